"""Count the bytes of tensors that are alive while some code runs, on real tensors or on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed; a storage with many views counts once.

    Args:
        known: Tensors that were there before and are not to count.
        resized: Tensors whose storage is emptied and filled again, as FSDP does it: they count with what they hold.
    """

    def __init__(self, known: Iterable[Tensor] = (), resized: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._resized = [tensor.untyped_storage() for tensor in resized]
        # Keyed by storage objects: torch keeps one per storage alive for as long as the storage is.
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._seen.update(self._resized)
        self.now = 0
        """Bytes alive, without what is resized."""
        self.peak = 0
        """Most bytes that were alive at once."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        del types
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        if self._resized:
            self.peak = max(self.peak, self.now + sum(storage.nbytes() for storage in self._resized))
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        num_bytes = storage.nbytes()
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, num_bytes)

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes
