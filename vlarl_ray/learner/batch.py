"""Deal the rows of an update to ranks and micro-batches, and turn them into tensors.

All ranks compute the same permutation, so nothing is communicated:

    permutation(seed, version, epoch) -> minibatches -> rows[rank::R], padded to one length -> micro-batches
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor

from vlarl_ray.models.base import PolicyInputs, VLAModel
from vlarl_ray.models.distributions import Samples, samples_to_torch
from vlarl_ray.models.lora_dropout import RowSeeds, row_seeds
from vlarl_ray.types import DemoRows, FrameRef, TrainBatch, spread_mask

Fetch = Callable[[Sequence[FrameRef]], Sequence[Any]]
"""Resolves frame references to `u8[S+1, V, H, W, 3]` arrays: `Transport.fetch`."""


@dataclass(frozen=True)
class DealtRows:
    """The rows of one forward pass on one rank."""

    rows: Int[np.ndarray, " M"]
    """Indices into the batch; padding repeats a real row."""
    real: Bool[np.ndarray, " M"]
    """False for padding, which has weight 0."""
    dropout_seeds: RowSeeds | None = None
    """Of the adapters' dropout; None drops nothing."""

    def with_dropout(self, *, num_rows: int, seed: int, version: int, minibatch: int, is_cloning: bool) -> DealtRows:
        """Give each row its seed; arguments as of `row_seeds`."""
        options = {"seed": seed, "version": version, "minibatch": minibatch, "is_cloning": is_cloning}
        return replace(self, dropout_seeds=row_seeds(self.rows, num_rows=num_rows, **options))


