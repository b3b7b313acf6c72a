"""Checkpoints as OpenVLA and OpenVLA-OFT publish them: what their files say of the model, and where its tensors lie.

config.json ───────────────► dimensions, norm_stats ─┐
dataset_statistics.json ───► norm_stats (fine-tuned) ├─► OfficialPolicy: ModelConfig, normalisers, tokenizer,
preprocessor_config.json ──► resize, means, stds ────┤                   tensors by our names (none is read yet)
tokenizer.json ────────────► prompts ────────────────┤
*.safetensors ─────────────► tensors ────────────────┘
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlarl_ray.config import ModelConfig, TowerConfig
from vlarl_ray.models.action_tokens import ActionNormalizer
from vlarl_ray.models.openvla import padded_vocab_size
from vlarl_ray.models.openvla_oft import COMPONENTS, component_names
from vlarl_ray.models.proprio import ProprioNormalizer
from vlarl_ray.models.tokenizer import PromptTokenizer
from vlarl_ray.models.weight_files import HEADS_FILE, PICKLE_SUFFIXES, WeightFiles
from vlarl_ray.preprocessing_config import PreprocessingConfig
from vlarl_ray.registry import suggest

_LOG = logging.getLogger(__name__)

OFT_EPSILON = 1e-8
"""OpenVLA-OFT adds it to the range of every action dimension; OpenVLA does not."""
_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": (14, 4, TowerConfig(dim=1024, depth=24, num_heads=16, mlp_dim=4096)),
    "vit_so400m_patch14_siglip_224": (14, 0, TowerConfig(dim=1152, depth=27, num_heads=16, mlp_dim=4304)),
}
"""By timm's name: patch size, register tokens, dimensions. A checkpoint names its towers, and timm knows the rest."""
_LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_scaling": None,
}
"""Where a checkpoint's `text_config` says nothing, its library's defaults hold, which are these."""
_ONE_WAY = ("rms_norm_eps", "rope_theta", "hidden_act", "tie_word_embeddings", "attention_bias", "rope_scaling")
"""Of these the model here knows that value only."""


@dataclass(frozen=True)
class OfficialPolicy:
    """What the files of a checkpoint folder describe."""

    model: ModelConfig
    normalizer: ActionNormalizer
    proprio_normalizer: ProprioNormalizer | None
    tokenizer: PromptTokenizer | None
    """None where the folder has no `tokenizer.json`: prompts must then come as ids."""
    weights: WeightFiles
    """By our names. Heads that only RL needs (value, scale) may be missing."""
    metadata: dict[str, Any]


