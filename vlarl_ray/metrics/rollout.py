"""Turn the episodes of one iteration into the rollout, throughput and CPU-time metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from vlarl_ray.metrics.catalogue import MetricValue
from vlarl_ray.types import Trajectory


def summarize_rollout(trajectories: Sequence[Trajectory], wall_s: float) -> dict[str, MetricValue]:
    """Summarise all attempted episodes of an iteration, whether or not they are used for the update.

    Args:
        trajectories: Attempted episodes.
        wall_s: Wall time from the first request to the last result, seconds.

    Returns:
        Metrics by name (see `METRICS`); None where a metric is undefined, as steps to success without a success.

    Raises:
        ValueError: If there is no episode, or `wall_s` is not positive.
    """
    if not trajectories or wall_s <= 0:
        raise ValueError(
            f"a rollout needs >= 1 episode and a positive wall time, got {len(trajectories)} episodes in {wall_s} s; "
            "summarise after the episodes are there."
        )
    env_steps = sum(t.total_env_steps for t in trajectories)
    decisions = sum(t.num_decisions for t in trajectories)
    first = [t.first_success_env_step for t in trajectories if t.first_success_env_step is not None]
    metrics: dict[str, MetricValue] = {
        "rollout/num_episodes": len(trajectories),
        "rollout/num_decisions": decisions,
        "rollout/env_steps": env_steps,
        "rollout/success_rate": _mean([t.success for t in trajectories]),
        "rollout/last_step_success_rate": _mean([t.success_at_last_step for t in trajectories]),
        "rollout/episode_return": _mean([t.episode_return for t in trajectories]),
        "rollout/episode_env_steps": env_steps / len(trajectories),
        "rollout/steps_to_success": _mean(first) if first else None,
        "rollout/steps_to_success_all": _mean([_first_success_or_horizon(t) for t in trajectories]),
        "rollout/truncated_fraction": _mean([t.truncated for t in trajectories]),
        "throughput/env_steps_per_s": env_steps / wall_s,
        "throughput/decisions_per_s": decisions / wall_s,
        "throughput/episodes_per_s": len(trajectories) / wall_s,
    }
    return metrics | _success_by_task(trajectories) | _cpu_split(trajectories, decisions)


def _success_by_task(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    by_task: defaultdict[str, list[bool]] = defaultdict(list)
    for trajectory in trajectories:
        by_task[trajectory.task.task_id].append(trajectory.success)
    return {f"rollout/success_rate/{task}": _mean(successes) for task, successes in sorted(by_task.items())}


def _cpu_split(trajectories: Sequence[Trajectory], decisions: int) -> dict[str, float]:
    metrics = {}
    for part in ("reset", "physics", "render", "inference"):
        seconds = float(sum(getattr(t.timing, f"{part}_s") for t in trajectories))
        metrics[f"time/{part}_cpu_s"] = seconds
        metrics[f"time/{part}_cpu_ms_per_decision"] = 1e3 * seconds / decisions
    return metrics


def _first_success_or_horizon(trajectory: Trajectory) -> int:
    first = trajectory.first_success_env_step
    return trajectory.task.max_env_steps if first is None else first


def _mean(values: Sequence[float | int | bool]) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64)))
