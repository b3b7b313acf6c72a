"""How an env worker reaches the inference servers: where there is least to do, and elsewhere if a server is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from vlarl_ray.inference.base import EngineLostError, NoWeightsError, split_request
from vlarl_ray.remote.routing import LeastLoaded
from vlarl_ray.types import ActReply, ActRequest

_LOG = logging.getLogger(__name__)

_INLINE_BYTES = 90_000
"""Bytes of frames in one argument of a call. Ray sends up to 100 KiB with the call; a larger argument goes through
the object store, which costs more CPU time than the rest of the call."""
_RETRY_S = 0.5
"""Between two attempts to get an answer while servers are being restarted."""
_LOAD_S = 0.05
"""Longest wait for servers' loads, a fraction of the time that an answer takes; who is silent counts as busy."""

_LOST = (RayActorError, NoWeightsError, EngineLostError)
"""A server that is away for a while."""


class RemoteClient:
    """Sends the requests of one env worker.

    Which server answers changes nothing: each holds the version asked for, and what is sampled depends on the
    request's noise keys alone.

    Args:
        servers: Handles of `InferenceServerActor`.
        home: Index of the server that is asked unless another has less to do.
    """

    def __init__(self, servers: Sequence[Any], *, home: int = 0) -> None:
        self._servers = list(servers)
        self._routing = LeastLoaded(len(self._servers), home=home, ask=self._ask_loads)

    def act(self, request: ActRequest) -> Future[ActReply]:
        """Send a request; Ray resolves the future from a thread of its own."""
        rows = _INLINE_BYTES // request.images[0].nbytes
        parts = split_request(request, rows) if rows else [request]
        return _Answer(lambda: self._send(parts, len(request)))

    def _send(self, parts: Sequence[ActRequest], rows: int) -> Future[tuple[ActReply, int]]:
        server = self._routing.pick(rows)
        sent = self._servers[server].act.remote(*parts).future()
        sent.add_done_callback(lambda done: self._note(server, done))
        return sent

    def _note(self, server: int, done: Future[tuple[ActReply, int]]) -> None:
        error = done.exception()
        if error is None:
            self._routing.answered(server, done.result()[1])
        elif isinstance(error, _LOST):
            self._routing.failed(server)

    def _ask_loads(self, servers: Sequence[int]) -> list[float]:
        calls = [self._servers[server].rows_in_flight.remote() for server in servers]
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=_LOAD_S)
        return [_load(call) if call in ready else float("inf") for call in calls]


def _load(call: Any) -> float:
    try:
        return float(ray.get(call))
    except RayError:  # it died; its requests will say so
        return float("inf")


class _Answer(Future):
    """An answer that is asked for again, of whichever server, while one is down or has no weights yet.

    Asking twice is safe: what is sampled depends on the request's noise keys alone.
    """

    def __init__(self, send: Callable[[], Future[tuple[ActReply, int]]]) -> None:
        super().__init__()
        self._send = send
        self._sent = send()

    def result(self, timeout: float | None = None) -> ActReply:
        """Wait for the answer, of whichever attempt, for `timeout` seconds in all."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                reply, _ = self._sent.result(None if timeout is None else max(0.0, left))
                return reply
            except _LOST as error:
                if left <= _RETRY_S:
                    raise
                _LOG.warning("no answer (%s); asking again", type(error).__name__)
                time.sleep(_RETRY_S)
                self._sent = self._send()
