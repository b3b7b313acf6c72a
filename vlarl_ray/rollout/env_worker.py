"""Runs episodes on a set of simulators, half of them stepping while the other half waits for actions.

    submit(task) ─► waiting ─► free seat ─┬─ half A: request in flight
                                          └─ half B: execute chunks, render, hand in finished episodes, refill

One `turn` serves one half: take its reply, step its simulators, give free seats the next tasks, send its next request.
A finished episode frees its seat in the same turn, so no simulator idles while tasks wait.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from vlarl_ray.envs.base import SimEnv
from vlarl_ray.rollout.episode import Episode, EpisodeFailure
from vlarl_ray.types import ActReply, ActRequest, TaskSpec, Trajectory

_LOG = logging.getLogger(__name__)


@runtime_checkable
class PolicyClient(Protocol):
    """What an env worker sees of an inference server."""

    def act(self, request: ActRequest) -> Future[ActReply]:
        """Send a request; the future resolves to the reply."""
        ...


@dataclass
class _Seat:
    env: SimEnv | None = None
    episode: Episode | None = None


@dataclass
class _Half:
    seats: list[_Seat]
    asked: list[_Seat] = field(default_factory=list)
    reply: Future[ActReply] | None = None


class EnvWorker:
    """Owns simulators and runs the episodes it is given.

    Args:
        make_env: Builds one simulator; called at most once per seat, and again after a crash.
        client: Where action chunks come from.
        num_envs: Simulators; even.
        index: Number of this worker, recorded in its trajectories.
        deadline_s: Longest wait for a reply.
    """

    def __init__(
        self,
        make_env: Callable[[], SimEnv],
        client: PolicyClient,
        *,
        num_envs: int,
        index: int = 0,
        deadline_s: float = 60.0,
    ) -> None:
        if num_envs < 2 or num_envs % 2:
            raise ValueError(f"rollout.envs_per_worker = {num_envs}: must be even and >= 2, as halves take turns.")
        self._make_env = make_env
        self._client = client
        self._index = index
        self._deadline_s = deadline_s
        self._halves = [_Half([_Seat() for _ in range(num_envs // 2)]) for _ in range(2)]
        self._turn = 0
        self._waiting: deque[TaskSpec] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not any(seat.episode for half in self._halves for seat in half.seats)

    def submit(self, task: TaskSpec) -> None:
        """Queue one episode."""
        self._waiting.append(task)

    def turn(self) -> list[Trajectory | EpisodeFailure]:
        """Serve one half; returns the episodes that ended."""
        half = self._halves[self._turn]
        self._turn = 1 - self._turn
        ended = self._execute_reply(half)
        ended += self._fill_seats(half)
        self._send_request(half)
        return ended

    def cancel_all(self) -> None:
        """Abandon every episode; a reply still to come is not waited for."""
        self._waiting.clear()
        for half in self._halves:
            half.asked, half.reply = [], None
            for seat in half.seats:
                seat.episode = None

    def close(self) -> None:
        """Close every simulator."""
        for half in self._halves:
            for seat in half.seats:
                if seat.env is not None:
                    seat.env.close()
                seat.env = seat.episode = None

    def _execute_reply(self, half: _Half) -> list[Trajectory | EpisodeFailure]:
        if half.reply is None:
            return []
        reply = half.reply.result(timeout=self._deadline_s)
        asked, half.asked, half.reply = half.asked, [], None
        share = reply.inference_cpu_s / len(asked)
        ended: list[Trajectory | EpisodeFailure] = []
        for row, seat in enumerate(asked):
            episode = seat.episode
            assert episode is not None
            try:
                episode.execute(
                    reply.actions[row],
                    reply.tokens[row],
                    reply.logprobs[row],
                    policy_version=reply.policy_version,
                    inference_cpu_s=share,
                    tokens_of_chunk=reply.tokens_of_chunk,
                )
            except Exception as error:  # noqa: BLE001 - a simulator may raise anything; it costs one episode, not the run
                ended.append(self._fail(seat, episode.task, error))
                continue
            if episode.is_over:
                ended.append(episode.record(self._index))
                seat.episode = None
        return ended

    def _fill_seats(self, half: _Half) -> list[Trajectory | EpisodeFailure]:
        failures: list[Trajectory | EpisodeFailure] = []
        busy = [sum(seat.episode is not None for seat in each.seats) for each in self._halves]
        # Both halves must be busy for them to overlap, so a few last tasks are shared out evenly.
        share = -(-(sum(busy) + len(self._waiting)) // 2)
        room = share - busy[self._halves.index(half)]
        for seat in half.seats:
            if room <= 0 or not self._waiting:
                break
            if seat.episode is None:
                room -= 1
                task = self._waiting.popleft()
                try:
                    seat.env = seat.env or self._make_env()
                    seat.episode = Episode(seat.env, task)
                except Exception as error:  # noqa: BLE001 - as above
                    failures.append(self._fail(seat, task, error))
        return failures

    def _send_request(self, half: _Half) -> None:
        asked = [(seat, seat.episode) for seat in half.seats if seat.episode is not None]
        if not asked:
            return
        episodes = [episode for _, episode in asked]
        task = episodes[0].task
        # A worker is given tasks of one iteration (or one evaluation) at a time, so version and temperature agree.
        assert all(
            (e.task.policy_version, e.task.temperature) == (task.policy_version, task.temperature) for e in episodes
        )
        half.asked = [seat for seat, _ in asked]
        half.reply = self._client.act(
            ActRequest(
                images=np.stack([e.observation.images for e in episodes]),
                proprio=np.stack([e.observation.proprio for e in episodes]),
                instructions=tuple(e.observation.instruction for e in episodes),
                noise_keys=np.array([e.task.noise_key(e.num_decisions) for e in episodes], dtype=np.uint64),
                temperature=task.temperature,
                policy_version=task.policy_version,
                max_policy_lag=task.max_policy_lag,
            )
        )

    def _fail(self, seat: _Seat, task: TaskSpec, error: Exception) -> EpisodeFailure:
        _LOG.warning("worker %d: simulator failed in %s (slot %d): %s", self._index, task.task_id, task.slot, error)
        try:
            if seat.env is not None:
                seat.env.close()
        except Exception as close_error:  # noqa: BLE001 - a broken simulator may not close either
            _LOG.warning("worker %d: and did not close: %s", self._index, close_error)
        seat.env = seat.episode = None
        return EpisodeFailure(task, f"{type(error).__name__}: {error}", self._index)
