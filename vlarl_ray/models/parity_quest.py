"""Our QueST against a reference folder, array by array.

Logits are those given the reference's codes, over all outputs of the prior. Greedy codes are compared twice: the
sampler's own, which never leave the codebook, and the likeliest given the reference's codes before. Equal codes, and
equal actions of these, make actions equal from end to end. Log-probabilities are compared over all outputs, and where
these are the codebook's, also as learner and sampler give them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vlarl_ray.comparison import (
    Group,
    NotComparableError,
    NotCovered,
    Ours,
    Row,
    compare,
    missing,
    read_arrays,
    read_json,
)
from vlarl_ray.models.base import PolicyInputs
from vlarl_ray.models.distributions import ActionDistribution
from vlarl_ray.models.parity_checkpoint import as_tensor
from vlarl_ray.models.quest import QueST
from vlarl_ray.models.quest_checkpoint import UnsupportedVariantError, read_quest
from vlarl_ray.models.quest_official import load_quest_official

OUTSIDE = "the reference's likeliest output of the prior is no code; decoding is restricted to codes here"
_GREEDY, _LIKELIEST = "decoded from the codebook", "likeliest output, given the reference's codes before"
_LEARNER, _SAMPLER = "as the learner scores them", "as the sampler records them"
_Found = Iterator[tuple[str, Ours | NotCovered]]


def rows(folder: Path) -> list[Row]:
    """Compare everything in a QueST folder.

    Raises:
        FileNotFoundError: If a file of arrays is missing.
        ValueError: If one is damaged.
    """
    case = QuestReference(folder)
    with torch.no_grad():
        return [*case.listed_but_missing(), *compare(case.outputs, groups(case))]


def groups(case: QuestReference) -> list[Group]:
    """List what can be computed from a folder's inputs, with gradients off."""
    return [
        Group("conv_features|encoder_z|fsq_.+|codes|code_.+|reconstructed_.+", partial(_skills, case)),
        Group("decoded_random_indices", partial(_decoded, case)),
        Group("image_embedding_.+|lowdim_embedding_.+|context", partial(_encoded, case)),
        Group("prior_.+", partial(_scored, case)),
        Group(r"greedy_.+|top\d+_.+|ript_.+", partial(_greedy, case)),
    ]


class QuestReference:
    """Files of a reference folder; everything about its sizes is read from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = read_arrays(folder / "inputs.npz")
        self.outputs = read_arrays(folder / "outputs.npz")

    def listed_but_missing(self) -> list[Row]:
        """Fail for arrays that `meta.json` lists and the folder lacks."""
        meta = read_json(self.folder / "meta.json")
        return [
            *missing(meta.get("inputs"), self.inputs, file="inputs.npz"),
            *missing(meta.get("outputs"), self.outputs, file="outputs.npz"),
        ]

    @cached_property
    def model(self) -> QueST:
        """Our model with the checkpoint's weights.

        Raises:
            NotComparableError: If the checkpoint is of a variant that is not here.
        """
        try:
            size = read_quest(self.folder).model.quest.task_size
            # vectors come with the inputs, a row for each of theirs
            return load_quest_official(self.folder, instructions=(), task_embeddings=torch.zeros(0, size))
        except UnsupportedVariantError as error:
            raise NotComparableError(str(error)) from error

    def input(self, name: str) -> Tensor:
        """Give an array of `inputs.npz`: integers in 64 bit, others in fp32.

        Raises:
            NotComparableError: If it is not there.
        """
        if name not in self.inputs:
            raise NotComparableError(f"inputs.npz lacks {name}")
        array = as_tensor(self.inputs[name])
        return array.float() if array.is_floating_point() else array

    def output(self, name: str) -> Tensor | None:
        """Give an array of `outputs.npz`, to compute with, or None."""
        return as_tensor(self.outputs[name]) if name in self.outputs else None

    def frames(self, camera: str) -> UInt8[Tensor, "B H W 3"]:
        """Give one camera's frames.

        Raises:
            NotComparableError: If they are missing, not of 8 bit, or several to an observation.
        """
        frames = self._now(f"obs_{camera}", num_axes=4)
        if frames.is_floating_point():
            raise NotComparableError(f"obs_{camera} holds fractions; frames are of 8 bit here")
        return frames.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def lowdim(self, name: str) -> Float[Tensor, "B n"]:
        """Give one entry of proprioception.

        Raises:
            NotComparableError: As for frames.
        """
        return self._now(f"obs_{name}", num_axes=2).float()

    def observations(self) -> PolicyInputs:
        """Make the batch of all observations; the task vectors of its rows become the model's table."""
        quest = self.model.model_config.quest
        if quest.task_encoding == "vector":
            vectors = self.input("task_emb").flatten(1)
            self.model.task_embeddings = vectors
            task = torch.arange(len(vectors))
        else:
            task = self.input("task_id").flatten()
        images = [self.frames(camera) for camera in quest.cameras]
        proprio = [self.lowdim(name) for name, _ in quest.lowdim]
        return PolicyInputs(
            torch.stack(images, 1) if images else torch.zeros(len(task), 0, 1, 1, 3, dtype=torch.uint8),
            task[:, None],
            torch.ones(len(task), dtype=torch.int64),
            torch.cat(proprio, -1) if proprio else torch.zeros(len(task), 0),
        )

    def _now(self, name: str, *, num_axes: int) -> Tensor:
        """Take away an observation's axis of time."""
        array = self.input(name)
        if array.ndim == num_axes:
            return array
        if array.shape[1] != 1:
            raise NotComparableError(f"{name} has {array.shape[1]} frames to an observation; the model here reads one")
        return array[:, 0]


