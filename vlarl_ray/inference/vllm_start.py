"""Starts vLLM for a policy folder: the environment of its processes, the settings that this package relies on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from vlarl_ray.config import InferenceConfig, LoraConfig, ModelConfig
from vlarl_ray.inference.vllm_folder import link_policy
from vlarl_ray.inference.vllm_lora import adapter_room
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.policy import describe_policy, policy_weights
from vlarl_ray.vllm_checks import VLLM_CPU_CACHE_BYTES, gpu_memory_problem, needed_len

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
        ValueError: If a GPU cannot hold it.
    """
    model: ModelConfig = describe_policy(policy_dir)["model"]
    on_cpu = device == "cpu"
    if not on_cpu:
        _check_gpu(policy_dir, cfg, model, lora)
    # vLLM's processes inherit it; without it each takes all cores
    os.environ["OMP_NUM_THREADS"] = str(cfg.num_threads)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if cfg.vllm.enforce_eager:
        # vLLM's sampler is compiled even so: a minute of a C++ compiler at the first request, for a count
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    folder, vllm = scratch / "model", cfg.vllm
    folder.mkdir()
    model_len = vllm.max_model_len or needed_len(model)
    # Where a prompt is not processed in one step, vLLM rewinds its request's random generator, which on CPUs has no
    # offset to rewind: the engine dies. So a step there has room for every prompt that may be running.
    cpu_scheduling = {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": vllm.max_num_seqs * model_len,
        "scheduler_cls": SCHEDULER,
    }
    arguments = AsyncEngineArgs(
        model=str(link_policy(policy_dir, folder, dtype=cfg.dtype)),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=cfg.dtype,
        max_model_len=model_len,
        max_num_seqs=vllm.max_num_seqs,
        seed=0,
        # log pi of what is sampled from: action tokens only, tempered. The default is neither.
        logprobs_mode="processed_logprobs",
        limit_mm_per_prompt={"image": model.num_cameras},
        mm_processor_cache_gb=0,
        enable_prefix_caching=vllm.enable_prefix_caching,
        enforce_eager=vllm.enforce_eager,
        block_size=vllm.block_size,
        tensor_parallel_size=vllm.tensor_parallel_size,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        kv_cache_memory_bytes=vllm.kv_cache_bytes or (VLLM_CPU_CACHE_BYTES if on_cpu else None),
        worker_extension_cls=worker_class,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **(cpu_scheduling if on_cpu else {}),
        **(adapter_room(lora, model) if lora is not None else {}),
    )
    return AsyncLLM.from_engine_args(arguments)


def shared_memory() -> str | None:
    """Memory-backed folder for what engine and workers exchange, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _check_gpu(policy_dir: Path, cfg: InferenceConfig, model: ModelConfig, lora: LoraConfig | None) -> None:
    """Refuse what does not fit, with the arithmetic, before vLLM's process takes minutes to find out."""
    served = [tensor.num_values for name, tensor in policy_weights(policy_dir).items() if not name.startswith(HEADS)]
    problem = gpu_memory_problem(
        cfg,
        model,
        weight_values=sum(served),
        largest_values=max(served),
        lora=lora,
        gpu_bytes=torch.cuda.get_device_properties(0).total_memory,
    )
    if problem is not None:
        raise ValueError(problem)
