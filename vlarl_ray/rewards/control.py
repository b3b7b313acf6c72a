"""Negative control: rewards that carry no information."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlarl_ray.types import Trajectory, TrajectoryGroup


def shuffle_rewards(groups: Sequence[TrajectoryGroup], *, seed: int, iteration: int) -> list[TrajectoryGroup]:
    """Permute episode returns among all episodes of an iteration (F76).

    Each return is paid at the last executed env step, and every episode counts as terminated, so that the bootstrap
    does not tell success from failure. Use it without a discount (gamma 1): successes end
    early, and would be worth more.

    Args:
        groups: The iteration's groups.
        seed: Seed of the run.
        iteration: Number of the iteration.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    order = np.random.default_rng([seed, iteration, 0x5EED]).permutation(len(trajectories))
    paid = iter([trajectories[i].episode_return for i in order])
    return [TrajectoryGroup(tuple(_pay(t, next(paid)) for t in group.trajectories)) for group in groups]


def _pay(trajectory: Trajectory, episode_return: float) -> Trajectory:
    rewards = np.zeros_like(trajectory.rewards)
    rewards[-1, trajectory.num_env_steps[-1] - 1] = episode_return
    return replace(trajectory, rewards=rewards, terminated=True, truncated=False)
