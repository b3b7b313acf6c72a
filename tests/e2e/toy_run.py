"""A run small enough for tests: the toy suite, a policy of ten thousand parameters, deterministic mode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from vlarl_ray.config import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    DemosConfig,
    EnvConfig,
    EvaluationConfig,
    ExperimentConfig,
    InferenceConfig,
    LearnerConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    RolloutConfig,
    SFTConfig,
    TowerConfig,
    TrustConfig,
)
from vlarl_ray.metrics.catalogue import is_timing_metric
from vlarl_ray.metrics.episodes import read_episodes
from vlarl_ray.metrics.logger import read_jsonl

TOWER = TowerConfig(dim=16, depth=2, num_heads=2, mlp_dim=32)


def toy_config(run_dir: Path, **changes) -> ExperimentConfig:
    cfg = ExperimentConfig(
        name="toy",
        run_dir=str(run_dir),
        num_iterations=3,
        env=EnvConfig(suite="toy", tasks=("reach-a",), image_size=32, max_env_steps=24),
        demos=DemosConfig(episodes_per_task=4),
        model=ModelConfig(
            image_size=32,
            patch_size=8,
            dino=TOWER,
            siglip=TOWER,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            action_dim=2,
            chunk_length=4,
            value_hidden_sizes=(16,),
        ),
        sft=SFTConfig(num_steps=60, batch_size=32, num_threads=1),
        algorithm=AlgorithmConfig(num_epochs=1, num_minibatches=2, critic_warmup_updates=1),
        rollout=RolloutConfig(num_workers=1, envs_per_worker=4, groups_per_update=8),
        inference=InferenceConfig(batch_size=4),
        learner=LearnerConfig(num_ranks=1, micro_batch_size=16, lora=LoraConfig(rank=4, alpha=8.0)),
        trust=TrustConfig(deterministic=True),
        checkpoint=CheckpointConfig(every_updates=1),
        evaluation=EvaluationConfig(states_per_task=4),
        cluster=ClusterConfig(object_store_bytes=128 * 1024 * 1024),
        metrics=MetricsConfig(tensorboard=False, progress=False),
    )
    return replace(cfg, **changes)


def with_lag(cfg: ExperimentConfig) -> ExperimentConfig:
    return replace(
        cfg,
        algorithm=replace(cfg.algorithm, old_logprobs="learner"),
        rollout=replace(cfg.rollout, max_policy_lag=1),
        trust=replace(cfg.trust, deterministic=False),
    )


def numbers(run_dir: Path) -> list[dict]:
    """Everything in `metrics.jsonl` that does not depend on how fast the machine is."""
    return [
        {name: value for name, value in row.items() if not is_timing_metric(name)}
        for row in read_jsonl(Path(run_dir) / "metrics.jsonl")
    ]


def evaluations(run_dir: Path) -> list[dict]:
    return read_jsonl(Path(run_dir) / "evaluations.jsonl")


def episodes(run_dir: Path) -> list[dict]:
    rows = read_episodes(run_dir).to_pylist()
    return [{name: value for name, value in row.items() if name != "worker"} for row in rows]


def summary(run_dir: Path) -> dict:
    return json.loads((Path(run_dir) / "summary.json").read_text())
