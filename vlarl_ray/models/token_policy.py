"""What policies that act in tokens share: tokenizers, normalisation of actions, and their folder on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.action_tokens import ActionNormalizer, ActionTokenizer
from vlarl_ray.models.base import VLAModel
from vlarl_ray.models.heads import ValueHead
from vlarl_ray.models.lora import adapters_disabled
from vlarl_ray.models.tokenizer import PromptTokenizer


class TokenPolicyModel(VLAModel):
    """A model whose actions are the `num_action_bins` last tokens of its vocabulary."""

    value_head: ValueHead

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PromptTokenizer | None = None,
        *,
        normalizer: ActionNormalizer | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the model with arbitrary weights (see `new_policy` and `load_policy`).

        Args:
            config: Dimensions.
            tokenizer: For `encode_prompts`; None where prompts come as ids.
            normalizer: Between env units and [-1, 1]; None passes actions through.
            metadata: JSON facts to keep with the weights, like camera and render profile of the training data.
        """
        super().__init__()
        self.model_config = config
        self.tokenizer = tokenizer
        self.normalizer = normalizer or ActionNormalizer.identity(config.action_dim)
        self.metadata = dict(metadata or {})
        self.chunk_length, self.action_dim = config.chunk_length, config.action_dim
        self.num_action_tokens = config.chunk_length * config.action_dim
        self.action_tokenizer = ActionTokenizer(config.text_vocab_size + config.num_action_bins, config.num_action_bins)
        self.first_action_token = self.action_tokenizer.first_token

    @property
    @abstractmethod
    def action_head(self) -> nn.Linear:
        """The layer that gives the logits; a new model starts with small weights there."""

    def encode_prompts(self, instructions: Sequence[str]) -> tuple[Int64[Tensor, "B N"], Int64[Tensor, " B"]]:
        """Turn instructions into padded prompt ids and their lengths."""
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer, so it cannot encode instructions; pass prompt ids, or a tokenizer."
            )
        return self.tokenizer.encode_batch(instructions, max_tokens=self.model_config.max_prompt_tokens)

    def decode_actions(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B K D"]:
        """Turn action tokens into env actions (fp32, env units)."""
        actions = self.action_tokenizer.decode(tokens).view(-1, self.chunk_length, self.action_dim)
        return self.normalizer.unnormalize(actions)

    def encode_actions(self, actions: Float[Tensor, "B K D"]) -> Int64[Tensor, "B L"]:
        """Turn env actions into action tokens."""
        return self.action_tokenizer.encode(self.normalizer.normalize(actions)).flatten(1)

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Context in which the model is the one before LoRA (the reference policy)."""
        return adapters_disabled(self)

    def save(self, folder: Path) -> None:
        """Write a policy folder: `config.json`, `model.safetensors`, `tokenizer.json`. LoRA must not be attached."""
        from vlarl_ray.models.policy import save_policy  # policy.py builds models, so it imports this module

        save_policy(self, folder)
