"""Rows of a request enter vLLM's batch together, and log-probabilities leave it with the last token of their row."""

from types import SimpleNamespace

import numpy as np
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
    monkeypatch.setattr(
        Scheduler, "update_from_output", lambda self, asked, outputs: {0: SimpleNamespace(outputs=outputs)}
    )
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


def sampled(name, token, *, others=(), finished=False):
    """What vLLM's scheduler has to say of a row after a step; other tokens come in where a row beside it asks so."""
    from vllm.v1.outputs import LogprobsLists

    logprobs = LogprobsLists(
        np.array([[token, *others]]), np.array([[-each / 8 for each in (token, *others)]]), np.array([token % 3])
    )
    return SimpleNamespace(request_id=name, new_token_ids=[token], new_logprobs=logprobs, finished=finished)


def sent(scheduler, *outputs):
    return scheduler.update_from_output(None, list(outputs))[0].outputs


def test_every_token_goes_out_at_once_and_log_probabilities_with_the_last(scheduler):
    for token in (5, 6):
        steps = sent(scheduler, sampled("a", token), sampled("b", token + 10))
        assert [step.new_token_ids for step in steps] == [[token], [token + 10]]
        assert [step.new_logprobs for step in steps] == [None, None]
    a, b = sent(scheduler, sampled("a", 7, finished=True), sampled("b", 17))
    assert b.new_logprobs is None
    ids, logprobs, ranks, _ = a.new_logprobs
    assert ids.tolist() == [[5], [6], [7]]
    assert logprobs.tolist() == [[-5 / 8], [-6 / 8], [-7 / 8]]
    assert ranks.tolist() == [2, 0, 1]
    [b] = sent(scheduler, sampled("b", 18, finished=True))
    assert b.new_logprobs.logprob_token_ids.tolist() == [[15], [16], [17], [18]]
    assert not scheduler._logprobs


def test_a_row_beside_one_that_asks_for_more_tokens_loses_nothing(scheduler):
    sent(scheduler, sampled("a", 5))
    sent(scheduler, sampled("a", 6, others=(40,)))
    [a] = sent(scheduler, sampled("a", 7, finished=True))
    ids, logprobs, ranks, _ = a.new_logprobs
    assert ids.tolist() == [[5], [6], [7]]
    assert logprobs.tolist() == [[-5 / 8], [-6 / 8], [-7 / 8]]
    assert len(ranks) == 3
    sent(scheduler, sampled("b", 5, others=(41, 42)))
    [b] = sent(scheduler, sampled("b", 6, others=(43, 44), finished=True))
    assert b.new_logprobs.logprob_token_ids.tolist() == [[5, 41, 42], [6, 43, 44]]


@pytest.mark.parametrize("ids", ["a", ["a"], None])
def test_log_probabilities_of_a_row_that_was_given_up_are_forgotten(scheduler, ids):
    from vllm.v1.request import RequestStatus

    sent(scheduler, sampled("a", 5))
    scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
    assert not scheduler._logprobs
    [again] = sent(scheduler, sampled("a", 6, finished=True))
    assert again.new_logprobs.logprob_token_ids.tolist() == [[6]]