def epoch_minibatches(
    num_rows: int, num_minibatches: int, *, seed: int, version: int, epoch: int
) -> list[Int[np.ndarray, " M"]]:
    """Cut a fresh permutation of all rows into minibatches of nearly equal size.

    The permutation depends on (seed, version, epoch) only: neither on the number of ranks nor on call history, and it
    differs between epochs and between updates.

    Args:
        num_rows: B.
        num_minibatches: Optimiser steps of an epoch; fewer where there are fewer rows.
        seed: Seed of the run.
        version: Version of the weights that are about to be updated.
        epoch: Pass over the batch, from 0.
    """
    key = np.array([seed & (1 << 64) - 1, version << 20 | epoch], dtype=np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(num_rows)
    return [part for part in np.array_split(order, num_minibatches) if len(part)]


def deal_rows(rows: Int[np.ndarray, " B"], *, rank: int, world_size: int, micro_batch_size: int) -> list[DealtRows]:
    """Give one rank its share of a minibatch, cut into micro-batches.

    Every rank gets as many micro-batches, of the same sizes: one that ran another number of passes would hang the
    others in a collective.

    Args:
        rows: The minibatch, the same on every rank; not empty.
        rank: This rank.
        world_size: Number of ranks R.
        micro_batch_size: Most rows of one pass.
    """
    share = -(-len(rows) // world_size)
    own = rows[rank::world_size]
    padding = np.repeat(own[-1:] if len(own) else rows[-1:], share - len(own))
    padded = np.concatenate([own, padding])
    real = np.arange(share) < len(own)
    num_passes = -(-share // micro_batch_size)
    parts = zip(np.array_split(padded, num_passes), np.array_split(real, num_passes), strict=True)
    return [DealtRows(*part) for part in parts]


def deal_trajectories(num_observations: Sequence[int], world_size: int) -> list[list[int]]:
    """Share whole trajectories among ranks, longest first to the least loaded, so that each is fetched by one rank.

    Args:
        num_observations: S+1 of each trajectory.
        world_size: Number of ranks.

    Returns:
        Ascending trajectory indices per rank.
    """
    loads = [0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(num_observations)), key=lambda i: (-num_observations[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += num_observations[index]
    return [sorted(share) for share in shares]


class PromptCache:
    """Encodes each instruction once."""

    def __init__(self, model: VLAModel) -> None:
        self._model = model
        self._encoded: dict[str, tuple[Int64[Tensor, "1 N"], Int64[Tensor, " 1"]]] = {}

    def encode(self, instructions: Sequence[str]) -> tuple[Int64[Tensor, "B N"], Int64[Tensor, " B"]]:
        """Return padded prompt ids and lengths, as `VLAModel.encode_prompts` does."""
        for instruction in instructions:
            if instruction not in self._encoded:
                self._encoded[instruction] = self._model.encode_prompts([instruction])
        ids, lengths = zip(*(self._encoded[instruction] for instruction in instructions), strict=True)
        return torch.cat(ids), torch.cat(lengths)


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward pass, on the learner's device."""

    inputs: PolicyInputs
    tokens: Samples
    token_mask: Bool[Tensor, "M L"]
    old_logprobs: Float[Tensor, "M L"]
    old_values: Float[Tensor, " M"]
    advantages: Float[Tensor, " M"]
    returns: Float[Tensor, " M"]
    weights: Float[Tensor, " M"]
    """0 for padding rows."""


@dataclass(frozen=True)
class CloneBatch:
    """Tensors of one cloning pass, on the learner's device."""

    inputs: PolicyInputs
    tokens: Samples
    mask: Bool[Tensor, "M L"]
    """False for padding rows, and for tokens behind the end of an episode."""


class DemoReader:
    """Reads rows to clone; the model turns their actions into tokens.

    Args:
        demos: What to clone.
        rows: All rows that will be asked for; only their episodes are fetched, each once.
        fetch: Resolves frame references.
        prompts: Prompt encoder.
        model: Encodes actions.
        device: Where tensors go.
    """

    def __init__(
        self,
        demos: DemoRows,
        rows: Int[np.ndarray, " M"],
        fetch: Fetch,
        prompts: PromptCache,
        model: VLAModel,
        device: torch.device,
    ) -> None:
        needed = np.unique(demos.episode_index[rows]).tolist()
        self._frames: Mapping[int, np.ndarray] = dict(
            zip(needed, fetch([demos.frames[i] for i in needed]), strict=True)
        )
        self._demos = demos
        self._prompts = prompts
        self._model = model
        self._device = device

    def read(self, dealt: DealtRows) -> CloneBatch:
        """Gather the rows of one pass."""
        demos, rows = self._demos, dealt.rows
        episodes = demos.episode_index[rows].tolist()
        frames = stack_frames(self._frames, episodes, demos.decision_index[rows].tolist())
        ids, lengths = self._prompts.encode([demos.instructions[i] for i in episodes])
        inputs = PolicyInputs(torch.from_numpy(frames), ids, lengths, torch.from_numpy(demos.proprio[rows]))
        model, executed = self._model, demos.action_mask[rows]
        mask = spread_mask(executed & dealt.real[:, None], model.num_action_tokens, of_chunk=model.tokens_of_chunk)
        # Behind the end of an episode the last action is repeated, as in demonstrations: a skill is coded as a whole.
        last = np.maximum(executed.sum(axis=1, keepdims=True) - 1, 0)
        kept = np.minimum(np.arange(executed.shape[1]), last)
        actions = np.take_along_axis(demos.actions[rows], kept[..., None], axis=1)
        return CloneBatch(
            inputs=inputs.to(self._device),
            tokens=model.encode_actions(torch.from_numpy(actions)).to(self._device),
            mask=torch.from_numpy(mask).to(self._device),
        )


class BatchReader:
    """Reads micro-batches of one `TrainBatch`; frames stay uint8 numpy views until their pass.

    Args:
        batch: The batch.
        rows: All rows that will be asked for; only their trajectories are fetched, each once.
        fetch: Resolves frame references.
        prompts: Prompt encoder.
        device: Where tensors go.
    """

    def __init__(
        self, batch: TrainBatch, rows: Int[np.ndarray, " M"], fetch: Fetch, prompts: PromptCache, device: torch.device
    ) -> None:
        needed = np.unique(batch.trajectory_index[rows]).tolist()
        self._frames: Mapping[int, np.ndarray] = dict(
            zip(needed, fetch([batch.frames[i] for i in needed]), strict=True)
        )
        self._batch = batch
        self._prompts = prompts
        self._device = device

    def read(self, dealt: DealtRows) -> MicroBatch:
        """Gather the rows of one pass."""
        batch, rows = self._batch, dealt.rows
        trajectories = batch.trajectory_index[rows].tolist()
        frames = stack_frames(self._frames, trajectories, batch.decision_index[rows].tolist())
        ids, lengths = self._prompts.encode([batch.instructions[i] for i in trajectories])
        inputs = PolicyInputs(torch.from_numpy(frames), ids, lengths, torch.from_numpy(batch.proprio[rows]))
        return MicroBatch(
            inputs=inputs.to(self._device),
            tokens=samples_to_torch(batch.action_tokens[rows]).to(self._device),
            token_mask=self._tensor(batch.token_mask[rows]),
            old_logprobs=self._tensor(batch.old_logprobs[rows]),
            old_values=self._tensor(batch.old_values[rows]),
            advantages=self._tensor(batch.advantages[rows]),
            returns=self._tensor(batch.returns[rows]),
            weights=self._tensor(np.where(dealt.real, batch.weights[rows], np.float32(0))),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def stack_frames(
    frames: Mapping[int, np.ndarray], trajectories: Sequence[int], decisions: Sequence[int]
) -> UInt8[np.ndarray, "M V H W 3"]:
    """Copy single frames out of per-trajectory arrays."""
    first = frames[trajectories[0]]
    stacked = np.empty((len(trajectories), *first.shape[1:]), np.uint8)
    for slot, (trajectory, decision) in enumerate(zip(trajectories, decisions, strict=True)):
        stacked[slot] = frames[trajectory][decision]
    return stacked
