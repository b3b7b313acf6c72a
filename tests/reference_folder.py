"""Folders laid out like the golden ones, of any size, whose numbers are those of our own models."""

import dataclasses
import json
from contextlib import suppress

import numpy as np
import torch
from safetensors.torch import save_file

from tests.small_openvla import INSTRUCTIONS
from tests.small_quest import quest_observations, random_codes, small_quest
from vlarl_ray.comparison import NotComparableError, Ours
from vlarl_ray.config import ModelConfig, OFTConfig, TowerConfig
from vlarl_ray.models import new_policy, parity_oft, parity_openvla, parity_quest
from vlarl_ray.models.openvla_oft import COMPONENTS
from vlarl_ray.models.parity_checkpoint import ReferenceCheckpoint
from vlarl_ray.models.policy_export import export_policy

TRAILING = 77
SMALL = ModelConfig(
    image_size=24, patch_size=12, num_register_tokens=3, official_unused=True, hidden_size=16, intermediate_size=40,
    dino=TowerConfig(dim=24, depth=2, num_heads=2, mlp_dim=40),
    siglip=TowerConfig(dim=20, depth=3, num_heads=2, mlp_dim=30),
    num_layers=3, num_heads=4, num_kv_heads=2, text_vocab_size=320, action_dim=5, value_hidden_sizes=(8,),
)  # fmt: skip


def write_openvla(folder, *, seed=0, num_prompts=2, inside=True, **changes):
    """Write a folder whose batch has labels of two lengths; `inside`: the likeliest tokens are action tokens."""
    config = dataclasses.replace(SMALL, decoding="autoregressive", chunk_length=1, **changes)
    rng = np.random.default_rng(seed)
    keys = [f"dataset{i}" for i in range(num_prompts)]
    _write_checkpoint(folder, config, {key: _statistics(rng, config) for key in keys}, seed=seed, inside=inside)
    inputs = _prompts(rng, num_prompts)
    inputs["pixel_values"] = rng.normal(size=(num_prompts, 6, config.image_size, config.image_size)).astype(np.float32)
    first = config.text_vocab_size
    texts = [[*inputs[f"prompt{i}_input_ids"][0], TRAILING, *(first + np.arange(i + 1)), 2] for i in range(num_prompts)]
    inputs |= _batch(texts, [i + 2 for i in range(num_prompts)])
    case = _write_arrays(folder, inputs, {}, {"unnorm_keys": keys}, make=openvla_case)
    outputs = computed(parity_openvla.groups(case))
    for index in range(0 if inside else num_prompts):
        for _ in range(config.action_dim):  # each round settles one more of the tokens that depend on those before
            case.outputs[f"prompt{index}_action_tokens"] = outputs[f"prompt{index}_action_tokens"]
            outputs = computed(parity_openvla.groups(case))
    _write_arrays(folder, inputs, outputs, {"unnorm_keys": keys}, make=openvla_case)
    return folder


