"""What lower layers need of a cluster: call a method elsewhere, wait for it, share a large value by reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, runtime_checkable

Result = TypeVar("Result")


@runtime_checkable
class Transport(Protocol):
    """Implemented by Ray in `remote/` and by `LocalTransport` in one process."""

    def call(self, target: Any, method: str, *args: Any) -> Any:
        """Start `target.method(*args)`; returns a handle at once. Handles may be arguments of further calls."""
        ...

    def get(self, handles: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
        """Wait for all results, in order.

        Raises:
            TimeoutError: After `timeout_s`, naming `what`.
        """
        ...

    def put(self, value: Any) -> Any:
        """Store a value once and return a reference to it."""
        ...

    def background(self, work: Callable[[], Result]) -> Future[Result]:
        """Run driver code beside what the caller goes on to do, where there is something to run it beside."""
        ...

    def fetch(self, references: Sequence[Any]) -> list[Any]:
        """Resolve references to (read-only) values; each is copied at most once per node."""
        ...


class LocalTransport:
    """Everything in this process: a call runs at once, a reference is the value itself."""

    def call(self, target: Any, method: str, *args: Any) -> Any:
        """Run `target.method(*args)` now; the handle is its result."""
        return getattr(target, method)(*args)

    def get(self, handles: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
        """Return the results; they are there already."""
        return list(handles)

    def put(self, value: Any) -> Any:
        """Return `value`."""
        return value

    def background(self, work: Callable[[], Result]) -> Future[Result]:
        """Run `work` now: everything is in one thread here."""
        future: Future[Result] = Future()
        future.set_result(work())
        return future

    def fetch(self, references: Sequence[Any]) -> list[Any]:
        """Return the values."""
        return list(references)
