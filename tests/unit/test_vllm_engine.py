"""The vLLM engine serves exactly what the learner has, before and after each publication. One engine for all tests."""

from __future__ import annotations

import importlib.metadata
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.broadcasts import Rank, Server, broadcasting_publisher
from tests.small_openvla import tiny
from tests.vllm_faults import DROPPED, SWAPPED
from tests.vllm_serving import (
    DEVICE,
    SCALE,
    engine_processes,
    gap,
    make_learner,
    make_publisher,
    make_request,
    save_served_policy,
    train,
)
from vlarl_ray.config import InferenceConfig, VllmConfig
from vlarl_ray.inference.base import EngineLostError, WrongVersionError
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.inference.vllm_plugin import ARCHITECTURE
from vlarl_ray.models.lora import adapter_tensors, load_adapter_tensors
from vlarl_ray.weights.canary import CanaryError, update_digests
from vlarl_ray.weights.merge import checksum, read_update

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_served_policy(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    from vlarl_ray.inference.vllm_engine import VllmEngine

    # prefix caching in blocks shorter than a prompt, so that what is stale can be found
    vllm = VllmConfig(enable_prefix_caching=True, block_size=32, kv_cache_bytes=1 << 27)
    cfg = InferenceConfig(engine="vllm", vllm=vllm)
    engine = VllmEngine(folder, cfg, deterministic=False, device=DEVICE, worker_class="tests.vllm_faults.FaultyLoading")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def learner(folder):
    return make_learner(folder)


@pytest.fixture(scope="module")
def publisher(engine, learner):
    return make_publisher(engine, learner)


def test_sampled_log_probabilities_are_the_learners(engine, learner, publisher):
    train(learner, 1)
    publisher.publish(1)
    for temperature in (1.0, 1.6):
        request = make_request(40, version=1, temperature=temperature)
        reply = engine.sample(request)
        assert gap(learner, request, reply) < 1e-4
        assert reply.tokens.min() >= 511
        assert reply.tokens.max() < 511 + 256
        assert len(np.unique(reply.tokens)) > 20
    assert reply.actions.shape == (40, 2, 3)
    assert reply.inference_cpu_s > 0


def test_greedy_chunks_are_the_pytorch_engines(engine, learner, publisher, folder):
    train(learner, 2)
    publisher.publish(2)
    torch_engine = TorchEngine(folder, InferenceConfig(batch_size=50), deterministic=False)
    torch_engine.load(learner.weight_update(2))
    request = make_request(200, version=2, temperature=0.0)
    served, expected = engine.sample(request), torch_engine.sample(request)
    assert (served.tokens == expected.tokens).mean() >= 0.999
    np.testing.assert_array_equal(served.actions[0], expected.actions[0])
    same = served.tokens == expected.tokens
    np.testing.assert_allclose(served.logprobs[same], expected.logprobs[same], atol=1e-4)


def test_a_rows_sample_depends_on_its_noise_key_alone(engine, learner, publisher):
    publisher.publish(3)
    whole = engine.sample(make_request(12, version=3))
    for row in (0, 7):
        alone = engine.sample(make_request(1, version=3, first=row))
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])
    request = make_request(12, version=3)
    other = engine.sample(replace(request, noise_keys=request.noise_keys + np.uint64(1)))
    assert (other.tokens != whole.tokens).any(axis=1).all()


def test_more_requests_than_fit_into_one_step_are_all_answered(engine, learner, publisher):
    """With prompts cut at the end of a step, seeded requests would kill vLLM on CPUs."""
    publisher.publish(3)
    request = make_request(150, version=3)
    reply = engine.sample(request)
    assert gap(learner, request, reply) < 1e-4
    np.testing.assert_array_equal(engine.sample(make_request(12, version=3)).tokens, reply.tokens[:12])


def test_scored_log_probabilities_are_the_sampled_ones(engine, publisher):
    publisher.publish(4)
    request = make_request(6, version=4, temperature=1.3)
    reply = engine.sample(request)
    np.testing.assert_allclose(engine.logprobs(request, reply.tokens), reply.logprobs, atol=2e-5)


