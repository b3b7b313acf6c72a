"""Which task to draw next: success per task as a running estimate, and three ways to turn it into probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from vlarl_ray.types import TrajectoryGroup

CurriculumMode = Literal["uniform", "hardest", "frontier"]

_PRIOR = 0.5


def task_probabilities(
    success: Float[np.ndarray, " N"], mode: CurriculumMode, temperature: float
) -> Float[np.ndarray, " N"]:
    """Turn success estimates of N tasks into sampling probabilities.

    Args:
        success: Estimates in [0, 1].
        mode: `hardest` is proportional to exp((0.5 - s) / temperature), which falls with s; `frontier` to
            exp(-|0.5 - s| / temperature), which prefers tasks that are solved half of the time; `uniform` to 1.
        temperature: The smaller, the more pointed.

    Source:
        VLA-RL (arXiv:2505.18719): its formula is `hardest`, its prose describes `frontier`.

    Example:
        >>> task_probabilities(np.array([0.0, 0.5, 1.0]), "hardest", 1.0).round(4).tolist()
        [0.5065, 0.3072, 0.1863]
    """
    distance = 0.5 - np.asarray(success, np.float64)
    scores = {"uniform": np.zeros_like(distance), "hardest": distance, "frontier": -np.abs(distance)}[mode]
    weights = np.exp((scores - scores.max()) / temperature)
    return weights / weights.sum()


class Curriculum:
    """Keeps a success estimate per task: an exponential moving average over attempted groups, 0.5 before the first.

    Args:
        task_ids: Of the suite.
        mode: See `task_probabilities`.
        temperature: See `task_probabilities`.
        rate: Weight of a group's mean success in the average.
    """

    def __init__(
        self, task_ids: Sequence[str], *, mode: CurriculumMode = "uniform", temperature: float = 1.0, rate: float = 0.1
    ) -> None:
        self._task_ids = list(task_ids)
        self._mode: CurriculumMode = mode
        self._temperature = temperature
        self._rate = rate
        self.success = dict.fromkeys(self._task_ids, _PRIOR)

    @property
    def is_uniform(self) -> bool:
        """Whether the estimates are not used."""
        return self._mode == "uniform"

    def probabilities(self) -> Float[np.ndarray, " N"]:
        """Probability of each task, in the order of `task_ids`."""
        success = np.array([self.success[task] for task in self._task_ids])
        return task_probabilities(success, self._mode, self._temperature)

    def observe(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Move the estimates by every attempted group, in order: those that were rejected count as well."""
        for group in groups:
            task_id = group.trajectories[0].task.task_id
            mean = float(np.mean([trajectory.success for trajectory in group.trajectories]))
            self.success[task_id] += self._rate * (mean - self.success[task_id])

    def state_dict(self) -> dict[str, Any]:
        """The estimates."""
        return {"success": dict(self.success)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; tasks that are new keep the prior."""
        self.success.update({task: value for task, value in state["success"].items() if task in self.success})