def is_openvla(folder: Path) -> bool:
    """Whether a folder's `config.json` is that of an OpenVLA checkpoint."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text()).get("model_type") == "openvla"
    except (OSError, ValueError, AttributeError):
        return False


def read_openvla(folder: Path, wanted: ModelConfig, *, unnorm_key: str | None = None) -> OfficialPolicy:
    """Read a checkpoint folder.

    Args:
        folder: As published, its weights in safetensors.
        wanted: What the files leave open is taken from here: `chunk_length`, `oft`, `action_head`, `frame_steps` of
            the preprocessing, `value_hidden_sizes`, `max_prompt_tokens`, `prompt_style`; and the architecture, where
            nothing tells OpenVLA-OFT from OpenVLA. What they do say must not contradict it.
        unnorm_key: Dataset whose statistics to take; may be left out where there is one.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the files contradict each other or `wanted`, are of a model that is none of ours, or pickles.
    """
    config = _read_json(folder / "config.json")
    components = _component_files(folder)
    is_oft = wanted.architecture == "openvla_oft" or bool(components)
    known, key = _statistics(folder, config, unnorm_key)
    kind = config.get("tiny", {}).get("action_proprio_normalization_type", "bounds_q99")
    _require(config, {"image_sizes": list, "pad_to_multiple_of": int, "n_action_bins": int}, folder / "config.json")
    statistics = _with_bounds(known[key], kind)
    _require_bounds(statistics, key, folder)
    weights = _all_weights(folder)
    determined = _determined(config, statistics, weights, is_oft=is_oft)
    processor = folder / "preprocessor_config.json"
    if processor.exists():
        determined["preprocessing"] = _preprocessing(_read_json(processor), wanted.preprocessing)
    model = _merge(wanted, determined, folder)
    if is_oft:
        model = replace(model, action_head=_action_head(model, weights))
        _LOG.info(
            "%s: chunks of %d env steps, %d cameras, %s pass(es), as model.chunk_length, model.oft.num_cameras and "
            "model.oft.passes say; the checkpoint does not",
            folder, model.chunk_length, model.oft.num_cameras, model.oft.passes,
        )  # fmt: skip
    # A tokenizer made offline has fewer tokens than its model has text ids; whoever exported it says how many.
    num_tokens = config.get("tiny", {}).get("num_base_tokens", model.text_vocab_size + model.num_action_bins)
    tokenizer = _tokenizer(folder, model, num_tokens)
    action, proprio = statistics["action"], statistics.get("proprio")
    normalizer = ActionNormalizer.from_statistics(action["q01"], action["q99"], action.get("mask"))
    return OfficialPolicy(
        model=model,
        normalizer=replace(normalizer, epsilon=OFT_EPSILON) if is_oft else normalizer,
        proprio_normalizer=ProprioNormalizer.from_statistics(proprio["q01"], proprio["q99"], proprio.get("mask"))
        if model.proprio_dim and proprio
        else None,
        tokenizer=tokenizer,
        weights=weights.without(_unused(weights, model)),
        metadata={
            "official": {"config": config, "statistics": known, "unnorm_key": key}
        },  # `export_policy` writes them
    )


def openvla_weights(folder: Path, model: ModelConfig) -> WeightFiles:
    """Find the tensors of a checkpoint folder that a model of this config has."""
    weights = _all_weights(folder)
    return weights.without(_unused(weights, model))


def _all_weights(folder: Path) -> WeightFiles:
    weights = WeightFiles.of_folder(folder)
    for component, path in _component_files(folder).items():
        file = WeightFiles.of_file(path)
        weights = weights | file.renamed(component_names(component, file))
    heads = folder / HEADS_FILE
    return weights | WeightFiles.of_file(heads) if heads.exists() else weights


def _determined(
    config: Mapping[str, Any], statistics: Mapping[str, Any], weights: WeightFiles, *, is_oft: bool
) -> dict:
    """Fields of the model config that the checkpoint settles."""
    tiny, text = config.get("tiny", {}), {**_LLAMA_2_7B, **config.get("text_config", {})}
    for name in _ONE_WAY:
        if text[name] != _LLAMA_2_7B[name]:
            raise ValueError(
                f"config.json: text_config.{name} = {text[name]!r}: only {_LLAMA_2_7B[name]!r}, as in OpenVLA's "
                "released checkpoints, is supported."
            )
    if config.get("use_fused_vision_backbone") is False:
        raise ValueError("config.json: use_fused_vision_backbone = false: only the fused DINOv2-SigLIP is supported.")
    patch_size, num_registers, dino = _tower(config, tiny, 0)
    siglip_patch, _, siglip = _tower(config, tiny, 1)
    sizes = {*config["image_sizes"]}
    if len(sizes) != 1 or patch_size != siglip_patch:
        raise ValueError(f"config.json: image_sizes = {config['image_sizes']}: both towers must take the same image.")
    multiple, num_bins = int(config["pad_to_multiple_of"]), int(config["n_action_bins"])
    padded = int(text.get("vocab_size", 32064))
    projector = "proprio_projector.fc1.weight"
    determined = {
        "architecture": "openvla_oft" if is_oft else "openvla",
        "image_size": sizes.pop(),
        "patch_size": patch_size,
        "num_register_tokens": num_registers,
        "dino": dino,
        "siglip": siglip,
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "num_kv_heads": text.get("num_key_value_heads") or text["num_attention_heads"],
        "text_vocab_size": padded - multiple - num_bins,
        "pad_to_multiple_of": multiple,
        "num_action_bins": num_bins,
        "action_dim": len(statistics["action"]["q01"]),
        "proprio_dim": weights[projector].shape[1] if projector in weights else 0,
        "decoding": "parallel" if is_oft else "autoregressive",
        "official_unused": True,
    }
    if not is_oft:
        determined |= {"chunk_length": 1, "action_head": "tokens"}
    return determined


def _tower(config: Mapping[str, Any], tiny: Mapping[str, Any], index: int) -> tuple[int, int, TowerConfig]:
    described = tiny.get(("featurizer", "fused_featurizer")[index])
    if described is not None:  # a small model that timm does not know
        dims = TowerConfig(
            dim=described["embed_dim"],
            depth=described["depth"],
            num_heads=described["num_heads"],
            mlp_dim=described["mlp_hidden"],
        )
        return described["patch_size"], described["reg_tokens"], dims
    name = config["timm_model_ids"][index]
    if name not in _TOWERS:
        raise ValueError(f"config.json: timm_model_ids names {name!r}; {suggest(name, _TOWERS)}.")
    return _TOWERS[name]


def _merge(wanted: ModelConfig, determined: Mapping[str, Any], folder: Path) -> ModelConfig:
    """Take what is determined, and the rest from `wanted`, whose own settings must not be others."""
    require_uncontradicted(wanted, determined, folder)
    model = replace(wanted, **determined)
    if padded_vocab_size(model) != model.text_vocab_size + model.num_action_bins + model.pad_to_multiple_of:
        raise ValueError(
            f"config.json of {folder}: text_config.vocab_size is not the tokenizer's plus pad_to_multiple_of = "
            f"{model.pad_to_multiple_of}; action tokens would lie elsewhere."
        )
    return model


def require_uncontradicted(wanted: ModelConfig, determined: Mapping[str, Any], folder: Path) -> None:
    """Require that a config leaves what a checkpoint determines at the default, or says the same.

    Raises:
        ValueError: Naming every field that says otherwise.
    """
    # frame steps are for `wanted` to say, so they alone do not make its preprocessing another one
    default = replace(ModelConfig(), preprocessing=_with_steps_of(wanted.preprocessing, PreprocessingConfig()))
    problems = []
    for name, value in determined.items():
        said = getattr(wanted, name)
        if said not in (value, getattr(default, name)):
            problems.append(f"model.{name} = {said!r}, but the checkpoint {folder} has {value!r}; leave it out.")
    if problems:
        raise ValueError("\n".join(problems))


def _action_head(model: ModelConfig, weights: WeightFiles) -> Any:
    """`l1` where there is an action head and nothing else is wanted, `tokens` where there is none."""
    has_head = any(name.startswith("action_head.") for name in weights)
    if not has_head:
        return "tokens"
    is_default = model.action_head == ModelConfig().action_head
    has_scale = any(name.startswith("scale_head.") for name in weights)
    if is_default:
        return "laplace" if has_scale else "l1"
    if model.action_head in ("laplace", "gaussian") and not has_scale:
        raise ValueError(
            f"model.action_head = {model.action_head!r}: the checkpoint has no scale head; load it as 'l1' and give it "
            "one with vlarl_ray.models.add_scale_head."
        )
    return model.action_head


def _unused(weights: WeightFiles, model: ModelConfig) -> list[str]:
    """Heads that are in the checkpoint and that the wanted kind of action does without."""
    dropped = {"tokens": ("action_head.", "scale_head."), "l1": ("scale_head.",)}.get(model.action_head, ())
    return [name for name in weights if name.startswith(dropped)] if dropped else []


def _preprocessing(official: Mapping[str, Any], wanted: PreprocessingConfig) -> PreprocessingConfig:
    """The processor's part from the checkpoint, the frame steps from the config."""
    return _with_steps_of(wanted, PreprocessingConfig.from_official(official))


