"""A policy for toy suites: frames, proprioception and prompt through two layers, all action tokens at once.

It has the interface of the large models and learns the toy tasks in seconds, so that whole runs fit in a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.action_tokens import action_logprobs, choose_columns
from vlarl_ray.models.base import PolicyInputs, PolicyOutput
from vlarl_ray.models.heads import ValueHead
from vlarl_ray.models.lora import CRITIC, use_adapter
from vlarl_ray.models.token_policy import TokenPolicyModel


class PixelMLP(TokenPolicyModel):
    """Two hidden layers of `hidden_size`; frames are resized to `image_size`, of one camera."""

    def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
        """As `TokenPolicyModel`."""
        super().__init__(config, *args, **kwargs)
        width = config.hidden_size
        self.prompt_embedding = nn.Embedding(config.text_vocab_size, width)
        self.layers = nn.ModuleList([nn.Linear(3 * config.image_size**2, width), nn.Linear(width, width)])
        self.lm_head = nn.Linear(width, self.num_action_tokens * config.num_action_bins, bias=False)
        self.value_head = ValueHead(width, config.value_hidden_sizes)

    @property
    def action_head(self) -> nn.Linear:
        """The output layer."""
        return self.lm_head

    def forward(self, inputs: PolicyInputs, tokens: Int64[Tensor, "B L"] | None = None) -> PolicyOutput:
        """Score: logits of every action position, and the value; `tokens` are not looked at."""
        del tokens
        hidden = self._hidden(inputs)
        read_out = hidden
        if self.critic == "separate":
            with use_adapter(self, CRITIC):
                read_out = self._hidden(inputs)
        return PolicyOutput(self._logits(hidden), self.value_head(read_out, detach=self.detach_value))

    def sample(
        self, inputs: PolicyInputs, *, temperature: float, gumbel: Float[Tensor, "B L N"] | None
    ) -> tuple[Int64[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Draw chunks, with their log-probabilities."""
        with torch.no_grad():
            logits = self._logits(self._hidden(inputs))
            columns = choose_columns(logits, temperature=temperature, gumbel=gumbel)
            return columns + self.first_action_token, action_logprobs(logits, columns, temperature=temperature)

    def fsdp_units(self) -> Iterator[nn.Module]:
        """Yield the hidden layers, then the value head."""
        yield from self.layers
        yield self.value_head

    def _hidden(self, inputs: PolicyInputs) -> Float[Tensor, "B H"]:
        dtype = self.prompt_embedding.weight.dtype
        pixels = inputs.images[:, 0].permute(0, 3, 1, 2).float().div(255).sub(0.5)
        size = self.model_config.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        is_text = torch.arange(inputs.prompt_ids.shape[1], device=pixels.device) < inputs.prompt_lengths[:, None]
        embedded = self.prompt_embedding(inputs.prompt_ids) * is_text[..., None]
        prompt = F.layer_norm(embedded.sum(1), embedded.shape[-1:])  # as loud as the pixels, whatever its length
        hidden = F.relu(self.layers[0](pixels.flatten(1).to(dtype)) + prompt)
        return F.relu(self.layers[1](hidden))

    def _logits(self, hidden: Float[Tensor, "B H"]) -> Float[Tensor, "B L N"]:
        return self.lm_head(hidden).float().view(len(hidden), self.num_action_tokens, -1)
