"""Held-out evaluation: every task from every held-out initial state once, under the published weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlarl_ray.config import EvaluationConfig
from vlarl_ray.evaluation_results import EvaluationResult, summarize_evaluation
from vlarl_ray.report.video import EpisodeFilm, film_trajectory
from vlarl_ray.types import Trajectory

if TYPE_CHECKING:
    from vlarl_ray.train import System


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation leaves: figures, episodes and films of some starts."""

    result: EvaluationResult
    trajectories: Sequence[Trajectory]
    films: Sequence[EpisodeFilm]
    version: int


def evaluate(cfg: EvaluationConfig, system: System, *, version: int) -> Evaluation:
    """Run the evaluation on the system's own workers and servers; they must hold `version`."""
    trajectories = system.ledger.run(system.sampler.evaluation_tasks(cfg, version=version))
    filmed = [t for t in trajectories if t.task.init_state_id < cfg.videos_per_task]
    # The only frames a driver ever sees: a few episodes, for people to look at.
    frames = system.transport.fetch([t.frames for t in filmed])
    result = summarize_evaluation(
        trajectories, system.suite, task_ids=system.suite.task_ids, states_per_task=cfg.states_per_task
    )
    films = [film_trajectory(t, f) for t, f in zip(filmed, frames, strict=True)]
    return Evaluation(result, trajectories, films, version)
