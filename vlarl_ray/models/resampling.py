"""Resizing of 8-bit frames that gives the same bits on every device and in every batch.

Each resize is one matrix per axis. Weights are multiples of a power of two, so coarse that float64 holds every product
and every partial sum without rounding: in whatever order a device adds, the result is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

PillowKernel = Literal["bilinear", "bicubic"]

_PILLOW_BITS = 22
"""Fractional bits of Pillow's weights for 8-bit images."""
_WEIGHT_BITS, _BETWEEN_BITS = 26, 16
"""Fractional bits of TensorFlow-like weights, and of levels between the axes: with 10 before the point they fill 52."""


def pillow_resize(
    frames: UInt8[Tensor, "N H W C"], size: tuple[int, int], *, kernel: PillowKernel
) -> UInt8[Tensor, "N h w C"]:
    """Resize as Pillow does an 8-bit image, to the bit: one axis after the other, rounded to 8 bit after each.

    The width comes first, unless the height shrinks by more than twice as many pixels. That is Pillow 13's rule; older
    ones always begin with the width, and so give other levels there, but never from square to square.

    Args:
        frames: Grey levels 0..255.
        size: Height and width of the result; an axis that has it already is not touched.
        kernel: Widened when shrinking (antialiased).

    Source:
        Pillow 13, `src/libImaging/Resample.c`.
    """
    (height, width), device = frames.shape[1:3], frames.device
    pixels = frames.permute(0, 3, 1, 2)
    height_first = height - size[0] > max(0, 2 * (width - size[1]))
    for axis in ("height", "width") if height_first else ("width", "height"):
        if axis == "width" and width != size[1]:
            levels = pixels.double() @ _pillow_matrix(kernel, width, size[1], device).T
            pixels = _to_uint8(torch.floor(levels + 0.5))
        if axis == "height" and height != size[0]:
            levels = _pillow_matrix(kernel, height, size[0], device) @ pixels.double()
            pixels = _to_uint8(torch.floor(levels + 0.5))
    return pixels.permute(0, 2, 3, 1).contiguous()


def lanczos_levels(frames: UInt8[Tensor, "N H W C"], size: tuple[int, int]) -> Float64[Tensor, "N h w C"]:
    """Resize with Lanczos-3, antialiased, as TensorFlow does, without rounding to 8 bit between the axes or at the end.

    Args:
        frames: Grey levels 0..255.
        size: Height and width of the result.

    Returns:
        Grey levels, which may overshoot 0..255. `round_levels` makes a frame of them.

    Source:
        TensorFlow's `scale_and_translate` op with kernel `lanczos3`, which adds up in float32: within 1e-4 levels.
    """
    rows = _lanczos_matrix(frames.shape[1], size[0], frames.device)
    columns = _lanczos_matrix(frames.shape[2], size[1], frames.device)
    return _separable(frames, rows, columns)


def round_levels(levels: Float64[Tensor, "N H W C"]) -> UInt8[Tensor, "N H W C"]:
    """Round grey levels to 8 bit, half to even, and clip."""
    return _to_uint8(levels.round())


def center_crop_levels(frames: UInt8[Tensor, "N H W C"], area: float) -> Float64[Tensor, "N H W C"]:
    """Cut a centred piece of `area` (a fraction; each side keeps its square root) and scale it back, bilinearly.

    Samples lie evenly between the piece's first and last, without antialiasing, as TensorFlow's `crop_and_resize`.

    Returns:
        Grey levels in 0..255, unrounded. `truncate_levels` makes a frame of them.
    """
    rows, columns = (_crop_matrix(length, area, frames.device) for length in frames.shape[1:3])
    return _separable(frames, rows, columns)


def truncate_levels(levels: Float64[Tensor, "N H W C"]) -> UInt8[Tensor, "N H W C"]:
    """Turn grey levels into 8 bit as TensorFlow's `convert_image_dtype` does: floor(255.5 x) for x in [0, 1]."""
    return _to_uint8(torch.floor(levels * (255.5 / 255)))


def _to_uint8(levels: Tensor) -> Tensor:
    return levels.clamp(0, 255).to(torch.uint8)


def _separable(frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    pixels = frames.permute(0, 3, 1, 2).double()
    between = torch.round(pixels @ columns.T * 2**_BETWEEN_BITS) / 2**_BETWEEN_BITS
    return (rows @ between).permute(0, 2, 3, 1)


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    # Horner's scheme in Pillow's order of operations: another one differs in the last bit, and a weight then rounds
    # the other way once in a while.
    x, a = np.abs(x), -0.5
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


_PILLOW_KERNELS: dict[PillowKernel, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
}


@functools.lru_cache(maxsize=64)
def _pillow_matrix(
    kernel: PillowKernel, size_in: int, size_out: int, device: torch.device
) -> Float64[Tensor, "size_out size_in"]:
    weigh, reach = _PILLOW_KERNELS[kernel]
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = reach * stretch
    center = (np.arange(size_out)[:, None] + 0.5) * scale
    first = np.maximum(np.trunc(center - support + 0.5), 0)
    end = np.minimum(np.trunc(center + support + 0.5), size_in)
    source = np.arange(size_in)[None, :]
    weights = weigh((source - center + 0.5) * (1.0 / stretch))
    weights = np.where((source >= first) & (source < end), weights, 0.0)
    # cumsum adds from left to right, as Pillow does; sum adds pairwise
    weights = weights / np.cumsum(weights, axis=1)[:, -1:]
    fixed = np.trunc(weights * 2**_PILLOW_BITS + np.copysign(0.5, weights))
    return torch.from_numpy(fixed / 2**_PILLOW_BITS).to(device)


@functools.lru_cache(maxsize=64)
def _lanczos_matrix(size_in: int, size_out: int, device: torch.device) -> Float64[Tensor, "size_out size_in"]:
    # Positions in float32, as TensorFlow has them: exact ones move a level by 4e-4, which tips the odd one over.
    one, half = np.float32(1), np.float32(0.5)
    ratio = one / (np.float32(size_out) / np.float32(size_in))
    center = (np.arange(size_out, dtype=np.float32)[:, None] + half) * ratio
    source = np.arange(size_in, dtype=np.float32)[None, :] + half
    x = (source - center).astype(np.float64) / max(ratio, one)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return _coarse(weights / weights.sum(axis=1, keepdims=True), device)


@functools.lru_cache(maxsize=64)
def _crop_matrix(size: int, area: float, device: torch.device) -> Float64[Tensor, "size size"]:
    # TensorFlow's operations one by one, in float32: a product shortened here moves samples by 4e-6 pixels.
    side, last = np.sqrt(np.float32(area)), np.float32(size - 1)
    start = (1 - side) / 2
    step = (start + side - start) * last / max(last, np.float32(1))
    position = start * last + step * np.arange(size, dtype=np.float32)
    weights = _bilinear(np.arange(size)[None, :] - position[:, None].astype(np.float64))
    return _coarse(weights, device)


def _coarse(weights: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.round(weights * 2**_WEIGHT_BITS) / 2**_WEIGHT_BITS).to(device)
