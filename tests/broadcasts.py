"""Learner rank 0 and servers in threads of this process, as the publisher sees them, weights going over gloo."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vlarl_ray.learner.group import LearnerGroup
from vlarl_ray.transport import LocalTransport
from vlarl_ray.weights.channel import Receiver, Sender
from vlarl_ray.weights.delivery import BroadcastDelivery
from vlarl_ray.weights.publisher import WeightPublisher


class ThreadedTransport(LocalTransport):
    """Runs the calls of a target one after another on a thread of its own, like an actor."""

    def __init__(self) -> None:
        self._threads: dict[int, ThreadPoolExecutor] = {}

    def call(self, target: Any, method: str, *args: Any) -> Future:
        def run() -> Any:
            return getattr(target, method)(*(arg.result() if isinstance(arg, Future) else arg for arg in args))

        return self._threads.setdefault(id(target), ThreadPoolExecutor(1)).submit(run)

    def get(self, handles, *, timeout_s, what) -> list[Any]:
        return [handle.result(timeout_s) for handle in handles]


class Rank:
    """A learner that also sends; `damage` may change the buffer before it leaves."""

    def __init__(self, learner, *, timeout_s: float) -> None:
        self._learner = learner
        self.sender = Sender("gloo", "127.0.0.1", device="cpu", timeout_s=timeout_s)
        self.damage: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def weight_update(self, version: int):
        update = self._learner.weight_update(version)
        self.sender.hold(update)
        if self.damage is not None:
            self.damage(self.sender._held[1])
        return update

    def offer_weights(self, version: int, num_servers: int, renew: bool):
        return self.sender.offer(version, num_servers, renew=renew)

    def send_weights(self) -> None:
        self.sender.send()


class Server:
    """An engine that also receives; counts how weights came, and keeps the last report of some that were received."""

    def __init__(self, engine, *, timeout_s: float) -> None:
        self._engine = engine
        self._receiver = Receiver("gloo", device="cpu", timeout_s=timeout_s)
        self.received = self.loaded = 0
        self.report: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def load(self, update):
        self.loaded += 1
        return self._engine.load(update)

    def load_offered(self, offer, rank: int):
        update = self._receiver.receive(offer, rank)
        self.received += 1
        self.report = self._engine.load(update)
        return self.report


def broadcasting_publisher(rank: Rank, servers: list[Server], *, probe, restarts=lambda: 0) -> WeightPublisher:
    transport = ThreadedTransport()
    return WeightPublisher(
        LearnerGroup([rank], transport, deadline_s=60.0),
        servers,
        transport,
        probe=probe,
        tolerance=1e-4,
        deadline_s=60.0,
        delivery=BroadcastDelivery(rank, servers, transport, deadline_s=60.0, restarts=restarts),
    )
