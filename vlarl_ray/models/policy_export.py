"""Write a policy in the published layout of OpenVLA, OpenVLA-OFT or QueST.

What was imported goes back with its own `config.json` and statistics. A policy made here gets a `config.json` with its
dimensions in a block `tiny`, which this package reads; published code knows the released dimensions only. The heads of
OpenVLA-OFT are safetensors, where its published code loads `.pt` files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlarl_ray.config import ModelConfig, TowerConfig
from vlarl_ray.models.official import is_official
from vlarl_ray.models.openvla import padded_vocab_size
from vlarl_ray.models.openvla_oft import COMPONENTS
from vlarl_ray.models.policy import describe_policy, policy_weights
from vlarl_ray.models.quest_export import write_quest
from vlarl_ray.models.tokenizer import PromptTokenizer
from vlarl_ray.models.weight_files import HEADS_FILE, MAX_FILE_BYTES, WeightFiles, write_files
from vlarl_ray.registry import MODELS, resolve

_OWN_KEY = "vlarl_ray"
"""Of the statistics of a policy that was no published checkpoint before."""


def export_policy(policy_dir: Path, folder: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> Path:
    """Write a folder laid out like a published checkpoint; one file's tensors are held at a time.

    Args:
        policy_dir: Policy folder, adapters merged (as a run leaves it in `policy_final`).
        folder: To write; must not exist or be empty.
        max_file_bytes: Of one file of weights.

    Raises:
        FileExistsError: If there is something in `folder`.
        ValueError: If the published layout has no place for this kind of policy, or it is in that layout already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder, so that files of two policies do not mix.")
    if is_official(policy_dir):
        raise ValueError(f"{policy_dir} is in the published layout already; there is nothing to export.")
    description = describe_policy(policy_dir)
    model: ModelConfig = description["model"]
    _check_has_counterpart(model)
    weights = policy_weights(policy_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        new = Path(partial) / folder.name
        new.mkdir()
        if model.architecture == "quest":
            write_quest(new, description, weights, max_file_bytes=max_file_bytes)
        else:
            write_files(new, _backbone(model, weights), max_file_bytes=max_file_bytes)
            _write_heads(new, weights)
            _write_descriptions(new, policy_dir, description)
        new.rename(folder)
    return folder


def _write_descriptions(folder: Path, policy_dir: Path, description: Mapping[str, Any]) -> None:
    """Write all that an OpenVLA checkpoint holds besides tensors."""
    model: ModelConfig = description["model"]
    official = description["metadata"].get("official", {})
    path = policy_dir / "tokenizer.json"
    tokenizer = PromptTokenizer.load(path, model.prompt_style) if path.exists() else None
    statistics = official.get("statistics") or {_OWN_KEY: _statistics(description)}
    config = official.get("config") or {**_config(model, tokenizer), "norm_stats": statistics}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if model.architecture == "openvla_oft":
        (folder / "dataset_statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")
    if model.preprocessing.interpolation != "bilinear":
        processor = model.preprocessing.to_official(model.image_size)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    if tokenizer is not None:
        shutil.copy(path, folder)


def _check_has_counterpart(model: ModelConfig) -> None:
    is_openvla = model.architecture == "openvla" and model.decoding == "autoregressive" and model.chunk_length == 1
    if not is_openvla and model.architecture not in ("openvla_oft", "quest"):
        raise ValueError(
            f"model.architecture = {model.architecture!r} with decoding {model.decoding!r} and chunks of "
            f"{model.chunk_length}: published layouts hold openvla with autoregressive decoding of single actions, "
            "openvla_oft, and quest; other policies are shared as policy folders."
        )


def _backbone(model: ModelConfig, weights: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the published main files, in the order of the model; parts never computed may be zero."""
    with torch.device("meta"):
        whole = resolve(MODELS, model.architecture, what="model.architecture")(replace(model, official_unused=True))
    ours = ("value_head.", *(f"{component}." for component in COMPONENTS))
    for name, tensor in whole.state_dict().items():
        if not name.startswith(ours):
            yield name, weights.read(name) if name in weights else torch.zeros(tensor.shape)


def _write_heads(folder: Path, weights: WeightFiles) -> None:
    """Components in a file each under their published names, the value head in one of ours."""
    for component in COMPONENTS:
        prefix = f"{component}."
        own = {name.removeprefix(prefix): weights.read(name).clone() for name in weights if name.startswith(prefix)}
        if own:
            save_file(own, folder / f"{component}.safetensors", metadata={"format": "pt"})
    values = {name: weights.read(name).clone() for name in weights if name.startswith("value_head.")}
    if values:
        save_file(values, folder / HEADS_FILE, metadata={"format": "pt"})


def _statistics(description: Mapping[str, Any]) -> dict[str, Any]:
    parts = {"action": description["action_statistics"], "proprio": description["proprio_statistics"]}
    return {name: {k: part[k] for k in ("q01", "q99", "mask")} for name, part in parts.items() if part is not None}


def _config(model: ModelConfig, tokenizer: PromptTokenizer | None) -> Mapping[str, Any]:
    """A published `config.json`, with the dimensions that timm would know in a block of their own."""
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": model.preprocessing.resize_strategy,
        "image_sizes": [model.image_size, model.image_size],
        "timm_model_ids": [None, None],
        "n_action_bins": model.num_action_bins,
        # Published code takes the tokenizer's size for that of the embedding minus this.
        "pad_to_multiple_of": padded_vocab_size(model) - model.text_vocab_size - model.num_action_bins,
        "text_config": {
            "model_type": "llama",
            "vocab_size": padded_vocab_size(model),
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
        },
        "tiny": {
            "featurizer": _tower(model, model.dino, model.num_register_tokens),
            "fused_featurizer": _tower(model, model.siglip, 0),
            **({} if tokenizer is None else {"num_base_tokens": tokenizer.num_base_tokens}),
        },
    }


def _tower(model: ModelConfig, tower: TowerConfig, num_registers: int) -> dict[str, int]:
    return {
        "embed_dim": tower.dim,
        "depth": tower.depth,
        "num_heads": tower.num_heads,
        "mlp_hidden": tower.mlp_dim,
        "patch_size": model.patch_size,
        "reg_tokens": num_registers,
    }
