"""Llama decoder with the official parameter names, in plain torch, read out at chosen positions only.

It attends causally (OpenVLA), or from every position to all that is not padding (OpenVLA-OFT). Not transformers' class:
importing that costs every server and rank 2.6 s and 150 MB, it cannot restrict the last layer to the positions that are
read, it materialises masks, which causal sequences with all padding at their end do not need, and it is causal only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

RMS_NORM_EPS = 1e-6
"""The published OpenVLA config leaves this at the library's default, not at Llama-2's 1e-5."""
ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class LlamaDims:
    """Sizes of the decoder."""

    vocab_size: int
    """Rows of the embedding, padding included."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True)
class Rotary:
    """Rotary position factors of the tokens at hand, broadcastable to `[B, T, heads, head_dim]`."""

    cos: Float[Tensor, "... head_dim"]
    signed_sin: Float[Tensor, "... head_dim"]
    """Negative in the first half, so that rotating the halves needs no negation."""

    @classmethod
    def of_length(cls, length: int, head_dim: int, like: Tensor) -> Rotary:
        """Compute the factors of positions 0..length-1; on each pass, as a buffer would not survive `to_empty`."""
        half = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
        angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), ROPE_THETA**-half)
        cos, sin = angles.cos(), angles.sin()
        return cls(
            torch.cat([cos, cos], -1)[:, None].to(like.dtype), torch.cat([-sin, sin], -1)[:, None].to(like.dtype)
        )

    def at(self, positions: Int64[Tensor, "B R"]) -> Rotary:
        """Select the factors of some positions of each row."""
        return Rotary(self.cos[positions], self.signed_sin[positions])

    def rotate(self, x: Float[Tensor, "B T heads head_dim"]) -> Float[Tensor, "B T heads head_dim"]:
        """Rotate queries or keys."""
        return torch.addcmul(x * self.cos, torch.roll(x, x.shape[-1] // 2, -1), self.signed_sin)


@dataclass
class KeyValues:
    """Keys and values of one layer for all T positions of a sequence; decoding overwrites them position by position."""

    keys: Float[Tensor, "B heads T head_dim"]
    values: Float[Tensor, "B heads T head_dim"]

    def followed_by(self, new: KeyValues) -> KeyValues:
        """Join with the keys and values of further tokens."""
        return KeyValues(torch.cat([self.keys, new.keys], dim=2), torch.cat([self.values, new.values], dim=2))

    def write(self, positions: Int64[Tensor, " B"], new: KeyValues) -> None:
        """Store one new position per row."""
        index = positions[:, None, None, None].expand_as(new.keys)
        self.keys.scatter_(2, index, new.keys)
        self.values.scatter_(2, index, new.values)


class Attention(nn.Module):
    """Grouped-query self-attention."""

    def __init__(self, dims: LlamaDims) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = dims.num_heads, dims.num_kv_heads
        self.head_dim = dims.hidden_size // dims.num_heads
        self.q_proj = nn.Linear(dims.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dims.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dims.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, dims.hidden_size, bias=False)

    def key_values(self, x: Float[Tensor, "B T C"], rotary: Rotary) -> KeyValues:
        """Project keys and values of all tokens."""
        shape = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        keys = rotary.rotate(self.k_proj(x).view(shape))
        return KeyValues(keys.transpose(1, 2), self.v_proj(x).view(shape).transpose(1, 2))

    def attend(
        self,
        x: Float[Tensor, "B R C"],
        rotary: Rotary,
        key_values: KeyValues,
        mask: Bool[Tensor, "B 1 #R T"] | None,
    ) -> Float[Tensor, "B R C"]:
        """Attend from R tokens to the keys that the mask shows; without one they are all T and see those before."""
        query = rotary.rotate(self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            query,
            key_values.keys,
            key_values.values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.o_proj(attended.transpose(1, 2).reshape(*x.shape[:2], -1))


class FeedForward(nn.Module):
    """Gated feed-forward layer (SwiGLU)."""

    def __init__(self, dims: LlamaDims) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.up_proj = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.down_proj = nn.Linear(dims.intermediate_size, dims.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Transform each token alone."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer; the unit that FSDP shards."""

    def __init__(self, dims: LlamaDims) -> None:
        super().__init__()
        self.self_attn = Attention(dims)
        self.mlp = FeedForward(dims)
        self.input_layernorm = nn.RMSNorm(dims.hidden_size, eps=RMS_NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(dims.hidden_size, eps=RMS_NORM_EPS)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        rotary: Rotary,
        read: Int64[Tensor, "B R"] | None = None,
        *,
        visible: Bool[Tensor, "B 1 1 S"] | None = None,
        past: KeyValues | None = None,
    ) -> tuple[Float[Tensor, "B R C"], KeyValues]:
        """Process a whole sequence, or its continuation.

        Args:
            x: Hidden states of all T positions at hand.
            rotary: Their factors.
            read: Indices among them whose output is wanted; None computes all (R = T).
            visible: Keys that every position sees, of S = T and those of `past`; None is causal attention.
            past: Keys and values of what comes before `x`.

        Returns:
            Hidden states of the wanted positions, and keys and values of all, `past` included.
        """
        normed = self.input_layernorm(x)
        key_values = self.self_attn.key_values(normed, rotary)
        if past is not None:
            key_values = past.followed_by(key_values)
        if read is None:
            return self._finish(x, self.self_attn.attend(normed, rotary, key_values, visible)), key_values
        if visible is None:
            visible = (torch.arange(x.shape[1], device=x.device) <= read[..., None])[:, None]
        index = read[..., None].expand(-1, -1, x.shape[-1])
        attended = self.self_attn.attend(normed.gather(1, index), rotary.at(read), key_values, visible)
        return self._finish(x.gather(1, index), attended), key_values

    def decode(
        self, x: Float[Tensor, "B 1 C"], rotary: Rotary, positions: Int64[Tensor, " B"], cache: KeyValues
    ) -> Float[Tensor, "B 1 C"]:
        """Process one new token per row, at `positions`, and write it to `cache`; `rotary` holds those positions."""
        normed = self.input_layernorm(x)
        cache.write(positions, self.self_attn.key_values(normed, rotary))
        visible = (torch.arange(cache.keys.shape[2], device=x.device) <= positions[:, None])[:, None, None]
        return self._finish(x, self.self_attn.attend(normed, rotary, cache, visible))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token embedding, layers and final norm."""

    def __init__(self, dims: LlamaDims) -> None:
        super().__init__()
        self.head_dim = dims.hidden_size // dims.num_heads
        self.embed_tokens = nn.Embedding(dims.vocab_size, dims.hidden_size)
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(DecoderLayer(dims) for _ in range(dims.num_layers))  # type: ignore[assignment]
        self.norm = nn.RMSNorm(dims.hidden_size, eps=RMS_NORM_EPS)

    def forward(
        self,
        embeddings: Float[Tensor, "B T C"],
        read: Int64[Tensor, "B R"],
        *,
        lengths: Int64[Tensor, " B"] | None = None,
        keep_cache: bool = False,
    ) -> tuple[Float[Tensor, "B R C"], list[KeyValues]]:
        """Return normed hidden states at `read`; only these are computed in the last layer.

        Args:
            embeddings: Input embeddings at positions 0..T-1. Padding must follow everything that is read.
            read: Positions to read.
            lengths: Positions of each row that are not padding: every position sees all of these. None is causal.
            keep_cache: Whether to return each layer's keys and values (for decoding on, or `extend`).
        """
        rotary = Rotary.of_length(embeddings.shape[1], self.head_dim, embeddings)
        visible = None if lengths is None else _first(lengths, embeddings.shape[1])[:, None, None]
        x, caches = embeddings, []
        for index, layer in enumerate(self.layers):
            x, key_values = layer(x, rotary, read if index == len(self.layers) - 1 else None, visible=visible)
            if keep_cache:
                caches.append(key_values)
        return self.norm(x), caches

    def extend(
        self, embeddings: Float[Tensor, "B R C"], caches: list[KeyValues], lengths: Int64[Tensor, " B"]
    ) -> Float[Tensor, "B R C"]:
        """Process what follows each row's first `lengths` positions: it sees those and itself, they don't see it.

        Args:
            embeddings: Of positions `lengths`, `lengths + 1`, ... of each row, none of them padding.
            caches: Of a bidirectional pass over the first `lengths` positions (and padding); left as they are.
            lengths: Cached positions of each row that are not padding.
        """
        cached, count = caches[0].keys.shape[2], embeddings.shape[1]
        positions = lengths[:, None] + torch.arange(count, device=lengths.device)
        rotary = Rotary.of_length(cached + count, self.head_dim, embeddings).at(positions)
        visible = F.pad(_first(lengths, cached), (0, count), value=True)[:, None, None]
        x = embeddings
        for layer, cache in zip(self.layers, caches, strict=True):
            x, _ = layer(x, rotary, visible=visible, past=cache)
        return self.norm(x)

    def decode(
        self, embeddings: Float[Tensor, "B 1 C"], positions: Int64[Tensor, " B"], caches: list[KeyValues]
    ) -> Float[Tensor, "B 1 C"]:
        """Process one new token per row and return its normed hidden state; `caches` gain it."""
        rotary = Rotary.of_length(caches[0].keys.shape[2], self.head_dim, embeddings).at(positions[:, None])
        x = embeddings
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.decode(x, rotary, positions, cache)
        return self.norm(x)


class LanguageModel(nn.Module):
    """Decoder and output head, named as in official checkpoints (`model.*`, `lm_head`)."""

    def __init__(self, dims: LlamaDims, *, has_lm_head: bool = True) -> None:
        super().__init__()
        self.model = Decoder(dims)
        if has_lm_head:
            self.lm_head = nn.Linear(dims.hidden_size, dims.vocab_size, bias=False)

    def fsdp_units(self) -> Iterator[nn.Module]:
        """Yield what a pass should gather piece by piece: all but the final norm."""
        yield self.model.embed_tokens
        yield from self.model.layers
        if hasattr(self, "lm_head"):
            yield self.lm_head


def _first(lengths: Int64[Tensor, " B"], size: int) -> Bool[Tensor, "B {size}"]:
    """True in the first `lengths` of `size` columns."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]
