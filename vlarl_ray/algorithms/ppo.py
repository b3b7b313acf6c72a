"""Proximal policy optimisation over action chunks: GAE per episode, clipped surrogate, clipped value loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from vlarl_ray.algorithms.advantages import chunk_rewards, gae
from vlarl_ray.algorithms.base import LossRows, LossTerms, Normalizers
from vlarl_ray.algorithms.batch import build_batch, flatten_groups
from vlarl_ray.algorithms.losses import value_loss
from vlarl_ray.algorithms.policy_loss import PolicyGradient, policy_terms
from vlarl_ray.types import Scores, TrainBatch, Trajectory, TrajectoryGroup


class PPO(PolicyGradient):
    """PPO with a learned critic; groups play no role, every episode stands for itself.

    Source:
        Schulman et al. 2017 (arXiv:1707.06347); on action tokens: VLA-RL (arXiv:2505.18719).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    def make_batch(self, groups: Sequence[TrajectoryGroup], scores: Sequence[Scores], *, version: int) -> TrainBatch:
        """Compute advantages and value targets, one row per decision. `scores` holds one entry per trajectory."""
        trajectories = flatten_groups(groups, scores)
        estimates = [self._estimate(t, s) for t, s in zip(trajectories, scores, strict=True)]
        advantages, returns = zip(*estimates, strict=True)
        return build_batch(
            self.cfg,
            trajectories,
            scores,
            advantages=advantages,
            returns=returns,
            normalize=self.cfg.normalize_advantages is not False,
            version=version,
        )

    def loss(self, rows: LossRows, normalizers: Normalizers) -> LossTerms:
        """Compute this share of policy and value loss."""
        cfg = self.cfg
        policy = policy_terms(cfg, rows, normalizers)
        value = value_loss(
            rows.values,
            rows.old_values,
            rows.returns,
            (rows.weights > 0) & rows.token_mask.any(-1),
            clip=cfg.value_clip,
            shape=cfg.value_loss,
            huber_delta=cfg.huber_delta,
            normalizer=normalizers.rows,
        )
        return LossTerms(
            policy=policy.loss,
            value=cfg.value_loss_coef * value,
            sums={**policy.sums, "value_error": value.detach()},
            maxima=policy.maxima,
        )

    def _estimate(self, trajectory: Trajectory, score: Scores) -> tuple[np.ndarray, np.ndarray]:
        if score.values is None:
            raise ValueError("PPO needs values of every observation; score the trajectories with the learner first.")
        cfg = self.cfg
        steps = trajectory.num_env_steps
        return gae(
            chunk_rewards(trajectory.rewards, steps, cfg.gamma, cfg.discount_mode),
            score.values,
            terminated=trajectory.terminated,
            gamma=cfg.gamma,
            gae_lambda=cfg.gae_lambda,
            num_env_steps=steps,
            discount_mode=cfg.discount_mode,
        )
