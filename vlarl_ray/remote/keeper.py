"""Keeps inference servers alive: notices one that died, lost its engine or hangs, and gives the new one its weights.

health call to each server ─┬─ answered with a version ─► all is well
                            ├─ answered without one ────► give it the weights in force, verified like any publication
                            ├─ server or engine gone ───► (Ray restarts the actor) ─► asked again
                            └─ no answer in time ───────► killed, restarted by Ray ─► asked again
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from vlarl_ray.config import ClusterConfig
from vlarl_ray.inference.base import EngineLostError

_LOG = logging.getLogger(__name__)

_POLL_S = 0.5


def longest_start_s(cluster: ClusterConfig) -> float:
    """How long a server may take to start, on a slow machine and with a large model."""
    return max(300.0, cluster.placement_timeout_s)


@dataclass
class _Watched:
    server: Any
    asked: Any = None
    """Health call on its way."""
    since: float = 0.0
    """When it was sent."""
    is_starting: bool = True
    """Until the first answer after a start, which takes much longer than any other."""


class ServerKeeper:
    """Watches servers from the driver; `check` costs next to nothing while all is well.

    Args:
        servers: `InferenceServerActor` handles, whose actors Ray restarts.
        deadline_s: A server that does not answer for this long hangs.
        start_deadline_s: Longest start; a server that is not back by then ends the run.
    """

    def __init__(self, servers: Sequence[Any], *, deadline_s: float, start_deadline_s: float) -> None:
        self._watched = [_Watched(server) for server in servers]
        self._deadline_s = deadline_s
        self._start_deadline_s = start_deadline_s
        self._lock = threading.RLock()  # giving weights to a server may find it lost again
        self.republish: Callable[[int], None] | None = None
        """Gives a server the weights in force; None until there are some."""
        self.restarts = 0
        """Servers lost so far."""

    def wait_for_start(self) -> None:
        """Wait until every server has started, which takes longer than any answer later.

        Raises:
            RuntimeError: If one does not start.
        """
        with self._lock:
            for index, watched in enumerate(self._watched):
                self._wait_for_start(watched, index)

    def check(self) -> bool:
        """Take the answers that are there, send the next questions, and mend what is broken.

        Returns:
            Whether no server is known to be away: while one is, whoever needs it has reason to wait.

        Raises:
            RuntimeError: If a server does not come back.
        """
        with self._lock:
            for index, watched in enumerate(self._watched):
                if self._take_answer(watched, index) is None and not watched.is_starting and self.republish:
                    self.republish(index)
            return not any(watched.is_starting for watched in self._watched)

    def revive(self, index: int) -> None:
        """Wait until a server that failed answers again; it has no weights then.

        Raises:
            RuntimeError: If it does not come back.
        """
        with self._lock:
            watched = self._watched[index]
            if not watched.is_starting:  # else its loss is known, and its successor is on its way
                self._lose(watched, index, "failed in a publication")
                ray.kill(watched.server, no_restart=False)
            self._wait_for_start(watched, index)

    def _wait_for_start(self, watched: _Watched, index: int) -> None:
        while watched.is_starting:
            self._take_answer(watched, index)
            time.sleep(_POLL_S if watched.is_starting else 0.0)

    def _take_answer(self, watched: _Watched, index: int) -> int | None:
        """Return the version a server answers with; -1 where there is no news of it."""
        if watched.asked is None:
            watched.asked, watched.since = watched.server.health.remote(), watched.since or time.monotonic()
        waited = time.monotonic() - watched.since
        ready, _ = ray.wait([watched.asked], timeout=0)
        if not ready:
            if not watched.is_starting and waited > self._deadline_s:
                self._lose(watched, index, f"did not answer for {waited:.0f} s")
                ray.kill(watched.server, no_restart=False)
            self._check_start(watched, index, waited)
            return -1
        answer, watched.asked = watched.asked, None
        try:
            version: Any = ray.get(answer)
        except RayActorError as error:
            if error.actor_init_failed:  # Ray does not start it again, and it would fail again
                raise RuntimeError(f"inference server {index} cannot start: {error}") from error
            if not watched.is_starting:
                self._lose(watched, index, f"died ({type(error).__name__})")
            self._check_start(watched, index, waited)
            return -1
        except EngineLostError:
            self._lose(watched, index, "lost its engine")
            ray.kill(watched.server, no_restart=False)
            return -1
        watched.is_starting, watched.since = False, 0.0
        return version

    def _check_start(self, watched: _Watched, index: int, waited: float) -> None:
        if watched.is_starting and waited > self._start_deadline_s:
            raise RuntimeError(f"inference server {index} did not start within {waited:.0f} s; see its log.")

    def _lose(self, watched: _Watched, index: int, why: str) -> None:
        """Count a loss; the questions asked from now on go to the server's successor, which Ray starts."""
        self.restarts += 1
        _LOG.warning("inference server %d %s; restarting it", index, why)
        watched.asked, watched.since, watched.is_starting = None, time.monotonic(), True
