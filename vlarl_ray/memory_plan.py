"""How much memory a job's tensors need, from its config alone: bytes of each process by part, before anything is built.

The model runs once on the meta device, where tensors have shapes and lifetimes but no content: planning for 7 billion
weights takes no memory, and no architecture needs formulas of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlarl_ray.config import ExperimentConfig, ModelConfig
from vlarl_ray.learner.fsdp import large_units
from vlarl_ray.live_bytes import LiveBytes
from vlarl_ray.models.base import PolicyInputs
from vlarl_ray.models.chunk_policy import ChunkPolicyModel
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.lora import adapter_dropout, attach_lora
from vlarl_ray.models.policy import DTYPES
from vlarl_ray.registry import ALGORITHMS, MODELS, resolve
from vlarl_ray.vllm_sizes import (
    VLLM_CPU_CACHE_BYTES,
    ServedSizes,
    adapter_copies_bytes,
    adapter_slot_bytes,
    gpu_memory_problem,
    gpu_need,
)

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MemoryPart:
    """Tensors of one kind on one process."""

    process: str
    """`learner rank` or `inference server`."""
    name: str
    num_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What every process of a job holds at its peak."""

    parts: tuple[MemoryPart, ...]

    def total(self, process: str) -> int:
        """Bytes of one process, its parts together."""
        return sum(part.num_bytes for part in self.parts if part.process == process)

    @property
    def table(self) -> str:
        """A line per process and part."""
        lines = []
        for process in dict.fromkeys(part.process for part in self.parts):
            lines.append(f"{process:26} {_size(self.total(process))}")
            lines += [f"  {part.name:24} {_size(part.num_bytes)}" for part in self.parts if part.process == process]
        return "\n".join(lines)


def plan_memory(cfg: ExperimentConfig, *, proprio_dim: int = 0, is_sharded: bool = True) -> MemoryPlan:
    """List what each learner rank and each inference server holds at its peak.

    Args:
        cfg: The job; `cfg.model` describes the policy.
        proprio_dim: Of the simulator's observations.
        is_sharded: False plans for one learner rank without FSDP (`--inline`).

    Returns:
        Parts of a learner rank: `frozen weights`, `trained weights` (adapters and heads, or everything), `optimizer`
        (after the first update), `gradients`, `gathered` (what FSDP assembles while it computes) and `activations` (of
        one micro-batch, forward and backward). Of an inference server: `weights`, `keys and values` (of one batch) and
        `sampling` (what else one batch takes).
    """
    return MemoryPlan((*_plan_rank(cfg, proprio_dim, is_sharded=is_sharded), *_plan_server(cfg, proprio_dim)))


def plan_learner(cfg: ExperimentConfig, *, proprio_dim: int = 0) -> MemoryPlan:
    """List what each learner rank holds at its peak, on FSDP; arguments and parts as of `plan_memory`."""
    return MemoryPlan(tuple(_plan_rank(cfg, proprio_dim, is_sharded=True)))


def vllm_need(cfg: ExperimentConfig, *, gpu_bytes: int | None) -> tuple[str, str | None]:
    """Say what a server on vLLM needs of a GPU, and why `gpu_bytes` do not suffice; None where they do.

    Args:
        cfg: The job; `cfg.model` describes the policy.
        gpu_bytes: Memory of one GPU; None where it is unknown, and nothing is compared.
    """
    parameters = _empty_model(cfg.model).named_parameters()
    sizes = ServedSizes.of((name, p.numel()) for name, p in parameters if not name.startswith(HEADS))
    lora = cfg.learner.lora if cfg.inference.vllm.lora == "native" else None
    _, sum_of_parts = gpu_need(cfg.inference, cfg.model, sizes, lora)
    if gpu_bytes is None:
        return sum_of_parts, None
    return sum_of_parts, gpu_memory_problem(cfg.inference, cfg.model, sizes, lora, gpu_bytes=gpu_bytes)


