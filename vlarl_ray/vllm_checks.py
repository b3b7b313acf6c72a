"""Checks of the vLLM engine's settings; loads neither vLLM nor torch, so that a config is refused early."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict

from vlarl_ray.config import ExperimentConfig, InferenceConfig, LoraConfig, ModelConfig, VllmConfig
from vlarl_ray.registry import WEIGHT_TRANSPORTS, suggest
from vlarl_ray.vllm_installation import vllm_fault
from vlarl_ray.vllm_sizes import (
    LORA_RANKS,
    adapted_linears,
    cache_blocks,
    least_cache_bytes,
    needed_len,
    num_patches,
    token_bytes,
)

Found = tuple[tuple[str, ...], str]
"""Dotted paths of the fields compared, and a message: field, value, what is allowed, what to do."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM 0.32 has CPU kernels for."""
_CPU_BLOCK_TOKENS = 32
"""Blocks of keys and values have to be multiples of this on CPUs."""
_GPU_MOST_BINS = 1024
"""Tokens that a request may be restricted to on GPUs."""


def vllm_problems(cfg: ExperimentConfig) -> Iterator[Found]:
    """Find what keeps vLLM from serving this run; nothing where another engine is asked for."""
    engine = cfg.inference.engine
    if engine != "vllm":
        yield from _unused(cfg.inference)
        return
    fault = vllm_fault()
    if fault is not None:
        yield ("inference.engine",), f"inference.engine = vllm: {fault.what}; {fault.fix}, or set torch."
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
    if serves_on_gpu(cfg) and model.num_action_bins > _GPU_MOST_BINS:
        message = f"on GPUs vLLM restricts a token to {_GPU_MOST_BINS} at most; set inference.engine to torch"
        fields = ("model.num_action_bins", "inference.engine")
        yield fields, f"model.num_action_bins = {model.num_action_bins}: {message}."
    yield from _lengths(cfg.inference, model)
    yield from _cache(cfg, model)
    unserved = unserved_adapters(cfg.learner.lora, model)
    if cfg.inference.vllm.lora == "native" and cfg.learner.train == "lora" and unserved is not None:
        yield ("inference.vllm.lora", "learner.lora.target_modules"), unserved
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        value, ranks = getattr(model, name), cfg.inference.vllm.tensor_parallel_size
        if value % ranks:
            fields = ("inference.vllm.tensor_parallel_size", f"model.{name}")
            message = f"must divide model.{name} = {value}; lower it"
            yield fields, f"inference.vllm.tensor_parallel_size = {ranks}: {message}."


def serves_on_gpu(cfg: ExperimentConfig) -> bool:
    """Whether vLLM is to run on GPUs."""
    return cfg.inference.engine == "vllm" and cfg.inference.device != "cpu" and cfg.cluster.gpus_per_server > 0


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
        reserved = getattr(cfg.cluster, resource)
        if reserved < 1:
            message = f"needs {what} on GPUs of their own; set cluster.{resource} to 1, or object_store or gloo"
            yield (path, f"cluster.{resource}"), f"{path} = nccl, cluster.{resource} = {reserved:g}: {message}."
    fault = vllm_fault() if cfg.inference.engine != "vllm" else None
    if fault is not None:
        message = f"uses vLLM's communicator, and {fault.what}; {fault.fix}, or set object_store or gloo"
        yield (path,), f"{path} = nccl: {message}."


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


def _cache(cfg: ExperimentConfig, model: ModelConfig) -> Iterator[Found]:
    inference, on_gpu = cfg.inference, serves_on_gpu(cfg)
    vllm = inference.vllm
    if not on_gpu and vllm.block_size is not None and vllm.block_size % _CPU_BLOCK_TOKENS:
        message = f"on CPUs vLLM takes multiples of {_CPU_BLOCK_TOKENS}; set one of them, or leave it out"
        yield ("inference.vllm.block_size",), f"inference.vllm.block_size = {vllm.block_size}: {message}."
        return
    least = least_cache_bytes(inference, model, on_gpu=on_gpu)
    if vllm.kv_cache_bytes is not None and vllm.kv_cache_bytes < least:
        blocks, size = cache_blocks(inference, model, on_gpu=on_gpu)
        among = f" / {vllm.tensor_parallel_size} workers" if vllm.tensor_parallel_size > 1 else ""
        message = (
            f"one sequence of {vllm.max_model_len or needed_len(model)} tokens takes {blocks} blocks (one is vLLM's "
            f"own) of {size} x {token_bytes(inference, model)} bytes{among} = {least}; set at least that, or leave it "
            "out"
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
