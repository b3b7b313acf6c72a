"""Names and shapes of our OpenVLA's parameters against a list of a checkpoint's, without any weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vlarl_ray.comparison import Row, compare_one
from vlarl_ray.config import ModelConfig, TowerConfig
from vlarl_ray.models.openvla import OpenVLA

_DINO, _SIGLIP = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
_LLAMA = "language_model.model."
_PAD_MULTIPLE, _NUM_BINS = 64, 256
_Shapes = Mapping[str, Sequence[int]]


def rows(path: Path) -> list[Row]:
    """Compare a JSON file of names and shapes.

    Raises:
        ValueError: If the list is not of an OpenVLA.
    """
    listed: _Shapes = json.loads(path.read_text())
    with torch.device("meta"):
        model = OpenVLA(config_of(listed))
    ours = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith("value_head.")}
    found = []
    for name, shape in listed.items():
        if name in ours:
            row = compare_one(name, shape, ours[name], tolerance=0.0)
            found.append(Row(name, _text(shape), row.status, row.difference, row.tolerance, row.detail))
        else:
            found.append(Row(name, _text(shape), "FAIL", detail="there is no such parameter here"))
    return found + [
        Row(name, _text(shape), "FAIL", detail="the list lacks it")
        for name, shape in ours.items()
        if name not in listed
    ]


def config_of(listed: _Shapes) -> ModelConfig:
    """Read a model's sizes off its parameters' shapes.

    The number of heads leaves no trace in shapes but the ratio of query to key heads, and is chosen by that alone.

    Raises:
        ValueError: If a parameter that tells a size is missing.
    """

    def size(name: str, axis: int = 0) -> int:
        if name not in listed:
            raise ValueError(f"the list lacks {name}; it is not of an OpenVLA.")
        return listed[name][axis]

    def tower(prefix: str) -> TowerConfig:
        dim = size(f"{prefix}blocks.0.attn.proj.weight")
        depth = _count(listed, rf"{re.escape(prefix)}blocks\.(\d+)\..+")
        return TowerConfig(dim=dim, depth=depth, num_heads=1, mlp_dim=size(f"{prefix}blocks.0.mlp.fc1.weight"))

    patch_size = size(f"{_DINO}patch_embed.proj.weight", 2)
    hidden_size, keys_size = (size(f"{_LLAMA}layers.0.self_attn.{x}_proj.weight") for x in "qk")
    padded = size(f"{_LLAMA}embed_tokens.weight")
    multiple = _PAD_MULTIPLE if padded % _PAD_MULTIPLE == 0 else 1
    return ModelConfig(
        image_size=math.isqrt(size(f"{_DINO}pos_embed", 1)) * patch_size,
        patch_size=patch_size,
        num_register_tokens=size(f"{_DINO}reg_token", 1),
        dino=tower(_DINO),
        siglip=tower(_SIGLIP),
        hidden_size=hidden_size,
        intermediate_size=size(f"{_LLAMA}layers.0.mlp.gate_proj.weight"),
        num_layers=_count(listed, rf"{re.escape(_LLAMA)}layers\.(\d+)\..+"),
        num_heads=hidden_size // keys_size,
        num_kv_heads=1,
        text_vocab_size=padded - multiple - _NUM_BINS,
        pad_to_multiple_of=multiple,
        num_action_bins=_NUM_BINS,
        chunk_length=1,
        decoding="autoregressive",
        official_unused=True,
    )


def _count(listed: _Shapes, pattern: str) -> int:
    """Tell how many layers there are, of numbers from 0."""
    return 1 + max((int(match[1]) for match in (re.fullmatch(pattern, name) for name in listed) if match), default=0)


def _text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
