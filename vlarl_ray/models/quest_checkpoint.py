"""QueST checkpoints in the layout of the published code: what their files say of the model, and where its tensors lie.

config.json ─────────────────► sizes in that code's words, instructions ─┐
*.safetensors ───────────────► its `model` entry ────────────────────────┼─► QuestCheckpoint: ModelConfig, instructions,
task_embeddings.safetensors ─► a vector for each instruction ────────────┤               tensors by name (none read yet)
heads.safetensors ───────────► value head, if RL gave it one ────────────┘
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlarl_ray.config import ModelConfig, QuestConfig
from vlarl_ray.models.weight_files import HEADS_FILE, INDEX, SINGLE, WeightFiles
from vlarl_ray.quest_checks import quest_problems

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
VECTORS = "task_embeddings"
"""Tensor with a row for each instruction, which the published code keeps elsewhere."""
VECTORS_FILE = f"{VECTORS}.safetensors"
_LOWDIM_LAYER = r"lowdim_encoders\.(?P<mlp>[^.]+)\.projection\.(?P<layer>\d+)\.weight"
_VALUE_LAYER = r"(?P<mlp>value_head)\.(?P<layer>\d+)\.weight"
_REQUIRED = (
    *(f"autoencoder.{name}" for name in ("vq_type", "use_causal_encoder", "use_causal_decoder", "encoder_dim")),
    *(f"autoencoder.{name}" for name in ("decoder_dim", "skill_block_size", "downsample_factor", "encoder_layers")),
    *(f"autoencoder.{name}" for name in ("encoder_heads", "decoder_layers", "decoder_heads")),
    *(f"policy_prior.{name}" for name in ("n_embd", "n_layer", "n_head", "vocab_size", "start_token", "attn_pdrop")),
    *("embed_dim", "image_embed_dim", "lowdim_embed_dim", "obs_reduction", "action_horizon"),
    *("shape_meta.action_dim", "shape_meta.observation", "shape_meta.task.type"),
)


class UnsupportedVariantError(ValueError):
    """The checkpoint is whole, but of a variant of QueST that is not here."""


@dataclass(frozen=True)
class QuestCheckpoint:
    """What the files of a checkpoint folder describe."""

    folder: Path
    model: ModelConfig
    weights: WeightFiles
    """By the official names. `task_embeddings` and the value head may be missing."""
    config: dict[str, Any]
    """Content of `config.json`."""
    instructions: tuple[str, ...]
    """What the policy was taught, in the order of its task ids; empty where `config.json` does not list it."""


def is_quest(folder: Path) -> bool:
    """Whether a folder's `config.json` is that of a QueST checkpoint."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"autoencoder", "policy_prior"} <= config.keys()


def read_quest(folder: Path, *, value_hidden_sizes: tuple[int, ...] = (128, 64)) -> QuestCheckpoint:
    """Read what the files of a checkpoint folder say; no tensor is read.

    Args:
        folder: Of the layout above. The weights file may have any name, and a `module.` before its tensors' names.
        value_hidden_sizes: Of the value head, where there is none beside the checkpoint.

    Raises:
        FileNotFoundError: If a file is missing.
        UnsupportedVariantError: If it is of a variant that is not here.
        ValueError: If the weights are a pickle, or `config.json` is damaged, lacks something or contradicts itself.
    """
    weights = quest_weights(folder)
    config = _read_config(folder / "config.json")
    value_hidden_sizes = _hidden_sizes(weights, _VALUE_LAYER) or value_hidden_sizes
    model = _model_config(config, folder / "config.json", weights, value_hidden_sizes)
    return QuestCheckpoint(folder, model, weights, config, _instructions(config, folder / "config.json"))


