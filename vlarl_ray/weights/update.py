"""The message from learner to servers: adapter and head tensors of one version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True)
class WeightUpdate:
    """Weights of version `version`, relative to the policy folder that learner and servers started from.

    Example:
        >>> head = np.zeros((2, 2), np.float32)
        >>> WeightUpdate(version=1, lora_scale=1.0, adapters={}, tensors={"value_head.0.weight": head}).num_bytes
        16
    """

    version: int
    lora_scale: float
    """alpha / rank."""
    adapters: Mapping[str, tuple[Float32[np.ndarray, "r i"], Float32[np.ndarray, "o r"]]]
    """(A, B) by the official name of the base weight they adapt: W = W0 + lora_scale * B A."""
    tensors: Mapping[str, Float32[np.ndarray, "..."]]
    """Tensors that replace the server's own, by official name: heads, or everything under full training."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(a.nbytes + b.nbytes for a, b in self.adapters.values()) + sum(
            t.nbytes for t in self.tensors.values()
        )


def named_arrays(update: WeightUpdate) -> dict[str, np.ndarray]:
    """Give an update's arrays flat names, in an order that is always the same: `tensor:<name>`, `A:<name>`, `B:<name>`.

    Example:
        >>> a, b = np.zeros((1, 3), np.float32), np.zeros((2, 1), np.float32)
        >>> update = WeightUpdate(version=1, lora_scale=1.0, adapters={"q.weight": (a, b)}, tensors={})
        >>> {name: array.shape for name, array in named_arrays(update).items()}
        {'A:q.weight': (1, 3), 'B:q.weight': (2, 1)}
    """
    arrays = {f"tensor:{name}": value for name, value in update.tensors.items()}
    for name, pair in update.adapters.items():
        arrays |= {f"{side}:{name}": part for side, part in zip("AB", pair, strict=True)}
    return arrays


def from_named_arrays(version: int, lora_scale: float, arrays: Mapping[str, np.ndarray]) -> WeightUpdate:
    """Undo `named_arrays`."""
    kinds: dict[str, dict[str, np.ndarray]] = {"tensor": {}, "A": {}, "B": {}}
    for key, value in arrays.items():
        kind, _, name = key.partition(":")
        kinds[kind][name] = value
    adapters = {name: (a, kinds["B"][name]) for name, a in kinds["A"].items()}
    return WeightUpdate(version=version, lora_scale=lora_scale, adapters=adapters, tensors=kinds["tensor"])


@dataclass(frozen=True)
class LoadReport:
    """What a server did with a `WeightUpdate`."""

    version: int
    digests: dict[str, str]
    """sha256 of each tensor that entered the loader, by the names of `weights.canary.digests`."""
    delta_kept: float
    """Projection of the served weight change on the one asked for: 1 if rounding lost nothing."""
    seconds: float
    checksums: Mapping[str, str] | None = None
    """`weights.merge.checksum` of each tensor as it entered the loader, by official name; None from an engine that has
    no loader, and reads back itself what it holds. Under `lora: native`, of the adapters in place, see
    `adapter_checksums`."""
    dtype: str = ""
    """Precision of those tensors."""
    lora: Literal["merged", "native"] = "merged"
    """Whether adapters were merged, or are applied by the server."""
