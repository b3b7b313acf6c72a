"""From camera frames to a model's pixels, as a `PreprocessingConfig` declares it.

frames -> frame steps, 8 bit -> resize to the model's square -> / 255 -> minus mean, / std, once per tower
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vlarl_ray.models.resampling import (
    center_crop_levels,
    lanczos_levels,
    pillow_resize,
    round_levels,
    truncate_levels,
)
from vlarl_ray.preprocessing_config import FrameStep, PreprocessingConfig

_MAX_FRAMES = 64
"""Resized at once: float64 frames are eight times as large as 8-bit ones."""


def preprocess(
    images: UInt8[Tensor, "B V H W 3"],
    config: PreprocessingConfig,
    *,
    image_size: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B C S S"]:
    """Turn the frames of V cameras into pixels: C = 6 V channels, per camera 3 for DINOv2, then 3 for SigLIP.

    It runs on the frames' device, but for the `jpeg` step, which visits the CPU. An observation's pixels depend on
    neither its batch nor its other cameras. Where frames are resized in 8 bit (frame steps, `bilinear-8bit`,
    `bicubic`), devices agree to the bit; `bilinear` is torch's and may round differently on each.

    Args:
        images: RGB frames as the simulator gives them.
        config: What to do.
        image_size: Side S of the square that the model expects, pixels.
        dtype: Of the result; arithmetic is fp32.
    """
    frames = apply_frame_steps(images.flatten(0, 1), config, image_size=image_size)
    pixels = _to_square(frames, config, image_size)
    mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (config.means, config.stds))
    pixels = (pixels.repeat(1, 2, 1, 1) - mean) / std
    return pixels.reshape(len(images), 6 * images.shape[1], image_size, image_size).to(dtype)


def apply_frame_steps(
    frames: UInt8[Tensor, "N H W 3"], config: PreprocessingConfig, *, image_size: int
) -> UInt8[Tensor, "N h w 3"]:
    """Do the frame steps in the declared order; each takes 8-bit frames and gives some.

    Args:
        frames: Of any cameras.
        config: Which steps.
        image_size: Side that `lanczos` scales to where `config.lanczos_size` is None, pixels.
    """
    size = config.lanczos_size or image_size
    steps: dict[FrameStep, Callable[[Tensor], Tensor]] = {
        "rotate180": lambda part: part.flip(1, 2),
        "jpeg": lambda part: jpeg_round_trip(part, config.jpeg_quality),
        "lanczos": lambda part: round_levels(lanczos_levels(part, (size, size))),
        "center_crop": lambda part: truncate_levels(center_crop_levels(part, config.crop_area)),
    }
    for name in config.frame_steps:
        frames = _in_parts(steps[name], frames)
    return frames


def jpeg_round_trip(frames: UInt8[Tensor, "N H W 3"], quality: int) -> UInt8[Tensor, "N H W 3"]:
    """Encode as JPEG and decode, with Pillow on the CPU: half the resolution in colour, as its default.

    The published evaluations use TensorFlow's codec. Pillow's comes near (39 to 44 dB at quality 95), but differs by
    up to 16 grey levels at hard edges.

    Args:
        frames: On any device.
        quality: 1..100, of libjpeg.
    """
    if frames.is_meta:  # memory is being planned: a copy of the same size
        return torch.empty_like(frames)
    decoded = np.empty(frames.shape, np.uint8)
    for row, frame in zip(decoded, frames.cpu().numpy(), strict=True):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        row[...] = np.asarray(Image.open(file))
    return torch.from_numpy(decoded).to(frames.device)


def _to_square(frames: Tensor, config: PreprocessingConfig, side: int) -> Float[Tensor, "N 3 S S"]:
    """Scale to [0, 1] and to the model's size; 8-bit interpolation comes before the former, torch's after."""
    if config.resize_strategy == "letterbox":
        frames = _pad_to_square(frames, config.letterbox_fill)
    height, width = frames.shape[1:3]
    target = (side, side)
    if config.resize_strategy != "resize-naive":
        short = min(height, width)
        target = (int(side * height / short), int(side * width / short))
    if config.interpolation == "bilinear":
        pixels = _scaled(frames)
        if (height, width) != target:
            pixels = F.interpolate(pixels, target, mode="bilinear", antialias=True, align_corners=False)
    else:
        kernel = "bicubic" if config.interpolation == "bicubic" else "bilinear"
        pixels = _scaled(_in_parts(lambda part: pillow_resize(part, target, kernel=kernel), frames))
    top, left = (round((length - side) / 2) for length in target)
    return pixels[:, :, top : top + side, left : left + side]


def _scaled(frames: Tensor) -> Float[Tensor, "N 3 H W"]:
    return frames.permute(0, 3, 1, 2).to(torch.float32).div(255)


def _pad_to_square(frames: Tensor, fill: tuple[int, int, int]) -> Tensor:
    """Pad the shorter side alike at both ends; where that would be half a pixel, one pixel is left to cut later."""
    count, height, width, _ = frames.shape
    top, left = ((max(height, width) - length) // 2 for length in (height, width))
    padded = frames.new_tensor(fill).repeat(count, height + 2 * top, width + 2 * left, 1)
    padded[:, top : top + height, left : left + width] = frames
    return padded


def _in_parts(step: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    return torch.cat([step(part) for part in frames.split(_MAX_FRAMES)])