def quest_weights(folder: Path) -> WeightFiles:
    """List a checkpoint's tensors by our names, whatever the main file is called.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several to choose from, or pickles only.
    """
    beside = [folder / name for name in (VECTORS_FILE, HEADS_FILE)]
    named = [path for path in (folder / SINGLE, folder / INDEX) if path.exists()]
    files = [path for path in sorted(folder.glob("*.safetensors")) if path not in beside]
    if len(files) > 1 and not named:
        listed = ", ".join(path.name for path in files)
        raise ValueError(f"{folder} holds {listed}, and no {SINGLE}; rename the one to read to that.")
    weights = WeightFiles.of_file(files[0]) if files and not named else WeightFiles.of_folder(folder)
    weights = weights.renamed({name: name.removeprefix("module.") for name in weights})
    for path in beside:
        if path.exists():
            weights = weights | WeightFiles.of_file(path)
    return weights


def require_table(checkpoint: QuestCheckpoint) -> None:
    """Require what a policy needs to be told its task: instructions, and their vectors where it reads such.

    Raises:
        ValueError: If either is missing, or they do not fit each other.
    """
    quest, count = checkpoint.model.quest, len(checkpoint.instructions)
    path = checkpoint.folder / "config.json"
    if not count:
        raise ValueError(
            f"{path} has no `instructions`; list there what the policy was taught, in the order of its task ids. The "
            "published code has them with its benchmark, not with the checkpoint."
        )
    if quest.task_encoding == "embedding" and count > quest.task_size:
        raise ValueError(
            f"{path} lists {count} instructions, but shape_meta.task.n_tasks = {quest.task_size}; list one for each "
            "task id, in their order."
        )
    if quest.task_encoding == "vector" and VECTORS not in checkpoint.weights:
        raise ValueError(
            f"{checkpoint.folder} has no {VECTORS_FILE}; write the vectors that the policy was trained with there (the "
            f"published code takes CLIP's), as a tensor {VECTORS!r} [{count}, {quest.task_size}], a row for each of "
            "`instructions`."
        )
    if quest.task_encoding == "vector":
        check_vectors(checkpoint.weights[VECTORS].shape, count, quest.task_size)


def check_vectors(shape: tuple[int, ...], num_instructions: int, size: int) -> None:
    """Require a vector of the right size for each instruction.

    Raises:
        ValueError: If there are more or fewer, or they are of another size.
    """
    if tuple(shape) != (num_instructions, size):
        raise ValueError(
            f"task_embeddings has shape {tuple(shape)}; {num_instructions} instructions need "
            f"{(num_instructions, size)}. Give both, in one order."
        )


