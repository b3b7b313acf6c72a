"""Heads on the policy's hidden state: value, and location and scale of continuous actions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

HEADS = ("value_head.", "scale_head.", "action_head.")
"""Name prefixes of the heads: always fp32, trained whole rather than by adapters."""


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


class ScaleHead(nn.Sequential):
    """Predicts the log-scale of each number of a chunk, in fp32; starts nearly constant at `INITIAL_LOG_SCALE`."""

    INITIAL_LOG_SCALE = -1.0

    def __init__(self, input_size: int, num_numbers: int) -> None:
        super().__init__(
            nn.Linear(input_size, input_size, dtype=torch.float32),
            nn.ReLU(),
            nn.Linear(input_size, num_numbers, dtype=torch.float32),
        )

    @property
    def last_layer(self) -> nn.Linear:
        """The layer whose output is the log-scale."""
        return cast(nn.Linear, self[-1])

    def reset_last_layer(self, generator: torch.Generator) -> None:
        """Draw Xavier weights at a gain of 0.01, as RIPT-VLA's head has them."""
        nn.init.xavier_normal_(self.last_layer.weight, gain=0.01, generator=generator)
        nn.init.constant_(self.last_layer.bias, self.INITIAL_LOG_SCALE)

    def make_constant(self, log_scale: float) -> None:
        """Predict the same log-scale everywhere, until trained."""
        nn.init.zeros_(self.last_layer.weight)
        nn.init.constant_(self.last_layer.bias, log_scale)

    def forward(self, hidden: Float[Tensor, "B C"]) -> Float32[Tensor, "B L"]:  # type: ignore[override]
        """Predict natural logs of scales."""
        return super().forward(hidden.float())
