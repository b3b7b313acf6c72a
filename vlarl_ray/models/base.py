"""What a policy model must offer, to the learner (differentiable scoring) and to the engines (sampling)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8, UInt64
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.distributions import ActionDistribution, Samples


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

    actions: ActionDistribution
    """Of the chunk, before tempering; fp32."""
    values: Float[Tensor, " B"]
    """fp32 state values, read at the first action position (h0)."""


class VLAModel(nn.Module, ABC):
    """A policy over action chunks with a value head. One instance is used either to train or to serve.

    `forward` is the only entry point of training, so that FSDP's hooks see every call.
    """

    samples_per_number: ClassVar[int] = 1
    """Numbers of a sample for each number of an action: more than 1 where a sample is a path, as in a flow policy."""
    tokens_of_chunk: ClassVar[bool] = False
    """Whether a sample's numbers say what the chunk is as a whole, as the codes of a skill do: they are then scored all
    together, once any env step was executed. Else they are step-major."""
    frozen_modules: ClassVar[tuple[str, ...]] = ()
    """Prefixes of parameter names that RL leaves alone, adapters or not. They are not sharded."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    """Precisions that it can compute in."""
    num_action_tokens: int
    """L, see `sample_space`."""
    chunk_length: int
    """K env steps per decision."""
    action_dim: int
    """D."""
    critic: Literal["shared", "separate"] = "shared"
    """Whether the value is read from the policy's pass, or from another one with the critic's own adapters."""
    detach_value: bool = False
    """Whether value gradients stop at the backbone."""

    @classmethod
    def sample_space(cls, config: ModelConfig) -> tuple[int, range | None]:
        """Say what a sample is: how many numbers (L), and the ids of its tokens; None where they are continuous."""
        first = config.text_vocab_size
        ids = range(first, first + config.num_action_bins) if config.action_head == "tokens" else None
        return config.chunk_length * config.action_dim * cls.samples_per_number, ids

    @property
    def block_length(self) -> int:
        """Env steps that `encode_actions` wants where there are as many: K, or more where samples say more."""
        return self.chunk_length

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Name prefixes of modules that are carried but not computed; they get no adapters and are never gathered."""
        return ()

    @property
    def has_likelihood(self) -> bool:
        """Whether `log_prob` is that of the samples, so that RL can train the policy."""
        return True

    @abstractmethod
    def encode_prompts(self, instructions: Sequence[str]) -> tuple[Int64[Tensor, "B N"], Int64[Tensor, " B"]]:
        """Turn instructions into padded prompt ids and their lengths.

        Raises:
            ValueError: If a prompt is longer than the model's fixed length.
        """

    @abstractmethod
    def forward(self, inputs: PolicyInputs, tokens: Samples | None = None) -> PolicyOutput:
        """Give the distribution of the chunk, and the value.

        Args:
            inputs: Observations.
            tokens: Samples to score: autoregressive decoding conditions each position on those before it. Parallel
                decoding does not look at them and takes None too.
        """

    @abstractmethod
    def sample(
        self, inputs: PolicyInputs, *, temperature: float, noise: Float[Tensor, "B L *N"] | None
    ) -> tuple[Samples, Float[Tensor, "B L"]]:
        """Draw chunks, with their log-probabilities: those that `forward` gives for the same samples and temperature.

        Args:
            inputs: Observations.
            temperature: 0 draws the most likely chunk, scored at temperature 1.
            noise: From `draw_noise`; None if and only if the temperature is 0.
        """

    @abstractmethod
    def draw_noise(self, keys: UInt64[np.ndarray, "B 2"]) -> Float[Tensor, "B L *N"]:
        """Draw what `sample` needs, on the CPU; a row's noise depends on its key alone (see `TaskSpec.noise_key`)."""

    @abstractmethod
    def decode_actions(self, tokens: Samples) -> Float[Tensor, "B K D"]:
        """Turn samples into env actions (fp32, env units)."""

    @abstractmethod
    def encode_actions(self, actions: Float[Tensor, "B K D"]) -> Samples:
        """Turn env actions into samples (inverse of `decode_actions`, up to half a bin for tokens).

        Args:
            actions: Of `block_length` env steps, env units; the K of a chunk will do.
        """

    def key_value_bytes(self, rows: int) -> int:
        """Bytes of keys and values that `sample` keeps from token to token; 0 where it decodes in one pass."""
        del rows
        return 0

    @abstractmethod
    def fsdp_units(self) -> Iterator[nn.Module]:
        """Submodules to shard one by one, in forward order; the value head is the last.

        FSDP gathers a unit's parameters while its `forward` runs, and what is in no unit for the whole pass: name every
        large module, one that is never computed too, as it is then never gathered. The pass must call it as a module.
        """

    @abstractmethod
    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Context in which the model is the one before LoRA (the reference policy)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a policy folder: `config.json`, `model.safetensors` (official names), tokenizer. LoRA must be off."""
