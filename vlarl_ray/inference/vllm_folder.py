"""A policy folder as vLLM reads models: a config in Hugging Face's form beside links to the safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlarl_ray.config import ModelConfig
from vlarl_ray.inference.vllm_plugin import ARCHITECTURE, MODEL_TYPE
from vlarl_ray.models.llama import RMS_NORM_EPS, ROPE_THETA
from vlarl_ray.models.openvla import padded_vocab_size
from vlarl_ray.models.policy import describe_policy, policy_weights
from vlarl_ray.vllm_sizes import needed_len

BOS_TOKEN_ID = 1
"""Of Llama's vocabulary, and of ours."""


def link_policy(policy_dir: Path, folder: Path, *, dtype: str) -> Path:
    """Write a model folder for vLLM.

    Args:
        policy_dir: Policy folder of an OpenVLA policy with autoregressive decoding.
        folder: Exists and is empty; gets `config.json` and one link per safetensors file.
        dtype: Precision to compute in.
    """
    model: ModelConfig = describe_policy(policy_dir)["model"]
    for index, path in enumerate(sorted({tensor.path for tensor in policy_weights(policy_dir).values()})):
        (folder / f"part-{index:05}.safetensors").symlink_to(path.resolve())
    (folder / "config.json").write_text(json.dumps(serving_config(model, dtype=dtype), indent=2) + "\n")
    return folder


def serving_config(model: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Describe a policy's model to vLLM."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "dtype": dtype,
        "tie_word_embeddings": False,
        "policy": asdict(model),  # type: ignore[call-overload]
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "dtype": dtype,
            "vocab_size": padded_vocab_size(model),
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "max_position_embeddings": max(2048, needed_len(model)),
            "rms_norm_eps": RMS_NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "tie_word_embeddings": False,
            "bos_token_id": BOS_TOKEN_ID,
            "eos_token_id": 2,
        },
    }


def placeholder_token(model: ModelConfig) -> int:
    """The padding id, which no prompt holds: it stands for a patch until its embedding takes its place."""
    return model.text_vocab_size + model.num_action_bins
