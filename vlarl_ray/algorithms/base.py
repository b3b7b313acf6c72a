"""The border between an algorithm and everything else: numbers in, numbers out, and one pure loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from vlarl_ray.config import AlgorithmConfig
from vlarl_ray.types import Scores, StoredEpisode, TrainBatch, TrajectoryGroup


@dataclass(frozen=True)
class LossRows:
    """The rows of one micro-batch, as tensors on the learner's device.

    L tokens a row: K*D, step-major, or those of the chunk as a whole.
    """

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
    """0 for padding rows, else the length normalisation (`TrainBatch.weights`)."""
    num_actions: int
    """K."""
    policy_weight: float = 1.0
    """Weight of the surrogate; entropy bonus, KL penalty and value loss keep their own coefficients."""


@dataclass(frozen=True)
class Normalizers:
    """Global denominators of one minibatch, over all ranks: a loss is a masked sum divided by these."""

    ratios: float
    """Number of executed ratios (tokens, actions or chunks, by `ratio_level`)."""
    tokens: float
    """Number of executed tokens."""
    rows: float
    """Number of rows with an executed token."""


@dataclass(frozen=True)
class LossTerms:
    """Loss of one micro-batch and what to report; everything is divided by the global `Normalizers` already."""

    policy: Tensor
    """Scalar: policy terms (weighted surrogate, entropy, KL)."""
    value: Tensor
    """Scalar: value loss, coefficient included."""
    sums: Mapping[str, Tensor]
    """Detached scalars whose sum over micro-batches and ranks is the metric of that name."""
    maxima: Mapping[str, Tensor]
    """Detached scalars to be maximised over micro-batches and ranks."""


@runtime_checkable
class Algorithm(Protocol):
    """`make_batch` runs on the driver and is numpy only; `loss` runs on the ranks and is pure."""

    cfg: AlgorithmConfig
    """The learner reads the update's schedule from it: epochs, minibatches, KL limit, critic warm-up."""
    needs: ClassVar[frozenset[str]]
    """Which of `values`, `logprobs` the learner must score before `make_batch`; without `values` there is no critic."""

    @property
    def needs_reference(self) -> bool:
        """Whether `loss` reads `LossRows.reference_logprobs`."""
        ...

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether `loss` differentiates `LossRows.entropy`; otherwise it arrives detached."""
        ...

    def make_batch(self, groups: Sequence[TrajectoryGroup], scores: Sequence[Scores], *, version: int) -> TrainBatch:
        """Compute advantages, value targets and masks. `scores` holds one entry per trajectory, in order."""
        ...

    def normalizers(self, batch: TrainBatch, rows: Any) -> Normalizers:
        """Denominators of the minibatch made of `rows` (an index array into `batch`)."""
        ...

    def loss(self, rows: LossRows, normalizers: Normalizers) -> LossTerms:
        """Compute the loss share of some rows. No state is read or written."""
        ...

    def observe_update(self, losses: Mapping[str, float], *, success_rate: float) -> None:
        """Take note of an update's metrics (`learn/...`) and of the success rate of its attempted episodes."""
        ...

    def metrics(self) -> dict[str, float | None]:
        """Metrics of the algorithm's own state, for the row of the update."""
        ...

    @property
    def stored_episodes(self) -> Sequence[StoredEpisode]:
        """Episodes that must outlive the run; each is written to disk once."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State to checkpoint (JSON types)."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], episodes: Mapping[str, StoredEpisode]) -> None:
        """Restore `state_dict`, with the stored episodes by key."""
        ...


class Stateless:
    """The state of algorithms that keep nothing between updates."""

    def observe_update(self, losses: Mapping[str, float], *, success_rate: float) -> None:
        """Nothing adapts."""
        del losses, success_rate

    def metrics(self) -> dict[str, float | None]:
        """There is nothing to report."""
        return {}

    @property
    def stored_episodes(self) -> Sequence[StoredEpisode]:
        """None."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept between updates."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], episodes: Mapping[str, StoredEpisode]) -> None:
        """Accept the empty state."""
        del state, episodes
