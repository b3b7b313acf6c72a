"""Checkpoints as they are published, told apart by their `config.json`: OpenVLA's and OpenVLA-OFT's, and QueST's."""

from __future__ import annotations

from pathlib import Path

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.action_tokens import ActionNormalizer
from vlarl_ray.models.openvla_checkpoint import (
    OfficialPolicy,
    is_openvla,
    openvla_weights,
    read_openvla,
    require_uncontradicted,
)
from vlarl_ray.models.quest_checkpoint import is_quest, quest_weights, read_quest, require_table
from vlarl_ray.models.weight_files import WeightFiles


def is_official(folder: Path) -> bool:
    """Whether a folder is a checkpoint in a published layout, going by its `config.json` alone."""
    return is_openvla(folder) or is_quest(folder)


def read_official(folder: Path, wanted: ModelConfig, *, unnorm_key: str | None = None) -> OfficialPolicy:
    """Read what the files of a checkpoint folder say.

    Args:
        folder: As published, its weights in safetensors.
        wanted: What the files leave open is taken from here, see `read_openvla`; of QueST that is the value head. What
            they do say must not contradict it.
        unnorm_key: Dataset whose statistics to take; may be left out where there is one. QueST has none.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the files contradict each other or `wanted`, are of a model that is none of ours, or pickles.
    """
    return (_read_quest if is_quest(folder) else read_openvla)(folder, wanted, unnorm_key=unnorm_key)


def official_weights(folder: Path, model: ModelConfig) -> WeightFiles:
    """Find the tensors of a checkpoint folder that a model of this config has."""
    return quest_weights(folder) if model.architecture == "quest" else openvla_weights(folder, model)


def _read_quest(folder: Path, wanted: ModelConfig, *, unnorm_key: str | None) -> OfficialPolicy:
    if unnorm_key is not None:
        raise ValueError(
            f"unnorm_key = {unnorm_key!r}: QueST checkpoints have no action statistics, their actions are env actions; "
            "leave it out."
        )
    checkpoint = read_quest(folder, value_hidden_sizes=wanted.value_hidden_sizes)
    require_table(checkpoint)
    settled = ["architecture", "image_size", "action_dim", "chunk_length", "proprio_dim", "quest"]
    settled += ["value_hidden_sizes"] if any(name.startswith("value_head.") for name in checkpoint.weights) else []
    require_uncontradicted(wanted, {name: getattr(checkpoint.model, name) for name in settled}, folder)
    return OfficialPolicy(
        model=checkpoint.model,
        normalizer=ActionNormalizer.identity(checkpoint.model.action_dim),
        proprio_normalizer=None,
        tokenizer=None,
        weights=checkpoint.weights,
        metadata={"instructions": list(checkpoint.instructions), "official": {"config": checkpoint.config}},
    )
