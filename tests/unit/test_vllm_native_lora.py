"""vLLM applies the learner's adapters itself, exactly, and what it leaves out is noticed. One engine for all tests."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.vllm_faults import CHANGED, DROPPED, SWAPPED
from tests.vllm_serving import (
    DEVICE,
    engine_processes,
    gap,
    make_learner,
    make_publisher,
    make_request,
    save_served_policy,
    train,
)
from vlarl_ray.config import InferenceConfig, LoraConfig, VllmConfig
from vlarl_ray.inference.base import EngineLostError, WrongVersionError
from vlarl_ray.inference.vllm_lora import lora_request
from vlarl_ray.weights.canary import CanaryError, update_digests

pytest.importorskip("vllm")

TARGET = "language_model.*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_served_policy(folder)
    return folder


@pytest.fixture(scope="module")
def learner(folder):
    return make_learner(folder, target_modules=TARGET)


@pytest.fixture(scope="module")
def engine(folder, learner):
    from vlarl_ray.inference.vllm_engine import VllmEngine

    # prefix caching in blocks shorter than a prompt, so that what is stale can be found
    vllm = VllmConfig(enable_prefix_caching=True, block_size=32, kv_cache_bytes=1 << 27, lora="native")
    engine = VllmEngine(
        folder,
        InferenceConfig(engine="vllm", vllm=vllm),
        deterministic=False,
        device=DEVICE,
        lora=LoraConfig(rank=3, target_modules=TARGET),
        worker_class="tests.vllm_faults.FaultyAdapters",
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def publisher(engine, learner):
    return make_publisher(engine, learner)


def test_every_publication_replaces_the_adapters_of_the_one_before(engine, learner, publisher):
    checksums, scores = {}, {}
    for version, seed in enumerate((1, 2, 3, 1), start=1):
        train(learner, seed)
        metrics = publisher.publish(version)  # compares digests, checksums and a probe of the same frames each time
        assert metrics["canary/max_abs_logprob_diff"] < 1e-4
        assert metrics["publish/delta_kept"] == 1.0
        request = make_request(40, version=version, temperature=1.3)
        reply = engine.sample(request)
        assert reply.policy_version == version
        assert gap(learner, request, reply) < 1e-4
        checksums[version] = learner.expected_checksums(learner.weight_update(version), "float32", "native")
        scores[version] = engine.logprobs(request, reply.tokens)
    assert len(checksums[1]) == 2 * (2 * 7 + 1)  # A and B of two layers' linears and the output head
    assert checksums[1] == checksums[4] != checksums[3]
    np.testing.assert_allclose(scores[1], scores[4], atol=1e-6)
    assert np.abs(scores[1] - scores[3]).max() > 0.01


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dropped", rf"version 21, adapters of server 0: tensor '{DROPPED}:A' is missing"),
        ("misnamed", rf"tensor '{DROPPED}:A' is missing"),
        ("unscaled", r"tensor '\S+\.weight:B' differs"),
        ("swapped", f"tensor '{SWAPPED[0]}:A' differs"),
        ("changed afterwards", f"the served weights are not .* compute with other weights: {CHANGED}\\."),
        ("stale prefixes", r"not version 21\. Found: its prefix cache held keys and values of older weights"),
        ("requests for the base", "the served weights are not version 21"),
    ],
)
def test_the_canary_catches_a_wrong_publication_at_once(engine, learner, publisher, monkeypatch, fault, message):
    train(learner, 20)
    publisher.publish(20)
    vllm, module = engine._engine, "vlarl_ray.inference.vllm_engine"
    if fault == "stale prefixes":  # the same name for other adapters, and caches left as they are
        replace_weights, pause = engine._replace_weights, vllm.pause_generation

        async def without_clearing(version):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(vllm, "pause_generation", lambda **options: pause(**{**options, "clear_cache": False}))
                patch.setattr(vllm, "reset_prefix_cache", _nothing)
                return await replace_weights(version)

        monkeypatch.setattr(engine, "_replace_weights", without_clearing)
        monkeypatch.setattr(f"{module}.lora_request", lambda update: lora_request(replace(update, version=20)))
    if fault == "requests for the base":
        monkeypatch.setattr(f"{module}.lora_request", lambda _update: None)
    engine._run(vllm.collective_rpc("set_fault", args=(fault,)))
    try:
        train(learner, 21)
        with pytest.raises(CanaryError, match=message):
            publisher.publish(21)
    finally:
        monkeypatch.undo()
        engine._run(vllm.collective_rpc("set_fault", args=(None,)))
    publisher.publish(22)  # the engine is none the worse


async def _nothing(*_args, **_kwargs) -> None:
    pass


def test_adapters_that_vllm_does_not_apply_are_named(engine, learner, folder):
    everything = make_learner(folder)  # towers and projector, too, as if nothing had refused that
    train(everything, 30)
    with pytest.raises(CanaryError, match=r"adapters of server 0: tensor 'projector\.fc1\.weight:A' is missing"):
        make_publisher(engine, everything).publish(30)
    update = learner.weight_update(31)
    whole = {"projector.fc1.bias": np.zeros(128, np.float32)}
    with pytest.raises(ValueError, match=r"replaces 'projector\.fc1\.bias', but .* serves adapters only; set merged"):
        engine.load(replace(update, tensors={**update.tensors, **whole}))
    report = engine.load(update)
    assert report.digests == update_digests(update)


def test_an_update_without_adapters_serves_the_base(engine, learner, folder):
    train(learner, 40)
    engine.load(learner.weight_update(40))
    engine.load(replace(learner.weight_update(41), adapters={}))
    request = make_request(12, version=41)
    assert gap(make_learner(folder), request, engine.sample(request)) < 1e-4  # new adapters change nothing yet


def test_an_engine_that_could_not_serve_all_adapters_does_not_start(folder):
    from vlarl_ray.inference.vllm_engine import VllmEngine

    cfg = InferenceConfig(engine="vllm", vllm=VllmConfig(lora="native"))
    with pytest.raises(ValueError, match=r"set learner\.lora\.target_modules to 'language_model\.\*'"):
        VllmEngine(folder, cfg, deterministic=False, lora=LoraConfig())
    with pytest.raises(ValueError, match="must be told the adapters' rank and layers"):
        VllmEngine(folder, cfg, deterministic=False)


def test_an_engine_whose_process_dies_while_it_loads_says_so(engine, learner):
    """The last test: nothing works after it."""
    engine.load(learner.weight_update(50))
    processes = engine_processes()
    for process in processes:
        process.suspend()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(engine.load, learner.weight_update(51))
        while engine.version is not None:  # nobody is served by then
            time.sleep(0.02)
        time.sleep(0.5)
        for process in processes:
            process.kill()
        with pytest.raises(EngineLostError):
            loading.result(timeout=60)
    with pytest.raises(WrongVersionError):  # and not kept waiting at the gate
        engine.sample(make_request(1, version=50))
