"""How camera frames become a model's pixels: a section of the model's config, stored with every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

FrameStep = Literal["rotate180", "jpeg", "lanczos", "center_crop"]
Strategy = Literal["resize-naive", "letterbox", "resize-crop"]
Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# By timm's name: ours, and torchvision's code in `tvf_resize_params`. Official processors resize 8-bit pixels only.
_OFFICIAL_INTERPOLATIONS: Mapping[str, tuple[Literal["bilinear-8bit", "bicubic"], int]] = {
    "bilinear": ("bilinear-8bit", 2),
    "bicubic": ("bicubic", 3),
}


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class PreprocessingConfig:
    """From camera frames to pixels (openvla): frame steps, then resize to the model's size, then normalise per tower.

    Sampler and learner both follow it, inside the model. `models.preprocessing.preprocess` carries it out.
    """

    frame_steps: tuple[FrameStep, ...] = ()
    """Done on 8-bit frames first, in this order; OpenVLA on LIBERO has rotate180, jpeg, lanczos, center_crop."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """`jpeg`: quality of the encoding and decoding, by Pillow on the CPU."""
    lanczos_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """`lanczos`: side of the square that it gives, pixels; None takes the model's."""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 0.9
    """`center_crop`: fraction of the area (not of the side) to keep; it is scaled back to the size before."""
    resize_strategy: Strategy = "resize-naive"
    """To a square: stretch both sides, pad to a square first, or scale the shorter side and cut the longer."""
    interpolation: Literal["bilinear", "bilinear-8bit", "bicubic"] = "bilinear"
    """`bilinear` is torch's on floats; `bilinear-8bit` and `bicubic` are Pillow's, as in official processors."""
    means: tuple[tuple[Mean, Mean, Mean], tuple[Mean, Mean, Mean]] = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
    """RGB means of the DINOv2 and the SigLIP tower, white = 1; the released ones are ImageNet's in bfloat16."""
    stds: tuple[tuple[Std, Std, Std], tuple[Std, Std, Std]] = (
        (0.228515625, 0.2236328125, 0.224609375),
        (0.5, 0.5, 0.5),
    )
    """RGB standard deviations of the two towers, likewise."""

    @property
    def letterbox_fill(self) -> tuple[int, int, int]:
        """Colour that `letterbox` pads with, in both towers: the mean of the second."""
        red, green, blue = (int(mean * 255) for mean in self.means[1])
        return red, green, blue

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> PreprocessingConfig:
        """Read the processor part of an official `preprocessor_config.json`; frame steps are not recorded there.

        Means and stds come from `tvf_normalize_params` where the file has them: those are what the official processor
        applies, and in released files `means` may hold the numbers before rounding to bfloat16.

        Args:
            official: The parsed file. Its image size is `official_image_size(official)`.

        Raises:
            ValueError: If a field is missing, has a value that the two towers here cannot follow, or contradicts
                another.

        Source:
            `prismatic/extern/hf/processing_prismatic.py` of the openvla repository.
        """
        size = official_image_size(official)
        if not _field(official, "use_fused_vision_backbone"):
            raise _refusal("use_fused_vision_backbone", False, "must be true: the model has two towers")
        strategy = _field(official, "image_resize_strategy")
        if strategy not in ("resize-naive", "letterbox", "resize-crop"):
            raise _refusal("image_resize_strategy", strategy, "must be resize-naive, letterbox or resize-crop")
        name = _same_for_both(official, "interpolations")
        if name not in _OFFICIAL_INTERPOLATIONS:
            raise _refusal("interpolations", name, f"must be one of {', '.join(_OFFICIAL_INTERPOLATIONS)}")
        applied = official.get("tvf_normalize_params")
        config = cls(
            resize_strategy=strategy,
            interpolation=_OFFICIAL_INTERPOLATIONS[name][0],
            means=_triples([item["mean"] for item in applied] if applied else _field(official, "means"), "means"),
            stds=_triples([item["std"] for item in applied] if applied else _field(official, "stds"), "stds"),
        )
        expected = config.to_official(size)
        for key in ("tvf_resize_params", "tvf_crop_params", "tvf_do_letterbox", "tvf_letterbox_fill"):
            if key in official and _meaning(official[key]) != _meaning(expected[key]):
                advice = f"contradicts the file's other fields, which give {expected[key]!r}; mend whichever is wrong"
                raise _refusal(key, official[key], advice)
        return config

    def to_official(self, image_size: int) -> dict[str, Any]:
        """Write the processor part as the fields of a `preprocessor_config.json`; frame steps have no place there.

        Args:
            image_size: The model's, pixels.

        Raises:
            ValueError: If the interpolation is `bilinear`, which no official processor can do.
        """
        names = {ours: (name, code) for name, (ours, code) in _OFFICIAL_INTERPOLATIONS.items()}
        if self.interpolation not in names:
            raise ValueError(
                f"preprocessing.interpolation = {self.interpolation!r} has no official counterpart; allowed for export "
                f"are {', '.join(names)}. The policy must have been trained with the one you set."
            )
        name, code = names[self.interpolation]
        is_letterbox = self.resize_strategy == "letterbox"
        resize = {
            "size": [image_size, image_size] if self.resize_strategy == "resize-naive" else image_size,
            "interpolation": code,
            "max_size": None,
            "antialias": True,
        }
        means, stds = ([list(triple) for triple in triples] for triples in (self.means, self.stds))
        return {
            "use_fused_vision_backbone": True,
            "image_resize_strategy": self.resize_strategy,
            "input_sizes": [[3, image_size, image_size] for _ in range(2)],
            "interpolations": [name, name],
            "means": means,
            "stds": stds,
            "tvf_resize_params": [dict(resize) for _ in range(2)],
            "tvf_crop_params": [{"output_size": [image_size, image_size]} for _ in range(2)],
            "tvf_normalize_params": [
                {"mean": list(mean), "std": list(std), "inplace": False}
                for mean, std in zip(self.means, self.stds, strict=True)
            ],
            "tvf_do_letterbox": is_letterbox,
            "tvf_letterbox_fill": list(self.letterbox_fill) if is_letterbox else None,
            "_processor_class": None,
            "image_processor_type": "PrismaticImageProcessor",
        }


