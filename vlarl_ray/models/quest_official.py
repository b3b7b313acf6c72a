"""Read QueST checkpoints in the layout of the published code: its sizes as JSON, its `model` entry as safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlarl_ray.config import ModelConfig, QuestConfig
from vlarl_ray.models.policy import init_weights
from vlarl_ray.models.quest import QueST
from vlarl_ray.models.weight_files import INDEX, SINGLE, WeightFiles

FSQ_LEVELS: Mapping[int, tuple[int, ...]] = {
    4: (5, 3),
    6: (8, 8),
    8: (8, 6, 5),
    9: (8, 8, 8),
    10: (8, 5, 5, 5),
    11: (8, 8, 6, 5),
    12: (7, 5, 5, 5, 5),
}
"""Levels that the published code takes for a `codebook_size`, by its binary logarithm; often they give fewer codes."""

_VECTORS = "task_embeddings"


def load_quest_official(
    folder: str | Path,
    *,
    instructions: Sequence[str] | None = None,
    task_embeddings: Float[Tensor, "M E"] | None = None,
    value_hidden_sizes: tuple[int, ...] = (128, 64),
    seed: int = 0,
) -> QueST:
    """Load a checkpoint of the published code, and give it a value head.

    The folder holds `config.json`, the sizes in the published code's words, and the checkpoint's `model` entry as
    safetensors, which `python -m vlarl_ray.models.unpickle` makes of it. They may bring what that code looks up
    elsewhere: a list `instructions` and a tensor `task_embeddings`. Save the result as a policy folder with
    `model.save`.

    Args:
        folder: Where they are.
        instructions: What the policy was taught, in the order of its task ids; None takes the folder's, if it has any.
        task_embeddings: One vector per instruction (CLIP's); None takes the folder's. Not for learned embeddings.
        value_hidden_sizes: Of the value head, whose value is 0 at first.
        seed: Of the value head, unless the checkpoint has one.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the weights are a pickle, of a variant that is not supported, or not those of the config; all
            tensors that are missing, unknown or of another shape are then listed.
    """
    folder = Path(folder)
    weights = _find_weights(folder)
    described = _read_config(folder)
    known = list(instructions if instructions is not None else described.get("instructions", []))
    model = QueST(quest_config(described, value_hidden_sizes), metadata={"instructions": known})
    init_weights(model, seed)
    targets = model.state_dict()
    if targets.pop(_VECTORS, None) is not None:
        if task_embeddings is None:
            has_any = _VECTORS in weights
            task_embeddings = weights.read(_VECTORS) if has_any else torch.zeros(0, model.model_config.quest.task_size)
        _set_vectors(model, task_embeddings)
        weights = weights.without([_VECTORS])
    weights.check(targets, may_lack=("value_head.",))
    for name, tensor in weights.read_rows(dict.fromkeys(weights, slice(None))):
        targets[name].copy_(tensor)
    return model.eval()


def quest_config(described: Mapping[str, Any], value_hidden_sizes: tuple[int, ...]) -> ModelConfig:
    """Translate the published code's sizes.

    Raises:
        ValueError: If they describe a variant that is not supported.
    """
    coder, prior, meta = described["autoencoder"], described["policy_prior"], described["shape_meta"]
    image = described.get("image_encoder", {})
    _require_supported(described)
    cameras = meta["observation"].get("rgb") or {}
    lowdim = meta["observation"].get("lowdim") or {}
    sides = {side for shape in cameras.values() for side in shape[1:]} or {image.get("image_size", 128)}
    if len(sides) != 1 or any(shape[0] != 3 for shape in cameras.values()):
        raise ValueError(f"shape_meta.observation.rgb = {dict(cameras)}: images must be [3, S, S], of one size S.")
    halvings = int(math.log2(coder["downsample_factor"]))
    levels = (
        coder.get("fsq_level") or coder.get("fsq_level_resolved") or FSQ_LEVELS[int(math.log2(coder["codebook_size"]))]
    )
    is_vector = meta["task"]["type"] != "onehot"
    return ModelConfig(
        architecture="quest",
        image_size=sides.pop(),
        action_dim=meta["action_dim"],
        chunk_length=described["action_horizon"],
        proprio_dim=sum(lowdim.values()),
        value_hidden_sizes=value_hidden_sizes,
        quest=QuestConfig(
            cameras=tuple(cameras),
            lowdim=tuple(lowdim.items()),
            task_encoding="vector" if is_vector else "embedding",
            task_size=meta["task"]["dim" if is_vector else "n_tasks"],
            image_embed_dim=described["image_embed_dim"],
            lowdim_embed_dim=described["lowdim_embed_dim"],
            block_length=coder["skill_block_size"],
            conv_kernels=(5, *[3] * halvings) if halvings else (3, 2),
            conv_strides=(*[2] * halvings, 1) if halvings else (1, 1),
            fsq_levels=tuple(levels),
            autoencoder_dim=coder["encoder_dim"],
            encoder_layers=coder["encoder_layers"],
            encoder_heads=coder["encoder_heads"],
            decoder_layers=coder["decoder_layers"],
            decoder_heads=coder["decoder_heads"],
            prior_dim=prior["n_embd"],
            prior_layers=prior["n_layer"],
            prior_heads=prior["n_head"],
            prior_vocab_size=prior["vocab_size"],
            dropout=prior["attn_pdrop"],
        ),
    )


def _require_supported(described: Mapping[str, Any]) -> None:
    """Refuse the variants that the published code has besides QueST as published."""
    coder, prior = described["autoencoder"], described["policy_prior"]
    image = described.get("image_encoder", {})
    wanted = [
        ("autoencoder.vq_type", coder["vq_type"], "fsq"),
        ("autoencoder.use_causal_encoder", coder["use_causal_encoder"], True),
        ("autoencoder.use_causal_decoder", coder["use_causal_decoder"], True),
        ("autoencoder.decoder_dim", coder["decoder_dim"], coder["encoder_dim"]),
        ("policy_prior.n_embd", prior["n_embd"], described["embed_dim"]),
        ("policy_prior.start_token", prior["start_token"], prior["vocab_size"]),
        ("obs_reduction", described["obs_reduction"], "cat"),
        ("image_encoder.remove_layer_num", image.get("remove_layer_num", 4), 4),
        ("image_encoder.language_fusion", image.get("language_fusion", "none"), "none"),
        ("image_encoder.pretrained", image.get("pretrained", False), False),
    ]
    for path, value, supported in wanted:
        if value != supported:
            raise ValueError(f"config.json: {path} = {value!r} is not supported; it must be {supported!r}.")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; it holds the sizes, in the words of the published code's config."
        )
    return json.loads(path.read_text())


def _find_weights(folder: Path) -> WeightFiles:
    """List the checkpoint's tensors by our names, whatever the one file is called."""
    named = [path for path in (folder / SINGLE, folder / INDEX) if path.exists()]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1 and not named:
        listed = ", ".join(path.name for path in files)
        raise ValueError(f"{folder} holds {listed}, and no {SINGLE}; rename the one to read to that.")
    weights = WeightFiles.of_file(files[0]) if files and not named else WeightFiles.of_folder(folder)
    return weights.renamed({name: name.removeprefix("module.") for name in weights})


def _set_vectors(model: QueST, vectors: Tensor) -> None:
    if vectors.shape != model.task_embeddings.shape:
        raise ValueError(
            f"task_embeddings has shape {tuple(vectors.shape)}; {len(model.metadata['instructions'])} instructions "
            f"need {tuple(model.task_embeddings.shape)}. Give both, in one order."
        )
    model.task_embeddings.copy_(vectors)
