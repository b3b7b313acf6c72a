"""QueST's skill prior: a GPT over the codes of a skill, behind a few context tokens.

    context_1 .. context_C │ start │ code_1 .. code_{L-1}      plain causal attention over all of it
                  ▼ value     ▼ logits of code_1 .. code_L

Parameters and buffers are named as in the official checkpoints. The attention is not `nn.MultiheadAttention`, which
takes the weight of its output layer without calling that layer, where an adapter would be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlarl_ray.config import QuestConfig
from vlarl_ray.models.quest_autoencoder import AddPositionalCode


@dataclass
class KeyValues:
    """Keys and values of one layer, of all positions so far."""

    keys: Float[Tensor, "B heads T head_dim"]
    values: Float[Tensor, "B heads T head_dim"]


class SelfAttention(nn.Module):
    """Causal self-attention; queries, keys and values are one packed parameter, which adapters do not reach."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw what is no layer of its own."""
        nn.init.normal_(self.in_proj_weight, 0.0, self.in_proj_weight.shape[1] ** -0.5, generator=generator)
        nn.init.zeros_(self.in_proj_bias)

    def forward(
        self, x: Float[Tensor, "B T C"], before: KeyValues | None = None
    ) -> tuple[Float[Tensor, "B T C"], KeyValues]:
        """Attend to the positions up to each one's own; behind `before`, `x` must be a single position."""
        shape = (*x.shape[:2], 3, self.num_heads, -1)
        query, keys, values = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(shape).permute(2, 0, 3, 1, 4)
        if before is not None:
            assert x.shape[1] == 1
            keys, values = torch.cat([before.keys, keys], dim=2), torch.cat([before.values, values], dim=2)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, keys, values, is_causal=before is None, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), KeyValues(keys, values)


class PriorLayer(nn.Module):
    """Pre-norm Transformer layer with exact GELU; the unit that FSDP shards."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, num_heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B T C"], before: KeyValues | None = None
    ) -> tuple[Float[Tensor, "B T C"], KeyValues]:
        """Transform positions; also returns keys and values, to decode on behind them."""
        attended, key_values = self.self_attn(self.norm1(x), before)
        x = x + self.dropout(attended)
        hidden = self.dropout(F.gelu(self.linear1(self.norm2(x))))
        return x + self.dropout(self.linear2(hidden)), key_values


class PriorLayers(nn.Module):
    """The layers, under the name that official checkpoints give them."""

    def __init__(self, config: QuestConfig) -> None:
        super().__init__()
        sizes = (config.prior_dim, config.prior_heads, config.dropout)
        self.layers: Sequence[PriorLayer] = nn.ModuleList(PriorLayer(*sizes) for _ in range(config.prior_layers))  # type: ignore[assignment]


class SkillPrior(nn.Module):
    """Distribution of a skill's codes given context tokens."""

    def __init__(self, config: QuestConfig) -> None:
        super().__init__()
        self.num_codes, self.codebook_size = config.num_codes, config.codebook_size
        self.start_token = config.prior_vocab_size or config.codebook_size
        self.tok_emb = nn.Embedding(self.start_token + 1, config.prior_dim)
        self.add_positional_emb = AddPositionalCode(config.prior_dim)
        self.drop = nn.Dropout(config.dropout)
        self.decoder = PriorLayers(config)
        self.lnf = nn.LayerNorm(config.prior_dim)
        self.head = nn.Linear(config.prior_dim, self.start_token)

    def forward(
        self, context: Float[Tensor, "B C W"], codes: Int64[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B n1 N"], Float[Tensor, "B W"]]:
        """Predict each code from those before it, and the one behind the last.

        Returns:
            Logits over the N codes at n + 1 positions, and the normed hidden state of the last context position (h0),
            which has seen no code.
        """
        hidden, _ = self._first_pass(context, codes)
        num_context = context.shape[1]
        return self._logits(hidden[:, num_context:]), hidden[:, num_context - 1]

    def read_out(self, context: Float[Tensor, "B C W"]) -> Float[Tensor, "B W"]:
        """Return h0 alone."""
        x = self.drop(context)
        for layer in self.decoder.layers:
            x, _ = layer(x)
        return self.lnf(x[:, -1])

    def sample(
        self,
        context: Float[Tensor, "B C W"],
        choose: Callable[[Float[Tensor, "B 1 N"], int], Int64[Tensor, "B 1"]],
    ) -> tuple[Float[Tensor, "B L N"], Int64[Tensor, "B L"]]:
        """Draw code by code, with cached keys and values.

        Args:
            context: Context tokens.
            choose: Is given the logits of one position and its number, and draws its code.

        Returns:
            The logits of every position, and the codes drawn.
        """
        hidden, caches = self._first_pass(context, torch.empty(len(context), 0, dtype=torch.int64))
        logits = [self._logits(hidden[:, -1:])]
        codes = [choose(logits[0], 0)]
        for index in range(1, self.num_codes):
            x = self.drop(self.add_positional_emb(self.tok_emb(codes[-1]), first=index))
            for number, layer in enumerate(self.decoder.layers):
                x, caches[number] = layer(x, caches[number])
            logits.append(self._logits(self.lnf(x)))
            codes.append(choose(logits[-1], index))
        return torch.cat(logits, dim=1), torch.cat(codes, dim=1)

    def _first_pass(self, context: Tensor, codes: Tensor) -> tuple[Tensor, list[KeyValues]]:
        """Return normed hidden states of context, start and codes, and each layer's keys and values."""
        start = codes.new_full((len(context), 1), self.start_token)
        embedded = self.tok_emb(torch.cat([start, codes], dim=1).to(context.device))
        x = self.drop(torch.cat([context, self.add_positional_emb(embedded)], dim=1))
        caches = []
        for layer in self.decoder.layers:
            x, key_values = layer(x)
            caches.append(key_values)
        return self.lnf(x), caches

    def _logits(self, hidden: Float[Tensor, "B n W"]) -> Float[Tensor, "B n N"]:
        return self.head(hidden)[..., : self.codebook_size].float()