def write_oft(folder, *, seed=0, num_prompts=2, num_cameras=1, kind="bounds_q99", **changes):
    """Write a folder with heads as `changes` say, and RIPT-VLA's arrays."""
    settings = {"architecture": "openvla_oft", "action_head": "laplace", "chunk_length": 3, **changes}
    config = dataclasses.replace(SMALL, decoding="parallel", oft=OFTConfig(num_cameras=num_cameras), **settings)
    rng = np.random.default_rng(seed)
    tiny = {"action_proprio_normalization_type": kind, "num_actions_chunk": config.chunk_length, "stop_token_id": 2}
    _write_checkpoint(folder, config, {"some_robot": _statistics(rng, config)}, seed=seed, tiny=tiny)
    shape, num_numbers = (config.chunk_length, config.action_dim), config.chunk_length * config.action_dim
    inputs = _prompts(rng, num_prompts)
    pixels = rng.normal(size=(num_prompts, 6 * num_cameras, config.image_size, config.image_size))
    inputs |= {"pixel_values": pixels.astype(np.float32), "ript_input_ids": inputs["prompt0_input_ids"].repeat(2, 0)}
    inputs |= {name: rng.normal(size=(2, *shape)).astype(np.float32) for name in ("batch_actions", "ript_sample")}
    if config.proprio_dim:
        inputs["proprio_raw"] = rng.normal(size=(num_prompts, config.proprio_dim))
    texts = [[*inputs[f"prompt{i}_input_ids"][0], TRAILING, *[config.text_vocab_size] * num_numbers, 2] for i in (0, 1)]
    inputs |= _batch(texts, [num_numbers + 1] * 2)
    wanted = {"ript_logprob_clip_m1_p025": np.zeros((2, *shape))}
    case = _write_arrays(folder, inputs, wanted, {"unnorm_key": "some_robot"}, make=parity_oft.OFTReference)
    outputs = computed(parity_oft.groups(case))
    outputs.pop("proprio_normalized", None)
    _write_arrays(folder, inputs, outputs, {"unnorm_key": "some_robot"}, make=parity_oft.OFTReference)
    return folder


def write_quest(folder, *, seed=0, batch=3, top=4, **changes):
    """Write a folder of a small model with `changes`, whose convolutions are those of the published code."""
    model = small_quest(seed, **{"conv_kernels": (5, 3), "conv_strides": (2, 1), **changes})
    policy = folder.with_name(f"{folder.name} policy")
    model.save(policy)
    export_policy(policy, folder)
    quest, rng = model.model_config.quest, np.random.default_rng(seed)
    seen = quest_observations(model, batch, seed=seed)
    inputs = {
        "actions": rng.uniform(-1, 1, (batch, quest.block_length, model.action_dim)).astype(np.float32),
        "random_indices": random_codes(model, batch, seed=seed).numpy(),
        **{f"obs_{n}": seen.images[:, i, None].permute(0, 1, 4, 2, 3).numpy() for i, n in enumerate(quest.cameras)},
    }
    parts = seen.proprio.split([size for _, size in quest.lowdim], dim=1) if quest.lowdim else ()
    inputs |= {f"obs_{n}": part[:, None].numpy() for (n, _), part in zip(quest.lowdim, parts, strict=True)}
    if quest.task_encoding == "vector":
        inputs["task_emb"] = rng.normal(size=(batch, quest.task_size)).astype(np.float32)
    else:
        inputs["task_id"] = rng.integers(0, quest.task_size, batch)
    wanted = {f"top{top}_{name}": np.zeros((batch, quest.num_codes, top)) for name in ("indices", "probs")}
    wanted |= {f"lowdim_embedding_{name}": np.zeros((batch, 1, quest.lowdim_embed_dim)) for name, _ in quest.lowdim}
    case = _write_arrays(folder, inputs, wanted, {}, make=parity_quest.QuestReference)
    if (quest.prior_vocab_size or 0) > quest.codebook_size:
        wanted["greedy_indices"] = likeliest_outputs(case)
        case = _write_arrays(folder, inputs, wanted, {}, make=parity_quest.QuestReference)
    _write_arrays(folder, inputs, computed(parity_quest.groups(case)), {}, make=parity_quest.QuestReference)
    return folder


def likeliest_outputs(case):
    """What greedy decoding over all outputs of a prior gives, code or not."""
    codes = torch.zeros(len(case.inputs["actions"]), case.model.num_action_tokens, dtype=torch.int64)
    with torch.no_grad():
        for index in range(codes.shape[1]):
            codes[:, index] = parity_quest.prior(case.model, case.observations(), codes)[1][:, index].argmax(-1)
    return codes.numpy()


def openvla_case(folder):
    return ReferenceCheckpoint(folder, wanted=ModelConfig(), metadata=json.loads((folder / "meta.json").read_text()))


