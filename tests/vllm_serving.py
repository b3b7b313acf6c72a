"""A small policy, a learner of it and requests, for tests of the vLLM engine against the learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tests.small_openvla import INSTRUCTIONS, tiny
from vlarl_ray.config import AlgorithmConfig, ExperimentConfig, LearnerConfig, LoraConfig
from vlarl_ray.learner.build import build_learner
from vlarl_ray.learner.group import LearnerGroup
from vlarl_ray.learner.learner import Learner
from vlarl_ray.models.lora import adapter_tensors, load_adapter_tensors
from vlarl_ray.transport import LocalTransport
from vlarl_ray.types import ActReply, ActRequest
from vlarl_ray.weights.canary import make_probe
from vlarl_ray.weights.publisher import WeightPublisher

SIDE, SCALE = 32, 2.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Of the engines under test: GPUs run another model runner of vLLM's, by the same tests."""


def save_served_policy(folder: Path) -> None:
    tiny(patch_size=4, hidden_size=64, num_heads=2, num_kv_heads=1, decoding="autoregressive").save(folder)


def make_learner(folder: Path, **lora: Any) -> Learner:
    learner = LearnerConfig(num_ranks=1, lora=LoraConfig(rank=3, alpha=3 * SCALE, **lora))
    cfg = ExperimentConfig(algorithm=AlgorithmConfig(critic_warmup_updates=0), learner=learner)
    return build_learner(cfg, folder, rank=0, world_size=1, store_address=None)


def make_publisher(engine: Any, learner: Learner, *, tolerance: float = 1e-4) -> WeightPublisher:
    probe = make_probe(
        INSTRUCTIONS,
        image_shape=(1, SIDE, SIDE, 3),
        proprio_dim=4,
        token_ids=range(511, 511 + 256),
        num_tokens=6,
        seed=0,
    )
    group, transport = LearnerGroup([learner], LocalTransport(), deadline_s=60.0), LocalTransport()
    return WeightPublisher(group, [engine], transport, probe=probe, tolerance=tolerance, deadline_s=60.0)


def engine_processes() -> list[psutil.Process]:
    """vLLM's processes, of engines that run in this one."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()])]


def train(learner: Learner, seed: int) -> None:
    """Move the learner's weights as an update would: new adapters everywhere."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {
        name: (torch.randn(a.shape, generator=generator) * 0.3, torch.randn(b.shape, generator=generator) * 0.05)
        for name, (a, b) in adapter_tensors(learner.model).items()
    }
    load_adapter_tensors(learner.model, adapters)


def make_request(rows: int, *, version: int, temperature: float = 1.0, first: int = 0) -> ActRequest:
    index = np.arange(first, first + rows)
    images = [np.random.default_rng(i).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8) for i in index]
    return ActRequest(
        images=np.stack(images),
        proprio=np.zeros((rows, 4), np.float32),
        instructions=tuple(INSTRUCTIONS[i % 3] for i in index),
        noise_keys=np.stack([np.full(rows, 9), index], axis=1).astype(np.uint64),
        temperature=temperature,
        policy_version=version,
    )


def gap(learner: Learner, request: ActRequest, reply: ActReply) -> float:
    return float(np.abs(learner.logprobs(request, reply.tokens) - reply.logprobs).max())
