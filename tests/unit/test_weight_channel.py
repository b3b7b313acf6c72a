"""Weights that are broadcast arrive to the bit, or the failure is known in time and the object store steps in."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.broadcasts import Rank, Server, broadcasting_publisher
from tests.small_openvla import INSTRUCTIONS, tiny
from vlarl_ray.config import AlgorithmConfig, ExperimentConfig, InferenceConfig, LearnerConfig
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.learner.build import build_learner
from vlarl_ray.models.lora import adapter_tensors, load_adapter_tensors
from vlarl_ray.weights import channel
from vlarl_ray.weights.canary import CanaryError, make_probe, update_digests
from vlarl_ray.weights.channel import Receiver, Sender, TransferError
from vlarl_ray.weights.update import WeightUpdate

TIMEOUT_S = 20.0


def make_update(version: int) -> WeightUpdate:
    rng = np.random.default_rng(version)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    adapters = {"layer.0.weight": (draw(3, 8), draw(5, 3)), "layer.1.weight": (draw(3, 4), draw(6, 3))}
    return WeightUpdate(
        version=version, lora_scale=0.3, adapters=adapters, tensors={"head.weight": draw(2, 7), "head.bias": draw(2)}
    )


def exchange(sender: Sender, receivers: list[Receiver], version: int, *, renew: bool) -> list[WeightUpdate]:
    sender.hold(make_update(version))
    offer = sender.offer(version, len(receivers), renew=renew)
    with ThreadPoolExecutor() as threads:
        received = [threads.submit(receiver.receive, offer, rank) for rank, receiver in enumerate(receivers, 1)]
        sender.send()
        return [future.result() for future in received]


def make_ends(num_receivers: int, *, timeout_s: float = TIMEOUT_S):
    sender = Sender("gloo", "127.0.0.1", device="cpu", timeout_s=timeout_s)
    return sender, [Receiver("gloo", device="cpu", timeout_s=timeout_s) for _ in range(num_receivers)]


def test_every_receiver_gets_every_version_to_the_bit():
    sender, receivers = make_ends(2)
    for version, renew in enumerate((False, False, True, False)):
        for update in exchange(sender, receivers, version, renew=renew):
            assert update_digests(update) == update_digests(make_update(version))
            assert (update.version, update.lora_scale) == (version, 0.3)


def test_a_group_is_joined_once_and_anew_where_asked(monkeypatch):
    made = []

    class Counted(channel.GlooCommunicator):
        def __init__(self, store, rank, *args, **kwargs) -> None:
            made.append(rank)
            super().__init__(store, rank, *args, **kwargs)

    monkeypatch.setitem(channel._COMMUNICATORS, "gloo", Counted)
    sender, receivers = make_ends(2)
    for version, renew in enumerate((False, False, True, False)):
        exchange(sender, receivers, version, renew=renew)
    assert sorted(made) == [0, 0, 1, 1, 2, 2]


def test_a_version_that_is_not_held_is_not_offered():
    sender, _ = make_ends(1)
    sender.hold(make_update(4))
    with pytest.raises(ValueError, match="version 5 was to be sent, but the learner holds version 4"):
        sender.offer(5, 1, renew=False)


def test_a_receiver_that_never_comes_costs_the_others_the_deadline_and_the_next_group_works():
    sender, receivers = make_ends(2, timeout_s=1.5)
    sender.hold(make_update(1))
    offer = sender.offer(1, 2, renew=False)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(receivers[0].receive, offer, 1)
        with pytest.raises(TransferError, match="rank 0 of 3, broadcast over gloo"):
            sender.send()
        with pytest.raises(TransferError, match="rank 1 of 3, broadcast over gloo"):
            first.result()
    _, (again, other) = make_ends(2)
    sender._member._timeout_s = TIMEOUT_S
    for update in exchange(sender, [again, other], 2, renew=True):
        assert update_digests(update) == update_digests(make_update(2))


def test_a_member_that_leaves_fails_the_broadcast_of_the_others():
    sender, receivers = make_ends(1)
    exchange(sender, receivers, 1, renew=False)
    sender.hold(make_update(2))
    offer = sender.offer(2, 1, renew=False)
    sender._member.leave()
    with pytest.raises(TransferError, match="rank 1 of 2"):
        receivers[0].receive(offer, 1)


def test_a_communicator_that_hangs_is_given_up_and_aborted(monkeypatch):
    """NCCL's would: it knows no deadline."""
    aborted = threading.Event()
    sender, [receiver] = make_ends(1)
    exchange(sender, [receiver], 1, renew=False)  # both have joined: the hang is in the broadcast
    _, communicator = receiver._member._joined
    monkeypatch.setattr(communicator, "broadcast", lambda _buffer: aborted.wait())
    monkeypatch.setattr(communicator, "abort", aborted.set)
    receiver._member._timeout_s = 0.5
    sender.hold(make_update(2))
    with pytest.raises(TransferError, match=r"rank 1 of 2, broadcast over gloo: not done within 0\.5 s"):
        receiver.receive(sender.offer(2, 1, renew=False), 1)
    assert aborted.is_set()


