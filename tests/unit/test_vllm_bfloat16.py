"""The vLLM engine in bfloat16: what the learner publishes arrives, and agrees with it as far as rounding allows."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from tests.vllm_serving import DEVICE, SCALE, make_publisher, make_request, save_served_policy
from vlarl_ray.config import AlgorithmConfig, ExperimentConfig, InferenceConfig, LearnerConfig, LoraConfig, VllmConfig
from vlarl_ray.learner.build import build_learner

pytest.importorskip("vllm")


def make_learner(folder, dtype):
    lora = LoraConfig(rank=3, alpha=3 * SCALE)
    cfg = ExperimentConfig(
        algorithm=AlgorithmConfig(critic_warmup_updates=0), learner=LearnerConfig(num_ranks=1, lora=lora, dtype=dtype)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ("127.0.0.1", port) if dtype == "bfloat16" else None
    return build_learner(cfg, folder, rank=0, world_size=1, store_address=address)


def train(learners, seed, *, size):
    """Move the weights of each learner alike."""
    for learner in learners:
        arrays, state = learner.state_dict()
        rng = np.random.default_rng(seed)
        for name, value in sorted(arrays["parameters"].items()):
            if ".lora_" in name:
                drawn = 0.3 if ".lora_A." in name else 0.05 * size
                arrays["parameters"][name] = (drawn * rng.standard_normal(value.shape)).astype(np.float32)
        learner.load_state_dict(arrays, state)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from vlarl_ray.inference.vllm_engine import VllmEngine

    folder = tmp_path_factory.mktemp("policy")
    save_served_policy(folder)
    vllm = VllmConfig(kv_cache_bytes=1 << 27)
    cfg = InferenceConfig(engine="vllm", dtype="bfloat16", vllm=vllm)
    engine = VllmEngine(folder, cfg, deterministic=False, device=DEVICE)
    learner, exact = make_learner(folder, "bfloat16"), make_learner(folder, "float32")
    publisher = make_publisher(engine, learner, tolerance=1.0)
    yield engine, learner, exact, publisher
    engine.close()
    learner.shutdown()


# B as after one update, some, and many; a step of bfloat16 is a thousand times the first change of a weight
@pytest.mark.parametrize(("version", "size"), enumerate((0.0, 1e-4, 1e-3, 0.1)))
def test_what_is_published_arrives_and_is_served_as_exactly_as_the_learner_computes(served, version, size):
    engine, learner, exact, publisher = served
    train([learner, exact], seed=version, size=size)
    metrics = publisher.publish(version)
    # rounding to nearest would keep nothing of the small ones; what the dither keeps is right on average
    assert metrics["publish/delta_kept"] == pytest.approx(1.0, abs=0.15)
    request = make_request(40, version=version)
    reply = engine.sample(request)
    ours, in_float32 = learner.logprobs(request, reply.tokens), exact.logprobs(request, reply.tokens)
    # Two results with independent rounding differ by 1.4 times what each differs from the exact one; all are steep
    # here, as logits are 40 times those of a new policy.
    rounding = spread(ours - in_float32)
    assert 0.01 < spread(reply.logprobs - ours) < 2 * rounding
    assert spread(reply.logprobs - in_float32) < 2 * rounding


def spread(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(difference**2)))