def _with_steps_of(wanted: PreprocessingConfig, config: PreprocessingConfig) -> PreprocessingConfig:
    steps = ("frame_steps", "jpeg_quality", "lanczos_size", "crop_area")
    return replace(config, **{name: getattr(wanted, name) for name in steps})


def _statistics(folder: Path, config: Mapping[str, Any], unnorm_key: str | None) -> tuple[dict[str, Any], str]:
    """Find the statistics of all datasets, those of the fine-tuning if it left some, and the key of the wanted one."""
    path = folder / "dataset_statistics.json"
    known = _read_json(path) if path.exists() else config.get("norm_stats")
    where = path.name if path.exists() else "config.json (norm_stats)"
    if not known:
        raise ValueError(f"{folder}: neither dataset_statistics.json nor norm_stats in config.json; actions need them.")
    if unnorm_key is None and len(known) > 1:
        raise ValueError(f"{folder / where} has statistics of {', '.join(sorted(known))}; say which: set unnorm_key.")
    key = unnorm_key or next(iter(known))
    if key not in known:
        raise ValueError(f"unnorm_key = {key!r} is not in {folder / where}; {suggest(key, known)}.")
    return known, key


def _require(config: Mapping[str, Any], kinds: Mapping[str, type], path: Path) -> None:
    """Require fields that nothing else tells.

    Raises:
        ValueError: Naming every one that is missing or of another type.
    """
    odd = [f"{name} = {config.get(name)!r}" for name, kind in kinds.items() if not isinstance(config.get(name), kind)]
    if odd:
        raise ValueError(f"{path}: {', '.join(odd)}: missing or of another type; take the checkpoint's own file.")


