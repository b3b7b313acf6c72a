"""A server that is lost in the middle of a publication gets another chance; a wrong one does not."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from vlarl_ray.transport import LocalTransport
from vlarl_ray.weights.canary import CanaryError, make_probe, update_digests
from vlarl_ray.weights.publisher import WeightPublisher
from vlarl_ray.weights.update import LoadReport, WeightUpdate

PROBE = make_probe(["go"], image_shape=(1, 8, 8, 3), proprio_dim=0, token_ids=range(16), num_tokens=3, seed=0, rows=2)


def scores(update: WeightUpdate) -> np.ndarray:
    return np.full((2, 3), update.tensors["head"][0], np.float32)


class Learner:
    def weight_update(self, version):
        self.update = WeightUpdate(version, 1.0, {}, {"head": np.array([-1.0 - 0.45 * version], np.float32)})
        return self.update, self.update.num_bytes, update_digests(self.update)

    def expected_checksums(self, update, dtype, lora):
        return {}

    def logprobs(self, request, tokens):
        return scores(self.update)


class Server:
    """Loses its engine at the calls named in `faults`, and has no weights then until it is revived and loads."""

    def __init__(self, *faults: str) -> None:
        self.faults = list(faults)
        self.held: WeightUpdate | None = None
        self.is_up = True
        self.loads = 0

    def load(self, update):
        self._call("load")
        self.loads += 1
        self.held = update
        return LoadReport(update.version, update_digests(update), 1.0, 0.0)

    def logprobs(self, request, tokens):
        self._call("logprobs")
        assert self.held is not None
        assert self.held.version == request.policy_version
        return scores(self.held) + ("wrong" in self.faults)

    def diagnose(self, request, tokens, expected, tolerance):
        if "diagnose" in self.faults:
            raise Exception("vLLM's own")
        return ""

    def health(self):
        self._call("health")
        return self.held and self.held.version

    def _call(self, name):
        if name in self.faults:
            self.faults.remove(name)
            self.is_up = False
        if not self.is_up:
            raise TimeoutError("no answer")


class Keeper:
    def __init__(self, servers) -> None:
        self.servers = servers
        self.restarts = 0

    def revive(self, index):
        self.restarts += 1
        self.servers[index].is_up, self.servers[index].held = True, None


class Transport(LocalTransport):
    """Errors of calls come with their results, as from actors."""

    def call(self, target, method, *args):
        handle: Future = Future()
        try:
            handle.set_result(getattr(target, method)(*args))
        except TimeoutError as error:
            handle.set_exception(error)
        return handle

    def get(self, handles, *, timeout_s, what):
        return [handle.result() for handle in handles]


def make_publisher(*servers, keeper=True, tolerance=1e-4):
    kept = Keeper(servers) if keeper else None
    publisher = WeightPublisher(
        Learner(), servers, Transport(), probe=PROBE, tolerance=tolerance, deadline_s=1.0, keeper=kept
    )
    return publisher, kept


@pytest.mark.parametrize("call", ["load", "logprobs"])
def test_a_server_lost_while_it_loads_or_scores_gets_the_version_again_and_is_proven(call):
    servers = Server(), Server(call)
    publisher, _ = make_publisher(*servers)
    metrics = publisher.publish(3)
    assert metrics["publish/server_restarts"] == 1
    assert metrics["canary/max_abs_logprob_diff"] == 0
    assert [server.held.version for server in servers] == [3, 3]
    assert servers[0].loads == 1


def test_without_a_keeper_a_lost_server_ends_the_run():
    publisher, _ = make_publisher(Server("logprobs"), keeper=False)
    with pytest.raises(TimeoutError):
        publisher.publish(0)


@pytest.mark.parametrize("call", ["load", "logprobs"])
def test_a_restarted_server_that_is_lost_again_is_given_the_version_in_force_once_more(call):
    server = Server()
    publisher, keeper = make_publisher(server)
    publisher.publish(5)
    server.faults, server.held = [call], None
    publisher.republish(0)
    assert keeper.restarts == 1
    assert server.held.version == 5


def test_a_server_that_was_being_loaded_when_it_was_asked_is_left_alone():
    server = Server()
    publisher, keeper = make_publisher(server)
    publisher.publish(5)
    publisher.republish(0)
    assert (server.loads, keeper.restarts) == (1, 0)
    server.faults.append("health")  # gone since
    publisher.republish(0)
    assert (server.loads, keeper.restarts) == (2, 1)


def test_a_server_that_cannot_say_what_is_wrong_hides_nothing():
    publisher, _ = make_publisher(Server("wrong", "diagnose"))
    with pytest.raises(CanaryError, match="the served weights are not version 0"):
        publisher.publish(0)


def test_a_server_with_wrong_weights_is_not_given_another_chance():
    publisher, keeper = make_publisher(Server("wrong"))
    with pytest.raises(CanaryError, match="the served weights are not version 0"):
        publisher.publish(0)
    assert keeper.restarts == 0
    server = Server()
    publisher, keeper = make_publisher(server)
    publisher.publish(1)
    server.faults.append("wrong")
    server.held = None
    with pytest.raises(CanaryError, match="server 0, restarted"):
        publisher.republish(0)
    assert keeper.restarts == 0


def test_a_loader_that_loads_nothing_is_caught():
    learner, server = Learner(), Server()
    learner.expected_checksums = lambda update, dtype, lora: {"head": "what it should be"}
    load = server.load
    server.load = lambda update: replace(load(update), checksums={})
    publisher = WeightPublisher(learner, [server], Transport(), probe=PROBE, tolerance=1.0, deadline_s=1.0)
    with pytest.raises(CanaryError, match="loader of server 0: tensor 'head' is missing"):
        publisher.publish(0)


def test_the_learner_merges_while_servers_load():
    learner, server = Learner(), Server()
    held_when_asked = []
    server.load = lambda update, load=server.load: replace(load(update), checksums={})

    class Loading(Transport):
        """Loads last as long as someone waits for them."""

        def call(self, target, method, *args):
            return (target, args) if method == "load" else super().call(target, method, *args)

        def get(self, handles, *, timeout_s, what):
            if what != "loading weights":
                return super().get(handles, timeout_s=timeout_s, what=what)
            return [target.load(*args) for target, args in handles]

    def expected_checksums(update, dtype, lora):
        held_when_asked.append(server.held and server.held.version)
        return {}

    learner.expected_checksums = expected_checksums
    publisher = WeightPublisher(learner, [server], Loading(), probe=PROBE, tolerance=1.0, deadline_s=1.0)
    for version in range(3):
        publisher.publish(version)
    assert held_when_asked == [0, 0, 1]  # the first time, the server's report says what it loads
