"""Critic-free policy gradient: an episode is judged by its return against those of its group, or of the whole batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from vlarl_ray.algorithms.base import LossRows, LossTerms, Normalizers
from vlarl_ray.algorithms.batch import build_batch, flatten_groups
from vlarl_ray.algorithms.policy_loss import PolicyGradient, policy_terms
from vlarl_ray.types import Scores, TrainBatch, TrajectoryGroup


class GroupRelative(PolicyGradient, ABC):
    """What RLOO and GRPO share: every decision of an episode has the episode's advantage; no values, no discount."""

    needs: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    @abstractmethod
    def advantages(self, returns: Float[np.ndarray, " G"]) -> Float[np.ndarray, " G"]:
        """Judge episodes that share a baseline by their undiscounted returns.

        Raises:
            ValueError: If there are fewer than two.
        """

    def make_batch(self, groups: Sequence[TrajectoryGroup], scores: Sequence[Scores], *, version: int) -> TrainBatch:
        """Compare episodes within `algorithm.baseline_scope`; one row per decision."""
        trajectories = flatten_groups(groups, scores)
        returns = [group.returns for group in groups]
        scopes = [np.concatenate(returns)] if self.cfg.baseline_scope == "batch" else returns
        per_episode = np.concatenate([self.advantages(scope) for scope in scopes])
        counts = [trajectory.num_decisions for trajectory in trajectories]
        return build_batch(
            self.cfg,
            trajectories,
            scores,
            advantages=[np.full(n, a, np.float32) for n, a in zip(counts, per_episode, strict=True)],
            returns=[np.zeros(n, np.float32) for n in counts],
            normalize=self.cfg.normalize_advantages is True,
            version=version,
        )

    def loss(self, rows: LossRows, normalizers: Normalizers) -> LossTerms:
        """Compute this share of the policy loss; there is no value loss."""
        policy = policy_terms(self.cfg, rows, normalizers)
        no_value = policy.loss.new_zeros(())
        return LossTerms(policy=policy.loss, value=no_value, sums=policy.sums, maxima=policy.maxima)
