"""A user's policy without a closed-form density: it draws a path, and its likelihood is that of the path."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlarl_ray.models.distributions import ActionDistribution
from vlarl_ray.models.pixel_mlp import PixelMLP

NOISE = 0.3


@dataclass(eq=False)
class Path(ActionDistribution):
    """From a noisy start half-way to the target, in two steps with noise; samples hold both points, step-major."""

    target: Tensor
    shape: tuple[int, int]

    def sample(self, *, temperature, noise):
        points = torch.zeros(len(self.target), 2, self.target.shape[1]) if noise is None else self._points(noise)
        first = 0.5 * self.target + NOISE * temperature * points[:, 0]
        second = 0.5 * (first + self.target) + NOISE * temperature * points[:, 1]
        return self._flat(torch.stack([first, second], 1))

    def log_prob(self, samples, *, temperature):
        points = self._points(samples)
        means = torch.stack([0.5 * self.target, 0.5 * (points[:, 0] + self.target)], 1)
        scale = NOISE * (temperature or 1.0)
        standard = (points - means) / scale
        return self._flat(-0.5 * standard.square() - math.log(scale) - 0.5 * math.log(2 * math.pi))

    def entropy(self, *, temperature):
        each = 0.5 * math.log(2 * math.pi * math.e) + math.log(NOISE * (temperature or 1.0))
        return torch.full((len(self.target), 2 * self.target.shape[1]), each)

    def mode_error(self, samples):
        return (samples - self.sample(temperature=0.0, noise=None)).abs()

    def _points(self, samples: Tensor) -> Tensor:
        steps, dims = self.shape
        return samples.view(-1, steps, 2, dims).transpose(1, 2).flatten(2)

    def _flat(self, points: Tensor) -> Tensor:
        steps, dims = self.shape
        return points.view(-1, 2, steps, dims).transpose(1, 2).flatten(1)


class FlowPolicy(PixelMLP):
    """The toy model, acting by paths; `num_action_tokens` counts both points of each number."""

    samples_per_number = 2

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.lm_head = nn.Linear(config.hidden_size, config.chunk_length * config.action_dim, bias=False)

    @property
    def has_likelihood(self) -> bool:
        return True

    def _actions(self, hidden):
        return Path(self.lm_head(hidden), (self.chunk_length, self.action_dim))

    def draw_noise(self, keys: np.ndarray) -> Tensor:
        rows = [np.random.Generator(np.random.Philox(key=key)).standard_normal(self.num_action_tokens) for key in keys]
        return torch.from_numpy(np.stack(rows)).float()

    def decode_actions(self, tokens):
        return tokens.view(-1, self.chunk_length, 2, self.action_dim)[:, :, 1]

    def encode_actions(self, actions):
        return torch.stack([0.5 * actions, actions], 2).flatten(1)
