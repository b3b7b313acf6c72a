"""Env workers as Ray actors: keeps their seats filled, notices deaths and hangs, never waits on one worker alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from vlarl_ray.rollout.episode import EpisodeFailure
from vlarl_ray.types import TaskSpec, Trajectory

_LOG = logging.getLogger(__name__)


_CHECK_S = 1.0
"""Between two looks at the servers."""


@dataclass(frozen=True)
class _Running:
    task: TaskSpec
    worker: int
    frames: Any


class RayPool:
    """Submits each task to the worker with the fewest, and collects what ends first.

    Args:
        workers: `EnvWorkerActor` handles.
        seats_per_worker: Simulators of each; a few more tasks are queued, so that a freed seat need not wait for the
            driver.
        deadline_s: A worker that has episodes and returns none for this long counts as hung: it is killed (Ray
            restarts it) and all its episodes come back as failures, to be redone.
        check_servers: Called now and then while waiting; says whether the servers are there. While one is not, and
            while this call mends one, the clock of `deadline_s` stands still: workers without a server return nothing.
    """

    def __init__(
        self,
        workers: Sequence[Any],
        *,
        seats_per_worker: int,
        deadline_s: float,
        check_servers: Callable[[], bool] | None = None,
    ) -> None:
        self._workers = list(workers)
        self._check_servers = check_servers
        self._checked = 0.0
        self._deadline_s = deadline_s
        self._per_worker = seats_per_worker + max(2, seats_per_worker // 4)
        self._running: dict[Any, _Running] = {}
        self._load = [0] * len(self._workers)
        self._last_sign = [0.0] * len(self._workers)
        self.capacity = self._per_worker * len(self._workers)

    def submit(self, task: TaskSpec) -> None:
        """Send the task to the least loaded worker."""
        worker = min(range(len(self._workers)), key=self._load.__getitem__)
        numbers, frames = self._workers[worker].run_episode.options(num_returns=2).remote(task)
        self._running[numbers] = _Running(task, worker, frames)
        if self._load[worker] == 0:
            self._last_sign[worker] = time.monotonic()
        self._load[worker] += 1

    def collect(self) -> list[Trajectory | EpisodeFailure]:
        """Wait for the next result, or the next deadline."""
        ready: list[Any] = []
        while not ready:
            if self._check_servers and time.monotonic() > self._checked + _CHECK_S:
                before, are_there = time.monotonic(), self._check_servers()
                self._checked = time.monotonic()
                took = self._checked - before
                self._last_sign = [sign + took if are_there else self._checked for sign in self._last_sign]
            oldest = min(self._last_sign[running.worker] for running in self._running.values())
            left = max(0.0, oldest + self._deadline_s - time.monotonic())
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=min(left, _CHECK_S))
            if not ready and left == 0.0:
                return self._kill_hung()
        more, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._take(reference) for reference in more]

    def cancel_all(self) -> None:
        """Tell the workers to abandon their episodes; the references go, results are never read."""
        for worker in {running.worker for running in self._running.values()}:
            self._workers[worker].cancel_all.remote()
        self._running.clear()
        self._load = [0] * len(self._workers)

    def _take(self, reference: Any) -> Trajectory | EpisodeFailure:
        running = self._running.pop(reference)
        self._load[running.worker] -= 1
        self._last_sign[running.worker] = time.monotonic()
        try:
            outcome: Any = ray.get(reference)
        except RayTaskError as error:
            # Not a simulator's failure (those come as values) but the worker's own, such as a server that refuses.
            raise RuntimeError(f"env worker {running.worker} failed: {error.cause}") from error
        except (RayActorError, RayError) as error:
            return EpisodeFailure(
                running.task, f"env worker {running.worker} died ({type(error).__name__})", running.worker
            )
        if isinstance(outcome, Trajectory):
            return replace(outcome, frames=running.frames)
        return outcome

    def _kill_hung(self) -> list[Trajectory | EpisodeFailure]:
        now = time.monotonic()
        hung = {r.worker for r in self._running.values() if now - self._last_sign[r.worker] >= self._deadline_s}
        failures: list[Trajectory | EpisodeFailure] = []
        for worker in hung:
            _LOG.warning("env worker %d: no result for %.0f s; restarting it", worker, self._deadline_s)
            ray.kill(self._workers[worker], no_restart=False)
        for reference, running in list(self._running.items()):
            if running.worker in hung:
                del self._running[reference]
                self._load[running.worker] -= 1
                failures.append(EpisodeFailure(running.task, f"env worker {running.worker} hung", running.worker))
        return failures
