"""Weights from learner rank 0 to all servers by one broadcast, where they do not go through the object store.

    rank 0: WeightUpdate ─► one fp32 buffer ─► broadcast over gloo or NCCL ─► WeightUpdate: server 1, server 2, ...

Bytes alone go this way. What they are, and where to meet for them, is in an `Offer`, which comes with the actor call;
that they arrived whole is for the digests of the `LoadReport` to show. NCCL's part has never been run: no GPU was at
hand. All else is the same code for both, and tested with gloo.
"""

from __future__ import annotations

import atexit
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, TCPStore  # their public aliases are not typed as exported

from vlarl_ray.weights.update import WeightUpdate, from_named_arrays, named_arrays

_EXIT_WAIT_S = 10.0
"""For a thread that was given up, as the process ends: gloo may go on connecting for five seconds."""


class TransferError(RuntimeError):
    """A broadcast failed, or took too long; whoever holds the weights may give them in another way."""


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a group meet: a store that rank 0 serves."""

    host: str
    port: int
    world_size: int
    """Learner rank 0, and a rank for each server."""
    name: str
    """Unlike that of any other meeting, while ports may come again."""


@dataclass(frozen=True)
class Offer:
    """A version that learner rank 0 is about to broadcast."""

    version: int
    lora_scale: float
    shapes: Mapping[str, tuple[int, ...]]
    """By the names of `update.named_arrays`, in the order of the buffer; all fp32."""
    meeting: Meeting


@runtime_checkable
class Communicator(Protocol):
    """The group as one of its processes sees it; the constructor returns once all have come."""

    def broadcast(self, buffer: Tensor) -> None:
        """Fill every rank's buffer, fp32 in host memory, with rank 0's."""
        ...

    def abort(self) -> None:
        """Leave, whatever state the group is in."""
        ...


class GlooCommunicator:
    """Over TCP, from host memory to host memory."""

    def __init__(self, store: TCPStore, rank: int, world_size: int, *, device: torch.device, timeout_s: float) -> None:
        self._group: Any = ProcessGroupGloo(store, rank, world_size, timedelta(seconds=timeout_s))

    def broadcast(self, buffer: Tensor) -> None:
        """See `Communicator`."""
        self._group.broadcast(buffer, 0).wait()

    def abort(self) -> None:
        """See `Communicator`."""
        self._group.abort()


class NcclCommunicator:
    """From GPU to GPU, with the communicator of vLLM's NCCL weight transfer. Never run: see the module.

    vLLM's rather than torch's, whose watchdog ends the process of a rank that waits too long: the learner's, too.
    """

    def __init__(self, store: TCPStore, rank: int, world_size: int, *, device: torch.device, timeout_s: float) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        self._rank = rank
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        with unpinned_nccl_env():
            group = StatelessProcessGroup(rank=rank, world_size=world_size, store=store)
            self._nccl = PyNcclCommunicator(group, device=self._device)
        if self._nccl.disabled:  # vLLM says so in no other way
            raise RuntimeError("vLLM found no NCCL library, or VLLM_DISABLE_PYNCCL is set")

    def broadcast(self, buffer: Tensor) -> None:
        """See `Communicator`."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            on_device = buffer.to(self._device) if self._rank == 0 else torch.empty_like(buffer, device=self._device)
            self._nccl.broadcast(on_device, src=0, stream=stream)
            stream.synchronize()
            if self._rank > 0:
                buffer.copy_(on_device)

    def abort(self) -> None:
        """See `Communicator`."""
        self._nccl.destroy()


_COMMUNICATORS: dict[str, Callable[..., Communicator]] = {"gloo": GlooCommunicator, "nccl": NcclCommunicator}


