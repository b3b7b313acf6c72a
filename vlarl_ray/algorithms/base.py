"""The border between an algorithm and everything else: numbers in, numbers out, and one pure loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from vlarl_ray.types import Scores, TrainBatch, TrajectoryGroup


@dataclass(frozen=True)
class LossRows:
    """The rows of one micro-batch, as tensors on the learner's device. L tokens are K actions of D tokens, step-major."""

    logprobs: Float[Tensor, "B L"]
    """Of the taken tokens under the current weights (differentiable)."""
    entropy: Float[Tensor, "B L"]
    """Of the token distributions under the current weights (differentiable)."""
    values: Float[Tensor, " B"]
    """Current values (differentiable)."""
    reference_logprobs: Float[Tensor, "B L"] | None
    """Under the reference policy; only where the algorithm's `needs_reference` says so."""
    old_logprobs: Float[Tensor, "B L"]
    old_values: Float[Tensor, " B"]
    advantages: Float[Tensor, " B"]
    returns: Float[Tensor, " B"]
    token_mask: Bool[Tensor, "B L"]
    weights: Float[Tensor, " B"]
    """0 for padding rows; also carries the length normalisation (see `TrainBatch`)."""
    num_actions: int
    """K."""


@dataclass(frozen=True)
class Normalizers:
    """Global denominators of one minibatch, over all ranks: a loss is a masked sum divided by these."""

    ratios: float
    """Weighted number of ratios (tokens, actions or chunks, by `ratio_level`)."""
    tokens: float
    """Weighted number of executed tokens."""
    rows: float
    """Number of real rows."""


@dataclass(frozen=True)
class LossTerms:
    """Loss of one micro-batch (this rank's share) and what to report; every statistic is a sum to be divided globally."""

    policy: Tensor
    """Scalar: policy terms (surrogate, entropy, KL)."""
    value: Tensor
    """Scalar: value loss, coefficient included."""
    sums: Mapping[str, Tensor]
    """Detached scalars to be summed over micro-batches and ranks, named `<metric>`; divided by `denominators[metric]`."""
    maxima: Mapping[str, Tensor]
    """Detached scalars to be maximised over micro-batches and ranks."""


class Algorithm(Protocol):
    """`make_batch` runs on the driver and is numpy only; `loss` runs on the ranks and is pure."""

    needs: ClassVar[frozenset[str]]
    """Which of `values`, `logprobs` the learner must score before `make_batch`."""

    def make_batch(self, groups: Sequence[TrajectoryGroup], scores: Sequence[Scores], *, version: int) -> TrainBatch:
        """Compute advantages, value targets and masks. `scores` holds one entry per trajectory, in order."""
        ...

    def normalizers(self, batch: TrainBatch, rows: Any) -> Normalizers:
        """Denominators of the minibatch made of `rows` (an index array into `batch`)."""
        ...

    def loss(self, rows: LossRows, normalizers: Normalizers) -> LossTerms:
        """Compute the loss share of some rows. No state is read or written."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State to checkpoint (JSON types)."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        ...
