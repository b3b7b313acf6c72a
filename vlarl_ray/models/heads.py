"""Value head on the policy's hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn


class ValueHead(nn.Sequential):
    """ReLU MLP in fp32, whatever the precision of the backbone; starts at value 0 everywhere."""

    def __init__(self, input_size: int, hidden_sizes: Sequence[int]) -> None:
        sizes = [input_size, *hidden_sizes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, dtype=torch.float32), nn.ReLU()]
        super().__init__(*layers, nn.Linear(sizes[-1], 1, dtype=torch.float32))

    def forward(self, hidden: Float[Tensor, "B C"], *, detach: bool = False) -> Float32[Tensor, " B"]:  # type: ignore[override]
        """Predict values.

        Args:
            hidden: Hidden state at the last prompt token (h0).
            detach: Stop the gradient at `hidden`.
        """
        hidden = hidden.detach() if detach else hidden
        return super().forward(hidden.float()).squeeze(-1)