class Member:
    """One process of the group: joins when first needed, and anew where an offer names another meeting.

    Args:
        backend: `gloo` or `nccl`.
        device: Where NCCL sends from or receives.
        timeout_s: Longest wait for the others to join and for the bytes, together.
    """

    def __init__(self, backend: str, *, device: str, timeout_s: float) -> None:
        self._backend = backend
        self._device = torch.device(device)
        self._timeout_s = timeout_s
        self._joined: tuple[Meeting, Communicator] | None = None

    def broadcast(self, buffer: Tensor, meeting: Meeting, rank: int, store: TCPStore | None = None) -> None:
        """Send the buffer (rank 0, which passes its store) or fill it.

        Raises:
            TransferError: If that fails, or is not done in time. The buffer is not to be used then: it may yet change.
        """
        where = f"rank {rank} of {meeting.world_size}, broadcast over {self._backend}"
        try:
            _within(self._timeout_s, lambda: self._group(meeting, rank, store).broadcast(buffer))
        except TimeoutError as error:
            self.leave()
            raise TransferError(f"{where}: not done within {self._timeout_s:g} s.") from error
        except Exception as error:
            self.leave()
            raise TransferError(f"{where}: {error}") from error

    def leave(self) -> None:
        """Leave the group, if there is one; its other members fail in their next broadcast."""
        joined, self._joined = self._joined, None
        if joined is not None:
            joined[1].abort()

    def _group(self, meeting: Meeting, rank: int, store: TCPStore | None) -> Communicator:
        if self._joined is None or self._joined[0] != meeting:
            self.leave()
            if store is None:
                timeout = timedelta(seconds=self._timeout_s)
                store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
            if store.add(f"joined by rank {rank}", 1) > 1:
                # The others wait where an earlier process of this rank was; gloo would look for it there.
                raise RuntimeError("this rank was in the group before; a new group is needed")
            make = _COMMUNICATORS[self._backend]
            group = make(store, rank, meeting.world_size, device=self._device, timeout_s=self._timeout_s)
            self._joined = meeting, group
        return self._joined[1]


class Sender:
    """The end at learner rank 0. `hold`, `offer` and `send` follow one another for each version.

    Args:
        backend: `gloo` or `nccl`.
        host: Address of this machine, as servers reach it.
        device: Where NCCL sends from.
        timeout_s: Longest wait for the servers to join and to get the bytes, together.
    """

    def __init__(self, backend: str, host: str, *, device: str, timeout_s: float) -> None:
        self._member = Member(backend, device=device, timeout_s=timeout_s)
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)
        self._served: tuple[Meeting, TCPStore] | None = None
        self._held: tuple[WeightUpdate, Tensor] | None = None

    def hold(self, update: WeightUpdate) -> None:
        """Take the weights to send."""
        flat = np.concatenate([array.ravel() for array in named_arrays(update).values()])
        self._held = update, torch.from_numpy(flat)

    def offer(self, version: int, num_receivers: int, *, renew: bool) -> Offer:
        """Say what `send` will send.

        Args:
            version: Of the weights that are held.
            num_receivers: Servers.
            renew: Whether to make a new group, as after the failure or restart of a member.
        """
        assert self._held is not None
        update = self._held[0]
        if update.version != version:
            raise ValueError(f"version {version} was to be sent, but the learner holds version {update.version}.")
        if renew or self._served is None:
            self._member.leave()
            store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
            self._served = Meeting(self._host, store.port, 1 + num_receivers, uuid.uuid4().hex), store
        shapes = {name: array.shape for name, array in named_arrays(update).items()}
        return Offer(version, update.lora_scale, shapes, self._served[0])

    def send(self) -> None:
        """Broadcast what was offered, and let go of it.

        Raises:
            TransferError: If that fails, or is not done in time.
        """
        assert self._held is not None
        assert self._served is not None
        (_, buffer), (meeting, store) = self._held, self._served
        self._held = None
        self._member.broadcast(buffer, meeting, 0, store)


class Receiver:
    """The end at a server; see `Sender` for the arguments."""

    def __init__(self, backend: str, *, device: str, timeout_s: float) -> None:
        self._member = Member(backend, device=device, timeout_s=timeout_s)

    def receive(self, offer: Offer, rank: int) -> WeightUpdate:
        """Wait for the weights that were offered.

        Args:
            offer: Of learner rank 0.
            rank: Of this server in the group: 1 for the first.

        Raises:
            TransferError: If they do not come, or not in time.
        """
        ends = np.cumsum([0, *(prod(shape) for shape in offer.shapes.values())]).tolist()
        buffer = torch.empty(ends[-1])
        self._member.broadcast(buffer, offer.meeting, rank)
        flat, bounds = buffer.numpy(), pairwise(ends)
        parts = {
            name: flat[lo:hi].reshape(shape)
            for (name, shape), (lo, hi) in zip(offer.shapes.items(), bounds, strict=True)
        }
        return from_named_arrays(offer.version, offer.lora_scale, parts)


def _within(timeout_s: float, work: Callable[[], None]) -> None:
    """Run `work` on a thread that is given up after `timeout_s`: NCCL has no deadline of its own."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the one who waits
            done.set_exception(error)

    thread = threading.Thread(target=run, name="weights", daemon=True)
    thread.start()
    try:
        done.result(timeout_s)
    except TimeoutError:
        # If the interpreter were gone by the time the thread comes back from C++, that would abort the process.
        atexit.register(thread.join, _EXIT_WAIT_S)
        raise
