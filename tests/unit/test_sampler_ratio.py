"""The two-source check of action probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from tests.counting_env import CountingEnv, EchoClient, make_task
from vlarl_ray.rollout.env_worker import EnvWorker
from vlarl_ray.rollout.groups import GroupRule
from vlarl_ray.rollout.ledger import InlinePool, RolloutLedger
from vlarl_ray.train import SamplerMismatchError, check_sampler_ratio
from vlarl_ray.types import Scores


def make_groups():
    worker = EnvWorker(CountingEnv, EchoClient(), num_envs=2)
    tasks = [make_task(slot, init_state_id=10) for slot in range(3)]
    ledger = RolloutLedger(InlinePool(worker, capacity=4), max_attempts=1)
    rule = GroupRule(num_wanted=len(tasks), max_attempts=len(tasks))
    return ledger.take(([task] for task in tasks), rule).accepted


def make_scores(groups, **changed):
    """Log-probabilities equal to the engine's, except `slot_<n>=value` at that slot's first token."""
    scores = []
    for group in groups:
        [trajectory] = group.trajectories
        logprobs = trajectory.behaviour_logprobs.copy()
        logprobs[0, 0] += changed.get(f"slot_{trajectory.task.slot}", 0.0)
        scores.append(Scores(values=None, logprobs=logprobs))
    return scores


def test_equal_log_probabilities_pass_and_are_counted():
    groups = make_groups()
    found = check_sampler_ratio(groups, make_scores(groups), version=0, tolerance=1e-4)
    assert found["learn/sampler_ratio_max_error"] == 0.0
    assert found["learn/sampler_ratio_decisions"] == 9.0


def test_a_ratio_away_from_1_is_located():
    groups = make_groups()
    with pytest.raises(SamplerMismatchError, match="at count, slot 1, decision 0"):
        check_sampler_ratio(groups, make_scores(groups, slot_1=0.01), version=0, tolerance=1e-4)


@pytest.mark.parametrize("slot", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_never_passes_wherever_it_stands(slot, value):
    groups = make_groups()
    with pytest.raises(SamplerMismatchError, match=f"not finite at count, slot {slot}, decision 0"):
        check_sampler_ratio(groups, make_scores(groups, **{f"slot_{slot}": value}), version=0, tolerance=1e-4)


def test_tokens_that_were_never_executed_do_not_count():
    groups = make_groups()
    scores = make_scores(groups)
    assert scores[0].logprobs is not None
    scores[0].logprobs[2, 4:] += 1.0  # success at step 10 leaves the last two steps of the third chunk unexecuted
    assert check_sampler_ratio(groups, scores, version=0, tolerance=1e-4)["learn/sampler_ratio_max_error"] == 0.0


def test_in_bfloat16_one_decision_far_out_passes_and_all_of_them_a_little_out_do_not():
    groups = make_groups()
    scores = make_scores(groups, slot_1=0.9)
    found = check_sampler_ratio(groups, scores, version=0, tolerance=0.5, exact=False)
    assert found["learn/sampler_ratio_max_error"] > 0.5
    assert found["learn/sampler_ratio_rms_error"] == pytest.approx(0.3, rel=1e-5)  # of nine decisions
    for score in scores:
        score.logprobs[:, 0] += 0.6
    with pytest.raises(
        SamplerMismatchError, match=r"0\.\d+ nats away from 1 in the root mean square .*slot 1, decision 0"
    ):
        check_sampler_ratio(groups, scores, version=0, tolerance=0.5, exact=False)
