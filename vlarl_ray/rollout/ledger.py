"""Exactly-once accounting of episodes: every slot of an iteration is filled once, by whichever result comes first.

tasks ─► EpisodePool (workers) ─► results in any order ─► ledger by identity ─► trajectories in slot order
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vlarl_ray.rollout.env_worker import EnvWorker
from vlarl_ray.rollout.episode import EpisodeFailure
from vlarl_ray.rollout.groups import GroupIntake, GroupRule
from vlarl_ray.types import TaskSpec, Trajectory, TrajectoryGroup

_LOG = logging.getLogger(__name__)

Identity = tuple[str, int, int]

_RATE_STEP = 0.02
"""Weight of one group in the running accept rate, which decides how many groups to start ahead."""


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
        """Abandon what is running; nothing of it comes back."""
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
        """Abandon every episode."""
        self._worker.cancel_all()


@dataclass
class LedgerCounters:
    """What happened besides success, over the whole run."""

    dispatched: int = 0
    completed: int = 0
    redone: int = 0
    cancelled: int = 0
    duplicates_dropped: int = 0


@dataclass
class _Run:
    """Episodes of one `take` or `run`, by identity (run, iteration, slot)."""

    waiting: deque[TaskSpec] = field(default_factory=deque)
    running: set[Identity] = field(default_factory=set)
    known: set[Identity] = field(default_factory=set)
    unfinished: set[Identity] = field(default_factory=set)
    results: dict[Identity, Trajectory] = field(default_factory=dict)
    failures: Counter[Identity] = field(default_factory=Counter)

    def add(self, tasks: Sequence[TaskSpec]) -> None:
        new = {task.identity for task in tasks}
        if len(new) != len(tasks) or new & self.known:
            raise ValueError("two tasks share one identity (run, iteration, slot).")
        self.waiting.extend(tasks)
        self.known |= new
        self.unfinished |= new


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
        self._accept_rate = 1.0

    def take(self, draws: Iterator[Sequence[TaskSpec]], rule: GroupRule) -> GroupIntake:
        """Run groups until enough are accepted, or enough were tried.

        Groups are judged in draw order, whatever order they finish in. While the last ones run, idle seats start on
        groups that may turn out to be needed; what is not needed in the end is cancelled, and counts for nothing.

        Args:
            draws: The episodes of each group; asked for no more groups than may be needed.
            rule: What to accept, and when to stop.

        Raises:
            PoisonTaskError: If one task fails `max_attempts` times.
        """
        intake = GroupIntake(rule)
        run = _Run()
        groups: deque[list[TaskSpec]] = deque()
        num_drawn = 0
        while not intake.is_done:
            while num_drawn - len(intake.attempted) < intake.num_worth_starting(self._accept_rate):
                groups.append(list(next(draws)))
                run.add(groups[-1])
                num_drawn += 1
            self._step(run)
            while groups and not intake.is_done and not any(t.identity in run.unfinished for t in groups[0]):
                # popped, so that the frames of a rejected group are freed here and now
                accepted = intake.offer(TrajectoryGroup(tuple(run.results.pop(t.identity) for t in groups.popleft())))
                self._accept_rate += _RATE_STEP * (accepted - self._accept_rate)
        if run.unfinished:
            self.counters.cancelled += len(run.running)
            self._pool.cancel_all()
        return intake

    def run(self, tasks: Sequence[TaskSpec]) -> list[Trajectory]:
        """Run each task once.

        Returns:
            One trajectory per task, in the order of `tasks`.

        Raises:
            PoisonTaskError: If one task fails `max_attempts` times.
        """
        run = _Run()
        run.add(tasks)
        while run.unfinished:
            self._step(run)
        return [run.results[task.identity] for task in tasks]

    def _step(self, run: _Run) -> None:
        """Fill the pool, and take in what ended."""
        while run.waiting and len(run.running) < self._pool.capacity:
            task = run.waiting.popleft()
            run.running.add(task.identity)
            self.counters.dispatched += 1
            self._pool.submit(task)
        for outcome in self._pool.collect():
            identity = outcome.task.identity
            run.running.discard(identity)
            if identity not in run.unfinished:
                self.counters.duplicates_dropped += 1
            elif isinstance(outcome, EpisodeFailure):
                run.failures[identity] += 1
                self._redo(outcome, run.failures[identity], run.waiting)
            else:
                run.unfinished.discard(identity)
                run.results[identity] = outcome
                self.counters.completed += 1
                if self.on_episode is not None:
                    self.on_episode(outcome)

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
