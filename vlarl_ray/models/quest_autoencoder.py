"""QueST's skill autoencoder: a block of actions to a few discrete codes by finite scalar quantisation, and back.

    actions ─► linear ─► convolutions over time ─► Transformer ─► quantiser ─► codes
    actions ◄─ linear ◄─ Transformer: one position per action, looks at all codes ◄─┘

Parameters and buffers are named as in the official checkpoints.

Source:
    Mete et al. 2024, QueST (arXiv:2407.15840); quantiser: Mentzer et al. 2023 (arXiv:2309.15505).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from vlarl_ray.config import QuestConfig

_GROUPS = 8
"""Of the group norms."""
_MARGIN = 1e-3
"""The outermost levels lie this fraction inside of what tanh can reach, so that they are reached."""


class PositionalCode(nn.Module):
    """Sines and cosines of a position, interleaved: sin, cos, sin, cos, ... of falling frequencies."""

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("inv_freq", torch.empty(dim // 2))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the frequencies, which checkpoints carry although they never change."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=self.inv_freq.device) / self.dim
        self.inv_freq.copy_(10_000.0**-exponents)

    def forward(self, length: int) -> Float[Tensor, "T C"]:
        """Return the codes of positions 0 to `length - 1`."""
        positions = torch.arange(length, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(positions, self.inv_freq)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class AddPositionalCode(nn.Module):
    """Adds the code of each position."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.penc = PositionalCode(dim)

    def forward(self, x: Float[Tensor, "B T C"], *, first: int = 0) -> Float[Tensor, "B T C"]:
        """Add codes; `first` is the position of the first entry of `x`."""
        return x + self.penc(first + x.shape[1])[first:]


class Quantizer(nn.Module):
    """Rounds each of a few numbers to one of its levels; a code is the combination, its index counts them.

    Args:
        dim: Width of what is quantised, behind linear layers in and out.
        levels: Of each number; the first varies fastest in the index.
    """

    def __init__(self, dim: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels
        self.project_in = nn.Linear(dim, len(levels))
        self.project_out = nn.Linear(len(levels), dim)

    def bound(self, projected: Float[Tensor, "*R n"]) -> Float[Tensor, "*R n"]:
        """Squash numbers between their outermost levels; levels are then the whole numbers."""
        levels = torch.tensor(self.levels, device=projected.device)
        half = (levels - 1) * (1 + _MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)  # an even number of whole numbers is not symmetric around 0
        return torch.tanh(projected + torch.atanh(offset / half)) * half - offset

    def forward(self, z: Float[Tensor, "B L C"]) -> tuple[Float[Tensor, "B L C"], Int64[Tensor, "B L"]]:
        """Return codes, whose gradient passes the rounding as if it were not there, and their indices."""
        bounded = self.bound(self.project_in(z))
        rounded = bounded + (bounded.round() - bounded).detach()
        half_width, basis = self._half_width(z), self._basis(z)
        indices = ((bounded.round().long() + half_width) * basis).sum(-1)
        return self.project_out(rounded / half_width), indices

    def level_indices(self, indices: Int[Tensor, "*R"]) -> Int64[Tensor, "*R n"]:
        """Split indices into the level of each number, from 0."""
        levels = torch.tensor(self.levels, device=indices.device)
        return indices.long()[..., None] // self._basis(indices) % levels

    def codes(self, indices: Int[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        """Look up codes by index."""
        half_width = self._half_width(indices)
        scaled = (self.level_indices(indices) - half_width) / half_width
        return self.project_out(scaled.to(self.project_out.weight.dtype))

    def _half_width(self, like: Tensor) -> Int64[Tensor, " n"]:
        return torch.tensor([level // 2 for level in self.levels], device=like.device)

    def _basis(self, like: Tensor) -> Int64[Tensor, " n"]:
        return torch.tensor([math.prod(self.levels[:i]) for i in range(len(self.levels))], device=like.device)


class CausalConv(nn.Module):
    """Convolution over time whose outputs see no later input; a stride of s keeps every s-th."""

    def __init__(self, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv1d(dim, dim, kernel, stride=stride, padding=kernel - 1)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B C T2"]:
        """Convolve; the outputs that reach into the padding behind the end are dropped, as the original does."""
        surplus = (self.kernel - 2) // self.stride + 1
        padded = self.conv(x)
        return padded[..., : padded.shape[-1] - max(surplus, 0)]


class ConvBlock(nn.Module):
    """Causal convolution, group norm (over time too, so the block is not causal), Mish."""

    def __init__(self, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        # The identities stand where the original reshapes, so that the norm keeps its name, `block.2`.
        self.block = nn.Sequential(
            CausalConv(dim, kernel, stride), nn.Identity(), nn.GroupNorm(_GROUPS, dim), nn.Identity(), nn.Mish()
        )

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B C T2"]:
        """Transform a sequence."""
        return self.block(x)


class ConvStack(nn.Module):
    """Convolution blocks that shorten a sequence by the product of their strides."""

    def __init__(self, dim: int, kernels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(dim, *sizes) for sizes in zip(kernels, strides, strict=True))

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B L C"]:
        """Shorten a sequence."""
        x = x.transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2)


class SkillAutoencoder(nn.Module):
    """Turns blocks of T actions into L codes and back; in normalised action units.

    Args:
        config: Sizes.
        action_dim: D.
    """

    def __init__(self, config: QuestConfig, action_dim: int) -> None:
        super().__init__()
        dim = config.autoencoder_dim
        self.block_length = config.block_length
        self.action_proj = nn.Linear(action_dim, dim)
        self.conv_block = ConvStack(dim, config.conv_kernels, config.conv_strides)
        common = {
            "d_model": dim,
            "dim_feedforward": 4 * dim,
            "dropout": config.dropout,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.add_positional_emb = AddPositionalCode(dim)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(nhead=config.encoder_heads, **common),
            num_layers=config.encoder_layers,
            enable_nested_tensor=False,
        )
        self.vq = Quantizer(dim, config.fsq_levels)
        self.fixed_positional_emb = PositionalCode(dim)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(nhead=config.decoder_heads, **common), num_layers=config.decoder_layers
        )
        self.action_head = nn.Linear(dim, action_dim)

    def forward(self, actions: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Reconstruct blocks of actions from their codes (differentiable)."""
        codes, _ = self.vq(self.encode(actions))
        return self.decode(codes)

    def encode(self, actions: Float[Tensor, "B T D"]) -> Float[Tensor, "B L C"]:
        """Return what is quantised."""
        x = self.add_positional_emb(self.conv_block(self.action_proj(actions)))
        return self.encoder(x, mask=_causal_mask(x), is_causal=True)

    def decode(self, codes: Float[Tensor, "B L C"]) -> Float[Tensor, "B T D"]:
        """Turn codes into actions: an action sees those before it, and all codes."""
        queries = self.fixed_positional_emb(self.block_length).expand(len(codes), -1, -1)
        hidden = self.decoder(queries, codes, tgt_mask=_causal_mask(queries), tgt_is_causal=True)
        return self.action_head(hidden)

    def indices(self, actions: Float[Tensor, "B T D"]) -> Int64[Tensor, "B L"]:
        """Return the indices of the codes of blocks of actions."""
        return self.vq(self.encode(actions))[1]

    def decode_indices(self, indices: Int[Tensor, "B L"]) -> Float[Tensor, "B T D"]:
        """Return the actions that code indices stand for."""
        return self.decode(self.vq.codes(indices))


def _causal_mask(x: Tensor) -> Float[Tensor, "T T"]:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
