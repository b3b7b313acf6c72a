"""What an engine that answers many requests at once needs: a gate for changes of weights, a meter of CPU time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil


class Gate:
    """Lets requests in while weights stand still; whoever closes it waits for those inside, and keeps others out."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_closed = False
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Context that many may be in at once, once the gate is open."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_closed)
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Context in which nobody else is inside, nor gets in."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._inside == 0)
            yield
        finally:
            async with self._changed:
                self._is_closed = False
                self._changed.notify_all()


class CpuMeter:
    """CPU time of this process and of the children it has when the meter is made."""

    def __init__(self) -> None:
        self._children = psutil.Process().children(recursive=True)
        self._last = self._total()
        self._lock = threading.Lock()

    def since_last(self) -> float:
        """Seconds since the last call: shares of concurrent replies are arbitrary, their sum is right."""
        with self._lock:
            now, before = self._total(), self._last
            self._last = now
            return now - before

    def _total(self) -> float:
        total = time.process_time()
        for child in self._children:
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total
