"""`Transport` over Ray: actor calls with deadlines, values through the object store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from vlarl_ray.transport import Result


class RayTransport:
    """Calls actor methods; every wait has a deadline, as Ray itself never notices a hung actor."""

    def call(self, target: Any, method: str, *args: Any) -> Any:
        """Start an actor call; the handle is its `ObjectRef`."""
        return getattr(target, method).remote(*args)

    def get(self, handles: Sequence[Any], *, timeout_s: float, what: str) -> list[Any]:
        """Wait for all results.

        Raises:
            TimeoutError: After `timeout_s`.
            RuntimeError: If an actor died.
        """
        try:
            return ray.get(list(handles), timeout=timeout_s)
        except GetTimeoutError as error:
            raise TimeoutError(f"{what}: no answer within {timeout_s:.0f} s; a process hangs or is starved.") from error
        except RayActorError as error:
            raise RuntimeError(f"{what}: a process died: {error}") from error

    def put(self, value: Any) -> Any:
        """Store a value in the object store."""
        return ray.put(value)

    def background(self, work: Callable[[], Result]) -> Future[Result]:
        """Run `work` on a thread of its own; it mostly waits on actors. It ends with the process, finished or not."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the one who waits
                future.set_exception(error)

        threading.Thread(target=run, name="background", daemon=True).start()
        return future

    def fetch(self, references: Sequence[Any]) -> list[Any]:
        """Resolve references; numpy arrays are read-only views of shared memory."""
        return ray.get(list(references))