def test_publications_leave_no_trace_in_the_next(engine, learner, publisher, folder):
    base = load_file(folder / "model.safetensors")
    checksums, scores = {}, {}
    for version, seed in enumerate((7, 8, 9, 10, 7), start=5):
        train(learner, seed)
        metrics = publisher.publish(version)  # compares digests, checksums and probe
        assert metrics["canary/max_abs_logprob_diff"] < 1e-4
        assert metrics["publish/delta_kept"] == pytest.approx(1.0, abs=1e-6)
        update = learner.weight_update(version)
        checksums[version] = learner.expected_checksums(update, "float32")
        for name, (a, b) in update.adapters.items():
            total = sum(b[:, rank, None] * a[rank] for rank in range(len(a)))
            merged = base[name] + torch.from_numpy(total * np.float32(SCALE))
            assert checksums[version][name] == checksum(merged), name
        request = make_request(10, version=version)
        reply = engine.sample(request)
        assert gap(learner, request, reply) < 1e-4
        scores[version] = reply.logprobs
    assert checksums[5] == checksums[9] != checksums[8]
    np.testing.assert_allclose(scores[5], scores[9], atol=1e-6)
    assert np.abs(scores[5] - scores[8]).max() > 0.01


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dropped", rf"version 21, loader of server 0: tensor '{DROPPED}' is missing"),
        ("unscaled", r"tensor '\S+\.weight' differs"),
        ("swapped", f"tensor '{SWAPPED[0]}' differs"),
        ("swapped in the loader", f"layers that compute with other weights: {SWAPPED[0]}, {SWAPPED[1]}\\."),
        ("stale images", r"not version 21\. Found: its image cache held embeddings of older weights"),
        ("stale prefixes", r"not version 21\. Found: its prefix cache held keys and values of older weights"),
    ],
)
def test_the_canary_catches_a_wrong_publication_at_once(engine, learner, publisher, monkeypatch, fault, message):
    train(learner, 20)
    publisher.publish(20)
    vllm = engine._engine
    if fault.startswith("stale"):
        replace_weights, pause = engine._replace_weights, vllm.pause_generation
        kind = "reset_prefix_cache" if fault == "stale prefixes" else "reset_encoder_cache"

        async def without_clearing(version):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(vllm, "pause_generation", lambda **options: pause(**{**options, "clear_cache": False}))
                patch.setattr(vllm, kind, _nothing)
                return await replace_weights(version)

        monkeypatch.setattr(engine, "_replace_weights", without_clearing)
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


@pytest.mark.parametrize("damaged", [False, True])
def test_an_update_that_was_broadcast_is_the_one_from_the_object_store(engine, learner, publisher, damaged):
    train(learner, 25)
    by_store = engine.load(learner.weight_update(25)).checksums
    rank, server = Rank(learner, timeout_s=60.0), Server(engine, timeout_s=60.0)
    broadcasting = broadcasting_publisher(rank, [server], probe=publisher._probe)
    if damaged:
        rank.damage = lambda buffer: buffer[:1].view(torch.uint8).bitwise_xor_(1)
        with pytest.raises(CanaryError, match=r"version 26, server 0: tensor '\S+' differs"):
            broadcasting.publish(26)
        return
    broadcasting.publish(26)
    metrics = broadcasting.publish(26)  # from the second on, the learner merges while servers receive
    assert (server.received, server.loaded) == (2, 0)
    assert server.report.checksums == by_store != {}
    assert metrics["publish/bytes"] == learner.weight_update(26).num_bytes
    assert metrics["canary/max_abs_logprob_diff"] < 1e-4


def test_requests_in_flight_are_answered_by_one_version_and_none_is_lost(engine, learner, publisher):
    train(learner, 30)
    publisher.publish(30)
    replies, stop = [], threading.Event()

    def ask() -> None:
        count = 0
        while not stop.is_set():
            request = replace(make_request(3, version=30, first=count), max_policy_lag=10)
            replies.append((request, engine.sample(request)))
            count += 3

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    answers = {30: _adapters(learner)}
    for version in range(31, 36):
        train(learner, version)
        answers[version] = _adapters(learner)
        publisher.publish(version)
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    versions = {reply.policy_version for _, reply in replies}
    assert 35 in versions
    assert len(versions) > 1
    for version, adapters in answers.items():
        load_adapter_tensors(learner.model, adapters)
        for request, reply in [pair for pair in replies if pair[1].policy_version == version][-4:]:
            assert gap(learner, request, reply) < 1e-4


