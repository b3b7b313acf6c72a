"""Our OpenVLA-OFT, in one pass and in RIPT-VLA's two, against a reference folder, array by array.

Un-normalised actions are compared twice: those of the reference's normalised actions, and end to end, with a model's
tolerance carried through the un-normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from vlarl_ray.comparison import MODEL_TOLERANCE, Group, NotComparableError, NotCovered, Ours, Row, compare, read_json
from vlarl_ray.config import ModelConfig, OFTConfig
from vlarl_ray.models.base import PolicyInputs
from vlarl_ray.models.openvla_oft import COMPONENTS, component_names
from vlarl_ray.models.parity_checkpoint import (
    IGNORED,
    ReferenceCheckpoint,
    gradient_rows,
    layer_states,
)
from vlarl_ray.models.parity_openvla import ACTION_TOLERANCE, GREEDY, OUTSIDE

_Found = Iterator[tuple[str, Ours | NotCovered]]
_UNCLIPPED = (-100.0, 100.0)
_END_TO_END, _GIVEN = "end to end", "of the reference's normalised actions"


def rows(folder: Path) -> list[Row]:
    """Compare everything in an OpenVLA-OFT folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the checkpoint is refused.
    """
    case = OFTReference(folder)
    given = {name: case.inputs[name] for name in ("proprio_normalized",) if name in case.inputs}
    with torch.no_grad():
        compared = compare({**case.outputs, **given}, groups(case))
    return [*case.listed_but_missing(), *compared, *gradient_rows(folder, partial(_loss, case), _own_name)]


def groups(case: OFTReference) -> list[Group]:
    """List what can be computed from a folder's inputs, with gradients off."""
    return [
        *(Group(rf"prompt{i}_discrete_.+", partial(_discrete, case, i)) for i in case.prompt_indices()),
        *(Group(rf"prompt{i}_.+", partial(_prompt, case, i)) for i in case.prompt_indices()),
        Group("patch_.+|projected_.+|proprio_normalized", partial(_visual, case)),
        Group("batch_.+", partial(_batch, case)),
        Group("ript_.+", partial(_ript, case)),
    ]


class OFTReference(ReferenceCheckpoint):
    """An OpenVLA-OFT folder; cameras are counted in its pixels, env steps in its config or arrays."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, wanted=ModelConfig(), metadata=read_json(folder / "meta.json"))
        self.wanted = ModelConfig(
            architecture="openvla_oft",
            chunk_length=self._chunk_length(),
            log_scale_range=_UNCLIPPED,
            oft=OFTConfig(
                num_cameras=self.pixels().shape[1] // 6,
                stop_token_id=int(self.tiny.get("stop_token_id", OFTConfig().stop_token_id)),
            ),
        )

    def _chunk_length(self) -> int:
        if "num_actions_chunk" in self.tiny:
            return int(self.tiny["num_actions_chunk"])
        arrays = {**self.outputs, **self.inputs}
        for name, array in arrays.items():
            if re.fullmatch(r"batch_actions|ript_mean|prompt\d+_(normalized_actions|discrete_tokens)", name):
                return array.shape[-2]
        raise ValueError(f"{self.folder}: nothing tells the length of a chunk; give tiny.num_actions_chunk.")

    def oft_model(
        self,
        index: int = 0,
        *,
        pixels: slice,
        passes: Literal["one", "two"] = "one",
        log_scale_range: tuple[float, float] = _UNCLIPPED,
    ) -> Any:
        """Build our model, with all heads there are, for rows of the reference's pixels."""
        config = self.policy(index).model
        oft = replace(config.oft, passes=passes)
        config = replace(config, oft=oft, log_scale_range=log_scale_range)
        return self.with_pixels(self.model(index, config=config), pixels)

    def token_model(self, index: int, *, pixels: slice) -> Any:
        """Build our model without heads, which reads no proprioception, as the reference's discrete arrays are made."""
        config = replace(self.policy(index).model, action_head="tokens", proprio_dim=0)
        return self.with_pixels(self.model(index, config=config), pixels)

    def proprio(self, rows: slice) -> Float[Tensor, "B P"] | None:
        """Give rows of proprioception, raw; None where the model reads none."""
        return self.input("proprio_raw")[rows] if self.policy().model.proprio_dim else None

    def prompt_inputs(self, index: int) -> PolicyInputs:
        """Make a batch of one prompt."""
        return self.policy_inputs([self.prompt_ids(index)], self.proprio(slice(index, index + 1)))

    def batch_inputs(self) -> PolicyInputs:
        """Make the training batch; of what follows a prompt only the number matters, as it becomes placeholders."""
        labels, ids = self.input("batch_labels"), self.input("batch_input_ids")
        expected = self.num_numbers + 1
        if not ((labels != IGNORED).sum(1) == expected).all():
            raise NotComparableError(f"batch_labels holds rows without {expected} labels: actions and stop token")
        lengths = (labels != IGNORED).int().argmax(1)
        prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        return self.policy_inputs(prompts, self.proprio(slice(len(ids))))

    def ript_inputs(self) -> PolicyInputs:
        """Make the batch that RIPT-VLA's arrays are of."""
        ids = self.with_trailing(self.input("ript_input_ids"), "ript_attention_mask")
        return self.policy_inputs(list(ids), self.proprio(slice(len(ids))))

    @property
    def num_numbers(self) -> int:
        """Of a chunk."""
        return self.policy().model.chunk_length * self.policy().model.action_dim

    def by_step(self, chunk: Tensor) -> Tensor:
        """Turn [..., K*D] into [..., K, D]."""
        return chunk.unflatten(-1, (-1, self.policy().model.action_dim))

    def end_to_end_tolerance(self, index: int = 0) -> float:
        """Give a model's tolerance as un-normalising widens it, never narrower."""
        statistics = self.policy(index).normalizer
        ends = zip(statistics.q01, statistics.q99, statistics.mask, strict=True)
        return MODEL_TOLERANCE * max([1.0, *(0.5 * abs(high - low) for low, high, used in ends if used)])


