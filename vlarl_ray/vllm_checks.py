"""Checks of the vLLM engine's settings; loads neither vLLM nor torch, so that a config is refused early."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vlarl_ray.config import ExperimentConfig, InferenceConfig, LoraConfig, ModelConfig, VllmConfig
from vlarl_ray.registry import WEIGHT_TRANSPORTS, suggest

Found = tuple[tuple[str, ...], str]
"""Dotted paths of the fields compared, and a message: field, value, what is allowed, what to do."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM 0.32 has CPU kernels for."""
VLLM_CPU_CACHE_BYTES = 1 << 30
"""Keys and values on CPUs where `kv_cache_bytes` says nothing: vLLM itself would take a share of the memory."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM 0.32 makes room for; adapters in between are padded."""
_BLOCK_TOKENS = 128
"""Keys and values are kept in blocks of this many tokens on CPUs (16 on GPUs)."""
_BYTES = {"float32": 4, "bfloat16": 2}


def vllm_problems(cfg: ExperimentConfig) -> Iterator[Found]:
    """Find what keeps vLLM from serving this run; nothing where another engine is asked for."""
    engine = cfg.inference.engine
    if engine != "vllm":
        yield from _unused(cfg.inference)
        return
    if not is_installed():
        message = (
            "vLLM is not installed here; run pip install --no-deps -r requirements.lock, which holds its CPU build (on "
            "GPUs: pip install 'vlarl_ray[gpu]'), or set torch"
        )
        yield ("inference.engine",), f"inference.engine = vllm: {message}."
    if cfg.trust.deterministic:
        advice = "vLLM's rounding depends on which requests share a batch; set it to false, or the engine to torch"
        yield ("trust.deterministic", "inference.engine"), f"trust.deterministic = true: {advice}."
    defaults = InferenceConfig()
    for name, other in (("batch_size", "inference.vllm.max_num_seqs"), ("batch_window_ms", None)):
        value = getattr(cfg.inference, name)
        if value != getattr(defaults, name):
            advice = f"set {other} instead" if other else "leave it out"
            message = f"has no effect on vllm, which batches by itself; {advice}"
            yield (f"inference.{name}", "inference.engine"), f"inference.{name} = {value}: {message}."
    yield from _parallel(cfg)
    yield from _native_lora(cfg)
    if cfg.policy is None or cfg.model != ModelConfig():  # else the model comes with the policy, and is checked then
        yield from model_problems(cfg, cfg.model)


def model_problems(cfg: ExperimentConfig, model: ModelConfig) -> Iterator[Found]:
    """Find what keeps vLLM from serving this model; nothing where another engine is asked for."""
    if cfg.inference.engine != "vllm":
        return
    if model.architecture != "openvla":
        message = f"serves openvla only, not {model.architecture}; set inference.engine to torch"
        yield ("inference.engine", "model.architecture"), f"inference.engine = vllm: {message}."
        return
    if model.decoding != "autoregressive":
        message = (
            "decodes one token after another; set model.decoding to autoregressive, or inference.engine to torch, "
            "which decodes a chunk in one pass"
        )
        yield ("inference.engine", "model.decoding"), f"inference.engine = vllm: {message}."
    head_size = model.hidden_size // model.num_heads
    if not serves_on_gpu(cfg) and head_size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        message = f"makes attention heads of {head_size}, but vLLM on CPUs has {sizes}; change one of the two"
        fields = ("model.hidden_size", "model.num_heads", "inference.engine")
        yield fields, f"model.hidden_size = {model.hidden_size} / model.num_heads = {model.num_heads} {message}."
    yield from _lengths(cfg.inference, model)
    unserved = unserved_adapters(cfg.learner.lora, model)
    if cfg.inference.vllm.lora == "native" and cfg.learner.train == "lora" and unserved is not None:
        yield ("inference.vllm.lora", "learner.lora.target_modules"), unserved
    for name in ("num_heads", "num_kv_heads"):
        value, ranks = getattr(model, name), cfg.inference.vllm.tensor_parallel_size
        if value % ranks:
            fields = ("inference.vllm.tensor_parallel_size", f"model.{name}")
            message = f"must divide model.{name} = {value}; lower it"
            yield fields, f"inference.vllm.tensor_parallel_size = {ranks}: {message}."


def serves_on_gpu(cfg: ExperimentConfig) -> bool:
    """Whether vLLM is to run on GPUs."""
    return cfg.inference.engine == "vllm" and cfg.inference.device != "cpu" and cfg.cluster.gpus_per_server > 0


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