def _require_bounds(statistics: Mapping[str, Any], key: str, folder: Path) -> None:
    """Require what actions are un-normalised with.

    Raises:
        ValueError: If it is not there.
    """
    if not all(isinstance(statistics.get("action", {}).get(name), list) for name in ("q01", "q99")):
        raise ValueError(
            f"{folder}: the statistics of {key!r} lack action.q01 or action.q99; take the checkpoint's own."
        )


def _with_bounds(statistics: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Take the least and largest values for the percentiles where the model was trained with `bounds`."""
    if kind not in ("bounds", "bounds_q99"):
        raise ValueError(f"config.json: normalisation type {kind!r} is unknown; allowed: bounds, bounds_q99.")
    if kind == "bounds_q99":
        return {**statistics}
    ends = {
        name: {**statistics[name], "q01": statistics[name]["min"], "q99": statistics[name]["max"]}
        for name in ("action", "proprio")
        if name in statistics
    }
    return {**statistics, **ends}


def _tokenizer(folder: Path, model: ModelConfig, expected: int) -> PromptTokenizer | None:
    """Read `tokenizer.json`, whose ids must be those that the model has embeddings for."""
    path = folder / "tokenizer.json"
    if not path.exists():
        if (folder / "tokenizer.model").exists():
            raise FileNotFoundError(
                f"{folder} has tokenizer.model only; make tokenizer.json of it once, with "
                "transformers.AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)."
            )
        return None
    tokenizer = PromptTokenizer.load(path, model.prompt_style)
    if tokenizer.num_base_tokens != expected:
        raise ValueError(
            f"{path} has {tokenizer.num_base_tokens} tokens, but by config.json (vocab_size - pad_to_multiple_of) the "
            f"model was trained with {expected}: action tokens would lie elsewhere. Take the checkpoint's own."
        )
    return tokenizer


def _component_files(folder: Path) -> dict[str, Path]:
    """Find the newest file of each component.

    Raises:
        ValueError: If one is there as a pickle only.
    """
    found: dict[str, Path] = {}
    for component in COMPONENTS:
        files = sorted(folder.glob(f"{component}*.safetensors"))
        pickles = [path for path in sorted(folder.glob(f"{component}*")) if path.suffix in PICKLE_SUFFIXES]
        if files:
            found[component] = files[-1]
        elif pickles:
            raise ValueError(
                f"{pickles[-1]} is a pickle, which runs code when it is loaded; convert it once with "
                f"`python -m vlarl_ray.models.unpickle {pickles[-1]}`, which runs none."
            )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder holds config.json and *.safetensors.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; download it again.") from error