def _visual(case: OFTReference) -> _Found:
    pixels = case.pixels()
    every = slice(len(pixels))
    model = case.oft_model(pixels=every)
    per_camera = model.vision_backbone(pixels.unflatten(1, (-1, 6)).flatten(0, 1))
    features = per_camera.unflatten(0, (-1, model.num_cameras)).flatten(1, 2)
    yield "patch_features", Ours(features)
    yield "projected_patches", Ours(model.projector(features))
    if model.model_config.proprio_dim:
        inputs = case.policy_inputs([torch.ones(1)] * len(pixels), case.proprio(every))
        numbers = model.normalized_proprio(inputs)
        yield "proprio_normalized", Ours(numbers, ACTION_TOLERANCE, "of inputs.npz")
        yield "projected_proprio", Ours(model.proprio_projector(numbers.float()))


def _prompt(case: OFTReference, index: int) -> _Found:
    """Predict one chunk in a single pass."""
    model, inputs = case.oft_model(index, pixels=slice(index, index + 1)), case.prompt_inputs(index)
    name = f"prompt{index}_"
    embeddings = model._embed(inputs)
    yield name + "multimodal_embeddings", Ours(embeddings[0])
    lengths = torch.tensor([embeddings.shape[1]])
    for layer, state in enumerate(layer_states(model, embeddings, lengths=lengths)):
        yield f"{name}hidden_{layer}", Ours(state[0])
    yield name + "actions_hidden_states", Ours(model._hidden(inputs, model.num_action_tokens)[0])
    _require_head(model)
    actions = model(inputs).actions
    yield name + "normalized_actions", Ours(case.by_step(actions.location[0]))
    yield from _actions(case, name, model, inputs, index=index, rows=0)
    if model.model_config.action_head == "laplace":
        yield name + "log_b", Ours(case.by_step(actions.log_scale[0]))


def _actions(
    case: OFTReference, name: str, model: Any, inputs: PolicyInputs, *, index: int = 0, rows: int | slice
) -> _Found:
    """Un-normalise the reference's actions, and our own."""
    stored = case.output(name + ("mean" if name == "ript_" else "normalized_actions"))
    if stored is not None:
        yield name + "actions", Ours(model.normalizer.unnormalize(stored.double()), ACTION_TOLERANCE, _GIVEN)
    samples, _ = model.sample(inputs, temperature=0.0, noise=None)
    tolerance = case.end_to_end_tolerance(index)
    yield name + "actions", Ours(model.decode_actions(samples)[rows], tolerance, _END_TO_END)