def _adapters(learner):
    return {name: (a.clone(), b.clone()) for name, (a, b) in adapter_tensors(learner.model).items()}


def test_an_update_on_its_way_to_the_workers_is_in_no_folder(learner):
    from vlarl_ray.inference.vllm_engine import nameless_file

    update = learner.weight_update(60)
    with nameless_file(update) as file:
        assert os.fstat(file.fileno()).st_nlink == 0
        read = read_update(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"))
    assert update_digests(read) == update_digests(update)


def test_a_request_for_other_weights_is_refused(engine, learner, publisher):
    publisher.publish(40)
    with pytest.raises(WrongVersionError, match=r"holds version 40, request wants 41\.\.41"):
        engine.sample(make_request(1, version=41))
    update = learner.weight_update(41)
    assert engine.load(update).digests == update_digests(update)
    engine.sample(make_request(1, version=41))


def test_an_update_of_another_model_is_named_and_leaves_an_engine_that_refuses(engine, learner, publisher):
    publisher.publish(42)
    update = learner.weight_update(43)
    wrong = replace(update, tensors={**update.tensors, "value_head.nowhere": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"'value_head\.nowhere', which the served model does not have"):
        engine.load(wrong)
    with pytest.raises(WrongVersionError):
        engine.sample(make_request(1, version=43))


def test_a_row_that_fails_takes_its_request_with_it_and_no_other(engine, learner, publisher, monkeypatch):
    publisher.publish(44)
    vllm, names = engine._engine, []
    generate = vllm.generate

    def failing(prompt, parameters, *, request_id, lora_request):
        names.append(request_id)
        if len(names) == 3:
            raise ValueError("the third row")
        return generate(prompt, parameters, request_id=request_id, lora_request=lora_request)

    monkeypatch.setattr(vllm, "generate", failing)
    with pytest.raises(ValueError, match="the third row"):
        engine.sample(make_request(3, version=44))
    monkeypatch.undo()
    assert vllm.output_processor.get_num_unfinished_requests() == 0
    request = make_request(12, version=44)
    assert gap(learner, request, engine.sample(request)) < 1e-4
    publisher.publish(45)  # nothing of it is left for the gate to wait for, or in the engine


def test_the_plug_in_is_found_by_vllm_and_may_be_registered_again():
    [entry] = importlib.metadata.entry_points(group="vllm.general_plugins", name="vlarl_ray")
    register = entry.load()
    register()
    register()
    from vllm import ModelRegistry

    assert ARCHITECTURE in ModelRegistry.get_supported_archs()


def test_a_policy_that_decodes_in_parallel_is_refused(tmp_path):
    from vlarl_ray.inference.vllm_engine import VllmEngine

    tiny().save(tmp_path)
    with pytest.raises(ValueError, match="holds openvla with parallel decoding"):
        VllmEngine(tmp_path, InferenceConfig(engine="vllm"), deterministic=False)


def test_an_engine_whose_process_died_says_so(engine, learner, publisher):
    """The last test: nothing works after it."""
    publisher.publish(50)
    assert engine.health() == 50
    processes = engine_processes()
    for process in processes:
        process.suspend()  # so that all are on their way
    waiting = engine.act(make_request(40, version=50))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.health)
        time.sleep(0.5)
        for process in processes:
            process.kill()
        with pytest.raises(EngineLostError):
            asked.result(timeout=60)
    with pytest.raises(EngineLostError):
        waiting.result(timeout=60)
    for ask in (engine.health, lambda: engine.sample(make_request(1, version=50))):
        with pytest.raises(EngineLostError):
            ask()
    with pytest.raises(EngineLostError):
        engine.load(learner.weight_update(51))
