"""Named sections of the main loop: how long they took, and how much CPU this process spent in them."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Accumulates wall and process-CPU seconds by section, until they are flushed into a row of metrics.

    Sections may nest; each counts all of its own time, inner sections included. A section that is entered again
    inside itself is counted once. For one thread.

    Example:
        >>> timer = Timer()
        >>> with timer("rollout"):
        ...     pass
        >>> sorted(timer.flush())
        ['time/rollout_driver_cpu_s', 'time/rollout_s']
    """

    def __init__(self) -> None:
        self._wall_s: defaultdict[str, float] = defaultdict(float)
        self._cpu_s: defaultdict[str, float] = defaultdict(float)
        self._depth: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent in the `with` block to section `name`, also if it raises."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._depth[name] += 1
        try:
            yield
        finally:
            self._depth[name] -= 1
            if self._depth[name] == 0:
                self._wall_s[name] += time.perf_counter() - wall
                self._cpu_s[name] += time.process_time() - cpu

    def flush(self) -> dict[str, float]:
        """Return what was measured since the last flush and start over; sections still open come with the next one.

        Returns:
            `time/<section>_s` (wall) and `time/<section>_driver_cpu_s` (CPU of this process), seconds.
        """
        measured = {f"time/{name}_s": seconds for name, seconds in self._wall_s.items()}
        measured |= {f"time/{name}_driver_cpu_s": seconds for name, seconds in self._cpu_s.items()}
        self._wall_s.clear()
        self._cpu_s.clear()
        return measured
