"""The message from learner to servers: adapter and head tensors of one version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class LoadReport:
    """What a server did with a `WeightUpdate`."""

    version: int
    digests: dict[str, str]
    """sha256 of each tensor that entered the loader, by the names of `weights.canary.digests`."""
    delta_kept: float
    """Projection of the served weight change on the one asked for: 1 if rounding lost nothing."""
    seconds: float
    checksums: Mapping[str, str] = field(default_factory=dict)
    """`weights.merge.checksum` of each tensor as it entered the loader, by official name; none where nothing is loaded
    that the engine could not read back. Under `lora: native`, of the adapters in place, see `adapter_checksums`."""
    dtype: str = ""
    """Precision of those tensors."""
    lora: Literal["merged", "native"] = "merged"
    """Whether adapters were merged, or are applied by the server."""
