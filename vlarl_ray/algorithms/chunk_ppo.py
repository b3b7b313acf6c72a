"""Action-chunked PPO with self behaviour cloning: one ratio per chunk, and the policy's own best episodes cloned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlarl_ray.algorithms.demo_buffer import DemoBuffer, DemoDraw
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.algorithms.weight_schedules import WeightSchedule
from vlarl_ray.config import AlgorithmConfig
from vlarl_ray.types import DemoRows, Scores, StoredEpisode, TrainBatch, TrajectoryGroup

_SAMPLING_KEY = 0x5E1FBC
"""Keeps these draws apart from others made of the same numbers."""


class ChunkPPO(PPO):
    """PPO whose batches carry as many decisions to clone as they have rows; `algorithm.self_bc` says of which episodes.

    Source:
        AC-PPO + self-BC (arXiv:2509.25718).
    """

    def __init__(self, cfg: AlgorithmConfig) -> None:
        super().__init__(cfg)
        self.buffer = DemoBuffer(cfg.self_bc)
        self.schedule = WeightSchedule(cfg.self_bc)
        self._weights: tuple[float, float] | None = None

    def seed_demonstrations(self, episodes: Sequence[StoredEpisode]) -> None:
        """Put demonstrations into the buffer, before the first update."""
        self.buffer.seed(episodes)

    def make_batch(self, groups: Sequence[TrajectoryGroup], scores: Sequence[Scores], *, version: int) -> TrainBatch:
        """Offer the episodes to the buffer, then draw what to clone."""
        batch = super().make_batch(groups, scores, version=version)
        for group in groups:
            for trajectory in group.trajectories:
                self.buffer.offer(trajectory)
        policy_weight, bc_weight = self._weights = self.schedule.weights(version)
        batch = replace(batch, policy_weight=policy_weight)
        if not len(self.buffer) or bc_weight == 0:
            return batch
        drawn = self.buffer.sample(len(batch), np.random.default_rng([_SAMPLING_KEY, version]))
        return replace(batch, demos=demo_rows(drawn), bc_weight=bc_weight)

    def observe_update(self, losses: Mapping[str, float], *, success_rate: float) -> None:
        """Adapt the weights."""
        self.schedule.observe(success_rate=success_rate, losses=losses)

    def metrics(self) -> dict[str, float | None]:
        """State of the buffer, and the weights of the last update."""
        if self._weights is None:
            return self.buffer.metrics()
        policy_weight, bc_weight = self._weights
        return {**self.buffer.metrics(), "learn/policy_weight": policy_weight, "learn/bc_weight": bc_weight}

    @property
    def stored_episodes(self) -> Sequence[StoredEpisode]:
        """What the buffer holds."""
        return self.buffer.episodes

    def state_dict(self) -> dict[str, Any]:
        """Buffer and schedule."""
        return {"buffer": self.buffer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], episodes: Mapping[str, StoredEpisode]) -> None:
        """Restore buffer and schedule."""
        self.buffer.load_state_dict(state["buffer"], episodes)
        self.schedule.load_state_dict(state["schedule"])


def demo_rows(drawn: DemoDraw) -> DemoRows:
    """Gather drawn decisions into rows; an episode that was drawn more than once is referred to once."""
    used, index = np.unique(drawn.episode_index, return_inverse=True)
    episodes = [drawn.episodes[i] for i in used]
    counts = np.array([len(episode.num_env_steps) for episode in episodes])
    rows = (np.cumsum(counts) - counts)[index] + drawn.decision_index
    actions = np.concatenate([episode.actions for episode in episodes])
    steps = np.concatenate([episode.num_env_steps for episode in episodes])
    return DemoRows(
        frames=tuple(episode.frames for episode in episodes),
        instructions=tuple(episode.instruction for episode in episodes),
        episode_index=index.astype(np.int32),
        decision_index=drawn.decision_index.astype(np.int32),
        proprio=np.concatenate([episode.proprio for episode in episodes])[rows],
        actions=actions[rows],
        action_mask=np.arange(actions.shape[1])[None, :] < steps[rows, None],
    )
