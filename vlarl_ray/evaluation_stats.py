"""Numbers of an evaluation from its episodes: success with its uncertainty, steps to success in both conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EpisodeOutcome:
    """What one evaluated episode contributes."""

    task_id: str
    success: bool
    """Success at any env step."""
    success_at_last_step: bool
    first_success_env_step: int | None
    """1-based; None without success."""


@dataclass(frozen=True)
class TaskResult:
    """One row of the results table."""

    task_id: str
    """`all` for the row over every episode."""
    episodes: int
    success_rate: float
    """Any-step success."""
    ci_low: float
    ci_high: float
    """95 % Wilson interval of `success_rate`."""
    last_step_success_rate: float
    steps_to_success: float | None
    """Mean first successful env step over successes; None without any."""
    steps_to_success_all: float
    """The same over all episodes, failures counted at the horizon."""


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Bound a success probability by the Wilson score interval.

    Args:
        successes: Episodes that succeeded.
        n: Episodes.
        z: Standard normal quantile; 1.96 is 95 %.

    Raises:
        ValueError: If n < 1 or successes is not in 0..n.

    Source:
        Wilson 1927.

    Example:
        >>> [round(x, 3) for x in wilson_interval(450, 500)]
        [0.871, 0.923]
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval needs n >= 1 and 0 <= successes <= n, got successes = {successes}, n = {n}.")
    rate = successes / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # exact ends: rounding must not leave 0/n a hair above 0, nor n/n a hair below 1
    return (0.0 if successes == 0 else center - half, 1.0 if successes == n else center + half)


def steps_to_success(first_success: Sequence[int | None], horizon: int) -> tuple[float | None, float]:
    """Average the first successful env step, in the field's two conventions.

    Args:
        first_success: 1-based env step of the first success of each episode; None for a failure.
        horizon: Env steps a failure counts as.

    Returns:
        Mean over successes (None without any), and mean over all episodes with failures at `horizon`.

    Raises:
        ValueError: If there is no episode, or a step is not in 1..horizon.

    Example:
        >>> steps_to_success([10, None, 30], 500)
        (20.0, 180.0)
    """
    if not first_success:
        raise ValueError("steps_to_success needs at least one episode.")
    steps = [step for step in first_success if step is not None]
    for step in steps:
        if not 1 <= step <= horizon:
            raise ValueError(f"first_success holds {step}, but env steps count from 1 to the horizon, {horizon}.")
    failures = len(first_success) - len(steps)
    mean_of_successes = float(np.mean(steps)) if steps else None
    return mean_of_successes, (sum(steps) + failures * horizon) / len(first_success)


def summarize(task_id: str, outcomes: Sequence[EpisodeOutcome], horizon: int) -> TaskResult:
    """Condense episodes into one row.

    Raises:
        ValueError: If there is no episode, or an outcome contradicts itself.
    """
    for outcome in outcomes:
        if outcome.success != (outcome.first_success_env_step is not None):
            raise ValueError(
                f"{outcome.task_id}: success = {outcome.success}, but first_success_env_step = "
                f"{outcome.first_success_env_step}; exactly the successful episodes have one."
            )
        if outcome.success_at_last_step and not outcome.success:
            raise ValueError(f"{outcome.task_id}: success at the last step is success, yet success = False.")
    over_successes, over_all = steps_to_success([o.first_success_env_step for o in outcomes], horizon)
    successes = sum(o.success for o in outcomes)
    low, high = wilson_interval(successes, len(outcomes))
    return TaskResult(
        task_id=task_id,
        episodes=len(outcomes),
        success_rate=successes / len(outcomes),
        ci_low=low,
        ci_high=high,
        last_step_success_rate=sum(o.success_at_last_step for o in outcomes) / len(outcomes),
        steps_to_success=over_successes,
        steps_to_success_all=over_all,
    )


def results_table(outcomes: Sequence[EpisodeOutcome], horizon: int) -> list[TaskResult]:
    """Build one row per task, in order of first appearance, and a last row `all` over every episode.

    Raises:
        ValueError: If there is no episode.
    """
    by_task: dict[str, list[EpisodeOutcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task_id, []).append(outcome)
    rows = [summarize(task_id, members, horizon) for task_id, members in by_task.items()]
    return [*rows, summarize("all", outcomes, horizon)]
