"""Our image preprocessing, action tokenizer and prompts against reference files, each of which may be missing.

Sizes are those of the reference's arrays. A level of 8 bit must be the reference's, unless ours was within 5e-4 of the
middle between two before rounding: there TensorFlow's float32 may round either way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from vlarl_ray.comparison import (
    Group,
    NotComparableError,
    NotCovered,
    Ours,
    Row,
    compare,
    missing,
    read_arrays,
    read_json,
)
from vlarl_ray.models.action_tokens import ActionTokenizer
from vlarl_ray.models.preprocessing import jpeg_round_trip, preprocess
from vlarl_ray.models.resampling import center_crop_levels, lanczos_levels, round_levels, truncate_levels
from vlarl_ray.models.tokenizer import PromptTokenizer, prompt_text, training_text
from vlarl_ray.preprocessing_config import PreprocessingConfig

AN_INPUT = "an input"
_Found = Iterator[tuple[str, Ours | NotCovered]]
_PIXEL_TOLERANCE = 1e-6
_LEVEL_TOLERANCE = 5e-4
"""Of grey levels before rounding."""
_CROP_TOLERANCE = 1e-5
"""Of cropped pixels in [0, 1]."""
_CENTER_TOLERANCE = 6e-8
"""Of bin centres: ours are fp32."""
_OTHER_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "letterbox": {"resize_strategy": "letterbox"},
    "resizecrop": {"resize_strategy": "resize-crop"},
    "imagenet_norm": {
        "means": ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5)),
        "stds": ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5)),
    },
}
"""What an array's name says was other than in `preprocessor_config.json`."""


def rows(folder: Path) -> list[Row]:
    """Compare whichever of the files there are.

    Raises:
        ValueError: If a file is damaged, or `preprocessor_config.json` cannot be followed.
    """
    meta, found = read_json(folder / "meta.json"), []
    for file, list_groups in (("images.npz", _image_groups), ("resize_crop.npz", _frame_groups)):
        if (folder / file).exists():
            arrays = read_arrays(folder / file)
            found += [*missing(meta.get(file.removesuffix(".npz")), arrays, file=file)]
            found += compare(arrays, list_groups(folder, arrays))
    if (folder / "action_tokenizer.npz").exists():
        arrays = read_arrays(folder / "action_tokenizer.npz")
        found += missing(meta.get("action_tokenizer"), arrays, file="action_tokenizer.npz")
        found += compare(arrays, [Group(".+", partial(_tokens, arrays))])
    if (folder / "prompts.json").exists():
        found += _prompts(folder)
    return found


def _image_groups(folder: Path, arrays: Mapping[str, np.ndarray]) -> list[Group]:
    return [Group(rf"{stem}_.+", partial(_image, folder, arrays, stem)) for stem in _stems(arrays)]


def _frame_groups(folder: Path, arrays: Mapping[str, np.ndarray]) -> list[Group]:
    del folder
    return [Group(rf"{stem}_.+", partial(_frame, arrays, stem)) for stem in _stems(arrays)]