def convolutions(factor: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give kernels and strides of the convolutions by which the published code shortens a block.

    Args:
        factor: Actions to a code.

    Raises:
        ValueError: If it is no power of two.

    Example:
        >>> convolutions(4)
        ((5, 3, 3), (2, 2, 1))
    """
    halvings = int(math.log2(factor))
    if 2**halvings != factor:
        raise ValueError(
            f"autoencoder.downsample_factor = {factor}: the published code halves blocks of actions, so it must be a "
            "power of two."
        )
    return ((5, *[3] * halvings), (*[2] * halvings, 1)) if halvings else ((3, 2), (1, 1))


def _model_config(
    config: Mapping[str, Any], path: Path, weights: WeightFiles, value_hidden_sizes: tuple[int, ...]
) -> ModelConfig:
    """Translate sizes, with whatever is wrong with them told as one error."""
    absent = [name for name in _REQUIRED if not _has(config, name)]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}; give them as in the config of the published code.")
    for name, value, supported in _variants(config):
        if value != supported:
            raise UnsupportedVariantError(
                f"{path.name}: {name} = {value!r} is not supported; it must be {supported!r}."
            )
    try:
        model = _translate(config, _hidden_sizes(weights, _LOWDIM_LAYER), value_hidden_sizes)
    except (ValidationError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is not as the published code's config: {error!r}.") from error
    problems = [message for _, message in quest_problems(model)]
    if problems:
        raise ValueError(f"{path} contradicts itself:\n  " + "\n  ".join(problems))
    return model


def _has(config: Mapping[str, Any], path: str) -> bool:
    section: Any = config
    for name in path.split("."):
        if not isinstance(section, Mapping) or name not in section:
            return False
        section = section[name]
    return True


def _variants(described: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Settings by which the published code makes something else than QueST as published, with the only ones known."""
    coder, prior = described["autoencoder"], described["policy_prior"]
    image = described.get("image_encoder", {})
    yield "autoencoder.vq_type", coder["vq_type"], "fsq"
    yield "autoencoder.use_causal_encoder", coder["use_causal_encoder"], True
    yield "autoencoder.use_causal_decoder", coder["use_causal_decoder"], True
    yield "autoencoder.decoder_dim", coder["decoder_dim"], coder["encoder_dim"]
    yield "policy_prior.n_embd", prior["n_embd"], described["embed_dim"]
    yield "policy_prior.start_token", prior["start_token"], prior["vocab_size"]
    yield "obs_reduction", described["obs_reduction"], "cat"
    yield "image_encoder.remove_layer_num", image.get("remove_layer_num", 4), 4
    yield "image_encoder.language_fusion", image.get("language_fusion", "none"), "none"
    yield "image_encoder.pretrained", image.get("pretrained", False), False


def _translate(
    described: Mapping[str, Any], lowdim_hidden_sizes: tuple[int, ...], value_hidden_sizes: tuple[int, ...]
) -> ModelConfig:
    coder, prior, meta = described["autoencoder"], described["policy_prior"], described["shape_meta"]
    cameras = meta["observation"].get("rgb") or {}
    lowdim = meta["observation"].get("lowdim") or {}
    sides = {side for shape in cameras.values() for side in shape[1:]}
    sides = sides or {described.get("image_encoder", {}).get("image_size", 128)}
    if len(sides) != 1 or any(shape[0] != 3 for shape in cameras.values()):
        raise UnsupportedVariantError(
            f"shape_meta.observation.rgb = {dict(cameras)}: images must be [3, S, S], of one size S."
        )
    kernels, strides = convolutions(coder["downsample_factor"])
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
            lowdim_hidden_sizes=lowdim_hidden_sizes,
            block_length=coder["skill_block_size"],
            conv_kernels=kernels,
            conv_strides=strides,
            fsq_levels=_levels(coder),
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


def _levels(coder: Mapping[str, Any]) -> tuple[int, ...]:
    given = coder.get("fsq_level") or coder.get("fsq_level_resolved")
    if given:
        return tuple(given)
    power = math.log2(coder["codebook_size"])
    if int(power) not in FSQ_LEVELS:
        allowed = ", ".join(str(2**power) for power in FSQ_LEVELS)
        raise ValueError(
            f"config.json: autoencoder.codebook_size = {coder['codebook_size']}: the published code has levels for "
            f"{allowed}; give others as autoencoder.fsq_level."
        )
    return FSQ_LEVELS[int(power)]


def _hidden_sizes(weights: WeightFiles, pattern: str) -> tuple[int, ...]:
    """Read the hidden widths of an MLP off its layers; of the low-dim encoders, which are all alike, `config` has none.

    Args:
        weights: All tensors.
        pattern: Of its weights' names: the MLP, if there are several, and the layer.
    """
    found: dict[str, dict[int, int]] = {}
    for name, tensor in weights.items():
        match = re.fullmatch(pattern, name)
        if match:
            found.setdefault(match["mlp"], {})[int(match["layer"])] = tensor.shape[0]
    sizes = next(iter(found.values()), {})
    return tuple(sizes[layer] for layer in sorted(sizes)[:-1])


def _instructions(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    listed = config.get("instructions", [])
    if not isinstance(listed, list) or not all(isinstance(text, str) and text for text in listed):
        raise ValueError(f"{path}: `instructions` must be a list of texts, in the order of the policy's task ids.")
    return tuple(listed)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; it holds the sizes, in the words of the published code's config."
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object; it must hold the sizes, as in the published code's config.")
    return config
