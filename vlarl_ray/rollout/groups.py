"""Dynamic sampling: which groups an update learns from, and when an iteration has enough of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.types import TrajectoryGroup


@dataclass(frozen=True)
class GroupRule:
    """When to accept a group, how many are wanted and how many may be tried."""

    num_wanted: int
    """Accepted groups that end the iteration."""
    max_attempts: int
    """Attempted groups that end it too, so that it ends where nothing is ever accepted."""
    rejects_uniform: bool = False
    """Whether groups whose returns are all equal (no advantage, no gradient) are rejected."""
    min_success: float = 0.0
    max_success: float = 1.0
    """Accepted range of a group's mean success, bounds included; used with `rejects_uniform` only."""

    @classmethod
    def from_config(cls, cfg: ExperimentConfig) -> GroupRule:
        """Read `rollout` and `sampling`."""
        wanted, sampling = cfg.rollout.groups_per_update, cfg.sampling
        if not sampling.dynamic:
            return cls(num_wanted=wanted, max_attempts=wanted)
        return cls(
            num_wanted=math.ceil(wanted * sampling.early_stop_fraction),
            max_attempts=math.ceil(wanted * sampling.max_attempts_factor),
            rejects_uniform=True,
            min_success=sampling.min_success,
            max_success=sampling.max_success,
        )

    def accepts(self, group: TrajectoryGroup) -> bool:
        """Whether an update may learn from the group."""
        if not self.rejects_uniform:
            return True
        returns = group.returns
        mean = float(np.mean([trajectory.success for trajectory in group.trajectories]))
        return not bool(np.all(returns == returns[0])) and self.min_success <= mean <= self.max_success


@dataclass
class GroupIntake:
    """Judges finished groups in the order they were drawn, so that a run does not depend on who finishes first.

    A preference for groups that finish early would be one for short episodes.
    """

    rule: GroupRule
    accepted: list[TrajectoryGroup] = field(default_factory=list)
    attempted: list[TrajectoryGroup] = field(default_factory=list)
    """Every judged group; those that were drawn later than the last needed one are not judged, whatever they hold.

    A rejected group is kept for its numbers only: its frames are let go at once.
    """

    @property
    def is_done(self) -> bool:
        """Whether no further group will be judged."""
        return len(self.accepted) >= self.rule.num_wanted or len(self.attempted) >= self.rule.max_attempts

    def offer(self, group: TrajectoryGroup) -> bool:
        """Judge the next group of the draw order; returns whether it was accepted."""
        if self.is_done:
            raise ValueError("the iteration has its groups; nothing more is judged.")
        contexts = dict.fromkeys((t.task.task_id, t.task.split, t.task.init_state_id) for t in group.trajectories)
        named = " and ".join(f"{task} from {split} state {state}" for task, split, state in contexts)
        assert len(contexts) == 1, f"one group holds episodes of several contexts: {named}; they cannot be compared."
        accepts = self.rule.accepts(group)
        self.attempted.append(group if accepts else without_frames(group))
        if accepts:
            self.accepted.append(group)
        return accepts

    def num_worth_starting(self, accept_rate: float) -> int:
        """How many groups beyond the judged ones are likely to be needed. Decides about speed only, not about results.

        Args:
            accept_rate: Accepted / attempted so far, or in earlier iterations.
        """
        missing = self.rule.num_wanted - len(self.accepted)
        likely = math.ceil(missing / max(accept_rate, 1e-3))
        return min(likely, self.rule.max_attempts - len(self.attempted))


def without_frames(group: TrajectoryGroup) -> TrajectoryGroup:
    """Drop the references to frames, which frees them in the object store."""
    return TrajectoryGroup(tuple(replace(trajectory, frames=None) for trajectory in group.trajectories))


def accept_rates(intake: GroupIntake, task_ids: Sequence[str]) -> dict[str, float | None]:
    """Metrics: accepted / attempted groups, over all and per task (None for a task that was not drawn)."""

    def rate(task_id: str | None) -> float | None:
        counts = [
            sum(task_id in (None, group.trajectories[0].task.task_id) for group in groups)
            for groups in (intake.accepted, intake.attempted)
        ]
        return counts[0] / counts[1] if counts[1] else None

    per_task = {f"rollout/accept_rate/{task_id}": rate(task_id) for task_id in task_ids}
    return {
        "rollout/num_groups": float(len(intake.accepted)),
        "rollout/groups_attempted": float(len(intake.attempted)),
        "rollout/accept_rate": rate(None),
        **per_task,
    }
