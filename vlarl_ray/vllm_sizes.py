"""What vLLM needs for a policy: lengths of sequences, layers with adapters, bytes. Loads neither vLLM nor torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vlarl_ray.config import InferenceConfig, LoraConfig, ModelConfig

VLLM_CPU_CACHE_BYTES = 1 << 30
"""Keys and values on CPUs where `kv_cache_bytes` says nothing: vLLM itself would take a share of the memory."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM 0.32 makes room for; adapters in between are padded."""
_BLOCK_TOKENS = {True: 16, False: 128}
"""Tokens of a block of keys and values, on GPUs and on CPUs."""
_MERGED_AT_ONCE, _TEMPORARY_BYTES = 1 << 22, 64
"""Numbers of a tensor that `weights.merge` works on at once, and the bytes it takes for each."""
_BYTES = {"float32": 4, "bfloat16": 2}


def needed_len(model: ModelConfig) -> int:
    """Tokens of the longest sequence: prompt, patches of each camera, action tokens.

    Example:
        >>> needed_len(ModelConfig(max_prompt_tokens=13, image_size=64, patch_size=8, chunk_length=5, action_dim=4))
        97
    """
    return model.max_prompt_tokens + model.num_cameras * num_patches(model) + model.chunk_length * model.action_dim


def num_patches(model: ModelConfig) -> int:
    """Tokens that one frame becomes."""
    return (model.image_size // model.patch_size) ** 2


def adapted_linears(lora: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of an openvla policy that get adapters, by module name.

    What `models.lora.attach_lora` finds in the model itself, in the same order.
    """
    linears: dict[str, tuple[int, int]] = {}
    for name, tower in (("featurizer", model.dino), ("fused_featurizer", model.siglip)):
        for index in range(tower.depth - 1):  # features are those before the last block
            block, dim = f"vision_backbone.{name}.blocks.{index}", tower.dim
            linears |= {f"{block}.attn.qkv": (dim, 3 * dim), f"{block}.attn.proj": (dim, dim)}
            linears |= {f"{block}.mlp.fc1": (dim, tower.mlp_dim), f"{block}.mlp.fc2": (tower.mlp_dim, dim)}
    vision, hidden, inner = model.dino.dim + model.siglip.dim, model.hidden_size, model.intermediate_size
    linears |= {"projector.fc1": (vision, 4 * vision), "projector.fc2": (4 * vision, hidden)}
    linears["projector.fc3"] = (hidden, hidden)
    keys = hidden // model.num_heads * model.num_kv_heads
    for index in range(model.num_layers):
        attention, mlp = (f"language_model.model.layers.{index}.{part}" for part in ("self_attn", "mlp"))
        linears |= {f"{attention}.q_proj": (hidden, hidden)}
        linears |= {f"{attention}.{name}": (hidden, keys) for name in ("k_proj", "v_proj")}
        linears |= {f"{attention}.o_proj": (hidden, hidden)}
        linears |= {f"{mlp}.{name}": (hidden, inner) for name in ("gate_proj", "up_proj")}
        linears |= {f"{mlp}.down_proj": (inner, hidden)}
    if lora.target_modules != "all-linear":
        linears = {name: size for name, size in linears.items() if re.fullmatch(lora.target_modules, name)}
    if lora.include_lm_head:
        rows = -(-(model.text_vocab_size + model.num_action_bins + 1) // model.pad_to_multiple_of)
        linears["language_model.lm_head"] = (hidden, rows * model.pad_to_multiple_of)
    return linears


def lora_slot_rank(rank: int) -> int:
    """Rank that vLLM makes room for, so that adapters of `rank` fit."""
    return min(allowed for allowed in LORA_RANKS if allowed >= rank)


def adapter_slot_bytes(inference: InferenceConfig, lora: LoraConfig, model: ModelConfig) -> int:
    """Bytes that vLLM's layers set aside for adapters that it applies itself."""
    values = sum(fan_in + fan_out for fan_in, fan_out in adapted_linears(lora, model).values())
    return values * lora_slot_rank(lora.rank) * _BYTES[inference.dtype]


def adapter_copies_bytes(inference: InferenceConfig, lora: LoraConfig, model: ModelConfig) -> int:
    """Bytes of the largest temporary with which vLLM applies adapters on CPUs: a copy of a layer's B for each token."""
    layers = {name: max(size) for name, size in adapted_linears(lora, model).items() if not name.endswith("lm_head")}
    tokens = inference.vllm.max_num_seqs * (inference.vllm.max_model_len or needed_len(model))
    return tokens * max(layers.values(), default=0) * lora_slot_rank(lora.rank) * _BYTES[inference.dtype]


@dataclass(frozen=True)
class ServedSizes:
    """How many numbers the served tensors of a policy hold."""

    split: int
    """Of the language model, which tensor parallelism splits."""
    whole: int
    """Of towers and projector, which every worker holds."""
    largest: int
    """Of the largest tensor."""

    @classmethod
    def of(cls, num_values: Iterable[tuple[str, int]]) -> ServedSizes:
        """Sort tensors by official name; the heads, which only the learner computes, are to be left out."""
        counts = dict(num_values)
        split = sum(count for name, count in counts.items() if name.startswith("language_model."))
        return cls(split, sum(counts.values()) - split, max(counts.values()))


def gpu_need(
    inference: InferenceConfig, model: ModelConfig, sizes: ServedSizes, lora: LoraConfig | None = None
) -> tuple[int, str]:
    """Say what a server takes of each of its GPUs at least: bytes, and how they add up.

    Args:
        inference: Precision, and what vLLM keeps beside the weights.
        model: Dimensions.
        sizes: Of the served tensors.
        lora: Adapters that vLLM is to apply itself; None where they are merged.
    """
    vllm, width = inference.vllm, _BYTES[inference.dtype]
    weights = (sizes.whole + sizes.split // vllm.tensor_parallel_size) * width
    room, purpose = gpu_room(inference, model, sizes, lora), "while it merges" if lora is None else "for adapters"
    # without a size of its own the pool is what is left; it must hold one sequence
    cache = vllm.kv_cache_bytes or least_cache_bytes(inference, model, on_gpu=True)
    parts = ((weights, "for weights"), (room, purpose), (cache, "for keys and values"))
    needed = weights + room + cache
    return needed, f"{' + '.join(f'{_gib(part)} {what}' for part, what in parts)} = {_gib(needed)}"


def gpu_room(inference: InferenceConfig, model: ModelConfig, sizes: ServedSizes, lora: LoraConfig | None) -> int:
    """Bytes of a GPU that loading an update takes, beside the weights.

    Where adapters are merged: a pristine tensor, the merged one, vLLM's copy of it, and the temporaries of a part.
    """
    if lora is not None:
        return adapter_slot_bytes(inference, lora, model)
    part = min(_MERGED_AT_ONCE, sizes.largest) * _TEMPORARY_BYTES
    return 3 * sizes.largest * _BYTES[inference.dtype] + part


def gpu_memory_problem(
    inference: InferenceConfig,
    model: ModelConfig,
    sizes: ServedSizes,
    lora: LoraConfig | None = None,
    *,
    gpu_bytes: int,
) -> str | None:
    """Say why a GPU of `gpu_bytes` cannot hold a server of this model; None where it can. See `gpu_need`."""
    share = inference.vllm.gpu_memory_utilization
    needed, sum_of_parts = gpu_need(inference, model, sizes, lora)
    if needed <= share * gpu_bytes:
        return None
    return (
        f"inference.vllm.gpu_memory_utilization = {share:g}: of a GPU of {_gib(gpu_bytes)} GiB that is "
        f"{_gib(share * gpu_bytes)}, but a server needs {sum_of_parts}; raise it, set inference.dtype to bfloat16, or "
        "raise inference.vllm.tensor_parallel_size."
    )


def _gib(num_bytes: int | float) -> str:
    return f"{num_bytes / 2**30:.3f}"


def cache_blocks(inference: InferenceConfig, model: ModelConfig, *, on_gpu: bool) -> tuple[int, int]:
    """Return how many blocks of keys and values serve one sequence, and the tokens of a block.

    One block more than it fills: vLLM keeps one for itself.
    """
    size = inference.vllm.block_size or _BLOCK_TOKENS[on_gpu]
    return -(-(inference.vllm.max_model_len or needed_len(model)) // size) + 1, size


def least_cache_bytes(inference: InferenceConfig, model: ModelConfig, *, on_gpu: bool) -> int:
    """Bytes of keys and values, of each worker, with which one sequence can be served."""
    blocks, size = cache_blocks(inference, model, on_gpu=on_gpu)
    return blocks * size * token_bytes(inference, model) // inference.vllm.tensor_parallel_size


def token_bytes(inference: InferenceConfig, model: ModelConfig) -> int:
    """Bytes of one token's keys and values in all layers."""
    head_dim = model.hidden_size // model.num_heads
    return 2 * model.num_layers * model.num_kv_heads * head_dim * _BYTES[inference.dtype]