def _stems(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the pictures, such as image0."""
    return [match[1] for match in (re.fullmatch(r"([a-z]+\d+)_uint8", name) for name in arrays) if match]


def _image(folder: Path, arrays: Mapping[str, np.ndarray], stem: str) -> _Found:
    """Process one image by every processor that the reference used on it."""
    yield f"{stem}_uint8", NotCovered(AN_INPUT)
    official = read_json(folder / "preprocessor_config.json")
    if not official:
        raise NotComparableError("preprocessor_config.json is missing, so the processor is not known")
    config = PreprocessingConfig.from_official(official)
    image = torch.from_numpy(arrays[f"{stem}_uint8"])[None, None]
    if f"{stem}_resized_uint8" in arrays:
        side = arrays[f"{stem}_resized_uint8"].shape[0]
        pixels = preprocess(image, config, image_size=side)[0]
        mean, std = (pixels.new_tensor(values[:1]).view(-1, 1, 1) for values in (config.means, config.stds))
        resized = ((pixels[:3] * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0)
        yield f"{stem}_resized_uint8", Ours(resized)
    for name, array in arrays.items():
        match = re.fullmatch(rf"{stem}_(?:(\w+)_)?pixel_values", name)
        if match and (match[1] is None or match[1] in _OTHER_PROCESSORS):
            other = replace(config, **_OTHER_PROCESSORS.get(match[1] or "", {}))
            yield name, Ours(preprocess(image, other, image_size=array.shape[-1])[0], _PIXEL_TOLERANCE)


def _frame(arrays: Mapping[str, np.ndarray], stem: str) -> _Found:
    """Do what evaluation on LIBERO does before the processor, each step on the reference's input to it."""
    frames = {name: torch.from_numpy(array)[None] for name, array in arrays.items() if name.startswith(f"{stem}_")}
    yield f"{stem}_uint8", NotCovered(AN_INPUT)
    encoded, resized = frames.get(f"{stem}_jpeg_roundtrip"), frames.get(f"{stem}_resized")
    if encoded is not None:
        pillow = jpeg_round_trip(frames[f"{stem}_uint8"], 95)
        furthest = (pillow.int() - encoded.int()).abs().max() if pillow.shape == encoded.shape else "?"
        yield f"{stem}_jpeg_roundtrip", NotCovered(f"of TensorFlow's codec; Pillow's is up to {furthest} levels off")
    for name, source in (
        (f"{stem}_resized", encoded),
        (f"{stem}_resized_float", encoded),
        (f"{stem}_resized_without_jpeg", frames[f"{stem}_uint8"]),
    ):
        if name not in frames:
            continue
        if source is None:
            yield name, NotCovered(f"{stem}_jpeg_roundtrip, which it is made of, is missing")
            continue
        levels = lanczos_levels(source, tuple(frames[name].shape[1:3]))  # type: ignore[arg-type]
        if frames[name].dtype == torch.uint8:
            yield name, Ours(_settle(round_levels(levels), levels, frames[name])[0])
        else:
            yield name, Ours(levels[0], _LEVEL_TOLERANCE)
    if resized is None:
        raise NotComparableError(f"{stem}_resized, which it is made of, is missing")
    levels = center_crop_levels(resized, PreprocessingConfig().crop_area)
    yield f"{stem}_center_cropped", Ours(truncate_levels(levels)[0], 1.0)
    yield f"{stem}_center_cropped_float", Ours(levels[0] / 255, _CROP_TOLERANCE)


def _settle(
    ours: UInt8[Tensor, "N H W C"], levels: Float64[Tensor, "N H W C"], reference: UInt8[Tensor, "N H W C"]
) -> UInt8[Tensor, "N H W C"]:
    """Take the reference's level where it is the other one of two that ours was between."""
    is_edge = ((levels - levels.floor()) - 0.5).abs() <= _LEVEL_TOLERANCE
    is_next = (ours.int() - reference.int()).abs() <= 1
    return torch.where(is_edge & is_next, reference, ours)


def _tokens(arrays: Mapping[str, np.ndarray]) -> _Found:
    """Encode and decode numbers, whatever the arrays of them are called."""
    if "vocab_size" not in arrays:
        raise NotComparableError("action_tokenizer.npz lacks vocab_size")
    yield "vocab_size", NotCovered(AN_INPUT)
    num_bins = len(arrays["bins"]) if "bins" in arrays else len(arrays.get("bin_centers", range(255))) + 1
    tokenizer = ActionTokenizer(int(arrays["vocab_size"]), num_bins)
    yield "bins", Ours(tokenizer.edges(torch.device("cpu")), 0.0)
    centers = tokenizer.decode(tokenizer.vocab_size - torch.arange(1, num_bins))
    yield "bin_centers", Ours(centers, _CENTER_TOLERANCE)
    yield "action_token_begin_idx", Ours(tokenizer.first_token - 1)
    for name in arrays:
        kind, source = _role(name)
        if kind == "actions" or (kind == "token_ids" and source not in arrays):
            yield name, NotCovered(AN_INPUT)
        elif kind == "token_ids":
            yield name, Ours(tokenizer.encode(torch.from_numpy(arrays[source]), allow_infinite=True))
        elif kind == "decoded" and source in arrays:
            numbers = tokenizer.decode(torch.from_numpy(arrays[source]), clip=True)
            yield name, Ours(numbers, _CENTER_TOLERANCE)
        elif kind == "decoded":
            yield name, NotCovered(f"{source}, which it is made of, is missing")


def _role(name: str) -> tuple[str, str]:
    """Tell what an array holds, and the name of the one it is made of, as in actions_x, token_ids_x, decoded_x."""
    for kind, source in (("token_ids", "actions"), ("decoded", "token_ids"), ("actions", "")):
        if name.startswith(f"{kind}_"):
            return kind, source + name.removeprefix(kind)
        if name.endswith(f"_{kind}"):
            return kind, name.removesuffix(kind) + source
    return "", ""


def _prompts(folder: Path) -> list[Row]:
    """Compare texts, and the token that ends a prompt where the folder has a tokenizer."""
    stored, references = read_json(folder / "prompts.json"), {}
    groups = []
    for index, record in enumerate(stored["prompts"]):
        references |= {f"prompts[{index}].{field}": value for field, value in record.items()}
        groups.append(Group(rf"prompts\[{index}\]\..+", partial(_prompt, record, f"prompts[{index}].")))
    groups.append(Group("trailing_token_id", partial(_trailing, folder)))
    return compare({**{k: v for k, v in stored.items() if k != "prompts"}, **references}, groups)


def _prompt(record: Mapping[str, str], prefix: str) -> _Found:
    yield prefix + "instruction", NotCovered(AN_INPUT)
    yield prefix + "answer", NotCovered(AN_INPUT)
    instruction = record["instruction"]
    text = prompt_text(instruction)
    yield prefix + "inference_prompt", Ours(text)
    yield prefix + "builder_prompt_without_answer", Ours(text)
    yield prefix + "inference_prompt_v01", Ours(prompt_text(instruction, "openvla-v01"))
    # where no field tells the answer, it is what stands between a space behind the prompt and the end mark
    answer = record.get("answer", record.get("training_text", "")[len(text) + 1 : -len("</s>")])
    yield prefix + "training_text", Ours(training_text(instruction, answer))


def _trailing(folder: Path) -> _Found:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise NotComparableError("the folder has no tokenizer.json")
    yield "trailing_token_id", Ours(PromptTokenizer.load(path).trailing_token_id)