def _plan_rank(cfg: ExperimentConfig, proprio_dim: int, *, is_sharded: bool) -> Iterator[MemoryPart]:
    process, learner = "learner rank", cfg.learner
    num_ranks = learner.num_ranks if is_sharded else 1
    compute = _BYTES[learner.dtype] if is_sharded else 4
    model = _learner_model(cfg)
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    heads = [p for n, p in frozen if n.startswith(HEADS)]
    whole = [p for n, p in frozen if n.startswith(model.frozen_modules)]
    rest = [p for n, p in frozen if not n.startswith((*HEADS, *model.frozen_modules))]
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    fixed = 4 * _shard_values(heads, num_ranks) + compute * (_shard_values(rest, num_ranks) + _shard_values(whole, 1))
    yield MemoryPart(process, "frozen weights", fixed + buffers)
    yield MemoryPart(process, "trained weights", 4 * _shard_values(trainable, num_ranks))
    yield MemoryPart(process, "optimizer", 8 * _shard_values(trainable, num_ranks))
    # Gradients are summed whole until the last micro-batch of a minibatch, but in full training each pass is reduced.
    are_whole = is_sharded and learner.train == "lora"
    yield MemoryPart(process, "gradients", 4 * _shard_values(trainable, 1 if are_whole else num_ranks))
    if is_sharded:
        yield MemoryPart(process, "gathered", _gathered_bytes(model, compute, learner.fsdp_min_params))
    yield MemoryPart(process, "activations", _activation_bytes(cfg, model, proprio_dim))


def _plan_server(cfg: ExperimentConfig, proprio_dim: int) -> Iterator[MemoryPart]:
    process, inference, temperature = "inference server", cfg.inference, cfg.rollout.temperature
    model = _empty_model(cfg.model)
    for name, parameter in model.named_parameters():
        if not name.startswith(HEADS):
            parameter.data = parameter.data.to(DTYPES[inference.dtype])
    parameters = list(model.parameters())
    yield MemoryPart(process, "weights", sum(t.numel() * t.element_size() for t in (*parameters, *model.buffers())))
    is_vllm = inference.engine == "vllm"
    rows = inference.vllm.max_num_seqs if is_vllm else inference.batch_size
    one = model.draw_noise(np.zeros((1, 2), np.uint64))
    noise = torch.empty(rows, *one.shape[1:], device="meta") if temperature > 0 else None
    inputs = _inputs(cfg, model, rows, proprio_dim)
    with torch.no_grad(), _flash_attention(), LiveBytes(known=(*parameters, *model.buffers())) as live:
        model.sample(inputs, temperature=temperature, noise=noise)
    cache = model.key_value_bytes(rows)
    on_gpu = inference.device == "cuda" or cfg.cluster.gpus_per_server
    if is_vllm:  # it reserves a pool at the start
        pool = inference.vllm.kv_cache_bytes or (cache if on_gpu else VLLM_CPU_CACHE_BYTES)
        yield MemoryPart(process, "keys and values", pool)
    else:
        yield MemoryPart(process, "keys and values", cache)
    yield MemoryPart(process, "sampling", live.peak - cache)
    if is_vllm and inference.vllm.lora == "native":
        sizes = (inference, cfg.learner.lora, cfg.model)
        yield MemoryPart(process, "adapters", adapter_slot_bytes(*sizes))
        if not on_gpu:
            yield MemoryPart(process, "applying adapters", adapter_copies_bytes(*sizes))
    elif is_vllm:  # a pristine tensor, the merged one, and vLLM's copy of it
        largest = max(p.numel() for p in parameters)
        yield MemoryPart(process, "merging", 3 * largest * _BYTES[inference.dtype])


