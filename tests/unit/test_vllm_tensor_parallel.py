"""Two vLLM workers that share every layer serve the learner's weights, too."""

from __future__ import annotations

import numpy as np
import pytest

from tests.small_openvla import tiny
from tests.unit.test_vllm_engine import make_request, train
from vlarl_ray.config import AlgorithmConfig, ExperimentConfig, InferenceConfig, LearnerConfig, LoraConfig, VllmConfig
from vlarl_ray.learner.build import build_learner

pytest.importorskip("vllm")


def test_two_workers_hold_the_learners_weights(tmp_path):
    from vlarl_ray.inference.vllm_engine import VllmEngine

    tiny(patch_size=4, hidden_size=64, num_heads=2, num_kv_heads=1, decoding="autoregressive").save(tmp_path)
    cfg = ExperimentConfig(
        algorithm=AlgorithmConfig(critic_warmup_updates=0),
        learner=LearnerConfig(num_ranks=1, lora=LoraConfig(rank=3, alpha=6.0)),
    )
    learner = build_learner(cfg, tmp_path, rank=0, world_size=1, store_address=None)
    vllm = VllmConfig(kv_cache_bytes=1 << 27, tensor_parallel_size=2)
    engine = VllmEngine(tmp_path, InferenceConfig(engine="vllm", vllm=vllm), deterministic=False)
    try:
        scores = []
        for version in (1, 2):
            train(learner, version)
            update = learner.weight_update(version)
            assert engine.load(update).checksums == learner.expected_checksums(update, "float32")
            request = make_request(20, version=version)
            reply = engine.sample(request)
            np.testing.assert_allclose(reply.logprobs, learner.logprobs(request, reply.tokens), atol=1e-4)
            scores.append(engine.logprobs(request, reply.tokens))
            np.testing.assert_allclose(scores[-1], reply.logprobs, atol=1e-4)
        assert np.abs(scores[1] - scores[0]).max() > 0.01
    finally:
        engine.close()
