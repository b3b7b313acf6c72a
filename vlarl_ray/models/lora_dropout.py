"""Dropout on the input of adapters, with masks that belong to rows: the same however rows are spread over passes."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

RowSeeds = Int64[np.ndarray, " B"]
"""What the masks of each row of a pass are drawn from; 32 bits count."""


def row_seeds(
    rows: Int[np.ndarray, " M"], *, num_rows: int, seed: int, version: int, minibatch: int, is_cloning: bool
) -> Int64[np.ndarray, " M"]:
    """Draw the seeds of a minibatch's rows; they depend on nothing but the arguments, so not on the number of ranks.

    Args:
        rows: Indices into the batch.
        num_rows: Of the whole batch.
        seed: Of the run.
        version: Of the weights that are about to be updated.
        minibatch: Optimiser step of the update, from 0, over all epochs.
        is_cloning: Whether the rows are demonstrations, which are numbered from 0 too.
    """
    # The top bit keeps these draws apart from those of the order of rows (`learner.batch.epoch_minibatches`).
    step = 1 << 63 | version << 20 | minibatch << 1 | int(is_cloning)
    key = np.array([seed & (1 << 64) - 1, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).integers(1 << 32, size=num_rows)[rows]


def drop(
    x: Float[Tensor, "*shape"], seeds: Int64[np.ndarray, " B"], *, layer: str, probability: float
) -> Float[Tensor, "*shape"]:
    """Zero elements at random and scale the others by `1 / (1 - probability)`, as PEFT's `lora_dropout` does.

    A layer that is called twice in a pass drops the same places both times.

    Args:
        x: Input of a layer, row by row; R is B, or a multiple of it where a row comes in several parts.
        seeds: See `row_seeds`.
        layer: Name of layer and adapter: each drops other places.
        probability: Of an element to become zero, in [0, 1).
    """
    assert x.shape[0] % len(seeds) == 0, (x.shape, len(seeds))
    noise = torch.empty(len(seeds), x.numel() // len(seeds), device=x.device)
    if not x.is_meta:  # where only shapes count, there is nothing to draw
        generator, salt = torch.Generator(device=x.device), zlib.crc32(layer.encode())
        for row, seed in zip(noise, seeds.tolist(), strict=True):
            row.uniform_(generator=generator.manual_seed(seed ^ salt))
    return x * (noise.view(x.shape) >= probability).to(x.dtype) / (1 - probability)
