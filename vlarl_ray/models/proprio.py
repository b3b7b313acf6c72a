"""Proprioception as a policy reads it: normalised by its statistics, and projected to one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class ProprioNormalizer:
    """Map raw proprioception to [-1, 1], per dimension, and clip it there.

    `q01` goes to -1 and `q99` to +1 where `mask` is true; other dimensions are only clipped.

    Source:
        OpenVLA-OFT, normalisation type `bounds_q99`; for its type `bounds`, give the minimum and maximum instead.

    Example:
        >>> normalizer = ProprioNormalizer.from_statistics([0.0, -2.0], [1.0, 2.0], None)
        >>> normalizer.normalize(torch.tensor([[0.5, 9.0]])).tolist()
        [[0.0, 1.0]]
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]
    epsilon: float = 1e-8
    """Added to the range, so that a dimension may be constant."""

    def __post_init__(self) -> None:
        if not len(self.q01) == len(self.q99) == len(self.mask):
            raise ValueError(
                f"proprio statistics: q01, q99, mask have {len(self.q01)}, {len(self.q99)}, {len(self.mask)} entries; "
                "each must have one per dimension."
            )
        for low, high, used in zip(self.q01, self.q99, self.mask, strict=True):
            if used and not low < high + self.epsilon:
                raise ValueError(f"proprio statistics: q01 = {low} is above q99 = {high}; mask this dimension out.")

    @classmethod
    def from_statistics(
        cls, q01: Sequence[float], q99: Sequence[float], mask: Sequence[bool] | None
    ) -> ProprioNormalizer:
        """Take the `proprio` entry of `dataset_statistics.json`; a missing mask means all true."""
        return cls(tuple(q01), tuple(q99), (True,) * len(q01) if mask is None else tuple(mask))

    def normalize(self, proprio: Float[Tensor, "... P"]) -> Float[Tensor, "... P"]:
        """Turn raw numbers, in env units, into the model's."""
        low, high = (torch.tensor(q, dtype=proprio.dtype, device=proprio.device) for q in (self.q01, self.q99))
        scaled = 2 * (proprio - low) / (high - low + self.epsilon) - 1
        return torch.where(torch.tensor(self.mask, device=proprio.device), scaled, proprio).clamp(-1, 1)


class ProprioProjector(nn.Module):
    """Two linear layers with the exact GELU between them, to one Llama embedding; official parameter names."""

    def __init__(self, proprio_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprio: Float[Tensor, "B P"]) -> Float[Tensor, "B H"]:
        """Embed normalised proprioception."""
        return self.fc2(F.gelu(self.fc1(proprio)))
