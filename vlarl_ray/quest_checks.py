"""Checks within the `quest` section of a model config; loads no torch, so that a config is refused early."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vlarl_ray.config import ModelConfig
from vlarl_ray.preprocessing_config import PreprocessingConfig

_GROUPS = 8


def quest_problems(model: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Find contradictions between the sizes of a QueST model.

    Yields:
        Dotted paths of the fields compared, and a message: field, value, what is allowed, what to do.
    """
    yield from _multiples(model)
    yield from _skill(model)
    yield from _observation(model)
    if model.action_head != "tokens":
        message = f"model.action_head = {model.action_head}: quest acts in codes; set it to tokens."
        yield ("model.action_head", "model.architecture"), message


def _multiples(model: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    quest = model.quest
    wanted = [
        ("autoencoder_dim", _GROUPS, f"{_GROUPS}, the groups of its norms"),
        ("autoencoder_dim", quest.encoder_heads, f"model.quest.encoder_heads = {quest.encoder_heads}"),
        ("autoencoder_dim", quest.decoder_heads, f"model.quest.decoder_heads = {quest.decoder_heads}"),
        ("prior_dim", quest.prior_heads, f"model.quest.prior_heads = {quest.prior_heads}"),
        ("prior_dim", 2, "2, as positions are pairs of sine and cosine"),
        ("image_embed_dim", 2, "2, as features are pairs of coordinates"),
    ]
    for name, divisor, what in wanted:
        value = getattr(quest, name)
        if value % divisor:
            path, nearest = f"model.quest.{name}", max(divisor, round(value / divisor) * divisor)
            yield (path,), f"{path} = {value}: must be a multiple of {what}; set {nearest}, for instance."


def _skill(model: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    quest = model.quest
    kernels, strides = quest.conv_kernels, quest.conv_strides
    if len(kernels) != len(strides) or not kernels:
        advice = f"must hold as many entries as model.quest.conv_strides = {list(strides)}, and at least one"
        fields = ("model.quest.conv_kernels", "model.quest.conv_strides")
        yield fields, f"model.quest.conv_kernels = {list(kernels)}: {advice}; give one kernel per stride."
    factor = math.prod(strides)
    if quest.block_length % factor:
        advice = f"must be a multiple of {factor}, the product of model.quest.conv_strides"
        fields = ("model.quest.block_length", "model.quest.conv_strides")
        yield (
            fields,
            f"model.quest.block_length = {quest.block_length}: {advice}; set {factor * quest.num_codes or factor}.",
        )
    if model.chunk_length > quest.block_length:
        advice = f"a skill has only model.quest.block_length = {quest.block_length} actions; shorten the chunk"
        fields = ("model.chunk_length", "model.quest.block_length")
        yield fields, f"model.chunk_length = {model.chunk_length}: {advice}."
    if not quest.fsq_levels:
        yield (
            ("model.quest.fsq_levels",),
            "model.quest.fsq_levels = []: must hold at least one; QueST's are [8, 5, 5, 5].",
        )
    vocabulary = quest.prior_vocab_size
    if vocabulary is not None and vocabulary < quest.codebook_size:
        advice = f"must be at least {quest.codebook_size}, the product of model.quest.fsq_levels; leave it out for that"
        fields = ("model.quest.prior_vocab_size", "model.quest.fsq_levels")
        yield fields, f"model.quest.prior_vocab_size = {vocabulary}: {advice}."


def _observation(model: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    quest = model.quest
    if not quest.cameras and not quest.lowdim:
        fields = ("model.quest.cameras", "model.quest.lowdim")
        yield fields, "model.quest.cameras = []: the policy would see nothing; name a camera, or entries of lowdim."
    for path, names in (("cameras", quest.cameras), ("lowdim", tuple(name for name, _ in quest.lowdim))):
        if len(set(names)) < len(names) or any(not name or "." in name for name in names):
            advice = "must be different, and name parameters, so they have no dot in them; rename them"
            yield (f"model.quest.{path}",), f"model.quest.{path}: the names {list(names)} {advice}."
    if model.preprocessing != PreprocessingConfig():
        message = "model.preprocessing is not for quest, which resizes frames in its own way; leave it out."
        yield ("model.preprocessing", "model.architecture"), message
    total = sum(size for _, size in quest.lowdim)
    if total != model.proprio_dim:
        advice = f"must be {total}, the sum of the sizes in model.quest.lowdim; set it to that, or mend those"
        fields = ("model.proprio_dim", "model.quest.lowdim")
        yield fields, f"model.proprio_dim = {model.proprio_dim}: {advice}."