def unserved_adapters(lora: LoraConfig, model: ModelConfig) -> str | None:
    """Say which adapters vLLM cannot apply by itself, and what to do; None if it can apply all of them.

    It knows its own linear layers, which are those of the language model; towers and projector are ours.
    """
    try:
        others = [name for name in adapted_linears(lora, model) if not name.startswith("language_model.")]
    except re.error:  # reported with the config's names
        return None
    if not others:
        return None
    parts = sorted({name.partition(".")[0] for name in others})
    return (
        f"inference.vllm.lora = native: vLLM applies adapters to the language model only, but "
        f"learner.lora.target_modules = {lora.target_modules!r} adapts {len(others)} layers of {' and '.join(parts)}, "
        f"such as {others[0]} and {others[-1]}; set learner.lora.target_modules to 'language_model.*', or "
        "inference.vllm.lora to merged."
    )


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


def weight_transport_problems(cfg: ExperimentConfig) -> Iterator[Found]:
    """Find what keeps weights from travelling as asked."""
    path, name = "inference.weight_transport", cfg.inference.weight_transport
    if name == "ipc":
        message = (
            "vLLM's IPC engine hands over tensors on one GPU, but a learner rank reserves a GPU of its own "
            "(cluster.gpus_per_rank); set object_store, or nccl"
        )
        yield (path,), f"{path} = ipc: {message}."
    elif name not in WEIGHT_TRANSPORTS:
        yield (path,), f"{path} = {name!r} is unknown; {suggest(name, WEIGHT_TRANSPORTS)}."
    if name != "nccl":
        return
    for what, resource in (("learner ranks", "gpus_per_rank"), ("servers", "gpus_per_server")):
        if not getattr(cfg.cluster, resource):
            message = f"needs {what} on GPUs; set cluster.{resource} to 1, or the transport to object_store or gloo"
            yield (path, f"cluster.{resource}"), f"{path} = nccl, cluster.{resource} = 0: {message}."
    if not is_installed() and cfg.inference.engine != "vllm":
        message = "uses vLLM's communicator, and vLLM is not installed here; install it, or set object_store or gloo"
        yield (path,), f"{path} = nccl: {message}."


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


def is_installed() -> bool:
    """Whether vLLM can be found; it is not imported, which takes seconds."""
    return importlib.util.find_spec("vllm") is not None


def gpu_need(
    inference: InferenceConfig,
    model: ModelConfig,
    *,
    weight_values: int,
    largest_values: int,
    lora: LoraConfig | None = None,
) -> tuple[int, str]:
    """Say what a server takes of each of its GPUs at least: bytes, and how they add up.

    Args:
        inference: Precision, and what vLLM keeps beside the weights.
        model: Dimensions.
        weight_values: Numbers in all served tensors.
        largest_values: Numbers in the largest tensor: where adapters are merged, that much is at once, in fp32.
        lora: Adapters that vLLM is to apply itself; None where they are merged.
    """
    vllm, width = inference.vllm, _BYTES[inference.dtype]
    weights = weight_values * width // vllm.tensor_parallel_size
    room, purpose = largest_values * (8 + width), "while it merges"
    if lora is not None:
        room, purpose = adapter_slot_bytes(inference, lora, model), "for adapters"
    # without a size of its own the pool is what is left; it must hold one sequence
    cache = vllm.kv_cache_bytes or (vllm.max_model_len or needed_len(model)) * token_bytes(inference, model)
    parts = ((weights, "for weights"), (room, purpose), (cache, "for keys and values"))
    needed = weights + room + cache
    return needed, f"{' + '.join(f'{_gib(part)} {what}' for part, what in parts)} = {_gib(needed)}"


def gpu_memory_problem(inference: InferenceConfig, model: ModelConfig, *, gpu_bytes: int, **sizes: Any) -> str | None:
    """Say why a GPU of `gpu_bytes` cannot hold a server of this model; None where it can. `sizes` as of `gpu_need`."""
    share = inference.vllm.gpu_memory_utilization
    needed, sum_of_parts = gpu_need(inference, model, **sizes)
    if needed <= share * gpu_bytes:
        return None
    return (
        f"inference.vllm.gpu_memory_utilization = {share:g}: of a GPU of {_gib(gpu_bytes)} GiB that is "
        f"{_gib(share * gpu_bytes)}, but a server needs {sum_of_parts}; raise it, set inference.dtype to bfloat16, or "
        "raise inference.vllm.tensor_parallel_size."
    )


