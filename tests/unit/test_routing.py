"""Requests go where there is least to do, as each env worker finds out from the answers it gets."""

from __future__ import annotations

import heapq
import random
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from vlarl_ray.inference.base import NoWeightsError
from vlarl_ray.remote.client import RemoteClient
from vlarl_ray.remote.routing import LeastLoaded
from vlarl_ray.types import ActReply, ActRequest

ROWS = 8


class Fixed(LeastLoaded):
    """Asks the worker's own server, whatever the others have to do."""

    def pick(self, rows):
        return self._home


def rows_per_second(row_seconds, num_workers, *, routing, think_s=0.2, until_s=60.0):
    """Simulate workers of two halves each, whose requests queue at servers; returns rows answered per second.

    A half thinks for some 0.2 s (its simulators step), asks for `ROWS` actions and waits for them.
    """
    num_servers, noise = len(row_seconds), random.Random(0)
    free_at, in_flight, answered = [0.0] * num_servers, [0] * num_servers, 0
    workers = [
        routing(num_servers, home=index % num_servers, ask=lambda servers: [in_flight[s] for s in servers])
        for index in range(num_workers)
    ]
    # (time, order, what happens, worker, server); no two orders are equal
    events = [(think_s * noise.random(), half, "ask", half // 2, -1) for half in range(2 * num_workers)]
    heapq.heapify(events)
    order = len(events)
    while events[0][0] < until_s:
        now, _, what, worker, server = heapq.heappop(events)
        order += 1
        if what == "ask":
            server = workers[worker].pick(ROWS)
            in_flight[server] += ROWS
            free_at[server] = max(now, free_at[server]) + ROWS * row_seconds[server]
            heapq.heappush(events, (free_at[server], order, "answer", worker, server))
        else:
            in_flight[server] -= ROWS
            answered += ROWS
            workers[worker].answered(server, in_flight[server])
            heapq.heappush(events, (now + think_s * noise.uniform(0.5, 1.5), order, "ask", worker, -1))
    return answered / until_s


@pytest.mark.parametrize(
    ("row_seconds", "num_workers", "gain"),
    [([0.02, 0.02], 3, 1.04), ([0.04, 0.01], 3, 1.2), ([0.01] * 8, 32, 0.99), ([0.005] * 4, 16, 0.99)],
    ids=["more workers than fit evenly", "a slow server", "even and saturated", "even and light"],
)
def test_asking_the_least_loaded_helps_where_loads_differ_and_costs_nothing_elsewhere(row_seconds, num_workers, gain):
    fixed, routed = (rows_per_second(row_seconds, num_workers, routing=kind) for kind in (Fixed, LeastLoaded))
    assert routed > gain * fixed


def test_nothing_is_asked_while_the_own_server_is_free():
    def ask(_servers):
        raise AssertionError("asked")

    routing = LeastLoaded(2, home=1, ask=ask)
    assert routing.pick(ROWS) == 1
    routing.answered(1, ROWS)  # the other half's
    assert routing.pick(ROWS) == 1


def test_a_request_moves_only_where_the_other_queue_stays_shorter_with_it():
    loads = {0: 16.0, 1: 8.0}
    routing = LeastLoaded(2, home=0, ask=lambda servers: [loads[server] for server in servers])
    routing.answered(0, 16)
    assert routing.pick(ROWS) == 0
    loads[0] = 17.0
    assert routing.pick(ROWS) == 1


def test_a_server_that_failed_is_left_alone_for_a_while():
    now, loads = [0.0], {0: 0.0, 1: 99.0, 2: 50.0}
    routing = LeastLoaded(3, home=0, ask=lambda servers: [loads[server] for server in servers], clock=lambda: now[0])
    routing.failed(0)
    assert routing.pick(ROWS) == 2
    routing.failed(2)
    assert routing.pick(ROWS) == 1
    routing.failed(1)
    assert routing.pick(ROWS) == 0  # all are away, and asked nevertheless
    now[0] = 60.0
    assert routing.pick(ROWS) == 0


def test_a_request_whose_server_is_lost_is_answered_by_another(monkeypatch):
    monkeypatch.setattr("vlarl_ray.remote.client._RETRY_S", 0.001)
    asked = []

    def server(name, outcome):
        def remote(*_parts):
            asked.append(name)
            future = Future()
            future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result((outcome, 0))
            return SimpleNamespace(future=lambda: future)

        return SimpleNamespace(act=SimpleNamespace(remote=remote))

    request = ActRequest(
        np.zeros((1, 1, 8, 8, 3), np.uint8),
        np.zeros((1, 0), np.float32),
        ("",),
        np.zeros((1, 2), np.uint64),
        temperature=1.0,
        policy_version=0,
    )
    reply = ActReply(np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), 0)
    client = RemoteClient([server("a", NoWeightsError("none")), server("b", reply)])
    assert client.act(request).result(timeout=10.0) is reply
    assert client.act(request).result(timeout=10.0) is reply
    assert asked == ["a", "b", "b"]
