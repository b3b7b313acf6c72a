"""What policies over action chunks share: the kind of action head, normalisation, their folder on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt64
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.action_tokens import ActionNormalizer, ActionTokenizer
from vlarl_ray.models.base import PolicyInputs, VLAModel
from vlarl_ray.models.distributions import (
    ActionDistribution,
    Gaussian,
    Laplace,
    Samples,
    TokenDistribution,
    standard_noise,
)
from vlarl_ray.models.heads import ValueHead
from vlarl_ray.models.lora import adapters_disabled
from vlarl_ray.models.proprio import ProprioNormalizer
from vlarl_ray.models.tokenizer import PromptTokenizer


class ChunkPolicyModel(VLAModel):
    """A model whose `output_layer` gives the distribution of a chunk, in normalised action units.

    `tokens`: each number is one of the `num_action_bins` last tokens of the vocabulary. `gaussian` and `laplace`: it is
    continuous, with a location and a scale. `l1`: it is the location alone, fitted by absolute error; such a policy
    acts, but has no likelihood to train by RL until it is given a scale (`add_scale_head`).
    """

    value_head: ValueHead

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PromptTokenizer | None = None,
        *,
        normalizer: ActionNormalizer | None = None,
        proprio_normalizer: ProprioNormalizer | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the model with arbitrary weights (see `new_policy` and `load_policy`).

        Args:
            config: Dimensions.
            tokenizer: For `encode_prompts`; None where prompts come as ids.
            normalizer: Between env units and [-1, 1]; None passes actions through.
            proprio_normalizer: From raw proprioception to [-1, 1]; None passes it through.
            metadata: JSON facts to keep with the weights, like camera and render profile of the training data.

        Raises:
            ValueError: If `proprio_normalizer` is of another number of dimensions than `config.proprio_dim`.
        """
        super().__init__()
        self.model_config = config
        self.tokenizer = tokenizer
        self.normalizer = normalizer or ActionNormalizer.identity(config.action_dim)
        if proprio_normalizer is not None and len(proprio_normalizer.q01) != config.proprio_dim:
            raise ValueError(
                f"proprio statistics have {len(proprio_normalizer.q01)} dimensions, but model.proprio_dim = "
                f"{config.proprio_dim}; they must be equal."
            )
        self.proprio_normalizer = proprio_normalizer
        self.metadata = dict(metadata or {})
        self.chunk_length, self.action_dim = config.chunk_length, config.action_dim
        self.num_action_tokens, _ = self.sample_space(config)
        self.action_tokenizer = ActionTokenizer(config.text_vocab_size + config.num_action_bins, config.num_action_bins)
        self.first_action_token = self.action_tokenizer.first_token

    @classmethod
    def for_instructions(
        cls,
        config: ModelConfig,
        instructions: Sequence[str],
        *,
        normalizer: ActionNormalizer | None = None,
        proprio_normalizer: ProprioNormalizer | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> ChunkPolicyModel:
        """Make a model that can encode `instructions`; its weights are arbitrary (see `new_policy`).

        Raises:
            ValueError: If a prompt is longer than `config.max_prompt_tokens`.
        """
        tokenizer = PromptTokenizer.train(instructions, vocab_size=config.text_vocab_size, style=config.prompt_style)
        tokenizer.encode_batch(list(instructions), max_tokens=config.max_prompt_tokens)
        return cls(config, tokenizer, normalizer=normalizer, proprio_normalizer=proprio_normalizer, metadata=metadata)

    @property
    def has_likelihood(self) -> bool:
        """False for `l1`, whose unit spread is no more than a way to fit the location."""
        return self.model_config.action_head != "l1"

    @property
    @abstractmethod
    def output_layer(self) -> nn.Linear:
        """The layer that gives logits or locations; a new model starts with small weights there."""

    def distribution(
        self, head: Float[Tensor, "B L *N"], log_scale: Float[Tensor, "B L"] | None = None
    ) -> ActionDistribution:
        """Make the distribution of a chunk.

        Args:
            head: Logits (`tokens`) or locations.
            log_scale: Output of the scale head, where there is one.
        """
        kind = self.model_config.action_head
        if kind == "tokens":
            return TokenDistribution(head.float(), self.first_action_token)
        if log_scale is None:  # unit scale: its log-likelihood is the absolute error, up to a constant
            return Laplace(head, torch.zeros_like(head), (0.0, 0.0))
        bounds = self.model_config.log_scale_range
        return Gaussian(head, log_scale, bounds) if kind == "gaussian" else Laplace(head, log_scale, bounds)

    def normalized_proprio(self, inputs: PolicyInputs) -> Float[Tensor, "B P"]:
        """Give proprioception as the model reads it.

        Raises:
            ValueError: If it has other dimensions than the model reads.
        """
        if inputs.proprio.shape[1] != self.model_config.proprio_dim:
            raise ValueError(
                f"observations hold {inputs.proprio.shape[1]} proprioception dimensions; this model reads "
                f"{self.model_config.proprio_dim}."
            )
        normalizer = self.proprio_normalizer
        return inputs.proprio if normalizer is None else normalizer.normalize(inputs.proprio)

    def draw_noise(self, keys: UInt64[np.ndarray, "B 2"]) -> Float[Tensor, "B L *N"]:
        """Draw the noise of one chunk per key."""
        config = self.model_config
        bins = (config.num_action_bins,) if config.action_head == "tokens" else ()
        return torch.from_numpy(standard_noise(config.action_head, keys, (self.num_action_tokens, *bins)))

    def encode_prompts(self, instructions: Sequence[str]) -> tuple[Int64[Tensor, "B N"], Int64[Tensor, " B"]]:
        """Turn instructions into padded prompt ids and their lengths."""
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, so it cannot encode instructions; pass prompt ids, or a tokenizer."
            )
        return self.tokenizer.encode_batch(instructions, max_tokens=self.model_config.max_prompt_tokens)

    def decode_actions(self, tokens: Samples) -> Float[Tensor, "B K D"]:
        """Turn samples into env actions (fp32, env units)."""
        is_token = self.model_config.action_head == "tokens"
        actions = self.action_tokenizer.decode(tokens) if is_token else tokens
        return self.normalizer.unnormalize(actions.view(-1, self.chunk_length, self.action_dim))

    def encode_actions(self, actions: Float[Tensor, "B K D"]) -> Samples:
        """Turn env actions into samples."""
        numbers = self.normalizer.normalize(actions)
        is_token = self.model_config.action_head == "tokens"
        return (self.action_tokenizer.encode(numbers) if is_token else numbers.float()).flatten(1)

    def check_samples(self, samples: Samples) -> None:
        """Refuse tokens that are no action.

        Raises:
            ValueError: If there is one.
        """
        if not samples.is_floating_point():
            self.action_tokenizer.columns(samples)

    def reset_special(self, generator: torch.Generator) -> None:
        """Set what `new_policy` leaves arbitrary: buffers, and parameters of layers it does not know."""
        del generator

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Context in which the model is the one before LoRA (the reference policy)."""
        return adapters_disabled(self)

    def save(self, folder: Path) -> None:
        """Write a policy folder: `config.json`, `model.safetensors`, `tokenizer.json`. LoRA must not be attached."""
        from vlarl_ray.models.policy import save_policy  # policy.py builds models, so it imports this module

        save_policy(self, folder)