def test_a_rank_that_comes_back_to_a_group_is_refused_at_once():
    """Gloo would try for five seconds to reach those who were there, whatever its deadline."""
    sender, [receiver] = make_ends(1)
    exchange(sender, [receiver], 1, renew=False)
    _, [successor] = make_ends(1)
    sender.hold(make_update(2))
    with pytest.raises(TransferError, match=r"rank 1 of 2.*was in the group before"):
        successor.receive(sender.offer(2, 1, renew=False), 1)
    for update in exchange(sender, [successor], 2, renew=True):
        assert update_digests(update) == update_digests(make_update(2))


_ENDS_WHILE_A_THREAD_WAITS = """
import sys, time
from datetime import timedelta
from torch._C._distributed_c10d import TCPStore
from vlarl_ray.weights.channel import _within

class SlowToEnd:
    sleep = time.sleep
    def __del__(self):
        self.sleep(3)

sys.modules["slow to end"] = SlowToEnd()
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
try:
    _within(0.1, lambda: store.wait(["never"], timedelta(seconds=1.5)))
except TimeoutError:
    print("given up")
"""


def test_a_process_ends_well_though_a_broadcast_was_given_up():
    """A thread that comes back from C++ to an interpreter that is gone aborts the process."""
    done = subprocess.run(
        [sys.executable, "-c", _ENDS_WHILE_A_THREAD_WAITS], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "given up\n"), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny().save(folder)
    return folder


@pytest.fixture
def system(folder):
    """A learner rank, two servers, and the publisher between them."""
    cfg = ExperimentConfig(algorithm=AlgorithmConfig(critic_warmup_updates=0), learner=LearnerConfig(num_ranks=1))
    rank = Rank(build_learner(cfg, folder, rank=0, world_size=1, store_address=None), timeout_s=TIMEOUT_S)
    engines = [TorchEngine(folder, InferenceConfig(batch_size=8), deterministic=False) for _ in range(2)]
    servers = [Server(engine, timeout_s=TIMEOUT_S) for engine in engines]
    probe = make_probe(
        INSTRUCTIONS, image_shape=(1, 32, 32, 3), proprio_dim=4, token_ids=range(511, 767), num_tokens=6, seed=0
    )
    return rank, servers, broadcasting_publisher(rank, servers, probe=probe)


def train(rank: Rank, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    adapters = {
        name: (torch.randn(a.shape, generator=generator) * 0.3, torch.randn(b.shape, generator=generator) * 0.05)
        for name, (a, b) in adapter_tensors(rank.model).items()
    }
    load_adapter_tensors(rank.model, adapters)


def test_a_publication_by_broadcast_passes_the_canary(system):
    rank, servers, publisher = system
    for version in (1, 2):
        train(rank, version)
        metrics = publisher.publish(version)
        assert metrics["publish/fallbacks"] == 0
        assert metrics["publish/bytes"] == rank.weight_update(version).num_bytes
        assert metrics["canary/max_abs_logprob_diff"] < 1e-4
    assert [(server.received, server.loaded, server.version) for server in servers] == [(2, 0, 2)] * 2


def _flip(buffer: torch.Tensor) -> None:
    buffer.view(torch.uint8)[len(buffer) * 2 + 1] ^= 1


def _tear(buffer: torch.Tensor) -> None:
    buffer[len(buffer) // 2 :] = 0


@pytest.mark.parametrize("damage", [_flip, _tear])
def test_what_is_damaged_on_the_way_is_named(system, damage):
    rank, _, publisher = system
    train(rank, 1)
    publisher.publish(1)
    rank.damage = damage
    with pytest.raises(CanaryError, match=r"version 2, server 0: tensor '\S+' differs"):
        publisher.publish(2)


def test_servers_that_a_broadcast_misses_get_the_version_from_the_object_store(system, caplog):
    rank, servers, publisher = system
    train(rank, 1)
    publisher.publish(1)
    servers[1]._receiver._member.leave()  # as if it had crashed, unnoticed
    members = [rank.sender._member, *(server._receiver._member for server in servers)]
    for member in members:
        member._timeout_s = 1.0
    train(rank, 2)
    metrics = publisher.publish(2)
    for member in members:
        member._timeout_s = TIMEOUT_S
    assert metrics["publish/fallbacks"] == sum(server.loaded for server in servers) >= 1
    assert metrics["canary/max_abs_logprob_diff"] < 1e-4
    assert "gets version 2 through the object store instead" in caplog.text
    train(rank, 3)
    assert publisher.publish(3)["publish/fallbacks"] == metrics["publish/fallbacks"]  # by a new group


def test_after_three_failures_in_a_row_nothing_is_broadcast_any_more(system, monkeypatch, caplog):
    rank, servers, publisher = system

    def refuse(*_args, **_kwargs):
        raise RuntimeError("no network")

    monkeypatch.setitem(channel._COMMUNICATORS, "gloo", refuse)
    for version in range(1, 5):
        train(rank, version)
        metrics = publisher.publish(version)
    assert metrics["publish/fallbacks"] == 3 * len(servers)
    assert [(server.received, server.loaded) for server in servers] == [(0, 4)] * 2
    assert "3 broadcasts of weights failed in a row" in caplog.text
    assert "no network" in caplog.text
