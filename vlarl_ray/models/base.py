"""What a policy model must offer, to the learner (differentiable scoring) and to the engines (sampling)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn


@dataclass(frozen=True)
class PolicyInputs:
    """B observations as a model takes them; preprocessing happens inside the model, on its device."""

    images: UInt8[Tensor, "B V H W 3"]
    """Raw RGB frames."""
    prompt_ids: Int64[Tensor, "B N"]
    """Right-padded prompts, all of the model's fixed length N."""
    prompt_lengths: Int64[Tensor, " B"]
    """Tokens of each prompt that are not padding."""
    proprio: Float[Tensor, "B P"]

    def rows(self, index: Tensor | slice) -> PolicyInputs:
        """Select rows."""
        return PolicyInputs(self.images[index], self.prompt_ids[index], self.prompt_lengths[index], self.proprio[index])

    def to(self, device: torch.device | str) -> PolicyInputs:
        """Copy to a device."""
        return PolicyInputs(
            self.images.to(device), self.prompt_ids.to(device), self.prompt_lengths.to(device), self.proprio.to(device)
        )


@dataclass(frozen=True)
class PolicyOutput:
    """What one forward pass says of B observations."""

    logits: Float[Tensor, "B L N"]
    """fp32, over the N action bins only (everything else has probability zero), before tempering."""
    values: Float[Tensor, " B"]
    """fp32 state values, read at the first action position (h0)."""


class VLAModel(nn.Module, ABC):
    """A policy over action chunks with a value head. One instance is used either to train or to serve.

    `forward` is the only entry point of training, so that FSDP's hooks see every call.
    """

    num_action_tokens: int
    """L = K * D."""
    chunk_length: int
    """K env steps per decision."""
    action_dim: int
    """D."""
    first_action_token: int
    """Vocabulary id of column 0 of `PolicyOutput.logits`."""
    critic: Literal["shared", "separate"] = "shared"
    """Whether the value is read from the policy's pass, or from another one with the critic's own adapters."""
    detach_value: bool = False
    """Whether value gradients stop at the backbone."""

    @abstractmethod
    def encode_prompts(self, instructions: Sequence[str]) -> tuple[Int64[Tensor, "B N"], Int64[Tensor, " B"]]:
        """Turn instructions into padded prompt ids and their lengths.

        Raises:
            ValueError: If a prompt is longer than the model's fixed length.
        """

    @abstractmethod
    def forward(self, inputs: PolicyInputs, tokens: Int64[Tensor, "B L"] | None = None) -> PolicyOutput:
        """Score: logits of every action position given `tokens` before it, and the value.

        Args:
            inputs: Observations.
            tokens: Vocabulary ids of the chunks to score. Parallel decoding does not look at them and takes None too.
        """

    @abstractmethod
    def sample(
        self, inputs: PolicyInputs, *, temperature: float, gumbel: Float[Tensor, "B L N"] | None
    ) -> tuple[Int64[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Draw chunks (argmax of tempered logits + `gumbel`), with their log-probabilities.

        The log-probabilities are those `forward` and `action_logprobs` give for the same tokens and temperature;
        at temperature 0 tokens are greedy and the log-probabilities those of temperature 1.
        """

    @abstractmethod
    def decode_actions(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B K D"]:
        """Turn action tokens into env actions (fp32, env units)."""

    @abstractmethod
    def encode_actions(self, actions: Float[Tensor, "B K D"]) -> Int64[Tensor, "B L"]:
        """Turn env actions into action tokens (inverse of `decode_actions` up to half a bin)."""

    @abstractmethod
    def fsdp_units(self) -> Iterator[nn.Module]:
        """Submodules to shard one by one, in forward order (decoder layers, value head); the root comes last."""

    @abstractmethod
    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Context in which the model is the one before LoRA (the reference policy)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a policy folder: `config.json`, `model.safetensors` (official names), tokenizer. LoRA must be off."""