def _discrete(case: OFTReference, index: int) -> _Found:
    """Decode tokens in parallel: ours out of the action bins, the reference's out of the whole vocabulary."""
    model = case.token_model(index, pixels=slice(index, index + 1))
    inputs, name = case.policy_inputs([case.prompt_ids(index)]), f"prompt{index}_discrete_"
    logits = model.language_model.lm_head(model._hidden(inputs, model.num_action_tokens))
    best = logits[0].topk(2)
    yield name + "margin", Ours(case.by_step(best.values[:, 0] - best.values[:, 1]))
    yield name + "tokens", Ours(case.by_step(best.indices[:, 0]), detail="likeliest of the vocabulary")
    own, _ = model.sample(inputs, temperature=0.0, noise=None)
    stored = case.output(name + "tokens")
    tokens = case.by_step(own[0]) if stored is None else stored
    is_covered = case.are_actions(tokens)
    yield name + "tokens", Ours(case.by_step(own[0]), detail=GREEDY) if is_covered else NotCovered(OUTSIDE)
    numbers = model.action_tokenizer.decode(tokens, clip=True).double()
    detail = "of the reference's tokens"
    yield name + "actions", Ours(model.normalizer.unnormalize(numbers), ACTION_TOLERANCE, detail)


def _batch(case: OFTReference) -> _Found:
    """Run the training pass over padded rows."""
    inputs, labels = case.batch_inputs(), case.input("batch_labels")
    model = case.oft_model(pixels=slice(len(labels)))
    count = model.num_action_tokens
    read = model._last_positions(inputs)[:, :count] - model.num_visual_tokens
    mask = torch.zeros(len(labels), labels.shape[1] - 1, dtype=torch.bool).scatter(1, read, value=True)
    yield "batch_action_mask", Ours(mask)
    yield "batch_actions_hidden_states", Ours(model._hidden(inputs, count))
    logits = model.language_model.lm_head(model._hidden(inputs, count + 1))
    targets = labels[labels != IGNORED].view(len(labels), -1)
    yield "batch_token_loss", Ours(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    _require_head(model)
    yield "batch_predicted_actions", Ours(case.by_step(model(inputs).actions.location))
    yield "batch_l1_loss", Ours(_loss(case)[0])


def _loss(case: OFTReference) -> tuple[Tensor, nn.Module]:
    """Give the absolute error of the training batch, with a graph where gradients are on."""
    inputs, actions = case.batch_inputs(), case.input("batch_actions")
    model = case.oft_model(pixels=slice(len(actions)))
    _require_head(model)
    return model(inputs).actions.mode_error(actions.flatten(1)).mean(), model


def _ript(case: OFTReference) -> _Found:
    """Predict and score in two passes."""
    inputs = case.ript_inputs()
    every = slice(len(inputs.prompt_ids))
    model = case.oft_model(pixels=every, passes="two")
    _require_head(model)
    actions = model(inputs).actions
    yield "ript_mean", Ours(case.by_step(actions.location))
    yield from _actions(case, "ript_", model, inputs, rows=every)
    single = case.oft_model(pixels=every)(inputs).actions.location
    yield "ript_rows_single_pass_mean", Ours(case.by_step(single))
    if model.model_config.action_head != "laplace":
        raise NotComparableError("the folder has no scale head")
    yield "ript_log_b", Ours(case.by_step(actions.log_scale))
    clipped = [name for name in case.outputs if name.startswith("ript_logprob_clip_")]
    yield "ript_logprob_of_mean", Ours(case.by_step(actions.log_prob(actions.location, temperature=1.0)))
    for name in clipped:
        limits = clip_range(name.removeprefix("ript_logprob_clip_"))
        if limits is None:
            yield name, NotCovered("its name does not tell the range of log-scales: write m2_p05 for -2 to 0.5")
            continue
        scored = case.oft_model(pixels=every, passes="two", log_scale_range=limits)(inputs).actions
        sample = case.input("ript_sample").flatten(1)
        yield name, Ours(case.by_step(scored.log_prob(sample, temperature=1.0)))


def clip_range(name: str) -> tuple[float, float] | None:
    """Read a range of log-scales from an array's name, where a leading zero stands for a decimal point behind it.

    Example:
        >>> clip_range("m2_p05"), clip_range("none"), clip_range("m15_0")
        ((-2.0, 0.5), (-100.0, 100.0), None)
    """
    if name == "none":
        return _UNCLIPPED
    ends = [re.fullmatch(r"([mp]?)(\d|0\d+)", part) for part in name.split("_")]
    if len(ends) != 2 or None in ends:
        return None
    low, high = (
        (-1 if end[1] == "m" else 1) * float(end[2] if len(end[2]) == 1 else f"0.{end[2][1:]}") for end in ends if end
    )
    return low, high


def _require_head(model: Any) -> None:
    if model.model_config.action_head == "tokens":
        raise NotComparableError("the folder has no action head")


def _own_name(name: str) -> str:
    """Give our name of `vla:<parameter>` or `<component>:<parameter>`."""
    component, _, bare = name.rpartition(":")
    return component_names(component, [bare])[bare] if component in COMPONENTS else bare
