"""OpenVLA's published sizes, and folders laid out like its checkpoint, of any size, with random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlarl_ray.config import ModelConfig, TowerConfig
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.openvla import OpenVLA, padded_vocab_size
from vlarl_ray.models.weight_files import write_files

OPENVLA_7B = ModelConfig(
    image_size=224,
    patch_size=14,
    num_register_tokens=4,
    dino=TowerConfig(dim=1024, depth=24, num_heads=16, mlp_dim=4096),
    siglip=TowerConfig(dim=1152, depth=27, num_heads=16, mlp_dim=4304),
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    text_vocab_size=31744,
    action_dim=7,
    chunk_length=1,
    decoding="autoregressive",
    max_prompt_tokens=64,
    value_hidden_sizes=(1024, 512),
    official_unused=True,
)


def write_checkpoint(folder: Path, model: ModelConfig, *, max_file_bytes: int) -> int:
    """Write a bf16 checkpoint in several safetensors files; its towers must be those of OpenVLA.

    Returns:
        Bytes of the tensors.
    """
    bounds = {"q01": [-1.0] * model.action_dim, "q99": [1.0] * model.action_dim}
    config = {
        "model_type": "openvla",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "image_sizes": [model.image_size] * 2,
        "n_action_bins": model.num_action_bins,
        "pad_to_multiple_of": model.pad_to_multiple_of,
        "norm_stats": {"random": {"action": bounds}},
        "text_config": {
            "vocab_size": padded_vocab_size(model),
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
        },
    }
    with torch.device("meta"):
        tensors = {n: t for n, t in OpenVLA(model).state_dict().items() if not n.startswith(HEADS)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_files(folder, _random(tensors), max_file_bytes=max_file_bytes)
    return sum(2 * tensor.numel() for tensor in tensors.values())


def _random(shapes: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Draw once and repeat: nothing here depends on the values."""
    drawn = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, tensor in shapes.items():
        yield name, drawn.repeat(-(-tensor.numel() // len(drawn)))[: tensor.numel()].view(tensor.shape)