def _gib(num_bytes: int | float) -> str:
    return f"{num_bytes / 2**30:.3f}"


def token_bytes(inference: InferenceConfig, model: ModelConfig) -> int:
    """Bytes of one token's keys and values in all layers."""
    head_dim = model.hidden_size // model.num_heads
    return 2 * model.num_layers * model.num_kv_heads * head_dim * _BYTES[inference.dtype]


def _lengths(inference: InferenceConfig, model: ModelConfig) -> Iterator[Found]:
    vllm, needed = inference.vllm, needed_len(model)
    parts = (
        f"{model.max_prompt_tokens} prompt tokens (model.max_prompt_tokens) + {model.num_cameras} x "
        f"{num_patches(model)} patches + {model.chunk_length} x {model.action_dim} action tokens = {needed}"
    )
    fields = ("inference.vllm.max_model_len", "model.max_prompt_tokens", "model.image_size", "model.chunk_length")
    if vllm.max_model_len is not None and vllm.max_model_len < needed:
        message = f"a sequence takes {parts}; set at least that, or leave it out"
        yield fields, f"inference.vllm.max_model_len = {vllm.max_model_len}: {message}."
    if vllm.kv_cache_bytes is None:
        return
    per_token = token_bytes(inference, model)
    size = vllm.block_size or _BLOCK_TOKENS
    blocks = -(-(vllm.max_model_len or needed) // size)
    least = blocks * size * per_token
    if vllm.kv_cache_bytes < least:
        message = (
            f"one sequence of {vllm.max_model_len or needed} tokens takes {blocks} block(s) of {size} x "
            f"{per_token} bytes = {least}; set at least that, or leave it out"
        )
        fields = ("inference.vllm.kv_cache_bytes", "model.num_layers", "model.num_kv_heads")
        yield fields, f"inference.vllm.kv_cache_bytes = {vllm.kv_cache_bytes}: {message}."


def _parallel(cfg: ExperimentConfig) -> Iterator[Found]:
    ranks, gpus = cfg.inference.vllm.tensor_parallel_size, cfg.cluster.gpus_per_server
    if ranks > 1 and gpus != ranks:
        message = f"needs as many GPUs; set cluster.gpus_per_server = {ranks} (it is {gpus:g}), or lower it to 1"
        fields = ("inference.vllm.tensor_parallel_size", "cluster.gpus_per_server")
        yield fields, f"inference.vllm.tensor_parallel_size = {ranks}: {message}."
    share = cfg.inference.vllm.gpu_memory_utilization
    if 0 < gpus < share <= 1:
        message = f"the server reserves cluster.gpus_per_server = {gpus:g} of a GPU; set at most that, or reserve more"
        fields = ("inference.vllm.gpu_memory_utilization", "cluster.gpus_per_server")
        yield fields, f"inference.vllm.gpu_memory_utilization = {share:g}: {message}."


def _native_lora(cfg: ExperimentConfig) -> Iterator[Found]:
    path, learner, ranks = "inference.vllm.lora", cfg.learner, cfg.inference.vllm.tensor_parallel_size
    if cfg.inference.vllm.lora != "native":
        return
    if learner.train == "full":
        message = "learner.train = full changes every weight, and has no adapters; set merged, or learner.train = lora"
        yield (path, "learner.train"), f"{path} = native: {message}."
    elif learner.lora.rank > LORA_RANKS[-1]:
        message = f"vLLM applies adapters of rank {LORA_RANKS[-1]} at most; set merged, or a lower rank"
        yield (path, "learner.lora.rank"), f"{path} = native with learner.lora.rank = {learner.lora.rank}: {message}."
    if ranks > 1:
        message = "each GPU would hold other parts of an adapter, and they are compared whole; set merged"
        fields = (path, "inference.vllm.tensor_parallel_size")
        yield fields, f"{path} = native with inference.vllm.tensor_parallel_size = {ranks}: {message}."


def _unused(inference: InferenceConfig) -> Iterator[Found]:
    for name, default in asdict(VllmConfig()).items():  # type: ignore[call-overload]
        value = getattr(inference.vllm, name)
        if value != default and inference.engine == "torch":
            path = f"inference.vllm.{name}"
            message = "has no effect with inference.engine = torch; set that to vllm, or leave this out"
            yield (path, "inference.engine"), f"{path} = {value}: {message}."
