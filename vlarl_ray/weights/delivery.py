"""The ways of a version to the servers, as the publisher sees them: through the object store, or by a broadcast."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from vlarl_ray.transport import Transport
from vlarl_ray.weights.channel import TransferError

_LOG = logging.getLogger(__name__)

_GIVE_UP_AFTER = 3
"""Broadcasts that fail in a row; each may cost the whole time allowed for one."""


@runtime_checkable
class Delivery(Protocol):
    """Brings a version to all servers. One that it fails to reach gets the version through the object store."""

    def start(self, version: int, reference: Any) -> list[Any]:
        """Make every server load the version.

        Args:
            version: Of the weights that the learner gave out last.
            reference: Of their `WeightUpdate` in the object store.

        Returns:
            Handles of `LoadReport`s, a server each; they may fail with a `TransferError`.
        """
        ...

    def end(self, *, num_failed: int) -> None:
        """Finish what `start` began, after all handles were waited for; `num_failed` of them with a `TransferError`."""
        ...


class ObjectStoreDelivery:
    """Each server fetches the update: through shared memory on the learner's node, once a node elsewhere."""

    def __init__(self, servers: Sequence[Any], transport: Transport) -> None:
        self._servers = list(servers)
        self._transport = transport

    def start(self, version: int, reference: Any) -> list[Any]:
        """See `Delivery`."""
        return [self._transport.call(server, "load", reference) for server in self._servers]

    def end(self, *, num_failed: int) -> None:
        """See `Delivery`."""


class BroadcastDelivery:
    """Learner rank 0 broadcasts to all servers; see `channel`.

    The group of processes lasts until a broadcast fails or a server restarts; then all make a new one.

    Args:
        sender: Target with `offer_weights` and `send_weights`: learner rank 0.
        servers: Targets with `load_offered`.
        transport: How to reach them.
        deadline_s: Longest wait for the sender.
        restarts: Says how many servers were lost so far.
    """

    def __init__(
        self,
        sender: Any,
        servers: Sequence[Any],
        transport: Transport,
        *,
        deadline_s: float,
        restarts: Callable[[], int],
    ) -> None:
        self._sender = sender
        self._servers = list(servers)
        self._transport = transport
        self._deadline_s = deadline_s
        self._restarts = restarts
        self._instead = ObjectStoreDelivery(servers, transport)
        self._group_of: int | None = None
        """Servers that had been lost when the group was made; None where it is to be made anew."""
        self._failed_in_a_row = 0
        self._sent: Any = None

    def start(self, version: int, reference: Any) -> list[Any]:
        """See `Delivery`."""
        if self._failed_in_a_row >= _GIVE_UP_AFTER:
            return self._instead.start(version, reference)
        restarts = self._restarts()
        renew = self._group_of != restarts
        asked = self._transport.call(self._sender, "offer_weights", version, len(self._servers), renew)
        [offer] = self._transport.get([asked], timeout_s=self._deadline_s, what="offering weights")
        self._group_of = restarts
        self._sent = self._transport.call(self._sender, "send_weights")
        return [
            self._transport.call(server, "load_offered", offer, rank) for rank, server in enumerate(self._servers, 1)
        ]

    def end(self, *, num_failed: int) -> None:
        """See `Delivery`."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        try:
            self._transport.get([sent], timeout_s=self._deadline_s, what="sending weights")
        except TransferError as error:
            _LOG.warning("weights were not sent: %s", error)
            num_failed += 1
        if not num_failed:
            self._failed_in_a_row = 0
            return
        self._group_of = None
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _GIVE_UP_AFTER:
            advice = "weights go through the object store from now on; see inference.weight_transport"
            _LOG.error("%d broadcasts of weights failed in a row: %s", self._failed_in_a_row, advice)
