"""Starts vLLM for a policy folder: the environment of its processes, the settings that this package relies on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from vlarl_ray.config import InferenceConfig, LoraConfig, ModelConfig
from vlarl_ray.inference.vllm_folder import link_policy
from vlarl_ray.inference.vllm_lora import adapter_room
from vlarl_ray.inference.vllm_plugin import ENGINE_OF
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.policy import describe_policy, policy_weights
from vlarl_ray.vllm_installation import installed_version
from vlarl_ray.vllm_sizes import VLLM_CPU_CACHE_BYTES, ServedSizes, gpu_memory_problem, gpu_room, needed_len

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker inside the engine's process: one process fewer
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
"""Of vLLM's processes, unless the user's environment says otherwise."""

SCHEDULER = "vlarl_ray.inference.vllm_scheduler.WholeRequests"
GROUP, SIZE = "vlarl_group", "vlarl_group_size"
"""Extra arguments of a row: which rows belong together, and how many they are. Read by `WholeRequests`."""


def together(group: str, size: int) -> dict[str, Any]:
    """Extra arguments of each of `size` rows that are to be batched as one; the name is used once."""
    return {GROUP: group, SIZE: size}


def start_engine(
    policy_dir: Path,
    cfg: InferenceConfig,
    scratch: Path,
    *,
    device: str,
    worker_class: str,
    lora: LoraConfig | None,
) -> Any:
    """Start an `AsyncLLM`; call it from the event loop that is to use it.

    Args:
        policy_dir: Policy folder of an OpenVLA policy with autoregressive decoding.
        cfg: Precision, threads, and the engine's own settings.
        scratch: Empty folder that is there until this returns.
        device: `cpu` or `cuda`.
        worker_class: What is mixed into vLLM's workers.
        lora: Adapters that updates will bring, where vLLM is to apply them itself.

    Raises:
        ValueError: If a GPU cannot hold it, or the build of vLLM does not serve on CPUs.
    """
    model: ModelConfig = describe_policy(policy_dir)["model"]
    on_cpu = device == "cpu"
    if on_cpu and installed_version("vllm-cpu") is None:
        raise ValueError(
            "inference.engine = vllm: the build of vLLM that is installed serves on GPUs only, and this process has "
            "none; run on Ray with cluster.gpus_per_server = 1, or set inference.engine to torch."
        )
    gpu_share = cfg.vllm.gpu_memory_utilization if on_cpu else _gpu_share(policy_dir, cfg, model, lora)
    _set_environment(cfg)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    folder = scratch / "model"
    folder.mkdir()
    arguments = AsyncEngineArgs(
        model=str(link_policy(policy_dir, folder, dtype=cfg.dtype)),
        worker_extension_cls=worker_class,
        gpu_memory_utilization=gpu_share,
        **_settings(cfg, model, on_cpu=on_cpu),
        **(adapter_room(lora, model) if lora is not None else {}),
    )
    return AsyncLLM.from_engine_args(arguments)


def _settings(cfg: InferenceConfig, model: ModelConfig, *, on_cpu: bool) -> dict[str, Any]:
    """Engine arguments: what this package relies on, and what the config says."""
    vllm = cfg.vllm
    model_len = vllm.max_model_len or needed_len(model)
    # Where a prompt is not processed in one step, vLLM rewinds its request's random generator, which on CPUs has no
    # offset to rewind: the engine dies. So a step there has room for every prompt that may be running.
    cpu_scheduling = {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": vllm.max_num_seqs * model_len,
        "scheduler_cls": SCHEDULER,
    }
    return {
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": cfg.dtype,
        "max_model_len": model_len,
        "max_num_seqs": vllm.max_num_seqs,
        "seed": 0,
        # log pi of what is sampled from: action tokens only, tempered. The default is neither.
        "logprobs_mode": "processed_logprobs",
        "limit_mm_per_prompt": {"image": model.num_cameras},
        "mm_processor_cache_gb": 0,
        "enable_prefix_caching": vllm.enable_prefix_caching,
        "enforce_eager": vllm.enforce_eager,
        "block_size": vllm.block_size,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "kv_cache_memory_bytes": vllm.kv_cache_bytes or (VLLM_CPU_CACHE_BYTES if on_cpu else None),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **(cpu_scheduling if on_cpu else {}),
    }


def _set_environment(cfg: InferenceConfig) -> None:
    """What vLLM reads from the environment, as it is imported and in its processes."""
    os.environ["OMP_NUM_THREADS"] = str(cfg.num_threads)  # without it each process takes all cores
    os.environ[ENGINE_OF] = str(os.getpid())
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # vLLM would take it in place of what the config says, unseen
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if cfg.vllm.enforce_eager:
        # vLLM's sampler is compiled even so: a minute of a C++ compiler at the first request, for a count
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def shared_memory() -> str | None:
    """Memory-backed folder for what engine and workers exchange, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _gpu_share(policy_dir: Path, cfg: InferenceConfig, model: ModelConfig, lora: LoraConfig | None) -> float:
    """Return the share of a GPU that vLLM may fill: that of the config, less what loading an update takes.

    Refuses what does not fit, with the arithmetic, before vLLM's process takes minutes to find out.
    """
    weights = policy_weights(policy_dir).items()
    sizes = ServedSizes.of((name, tensor.num_values) for name, tensor in weights if not name.startswith(HEADS))
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    problem = gpu_memory_problem(cfg, model, sizes, lora, gpu_bytes=gpu_bytes)
    if problem is not None:
        raise ValueError(problem)
    # vLLM counts the room for adapters itself, where it applies them
    room = 0 if lora is not None else gpu_room(cfg, model, sizes, lora)
    return cfg.vllm.gpu_memory_utilization - room / gpu_bytes
