"""Vision transformers with the parameter names of OpenVLA checkpoints (timm's), in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from jaxtyping import Float
from torch import Tensor, nn

from vlarl_ray.config import TowerConfig

_EPS = 1e-6
"""Of every layer norm."""


class Attention(nn.Module):
    """Multi-head self-attention with fused query, key and value projections."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Attend from every token to every token."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, dim))


class FeedForward(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Transform each token alone."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Learned factor per channel; timm calls it gamma, OpenVLA checkpoints `scale_factor`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Scale the channels."""
        return x * self.scale_factor


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, tower: TowerConfig, *, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(tower.dim, eps=_EPS)
        self.attn = Attention(tower.dim, tower.num_heads)
        self.ls1 = LayerScale(tower.dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(tower.dim, eps=_EPS)
        self.mlp = FeedForward(tower.dim, tower.mlp_dim)
        self.ls2 = LayerScale(tower.dim) if layer_scale else nn.Identity()

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Apply attention and feed-forward, each with a residual connection."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Linear map of non-overlapping patches."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P C"]:
        """Embed patches in row-major order."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """Parameters of SigLIP's pooling, which official checkpoints hold and OpenVLA never computes."""

    def __init__(self, tower: TowerConfig) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, tower.dim))
        self.q = nn.Linear(tower.dim, tower.dim)
        self.kv = nn.Linear(tower.dim, 2 * tower.dim)
        self.proj = nn.Linear(tower.dim, tower.dim)
        self.norm = nn.LayerNorm(tower.dim, eps=_EPS)
        self.mlp = FeedForward(tower.dim, tower.mlp_dim)


class VisionTransformer(nn.Module):
    """One tower; its feature is the raw output of the second-to-last block, without a final norm."""

    def __init__(
        self,
        tower: TowerConfig,
        *,
        image_size: int,
        patch_size: int,
        num_register_tokens: int | None,
        official_unused: bool,
    ) -> None:
        """Build the tower.

        Args:
            tower: Dimensions; `depth` counts the last block, which is never computed.
            image_size: Side of the input, pixels.
            patch_size: Side of a patch, pixels.
            num_register_tokens: A number makes this DINOv2 (class token, registers, LayerScale); None makes it SigLIP.
            official_unused: Carry the last block, the norm and the pooling of official checkpoints.
        """
        super().__init__()
        is_dino = num_register_tokens is not None
        self.num_prefix_tokens = 1 + num_register_tokens if num_register_tokens is not None else 0
        self.num_computed_blocks = tower.depth - 1
        if num_register_tokens is not None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, tower.dim))
            self.reg_token = nn.Parameter(torch.zeros(1, num_register_tokens, tower.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, tower.dim))
        self.patch_embed = PatchEmbed(tower.dim, patch_size)
        num_blocks = tower.depth if official_unused else self.num_computed_blocks
        self.blocks = nn.ModuleList(Block(tower, layer_scale=is_dino) for _ in range(num_blocks))
        if official_unused:
            self.norm = nn.LayerNorm(tower.dim, eps=_EPS)
            if not is_dino:
                self.attn_pool = AttentionPool(tower)

    def fsdp_units(self) -> Iterator[nn.Module]:
        """Yield what a pass should gather piece by piece; what is never computed is then never gathered."""
        yield from self.blocks
        if hasattr(self, "attn_pool"):
            yield self.attn_pool

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P C"]:
        """Return patch features. Positions are added to patches only, before the class and register tokens join."""
        x = self.patch_embed(pixels) + self.pos_embed
        if self.num_prefix_tokens:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks[: self.num_computed_blocks]:
            x = block(x)
        return x[:, self.num_prefix_tokens :]
