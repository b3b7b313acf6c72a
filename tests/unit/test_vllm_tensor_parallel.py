"""Two vLLM workers that share every layer serve the learner's weights, too."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vllm_serving import make_learner, make_request, save_served_policy, train
from vlarl_ray.config import InferenceConfig, VllmConfig

pytest.importorskip("vllm")


def test_two_workers_hold_the_learners_weights(tmp_path):
    from vlarl_ray.inference.vllm_engine import VllmEngine

    save_served_policy(tmp_path)
    learner = make_learner(tmp_path)
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
