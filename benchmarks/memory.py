"""The memory plan against what the tensors of a real update and a real batch of samples take, on presets that run here.

Learner: one unsharded rank; two updates of one update's rows, so that the optimiser's moments are there. Server: the
in-process engine. Bytes are those of live tensor storages, counted operation by operation, not of the process.

    python -m benchmarks.memory [--presets jobs/smoke.yaml jobs/laptop.yaml jobs/toy.yaml]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks._results import write_result
from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_loader import load_config
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.learner.build import build_learner
from vlarl_ray.live_bytes import LiveBytes
from vlarl_ray.memory_plan import plan_memory
from vlarl_ray.models import VLAModel, new_policy
from vlarl_ray.types import ActRequest, TrainBatch

PRESETS = ("jobs/smoke.yaml", "jobs/laptop.yaml", "jobs/toy.yaml")
INSTRUCTION = "reach the cross"
PROPRIO_DIM = {"toy": 2, "metaworld": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    args = parser.parse_args()
    figures = {preset: compare(load_config(preset, [])) for preset in args.presets}
    for preset, parts in figures.items():
        for name, figure in parts.items():
            ratio = "" if not figure["measured"] else f"{figure['planned'] / figure['measured']:6.3f}"
            print(f"{preset:22} {name:34} planned {figure['planned']:>13,} measured {figure['measured']:>13,} {ratio}")
    print("wrote", write_result("memory", figures))


def compare(cfg: ExperimentConfig) -> dict[str, dict[str, int]]:
    """Bytes planned and measured, by process and part."""
    cfg = replace(cfg, learner=replace(cfg.learner, num_ranks=1))
    proprio_dim = PROPRIO_DIM[cfg.env.suite]
    plan = plan_memory(cfg, proprio_dim=proprio_dim, is_sharded=False).parts
    with tempfile.TemporaryDirectory() as folder:
        new_policy(cfg.model, [INSTRUCTION], 0).save(Path(folder))
        measured = {**measure_learner(cfg, folder, proprio_dim), **measure_server(cfg, folder, proprio_dim)}
    names = [f"{part.process}: {part.name}" for part in plan]
    assert names == list(measured)
    return {n: {"planned": p.num_bytes, "measured": measured[n]} for n, p in zip(names, plan, strict=True)}


def measure_learner(cfg: ExperimentConfig, folder: str, proprio_dim: int) -> dict[str, int]:
    """Bytes of a real learner's tensors; activations are what the peak of an update holds beyond all else."""
    learner = build_learner(cfg, folder, rank=0, world_size=1, store_address=None)
    model, process = learner.model, "learner rank"
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    versions = (cfg.algorithm.critic_warmup_updates, cfg.algorithm.critic_warmup_updates + 1)
    with LiveBytes(known=[*model.parameters(), *model.buffers()]) as live:
        for version in versions:
            learner.update(make_batch(cfg, model, proprio_dim, version))
    moments = sum(t.nbytes for optimizer in learner.optimizers() for t in optimizer.moment_shards().values())
    gradients = sum(p.nbytes for p in trained)
    return {
        f"{process}: frozen weights": sum(t.nbytes for t in (*frozen, *model.buffers())),
        f"{process}: trained weights": sum(p.nbytes for p in trained),
        f"{process}: optimizer": moments,
        f"{process}: gradients": gradients,
        f"{process}: activations": live.peak - moments - gradients,
    }


def measure_server(cfg: ExperimentConfig, folder: str, proprio_dim: int) -> dict[str, int]:
    """Bytes of a real engine's tensors while it answers one full batch."""
    engine, process = TorchEngine(folder, cfg.inference, deterministic=False), "inference server"
    engine.version = 0
    rows, side = cfg.inference.batch_size, cfg.env.image_size
    request = ActRequest(
        images=np.zeros((rows, cfg.model.num_cameras, side, side, 3), np.uint8),
        proprio=np.zeros((rows, proprio_dim), np.float32),
        instructions=(INSTRUCTION,) * rows,
        noise_keys=np.arange(2 * rows, dtype=np.uint64).reshape(rows, 2),
        temperature=cfg.rollout.temperature,
        policy_version=0,
    )
    known = [*engine.model.parameters(), *engine.model.buffers()]
    with LiveBytes(known=known) as live:
        engine.sample(request)
    cache = engine.model.key_value_bytes(rows)
    return {
        f"{process}: weights": sum(t.nbytes for t in known),
        f"{process}: keys and values": cache,
        f"{process}: sampling": live.peak - cache,
    }


def make_batch(cfg: ExperimentConfig, model: VLAModel, proprio_dim: int, version: int) -> TrainBatch:
    """Rows for two full micro-batches in each minibatch."""
    rng, side = np.random.default_rng(version), cfg.env.image_size
    rows = 2 * cfg.learner.micro_batch_size * cfg.algorithm.num_minibatches
    tokens, ids = model.sample_space(cfg.model)
    assert ids is not None, "presets act in tokens"

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return TrainBatch(
        frames=(rng.integers(0, 256, (rows + 1, cfg.model.num_cameras, side, side, 3), dtype=np.uint8),),
        instructions=(INSTRUCTION,),
        trajectory_index=np.zeros(rows, np.int32),
        decision_index=np.arange(rows, dtype=np.int32),
        proprio=numbers(rows, proprio_dim),
        action_tokens=rng.integers(ids.start, ids.stop, (rows, tokens)).astype(np.int32),
        token_mask=np.ones((rows, tokens), bool),
        old_logprobs=np.full((rows, tokens), -np.log(len(ids)), np.float32),
        advantages=numbers(rows),
        returns=numbers(rows),
        old_values=numbers(rows),
        weights=np.ones(rows, np.float32),
        num_actions_per_decision=model.chunk_length,
        temperature=1.0,
        policy_version=version,
    )


if __name__ == "__main__":
    main()