def _skills(case: QuestReference) -> _Found:
    """Encode actions and decode them again."""
    autoencoder, actions = case.model.autoencoder, case.input("actions")
    yield "conv_features", Ours(autoencoder.conv_block(autoencoder.action_proj(actions)))
    z = autoencoder.encode(actions)
    yield "encoder_z", Ours(z)
    projected = autoencoder.vq.project_in(z)
    yield "fsq_projected", Ours(projected)
    yield "fsq_bounded", Ours(autoencoder.vq.bound(projected))
    codes, indices = autoencoder.vq(z)
    yield "code_indices", Ours(indices)
    yield "code_levels", Ours(autoencoder.vq.level_indices(indices))
    yield "codes", Ours(codes)
    yield "reconstructed_actions", Ours(autoencoder(actions))


def _decoded(case: QuestReference) -> _Found:
    yield "decoded_random_indices", Ours(case.model.autoencoder.decode_indices(case.input("random_indices")))


def _encoded(case: QuestReference) -> _Found:
    """Encode observations part by part, and together."""
    model = case.model
    parts = [
        (f"image_embedding_{camera}", encoder, lambda camera=camera: model.pixels(case.frames(camera)))
        for camera, encoder in model.image_encoders.items()
    ] + [
        (f"lowdim_embedding_{entry}", encoder, lambda entry=entry: case.lowdim(entry))
        for entry, encoder in model.lowdim_encoders.items()
    ]
    for name, encoder, read in parts:
        try:
            embedding = encoder(read())
        except NotComparableError as error:  # the other parts are there all the same
            yield name, NotCovered(str(error))
            continue
        has_time_axis = name in case.outputs and case.outputs[name].ndim == 3
        yield name, Ours(embedding[:, None] if has_time_axis else embedding)
    yield "context", Ours(model.context(case.observations()))


def _scored(case: QuestReference) -> _Found:
    """Score the random codes."""
    inputs, codes = case.observations(), case.input("random_indices")
    actions, logits = prior(case.model, inputs, codes)
    yield "prior_logits", Ours(logits)
    logprobs = _logprobs(logits, codes)
    yield "prior_logprobs", Ours(logprobs)
    if _is_codebook(case.model, logits):
        yield "prior_logprobs", Ours(actions.log_prob(codes, temperature=1.0), detail=_LEARNER)
    yield "prior_nll", Ours(-logprobs.mean())


def _greedy(case: QuestReference) -> _Found:
    """Decode greedily, and score the reference's codes."""
    model, inputs = case.model, case.observations()
    own, sampled = model.sample(inputs, temperature=0.0, noise=None)
    stored = case.output("greedy_indices")
    codes = own if stored is None else stored
    is_covered = bool((codes < model.model_config.quest.codebook_size).all())
    yield "greedy_indices", Ours(own, detail=_GREEDY) if is_covered else NotCovered(OUTSIDE)
    actions, logits = prior(model, inputs, codes)
    yield "greedy_indices", Ours(logits.argmax(-1), detail=_LIKELIEST)
    yield "greedy_logits", Ours(logits)
    yield "greedy_actions", Ours(model.autoencoder.decode_indices(codes), detail="of the reference's codes")
    yield "ript_logprobs_of_greedy", Ours(_logprobs(logits, codes))
    if _is_codebook(model, logits):
        yield "ript_logprobs_of_greedy", Ours(actions.log_prob(codes, temperature=1.0), detail=_LEARNER)
        yield "ript_logprobs_of_greedy", Ours(sampled, detail=_SAMPLER)
    for name, array in case.outputs.items():
        match = re.fullmatch(r"top\d+_(indices|probs)", name)
        if match:  # published rollouts draw from these; here all codes can be drawn, but the logits are the same
            top = logits.topk(array.shape[-1], dim=-1)
            yield name, Ours(top.indices if match[1] == "indices" else top.values.softmax(-1))


def prior(
    model: QueST, inputs: PolicyInputs, codes: Int64[Tensor, "B L"]
) -> tuple[ActionDistribution, Float[Tensor, "B L V"]]:
    """Run the learner's pass.

    Returns:
        The distribution of codes, and the logits of all V outputs of the prior: also of those that are no code.
    """
    kept: list[Any] = []
    hook = model.output_layer.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        return model(inputs, codes).actions, kept[0]
    finally:
        hook.remove()


def _logprobs(logits: Float[Tensor, "B L V"], codes: Int64[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    return logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]


def _is_codebook(model: QueST, logits: Tensor) -> bool:
    """Whether every output of the prior is a code, so that the distribution here is the reference's."""
    return logits.shape[-1] == model.model_config.quest.codebook_size
