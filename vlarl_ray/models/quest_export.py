"""Write a QueST policy in the layout of the published code, with what that code keeps elsewhere in files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.quest_checkpoint import VECTORS, VECTORS_FILE, convolutions
from vlarl_ray.models.weight_files import HEADS_FILE, WeightFiles, write_files
from vlarl_ray.registry import MODELS, resolve

_CODEBOOK_DIM = 64
"""The published code's default; its FSQ does not use it."""


def write_quest(folder: Path, description: Mapping[str, Any], weights: WeightFiles, *, max_file_bytes: int) -> None:
    """Write a checkpoint folder.

    Args:
        folder: Exists, empty.
        description: Of the policy, from `describe_policy`.
        weights: All its tensors.
        max_file_bytes: Of one file of weights.

    Raises:
        ValueError: If the layout has no place for something that the policy needs.
    """
    model: ModelConfig = description["model"]
    metadata = description["metadata"]
    _check_has_counterpart(model, description)
    config = metadata.get("official", {}).get("config") or _config(model)
    with torch.device("meta"):
        names = resolve(MODELS, model.architecture, what="model.architecture")(model, metadata=metadata).state_dict()
    own = [name for name in names if not name.startswith("value_head.") and name != VECTORS]
    write_files(folder, ((name, weights.read(name)) for name in own), max_file_bytes=max_file_bytes)
    heads = {name: weights.read(name).clone() for name in names if name.startswith("value_head.")}
    save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
    if VECTORS in names:
        save_file({VECTORS: weights.read(VECTORS).clone()}, folder / VECTORS_FILE, metadata={"format": "pt"})
    config = {**config, "instructions": metadata["instructions"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check_has_counterpart(model: ModelConfig, description: Mapping[str, Any]) -> None:
    quest = model.quest
    kernels, strides = convolutions(quest.block_length // quest.num_codes)
    if (quest.conv_kernels, quest.conv_strides) != (kernels, strides):
        raise ValueError(
            f"model.quest.conv_kernels = {list(quest.conv_kernels)} with conv_strides = {list(quest.conv_strides)}: "
            f"the published code has {list(kernels)} with {list(strides)} for {quest.num_codes} codes of "
            f"{quest.block_length} actions; share the policy as a policy folder."
        )
    is_identity = not any(description["action_statistics"]["mask"])
    if not is_identity or description["proprio_statistics"] is not None:
        raise ValueError(
            "the policy normalises actions or proprioception, and QueST's checkpoints have no place for statistics; "
            "share it as a policy folder."
        )


def _config(model: ModelConfig) -> dict[str, Any]:
    """Describe a model in the words of the published code's config."""
    quest = model.quest
    outputs, is_vector = quest.prior_vocab_size or quest.codebook_size, quest.task_encoding == "vector"
    size = model.image_size
    return {
        "autoencoder": {
            "action_dim": model.action_dim,
            "encoder_dim": quest.autoencoder_dim,
            "decoder_dim": quest.autoencoder_dim,
            "skill_block_size": quest.block_length,
            "downsample_factor": quest.block_length // quest.num_codes,
            "use_causal_encoder": True,
            "use_causal_decoder": True,
            "encoder_heads": quest.encoder_heads,
            "encoder_layers": quest.encoder_layers,
            "decoder_heads": quest.decoder_heads,
            "decoder_layers": quest.decoder_layers,
            "vq_type": "fsq",
            "fsq_level": list(quest.fsq_levels),
            "codebook_dim": _CODEBOOK_DIM,
            "codebook_size": quest.codebook_size,
            "attn_pdrop": quest.dropout,
        },
        "policy_prior": {
            "action_dim": model.action_dim,
            "start_token": outputs,
            "vocab_size": outputs,
            "block_size": quest.num_codes,
            "n_layer": quest.prior_layers,
            "n_head": quest.prior_heads,
            "n_embd": quest.prior_dim,
            "attn_pdrop": quest.dropout,
            "embd_pdrop": quest.dropout,
            "beam_size": 5,
            "temperature": 1.0,
        },
        "embed_dim": quest.prior_dim,
        "image_embed_dim": quest.image_embed_dim,
        "lowdim_embed_dim": quest.lowdim_embed_dim,
        "obs_reduction": "cat",
        "action_horizon": model.chunk_length,
        "image_encoder": {"image_size": size, "remove_layer_num": 4, "language_fusion": "none", "pretrained": False},
        "shape_meta": {
            "action_dim": model.action_dim,
            "observation": {
                "rgb": {camera: [3, size, size] for camera in quest.cameras},
                "lowdim": dict(quest.lowdim),
            },
            "task": {"type": "vector", "dim": quest.task_size}
            if is_vector
            else {"type": "onehot", "n_tasks": quest.task_size},
        },
    }
