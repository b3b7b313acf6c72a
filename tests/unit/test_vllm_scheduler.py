"""Rows of a request enter vLLM's batch together."""

from types import SimpleNamespace

import pytest

from vlarl_ray.inference.vllm_start import together

pytest.importorskip("vllm")


@pytest.fixture
def scheduler(monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from vlarl_ray.inference.vllm_scheduler import WholeRequests

    def init(self):
        self.taken, self.finished = [], []

    monkeypatch.setattr(Scheduler, "__init__", init)
    monkeypatch.setattr(Scheduler, "add_request", lambda self, row: self.taken.append(row.request_id))
    monkeypatch.setattr(Scheduler, "finish_requests", lambda self, *asked: self.finished.append(asked) or [])
    return WholeRequests()


def row(name, group=None, size=0):
    extra = together(group, size) if group else None
    return SimpleNamespace(request_id=name, sampling_params=SimpleNamespace(extra_args=extra))


def test_rows_wait_for_the_last_of_their_request(scheduler):
    for name, group in (("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b")):
        scheduler.add_request(row(name, group, 3))
    assert scheduler.taken == []
    scheduler.add_request(row("b3", "b", 3))
    assert scheduler.taken == ["b1", "b2", "b3"]
    scheduler.add_request(row("a3", "a", 3))
    assert scheduler.taken[3:] == ["a1", "a2", "a3"]


def test_a_row_of_no_request_is_taken_at_once(scheduler):
    scheduler.add_request(row("alone"))
    assert scheduler.taken == ["alone"]


@pytest.mark.parametrize("ids", ["a1", ["a1"], None])
def test_a_request_that_loses_a_row_does_not_wait_for_it(scheduler, ids):
    from vllm.v1.request import RequestStatus

    scheduler.add_request(row("a1", "a", 3))
    scheduler.add_request(row("a2", "a", 3))
    scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
    assert scheduler.taken == ["a1", "a2"]
    [(finished, status)] = scheduler.finished
    assert (finished if finished is None else set(finished), status) == (
        None if ids is None else {"a1"},
        RequestStatus.FINISHED_ABORTED,
    )
