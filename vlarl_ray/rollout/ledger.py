"""Exactly-once accounting of episodes: every slot of an iteration is filled once, by whichever result comes first.

tasks ─► EpisodePool (workers) ─► results in any order ─► ledger by identity ─► trajectories in slot order
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

from vlarl_ray.rollout.env_worker import EnvWorker
from vlarl_ray.rollout.episode import EpisodeFailure
from vlarl_ray.types import TaskSpec, Trajectory, TrajectoryGroup

_LOG = logging.getLogger(__name__)


class PoisonTaskError(RuntimeError):
    """A task failed so often that the fault is the task's, not a worker's."""


@runtime_checkable
class EpisodePool(Protocol):
    """Env workers, wherever they run."""

    capacity: int
    """Tasks that are worth having submitted at one time."""

    def submit(self, task: TaskSpec) -> None:
        """Give the task to a worker."""
        ...

    def collect(self) -> list[Trajectory | EpisodeFailure]:
        """Wait until something ended, and return it; episodes over their deadline come back as failures."""
        ...

    def cancel_all(self) -> None:
        """Forget what is running; late results are dropped."""
        ...


class InlinePool:
    """One env worker in this process."""

    def __init__(self, worker: EnvWorker, *, capacity: int) -> None:
        self._worker = worker
        self.capacity = capacity

    def submit(self, task: TaskSpec) -> None:
        """Queue the task."""
        self._worker.submit(task)

    def collect(self) -> list[Trajectory | EpisodeFailure]:
        """Take turns until an episode ends."""
        while not self._worker.is_idle:
            if ended := self._worker.turn():
                return ended
        raise RuntimeError("collect() was called with nothing submitted.")

    def cancel_all(self) -> None:
        """Nothing runs between calls."""


@dataclass
class LedgerCounters:
    """What happened besides success, over the whole run."""

    dispatched: int = 0
    completed: int = 0
    redone: int = 0
    duplicates_dropped: int = 0


class RolloutLedger:
    """Runs tasks to completion on a pool.

    Args:
        pool: The workers.
        max_attempts: Failures of one task that end the run.
        on_episode: Called for each first result (progress display).
    """

    def __init__(
        self,
        pool: EpisodePool,
        *,
        max_attempts: int,
        on_episode: Callable[[Trajectory], None] | None = None,
    ) -> None:
        self._pool = pool
        self._max_attempts = max_attempts
        self.on_episode = on_episode
        self.counters = LedgerCounters()

    def take(self, tasks: Sequence[TaskSpec]) -> list[TrajectoryGroup]:
        """Run the training tasks of one iteration; groups in group order, members in slot order."""
        trajectories = self.run(tasks)
        return [TrajectoryGroup(tuple(members)) for _, members in groupby(trajectories, key=lambda t: t.task.group_id)]

    def run(self, tasks: Sequence[TaskSpec]) -> list[Trajectory]:
        """Run each task once.

        Returns:
            One trajectory per task, in the order of `tasks`.

        Raises:
            PoisonTaskError: If one task fails `max_attempts` times.
        """
        waiting = deque(tasks)
        running: set[tuple[str, int, int]] = set()
        results: dict[tuple[str, int, int], Trajectory] = {}
        failures: Counter[tuple[str, int, int]] = Counter()
        wanted = {task.identity for task in tasks}
        if len(wanted) != len(tasks):
            raise ValueError("two tasks share one identity (run, iteration, slot).")
        while len(results) < len(tasks):
            while waiting and len(running) < self._pool.capacity:
                task = waiting.popleft()
                running.add(task.identity)
                self.counters.dispatched += 1
                self._pool.submit(task)
            for outcome in self._pool.collect():
                identity = outcome.task.identity
                running.discard(identity)
                if identity not in wanted or identity in results:
                    self.counters.duplicates_dropped += 1
                elif isinstance(outcome, EpisodeFailure):
                    failures[identity] += 1
                    self._redo(outcome, failures[identity], waiting)
                else:
                    results[identity] = outcome
                    self.counters.completed += 1
                    if self.on_episode is not None:
                        self.on_episode(outcome)
        return [results[task.identity] for task in tasks]

    def _redo(self, failure: EpisodeFailure, count: int, waiting: deque[TaskSpec]) -> None:
        if count >= self._max_attempts:
            self._pool.cancel_all()
            raise PoisonTaskError(
                f"{failure.task.task_id}, {failure.task.split} initial state {failure.task.init_state_id} "
                f"failed {count} times (rollout.max_attempts = {self._max_attempts}); last: {failure.reason}"
            )
        _LOG.warning("redoing slot %d of iteration %d: %s", failure.task.slot, failure.task.iteration, failure.reason)
        self.counters.redone += 1
        waiting.appendleft(failure.task)
