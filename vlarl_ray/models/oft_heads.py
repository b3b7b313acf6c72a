"""OpenVLA-OFT's action head and RIPT-VLA's scale head: residual MLPs over the hidden states of each env step."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Float32
from torch import Tensor, nn

from vlarl_ray.models.heads import ScaleHead

_FP32 = torch.float32


class ResidualBlock(nn.Module):
    """Layer norm, linear, ReLU, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width, dtype=_FP32), nn.Linear(width, width, dtype=_FP32), nn.ReLU())

    def forward(self, x: Float32[Tensor, "... C"]) -> Float32[Tensor, "... C"]:
        """Transform each row alone."""
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """Layer norm, linear, ReLU, residual blocks, layer norm, linear; fp32, with the official parameter names."""

    def __init__(self, input_size: int, width: int, output_size: int, *, num_blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_size, dtype=_FP32)
        self.fc1 = nn.Linear(input_size, width, dtype=_FP32)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
        self.layer_norm2 = nn.LayerNorm(width, dtype=_FP32)
        self.fc2 = nn.Linear(width, output_size, dtype=_FP32)

    def forward(self, x: Float32[Tensor, "... I"]) -> Float32[Tensor, "... O"]:
        """Transform each row alone; nothing squashes the output."""
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class LocationHead(nn.Module):
    """Predicts the normalised actions of each env step from the D hidden states at its positions."""

    def __init__(self, hidden_size: int, action_dim: int, width: int, *, num_blocks: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = ResidualMLP(action_dim * hidden_size, width, action_dim, num_blocks=num_blocks)

    def forward(self, hidden: Float[Tensor, "B L H"]) -> Float32[Tensor, "B L"]:
        """Predict the actions of a chunk, step by step, not limited to [-1, 1]."""
        return self.model(_by_step(hidden, self.action_dim)).flatten(1)


class ResidualScaleHead(ScaleHead):
    """Predicts the log-scale of each number of a chunk, in fp32, from the hidden states that the action head reads.

    Source:
        RIPT-VLA (arXiv:2505.17016), `LaplaceScaleHead`: the trunk of the action head up to `width` numbers, a linear
        layer, no activation between. Its bias starts at -3, below its own clip range; ours at `INITIAL_LOG_SCALE`.
    """

    def __init__(self, hidden_size: int, action_dim: int, width: int, *, num_blocks: int) -> None:
        trunk = ResidualMLP(action_dim * hidden_size, width, width, num_blocks=num_blocks)
        last = nn.Linear(width, action_dim, dtype=_FP32)
        nn.Sequential.__init__(self, OrderedDict(trunk=trunk, log_b_head=last))
        self.action_dim = action_dim

    def forward(self, hidden: Float[Tensor, "B L H"]) -> Float32[Tensor, "B L"]:  # type: ignore[override]
        """Predict natural logs of scales."""
        return nn.Sequential.forward(self, _by_step(hidden, self.action_dim)).flatten(1)


def _by_step(hidden: Float[Tensor, "B L H"], action_dim: int) -> Float32[Tensor, "B K DH"]:
    """Concatenate the hidden states of each env step's D numbers."""
    return hidden.float().unflatten(1, (-1, action_dim)).flatten(2)
