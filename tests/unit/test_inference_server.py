"""Batching across workers, version fencing, and errors that reach the caller."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from vlarl_ray.config import ExperimentConfig, InferenceConfig, LearnerConfig, LoraConfig, VllmConfig
from vlarl_ray.inference.base import (
    ConcurrentServer,
    DirectClient,
    EngineLostError,
    InferenceServer,
    NoWeightsError,
    WrongVersionError,
    make_engine,
    make_server,
    merge_requests,
    split_reply,
    split_request,
)
from vlarl_ray.remote.client import RemoteClient
from vlarl_ray.types import ActReply, ActRequest
from vlarl_ray.weights.update import LoadReport, WeightUpdate


class SlowEngine:
    """Echoes the first noise-key word as the action; the first batch waits for `gate`, so that others pile up."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.batches: list[int] = []
        self.gate = threading.Event()

    def load(self, update):
        self.version = update.version
        return LoadReport(update.version, {}, 1.0, 0.0)

    def sample(self, request):
        self.gate.wait(10)
        self.batches.append(len(request))
        if request.temperature == 9.0:
            raise FloatingPointError("NaN in logits")
        rows = len(request)
        actions = np.broadcast_to(request.noise_keys[:, :1, None], (rows, 1, 1)).astype(np.float32)
        return ActReply(actions, np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.float32), self.version or 0)

    def logprobs(self, request, tokens):
        return np.zeros(tokens.shape, np.float32)

    def diagnose(self, request, tokens, expected, tolerance):
        return ""

    def health(self):
        return self.version

    def close(self):
        pass


def make_request(first: int, rows: int, *, version: int = 0, temperature: float = 1.0, lag: int = 0) -> ActRequest:
    return ActRequest(
        images=np.zeros((rows, 1, 2, 2, 3), np.uint8),
        proprio=np.zeros((rows, 1), np.float32),
        instructions=("go",) * rows,
        noise_keys=np.stack([np.arange(first, first + rows), np.zeros(rows)], axis=1).astype(np.uint64),
        temperature=temperature,
        policy_version=version,
        max_policy_lag=lag,
    )


UPDATE = WeightUpdate(version=0, lora_scale=1.0, adapters={}, tensors={})
REPLY = ActReply(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), 0)


@pytest.fixture
def served():
    engine = SlowEngine()
    server = InferenceServer(engine, batch_size=8, batch_window_ms=0.0)
    server.load(UPDATE).result(10)
    yield engine, server
    engine.gate.set()
    server.close()


def test_requests_that_wait_share_a_batch_and_each_gets_its_own_rows(served):
    engine, server = served
    futures = [server.act(make_request(10 * i, 2)) for i in range(5)]
    engine.gate.set()
    wait(futures, timeout=10)
    for i, future in enumerate(futures):
        assert future.result().actions[:, 0, 0].tolist() == [10 * i, 10 * i + 1]
    assert sum(engine.batches) == 10
    assert max(engine.batches) == 8  # 4 requests of 2 rows
    assert len(engine.batches) <= 3


def test_a_batch_never_exceeds_its_size(served):
    engine, server = served
    futures = [server.act(make_request(0, 5)) for _ in range(4)]
    engine.gate.set()
    wait(futures, timeout=10)
    assert set(engine.batches) == {5}


def test_requests_of_different_temperature_do_not_share_a_batch(served):
    engine, server = served
    futures = [server.act(make_request(0, 1, temperature=t)) for t in (1.0, 1.0, 0.5, 0.5)]
    engine.gate.set()
    wait(futures, timeout=10)
    assert len(engine.batches) >= 2
    assert max(engine.batches) <= 2


@pytest.mark.parametrize(
    ("asked", "lag", "answers"), [(0, 0, True), (1, 0, False), (-1, 0, False), (-1, 1, True), (-2, 1, False)]
)
def test_a_server_answers_only_for_its_version(served, asked, lag, answers):
    engine, server = served
    engine.gate.set()
    future = server.act(make_request(0, 1, version=asked, lag=lag))
    if answers:
        assert future.result(10).policy_version == 0
    else:
        with pytest.raises(WrongVersionError, match="server holds version 0"):
            future.result(10)


def test_a_server_without_weights_refuses_until_it_is_given_some():
    engine = SlowEngine()
    engine.gate.set()
    server = InferenceServer(engine, batch_size=8, batch_window_ms=0.0)
    with pytest.raises(WrongVersionError, match="holds version None"):
        server.act(make_request(0, 1)).result(10)
    with pytest.raises(WrongVersionError):
        DirectClient(engine).act(make_request(0, 1))
    server.load(UPDATE).result(10)
    assert len(server.act(make_request(0, 1)).result(10).actions) == 1
    server.close()


def test_an_error_of_the_engine_reaches_every_caller_of_the_batch_and_the_server_lives_on(served):
    engine, server = served
    bad = [server.act(make_request(0, 1, temperature=9.0)) for _ in range(2)]
    engine.gate.set()
    for future in bad:
        with pytest.raises(FloatingPointError, match="NaN in logits"):
            future.result(10)
    assert len(server.act(make_request(0, 3)).result(10).actions) == 3


