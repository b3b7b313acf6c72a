"""A laptop-size policy and recorded rows for the learner benchmarks: random frames and tokens, fixed by a seed."""

from __future__ import annotations

import numpy as np

from vlarl_ray.config import AlgorithmConfig, LearnerConfig, ModelConfig
from vlarl_ray.models import new_policy
from vlarl_ray.models.base import VLAModel
from vlarl_ray.models.lora import attach_lora
from vlarl_ray.types import TrainBatch

INSTRUCTIONS = ("open the window", "close the drawer", "press the button from above")
PROPRIO_DIM = 4


def laptop_model(learner: LearnerConfig, *, seed: int = 0) -> VLAModel:
    """Build the default model with the learner's adapters."""
    model = new_policy(ModelConfig(), INSTRUCTIONS, seed)
    if learner.train == "lora":
        attach_lora(model, learner.lora, seed=seed)
    return model


def recorded_batch(model: VLAModel, *, num_rows: int, version: int, algorithm: AlgorithmConfig) -> TrainBatch:
    """Draw episodes of 1 to 32 decisions that have `num_rows` decisions in all."""
    rng = np.random.default_rng([version, 17])
    lengths = []
    while sum(lengths) < num_rows:
        lengths.append(min(int(rng.integers(1, 33)), num_rows - sum(lengths)))
    tokens = rng.integers(0, 256, (num_rows, model.num_action_tokens)) + model.first_action_token
    returns = rng.standard_normal(num_rows).astype(np.float32)
    return TrainBatch(
        frames=tuple(rng.integers(0, 256, (n + 1, 1, 64, 64, 3), dtype=np.uint8) for n in lengths),
        instructions=tuple(INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(len(lengths))),
        trajectory_index=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        decision_index=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        proprio=rng.standard_normal((num_rows, PROPRIO_DIM)).astype(np.float32),
        action_tokens=tokens.astype(np.int32),
        token_mask=rng.random((num_rows, model.num_action_tokens)) < 0.9,
        old_logprobs=np.full((num_rows, model.num_action_tokens), -np.log(256), np.float32),
        advantages=rng.standard_normal(num_rows).astype(np.float32),
        returns=returns,
        old_values=returns + rng.standard_normal(num_rows).astype(np.float32),
        weights=np.ones(num_rows, np.float32),
        num_actions_per_decision=model.chunk_length,
        temperature=1.0,
        policy_version=algorithm.critic_warmup_updates + version,  # warm-up is over
    )
