"""Which inference server gets a request: the least loaded of a few, asked just before."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

_OTHERS = 2
"""Servers asked beside the worker's own. Two draws are nearly as good as asking all (Mitzenmacher 2001)."""
_AVOID_S = 5.0
"""A server that failed is left alone for this long; it is being restarted, which takes longer."""


class LeastLoaded:
    """Chooses among servers for the requests of one env worker.

    Loads are asked for rather than remembered: with what earlier answers said, workers run in droves to a server that
    was free a moment ago, which is worse than never moving. Nothing is asked while the worker's own server, by its last
    word, has no more to do than this request. A request moves only where another server's queue is shorter even with
    it than the own one's without, so equal workers on equal servers stay near the server they share a node with.

    Args:
        num_servers: Servers there are.
        home: The worker's own.
        ask: Gives the rows in flight at each of some servers, infinity where there is no answer.
        clock: Seconds.
    """

    def __init__(
        self,
        num_servers: int,
        *,
        home: int,
        ask: Callable[[Sequence[int]], Sequence[float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home = home
        self._home_load = 0.0
        self._ask = ask
        self._clock = clock
        self._avoided_until = [float("-inf")] * num_servers
        self._random = random.Random(home)

    def pick(self, rows: int) -> int:
        """Choose a server for a request of `rows` rows."""
        candidates = self._candidates()
        at_home = candidates[0] == self._home
        if len(candidates) == 1 or (at_home and self._home_load <= rows):
            return candidates[0]
        loads = list(self._ask(candidates))
        if at_home:
            self._home_load = loads[0]
        return min(zip(candidates, loads, strict=True), key=lambda pair: pair[1] + rows * (pair[0] != self._home))[0]

    def answered(self, server: int, in_flight: int) -> None:
        """Note what a server said beside its answer: the rows that it still has in flight, of all workers."""
        if server == self._home:
            self._home_load = float(in_flight)

    def failed(self, server: int) -> None:
        """Note that a request was lost with its server."""
        self._avoided_until[server] = self._clock() + _AVOID_S

    def _candidates(self) -> list[int]:
        """The own server, where it lives, and a few others."""
        now, servers = self._clock(), range(len(self._avoided_until))
        usable = [server for server in servers if self._avoided_until[server] <= now] or list(servers)
        others = [server for server in usable if server != self._home]
        drawn = self._random.sample(others, min(_OTHERS, len(others)))
        return [self._home, *drawn] if self._home in usable else drawn