def test_the_cpu_time_of_a_batch_is_shared_by_rows():
    reply = ActReply(np.zeros((5, 1, 1), np.float32), np.zeros((5, 1), np.int32), np.zeros((5, 1), np.float32), 0, 1.0)
    assert [part.inference_cpu_s for part in split_reply(reply, [1, 1, 3])] == pytest.approx([0.2, 0.2, 0.6])


def test_a_request_split_and_merged_is_the_same_request():
    whole = make_request(5, 7, version=3, temperature=1.6, lag=1)
    parts = split_request(whole, 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    merged = merge_requests(parts)
    assert np.array_equal(merged.noise_keys, whole.noise_keys)
    assert merged.images.shape == whole.images.shape
    assert merged.proprio.shape == whole.proprio.shape
    assert merged.instructions == whole.instructions
    assert (merged.temperature, merged.policy_version, merged.max_policy_lag) == (1.6, 3, 1)


@pytest.mark.parametrize(("side", "rows"), [(64, [7, 7, 1]), (100, [3, 3, 3, 3, 3]), (224, [15])])
def test_frames_travel_with_the_call_where_they_can(side, rows):
    """An argument over 100 KiB goes through the object store; where one row is larger, splitting would not help."""
    sent = []

    class Handle:
        class act:  # noqa: N801 - stands for a method of an actor handle
            @staticmethod
            def remote(*parts):
                sent.extend(parts)
                return SimpleNamespace(future=Future)

    whole = make_request(0, 15)
    RemoteClient([Handle]).act(replace(whole, images=np.zeros((15, 1, side, side, 3), np.uint8)))
    assert [len(part) for part in sent] == rows
    assert all(part.images.nbytes < 100 * 1024 for part in sent) or side == 224


def test_an_answer_is_asked_for_again_until_the_server_has_weights_again(monkeypatch):
    monkeypatch.setattr("vlarl_ray.remote.client._RETRY_S", 0.01)
    outcomes = [NoWeightsError("none"), EngineLostError("gone"), REPLY]

    class Handle:
        class act:  # noqa: N801 - stands for a method of an actor handle
            @staticmethod
            def remote(*_parts):
                future, outcome = Future(), outcomes.pop(0)
                future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result((outcome, 0))
                return SimpleNamespace(future=lambda: future)

    request = replace(make_request(0, 1), images=np.zeros((1, 1, 8, 8, 3), np.uint8))
    assert RemoteClient([Handle]).act(request).result(timeout=10.0) is REPLY
    assert outcomes == []
    outcomes += [NoWeightsError("none")] * 1000
    with pytest.raises(NoWeightsError):
        RemoteClient([Handle]).act(request).result(timeout=0.1)


def test_a_hung_engine_gives_no_sign_of_health():
    engine = SlowEngine()
    server = InferenceServer(engine, batch_size=8, batch_window_ms=0.0)
    server.load(UPDATE).result(10)
    assert server.health().result(10) == 0
    waiting = server.act(make_request(0, 1))
    sign = server.health()
    assert wait([sign], timeout=0.2).not_done
    engine.gate.set()
    assert sign.result(10) == 0
    assert waiting.done()
    server.close()


def test_an_engine_that_batches_by_itself_gets_requests_as_they_come():
    class Eager(SlowEngine):
        def act(self, request):
            future = Future()
            future.set_result(self.sample(request))
            return future

    engine = Eager()
    engine.gate.set()
    server = make_server(engine, batch_size=8, batch_window_ms=0.0)
    assert isinstance(server, ConcurrentServer)
    server.load(UPDATE).result(10)
    assert [len(server.act(make_request(0, rows)).result(10).actions) for rows in (2, 3)] == [2, 3]
    assert engine.batches == [2, 3]
    assert server.logprobs(make_request(0, 2), np.zeros((2, 1), np.int32)).result(10).shape == (2, 1)
    server.close()
    assert isinstance(make_server(SlowEngine(), batch_size=8, batch_window_ms=0.0), InferenceServer)


class Told:
    """An engine that keeps what it was told."""

    def __init__(self, policy_dir, cfg, **options) -> None:
        self.said = (policy_dir, cfg, options)


@pytest.mark.parametrize("lora", ["merged", "native"])
def test_an_engine_that_applies_adapters_itself_is_told_what_they_are(lora):
    inference = InferenceConfig(engine=f"{__name__}:Told", vllm=VllmConfig(lora=lora))
    cfg = ExperimentConfig(inference=inference, learner=LearnerConfig(lora=LoraConfig(rank=7)))
    options = {"deterministic": False, "device": "cuda"} | ({"lora": cfg.learner.lora} if lora == "native" else {})
    assert make_engine(cfg, "folder", device="cuda").said == ("folder", inference, options)