def computed(groups):
    """Our values by name, the last of those that come in several ways."""
    found = {}
    for group in groups:
        with torch.no_grad(), suppress(NotComparableError):
            for name, ours in group.compute():
                if isinstance(ours, Ours):
                    found[name] = np.asarray(ours.value)
    return found


def _write_checkpoint(folder, config, statistics, *, seed, inside=True, tiny=None):
    folder.mkdir()
    model = new_policy(config, INSTRUCTIONS, seed)
    with torch.no_grad():
        if hasattr(model.language_model, "lm_head"):
            model.language_model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
            if inside:
                model.language_model.lm_head.weight[: config.text_vocab_size].mul_(0.1)
                model.language_model.lm_head.weight[config.text_vocab_size + config.num_action_bins :].mul_(0.1)
    tensors = model.state_dict()
    parts = {name: f"{name}." for name in COMPONENTS}
    for component, prefix in parts.items():
        own = {f"module.{n.removeprefix(prefix)}": t.contiguous() for n, t in tensors.items() if n.startswith(prefix)}
        if own:
            save_file(own, folder / f"{component}--9_checkpoint.safetensors")
    dropped = ("value_head.", *parts.values())
    save_file(
        {n: t.contiguous() for n, t in tensors.items() if not n.startswith(dropped)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(_official_config(config, statistics, tiny or {})))


def _official_config(config, statistics, tiny):
    def tower(dims, registers):
        return {
            "embed_dim": dims.dim, "depth": dims.depth, "num_heads": dims.num_heads, "mlp_hidden": dims.mlp_dim,
            "patch_size": config.patch_size, "reg_tokens": registers,
        }  # fmt: skip

    size = config.text_vocab_size + config.num_action_bins
    return {
        "model_type": "openvla",
        "image_sizes": [config.image_size] * 2,
        "n_action_bins": config.num_action_bins,
        "pad_to_multiple_of": config.pad_to_multiple_of,
        "norm_stats": statistics,
        "text_config": {
            "vocab_size": size + config.pad_to_multiple_of,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
        },
        "tiny": {
            "featurizer": tower(config.dino, config.num_register_tokens),
            "fused_featurizer": tower(config.siglip, 0),
            "trailing_token_id": TRAILING,
            **tiny,
        },
    }


def _statistics(rng, config):
    def ends(count):
        low = -rng.uniform(0.5, 3, count)
        return {"q01": low.tolist(), "q99": (-low).tolist(), "min": (2 * low).tolist(), "max": (-3 * low).tolist()}

    found = {"action": {**ends(config.action_dim), "mask": [True] * (config.action_dim - 1) + [False]}}
    if rng.integers(2):
        del found["action"]["mask"]
    return {**found, **({"proprio": ends(config.proprio_dim)} if config.proprio_dim else {})}


def _prompts(rng, count):
    return {f"prompt{i}_input_ids": np.array([[1, *rng.integers(3, 70, 4 + 2 * i)]]) for i in range(count)}


def _batch(texts, num_labels):
    width = max(map(len, texts))
    ids, labels = np.full((len(texts), width), 70), np.full((len(texts), width), -100)
    for row, (text, count) in enumerate(zip(texts, num_labels, strict=True)):
        ids[row, : len(text)] = text
        labels[row, len(text) - count : len(text)] = text[-count:]
    mask = np.arange(width) < np.array([[len(text)] for text in texts])
    return {"batch_input_ids": ids, "batch_attention_mask": mask, "batch_labels": labels}


def _write_arrays(folder, inputs, outputs, meta, *, make):
    np.savez(folder / "inputs.npz", **inputs)
    np.savez(folder / "outputs.npz", **outputs)
    listed = {name: [list(array.shape), str(array.dtype)] for name, array in outputs.items()}
    (folder / "meta.json").write_text(json.dumps({**meta, "outputs": listed}))
    return make(folder)
