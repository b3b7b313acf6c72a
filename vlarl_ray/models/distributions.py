"""Distributions over action chunks: one object that samplers draw from and learners score, whatever the kind of policy.

    model(inputs, samples).actions ─► .sample(temperature, noise)      what the sampler draws
                                   ─► .log_prob(samples, temperature)  what the learner scores: the same distribution
                                   ─► .entropy(temperature)

A *sample* is what was drawn for each of the L = K*D numbers of a chunk: an action token's id, or a continuous number
before any clipping (the simulator clips; that is no part of the density). A policy without such a closed form, like a
flow policy, passes by giving an `ActionDistribution` of its own whose `log_prob` scores the sampled path.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt64
from torch import Tensor

from vlarl_ray.models.action_tokens import action_entropy, action_logprobs, choose_columns, gumbel_noise

Samples = Int64[Tensor, "B L"] | Float32[Tensor, "B L"]


class ActionDistribution(ABC):
    """Distribution of B chunks of L numbers each, independent given the observation (and, for tokens, those before).

    Temperature 0 draws the most likely chunk, whose log-probabilities are then those of temperature 1. Make it a
    dataclass: FSDP must find the tensors of a model's output, and looks into those.
    """

    @abstractmethod
    def sample(self, *, temperature: float, noise: Float[Tensor, "B L *N"] | None) -> Samples:
        """Draw a chunk for each row; deterministic given the noise.

        Args:
            temperature: How spread the draws are.
            noise: From `VLAModel.draw_noise`; None if and only if the temperature is 0.
        """

    @abstractmethod
    def log_prob(self, samples: Samples, *, temperature: float) -> Float32[Tensor, "B L"]:
        """Log-probability, or log-density, of each number of a chunk."""

    @abstractmethod
    def entropy(self, *, temperature: float) -> Float32[Tensor, "B L"]:
        """Entropy of each number, nats."""

    @abstractmethod
    def mode_error(self, samples: Samples) -> Float32[Tensor, "B L"]:
        """How far the most likely chunk is from `samples`: 0 or 1 for a token, else the absolute difference."""


@dataclass(eq=False)
class TokenDistribution(ActionDistribution):
    """Action tokens under the masked, tempered softmax."""

    logits: Float[Tensor, "B L N"]
    """Over the N action bins only; everything else has probability zero."""
    first_token: int
    """Vocabulary id of column 0."""

    def sample(self, *, temperature: float, noise: Float[Tensor, "B L *N"] | None) -> Samples:
        """Draw a token for each position, with Gumbel noise."""
        return choose_columns(self.logits, temperature=temperature, gumbel=noise) + self.first_token

    def log_prob(self, samples: Samples, *, temperature: float) -> Float32[Tensor, "B L"]:
        """Log-probability of each token."""
        return action_logprobs(self.logits, samples - self.first_token, temperature=temperature)

    def entropy(self, *, temperature: float) -> Float32[Tensor, "B L"]:
        """Entropy of each token's distribution."""
        return action_entropy(self.logits, temperature=temperature)

    def mode_error(self, samples: Samples) -> Float32[Tensor, "B L"]:
        """1 where the most likely token is another."""
        return (self.logits.argmax(-1) + self.first_token != samples).float()


@dataclass(eq=False)
class LocationScale(ActionDistribution):
    """Continuous numbers at `location` with a spread of `exp(log_scale)`, which temperature multiplies."""

    location: Float[Tensor, "B L"]
    """Most likely numbers, normalised action units."""
    log_scale: Float[Tensor, "B L"]
    """Natural log of the spread; clamped to `bounds` when made, so for sampler and scorer alike."""
    bounds: tuple[float, float]
    """Least and largest `log_scale`."""

    def __post_init__(self) -> None:
        self.location = self.location.float()
        self.log_scale = self.log_scale.float().clamp(*self.bounds)

    def sample(self, *, temperature: float, noise: Float[Tensor, "B L *N"] | None) -> Samples:
        """Shift and scale standard noise."""
        if (temperature > 0) != (noise is not None):
            raise ValueError(f"temperature = {temperature}: noise must be given if and only if it is positive.")
        if noise is None:
            return self.location.clone()
        return self.location + self._log_scale(temperature).exp() * noise

    def log_prob(self, samples: Samples, *, temperature: float) -> Float32[Tensor, "B L"]:
        """Log-density of each number."""
        log_scale = self._log_scale(temperature)
        return self._standard_log_prob((samples - self.location) / log_scale.exp()) - log_scale

    def entropy(self, *, temperature: float) -> Float32[Tensor, "B L"]:
        """Differential entropy of each number."""
        return self._log_scale(temperature) + self._standard_entropy

    def mode_error(self, samples: Samples) -> Float32[Tensor, "B L"]:
        """Distance from the location."""
        return (samples - self.location).abs()

    def _log_scale(self, temperature: float) -> Tensor:
        if temperature < 0:
            raise ValueError(f"temperature = {temperature} is negative; it must be 0 (no noise) or more.")
        return self.log_scale + math.log(temperature or 1.0)

    _standard_entropy: ClassVar[float]

    @abstractmethod
    def _standard_log_prob(self, standard: Tensor) -> Tensor:
        """Log-density at location 0 and scale 1."""


class Gaussian(LocationScale):
    """Normal distribution; the scale is its standard deviation."""

    _standard_entropy = 0.5 * math.log(2 * math.pi * math.e)

    def _standard_log_prob(self, standard: Tensor) -> Tensor:
        return -0.5 * standard.square() - 0.5 * math.log(2 * math.pi)


class Laplace(LocationScale):
    """Double exponential distribution; the scale is its mean absolute deviation b."""

    _standard_entropy = 1.0 + math.log(2.0)

    def _standard_log_prob(self, standard: Tensor) -> Tensor:
        return -standard.abs() - math.log(2.0)


def standard_noise(kind: str, keys: UInt64[np.ndarray, "B 2"], shape: tuple[int, ...]) -> Float32[np.ndarray, "B ..."]:
    """Draw the noise that `sample` turns into chunks; each row's depends on its 128-bit Philox key alone.

    Args:
        kind: `tokens` (Gumbel), `gaussian` or `laplace`.
        keys: One key per row, see `TaskSpec.noise_key`.
        shape: Of one row's noise.
    """
    if kind == "tokens":
        return gumbel_noise(keys, shape)
    noise = np.empty((len(keys), *shape), dtype=np.float32)
    for row, key in zip(noise, keys, strict=True):
        generator = np.random.Generator(np.random.Philox(key=key))
        row[...] = generator.standard_normal(shape) if kind == "gaussian" else generator.laplace(size=shape)
    return noise


def samples_to_torch(samples: np.ndarray) -> Samples:
    """Copy recorded samples to a tensor: token ids as int64, numbers as fp32."""
    return torch.from_numpy(samples.astype(np.int64 if samples.dtype.kind == "i" else np.float32))


def samples_to_numpy(samples: Tensor) -> np.ndarray:
    """Turn drawn samples into what is recorded: token ids as int32, numbers as fp32."""
    return samples.to(torch.float32 if samples.is_floating_point() else torch.int32).cpu().numpy()