def official_image_size(official: Mapping[str, Any]) -> int:
    """Read the side of the square, in pixels, that an official processor gives.

    Raises:
        ValueError: If the file has none, or another for each tower or side.
    """
    size = _same_for_both(official, "input_sizes")
    if len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise _refusal("input_sizes", size, "must be [3, side, side] for each tower")
    return int(size[1])


def _field(official: Mapping[str, Any], key: str) -> Any:
    if official.get(key) is None:
        raise ValueError(f"preprocessor_config.json lacks {key}; it must say it, as the official defaults vary.")
    return official[key]


def _same_for_both(official: Mapping[str, Any], key: str) -> Any:
    values = _field(official, key)
    if len(values) != 2 or values[0] != values[1]:
        raise _refusal(key, values, "must hold one entry for each of two towers, and the same")
    return values[0]


def _triples(values: Any, key: str) -> Any:
    if len(values) != 2 or any(len(triple) != 3 for triple in values):
        raise _refusal(key, values, "must hold red, green and blue for each of two towers")
    return tuple(tuple(triple) for triple in values)


def _meaning(value: Any) -> Any:
    """Make values comparable: tuples as lists, and without what has no effect on a Pillow image (`antialias`)."""
    plain = json.loads(json.dumps(value))
    if isinstance(plain, list):
        return [
            {name: entry for name, entry in item.items() if name != "antialias"} if isinstance(item, dict) else item
            for item in plain
        ]
    return plain


def _refusal(key: str, value: Any, advice: str) -> ValueError:
    return ValueError(f"preprocessor_config.json: {key} = {value!r}: {advice}.")
