"""A policy for toy suites: frames, proprioception and prompt through two layers, the whole chunk at once.

It has the interface of the large models and learns the toy tasks in seconds, so that whole runs fit in a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.base import PolicyInputs, PolicyOutput
from vlarl_ray.models.chunk_policy import ChunkPolicyModel
from vlarl_ray.models.distributions import ActionDistribution, Samples
from vlarl_ray.models.heads import ScaleHead, ValueHead
from vlarl_ray.models.lora import CRITIC, use_adapter


class PixelMLP(ChunkPolicyModel):
    """Two hidden layers of `hidden_size`; frames are resized to `image_size`, of one camera."""

    def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
        """As `ChunkPolicyModel`."""
        super().__init__(config, *args, **kwargs)
        width = config.hidden_size
        self.prompt_embedding = nn.Embedding(config.text_vocab_size, width)
        self.layers = nn.ModuleList([nn.Linear(3 * config.image_size**2, width), nn.Linear(width, width)])
        if config.proprio_dim:
            self.proprio_projector = nn.Linear(config.proprio_dim, width, bias=False)
        per_number = config.num_action_bins if config.action_head == "tokens" else 1
        self.lm_head = nn.Linear(width, self.num_action_tokens * per_number, bias=False)
        if config.action_head in ("gaussian", "laplace"):
            self.scale_head = ScaleHead(width, self.num_action_tokens)
        self.value_head = ValueHead(width, config.value_hidden_sizes)

    @property
    def output_layer(self) -> nn.Linear:
        """The output layer."""
        return self.lm_head

    def forward(self, inputs: PolicyInputs, tokens: Samples | None = None) -> PolicyOutput:
        """Give the distribution of the chunk, and the value; `tokens` are not looked at."""
        del tokens
        hidden = self._hidden(inputs)
        read_out = hidden
        if self.critic == "separate":
            with use_adapter(self, CRITIC):
                read_out = self._hidden(inputs)
        return PolicyOutput(self._actions(hidden), self.value_head(read_out, detach=self.detach_value))

    def sample(
        self, inputs: PolicyInputs, *, temperature: float, noise: Float[Tensor, "B L *N"] | None
    ) -> tuple[Samples, Float[Tensor, "B L"]]:
        """Draw chunks, with their log-probabilities."""
        with torch.no_grad():
            actions = self._actions(self._hidden(inputs))
            samples = actions.sample(temperature=temperature, noise=noise)
            return samples, actions.log_prob(samples, temperature=temperature)

    def fsdp_units(self) -> Iterator[nn.Module]:
        """Yield the hidden layers, then the heads."""
        yield from self.layers
        if self.model_config.action_head in ("gaussian", "laplace"):
            yield self.scale_head
        yield self.value_head

    def _hidden(self, inputs: PolicyInputs) -> Float[Tensor, "B H"]:
        dtype = self.prompt_embedding.weight.dtype
        pixels = inputs.images[:, 0].permute(0, 3, 1, 2).float().div(255)
        size = self.model_config.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        # Standardised by channel: a toy frame is a few bright pixels on grey, and the grey should not be what is loud.
        std, mean = torch.std_mean(pixels, dim=(-2, -1), keepdim=True)
        pixels = (pixels - mean) / (std + 1e-3)
        is_text = torch.arange(inputs.prompt_ids.shape[1], device=pixels.device) < inputs.prompt_lengths[:, None]
        embedded = self.prompt_embedding(inputs.prompt_ids) * is_text[..., None]
        prompt = F.layer_norm(embedded.sum(1), embedded.shape[-1:])  # as loud as the pixels, whatever its length
        hidden = self.layers[0](pixels.flatten(1).to(dtype)) + prompt
        if self.model_config.proprio_dim:
            hidden = hidden + self.proprio_projector(self.normalized_proprio(inputs).to(dtype))
        return F.relu(self.layers[1](F.relu(hidden)))

    def _actions(self, hidden: Float[Tensor, "B H"]) -> ActionDistribution:
        kind, head = self.model_config.action_head, self.lm_head(hidden)
        if kind == "tokens":
            return self.distribution(head.view(len(hidden), self.num_action_tokens, -1))
        return self.distribution(head, None if kind == "l1" else self.scale_head(hidden))
