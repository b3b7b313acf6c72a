"""F45: which versions may answer and be learned from, and what an old decision weighs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.fake_episodes import make_task, make_trajectory
from vlarl_ray.algorithms.batch import importance_weights
from vlarl_ray.config import AlgorithmConfig
from vlarl_ray.inference.base import WrongVersionError
from vlarl_ray.train import check_sampler_ratio, check_versions
from vlarl_ray.types import Scores, TrajectoryGroup


def decided_by(*versions):
    task = make_task(policy_version=versions[0], max_env_steps=5 * len(versions))
    trajectory = make_trajectory(task)
    return replace(trajectory, policy_versions=np.array(versions, np.int32))


def as_group(trajectory):
    return [TrajectoryGroup((trajectory,))]


@pytest.mark.parametrize("versions", [(4, 4, 4), (5, 4, 5)])
def test_on_policy_mode_takes_the_current_version_only_f45(versions):
    with pytest.raises(WrongVersionError, match=r"decided by versions 4 to \d; the update from version 5 takes 5 to 5"):
        check_versions(as_group(decided_by(*versions)), 5, max_lag=0)
    check_versions(as_group(decided_by(5, 5, 5)), 5, max_lag=0)


@pytest.mark.parametrize(
    ("versions", "accepted"), [((4, 4, 5), True), ((4, 4, 4), True), ((3, 4, 5), False), ((5, 6, 6), False)]
)
def test_at_lag_1_decisions_may_be_one_update_old_f45(versions, accepted):
    groups = as_group(decided_by(*versions))
    if accepted:
        check_versions(groups, 5, max_lag=1)
    else:
        with pytest.raises(WrongVersionError):
            check_versions(groups, 5, max_lag=1)


def test_only_decisions_of_the_current_version_are_compared_with_the_engine_f45():
    trajectory = decided_by(4, 5, 5)
    logprobs = trajectory.behaviour_logprobs.copy()
    logprobs[0] += 0.3  # what an update does to the probability of an old decision
    found = check_sampler_ratio(as_group(trajectory), [Scores(None, logprobs)], version=5, tolerance=1e-4)
    assert found == {
        "learn/sampler_ratio_max_error": 0.0,
        "learn/sampler_ratio_rms_error": 0.0,
        "learn/sampler_ratio_decisions": 2.0,
        "learn/policy_age_mean": pytest.approx(1 / 3),
        "learn/policy_age_max": 1.0,
    }


def test_an_old_decision_weighs_its_probability_now_over_that_then_truncated():
    trajectory = decided_by(4, 4, 5)
    logprobs = trajectory.behaviour_logprobs.copy()
    logprobs[0, 0] += np.log(1.5)
    logprobs[1, 0] += np.log(7.0)
    scores = [Scores(None, logprobs)]
    learners = AlgorithmConfig(old_logprobs="learner", max_importance_weight=2.0)
    np.testing.assert_allclose(importance_weights(learners, [trajectory], scores), [1.5, 2.0, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(importance_weights(AlgorithmConfig(), [trajectory], scores), [1, 1, 1])


def test_tokens_that_were_never_executed_do_not_weigh():
    trajectory = decided_by(4, 4)
    trajectory = replace(trajectory, num_env_steps=np.array([trajectory.rewards.shape[1], 1], np.int32))
    logprobs = trajectory.behaviour_logprobs.copy()
    logprobs[1, -1] += 5.0
    weights = importance_weights(AlgorithmConfig(old_logprobs="learner"), [trajectory], [Scores(None, logprobs)])
    np.testing.assert_array_equal(weights, [1, 1])