def _activation_bytes(cfg: ExperimentConfig, model: ChunkPolicyModel, proprio_dim: int) -> int:
    """Peak of one micro-batch's forward and backward pass, gradients of the weights not included."""
    rows = cfg.learner.micro_batch_size
    inputs = _inputs(cfg, model, rows, proprio_dim)
    is_token = model.model_config.action_head == "tokens"
    tokens = torch.empty(rows, model.num_action_tokens, dtype=torch.int64 if is_token else torch.float32, device="meta")
    known = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            known.append(parameter.grad)
    seeds = np.zeros(rows, np.int64)  # nothing is drawn here
    with _flash_attention(), adapter_dropout(model, seeds), LiveBytes(known=known) as live:
        output = model(inputs, tokens)
        logprobs = output.actions.log_prob(tokens, temperature=1.0)
        entropy = output.actions.entropy(temperature=1.0)
        (logprobs.sum() + entropy.detach().sum() + output.values.sum()).backward()
    return live.peak


def _gathered_bytes(model: ChunkPolicyModel, compute_bytes: int, min_params: int) -> int:
    """What FSDP gathers at once: all that is in no unit, and two neighbours, one computing and one being fetched."""
    num_bytes = {
        parameter: parameter.numel() * (4 if name.startswith(HEADS) else compute_bytes)
        for name, parameter in model.named_parameters()
        if not name.startswith(model.frozen_modules)
    }
    unused = {p for name, p in model.named_parameters() if name.startswith(model.unused_modules)}
    units = [[*unit.parameters()] for unit in large_units(model, min_params)]
    sizes = [sum(num_bytes.pop(p) for p in unit) for unit in units]
    computed = [size for unit, size in zip(units, sizes, strict=True) if not unused.issuperset(unit)]
    return sum(num_bytes.values()) + max(map(sum, pairwise([0, *computed])))


def _learner_model(cfg: ExperimentConfig) -> ChunkPolicyModel:
    """Build the model as a learner rank trains it, on the meta device."""
    model = _empty_model(cfg.model)
    model.detach_value = cfg.learner.detach_value
    if cfg.learner.train == "lora":
        attach_lora(model, cfg.learner.lora, seed=0, critic=cfg.learner.critic, detach_value=cfg.learner.detach_value)
    has_critic = "values" in resolve(ALGORITHMS, cfg.algorithm.name, what="algorithm.name").needs
    for name, parameter in model.named_parameters():
        is_unused = name.startswith(model.frozen_modules) or (name.startswith("value_head.") and not has_critic)
        if is_unused or (name.startswith("scale_head.") and not cfg.learner.train_scale_head):
            parameter.requires_grad_(False)
    if cfg.learner.dtype == "bfloat16":
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and not name.startswith(HEADS):
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _empty_model(config: ModelConfig) -> ChunkPolicyModel:
    with torch.device("meta"):
        return resolve(MODELS, config.architecture, what="model.architecture")(config)


def _inputs(cfg: ExperimentConfig, model: ChunkPolicyModel, rows: int, proprio_dim: int) -> PolicyInputs:
    side = cfg.env.image_size
    with torch.device("meta"):
        return PolicyInputs(
            torch.empty(rows, model.model_config.num_cameras, side, side, 3, dtype=torch.uint8),
            torch.empty(rows, model.model_config.max_prompt_tokens, dtype=torch.int64),
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows, proprio_dim),
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:9.3f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:9.3f} MiB"


def _shard_values(parameters: Iterable[Tensor], num_ranks: int) -> int:
    """Values that the rank with the most rows holds."""
    return sum(-(-p.shape[0] // num_ranks) * (p.numel() // p.shape[0]) for p in parameters)


class _FlashAttention(torch.autograd.Function):
    """What fused attention keeps for its backward pass; on the meta device torch would keep the whole score matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, attended, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return attended

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Context in which attention on the meta device takes the memory that fused kernels take elsewhere."""
    before = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        return _FlashAttention.apply(query, key, value)  # type: ignore[return-value]

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before
