"""RLOO and GRPO: the numbers of F1, F2 and F7 through `make_batch`, and the rows they train on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny_model import algorithm_config, make_trajectories
from tests.unit.test_losses import loss_rows
from vlarl_ray.algorithms.base import Normalizers
from vlarl_ray.algorithms.grpo import GRPO
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.algorithms.rloo import RLOO
from vlarl_ray.registry import ALGORITHMS, resolve
from vlarl_ray.types import Scores, TrajectoryGroup


def groups_with_returns(*groups):
    """Groups of two-decision episodes whose returns are the given ones."""
    built = []
    for returns in groups:
        members = []
        for trajectory, value in zip(make_trajectories([2] * len(returns)), returns, strict=True):
            rewards = np.zeros_like(trajectory.rewards)
            rewards[-1, 0] = value
            members.append(replace(trajectory, rewards=rewards))
        built.append(TrajectoryGroup(tuple(members)))
    return built


def advantages_of(algorithm, groups):
    """One advantage per episode; every decision of it must have the same."""
    count = sum(len(group.trajectories) for group in groups)
    batch = algorithm.make_batch(groups, [Scores(values=None, logprobs=None)] * count, version=0)
    per_decision = batch.advantages.reshape(count, 2)
    np.testing.assert_array_equal(per_decision[:, 0], per_decision[:, 1])
    return per_decision[:, 0]


@pytest.mark.parametrize(("name", "kind"), [("rloo", RLOO), ("grpo", GRPO)])
def test_registered_under_its_name(name, kind):
    assert resolve(ALGORITHMS, name, what="algorithm.name") is kind


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ([1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        ([0, 0, 1, 0, 0, 1, 0, 0], [-2 / 7, -2 / 7, 0.857143, -2 / 7, -2 / 7, 0.857143, -2 / 7, -2 / 7]),
        ([0.2, 0.8, 0.5], [-0.45, 0.45, 0]),
        ([1, 1, 1], [0, 0, 0]),
    ],
)  # fmt: skip
def test_f1_rloo(returns, expected):
    algorithm = RLOO(algorithm_config(name="rloo"))
    np.testing.assert_allclose(advantages_of(algorithm, groups_with_returns(returns)), expected, atol=1e-5)


def test_f1_one_rollout_has_no_baseline():
    with pytest.raises(ValueError, match=r"rollout\.group_size >= 2"):
        advantages_of(RLOO(algorithm_config(name="rloo")), groups_with_returns([1]))


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ([1, 0, 0, 0], [1.499997, -0.499999, -0.499999, -0.499999]),
        ([0, 0, 1, 0, 0, 1, 0, 0], [-0.54006, -0.54006, 1.62018, -0.54006, -0.54006, 1.62018, -0.54006, -0.54006]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_f2_grpo(returns, expected):
    algorithm = GRPO(algorithm_config(name="grpo"))
    np.testing.assert_allclose(advantages_of(algorithm, groups_with_returns(returns)), expected, atol=1e-5)


@pytest.mark.parametrize(("scope", "expected"), [("context", [0, 0, 0, 0]), ("batch", [2 / 3, 2 / 3, -2 / 3, -2 / 3])])
def test_f7_baseline_scope(scope, expected):
    algorithm = RLOO(algorithm_config(name="rloo", baseline_scope=scope))
    np.testing.assert_allclose(advantages_of(algorithm, groups_with_returns([1, 1], [0, 0])), expected, atol=1e-5)


def test_groups_of_different_returns_do_not_touch_each_other():
    algorithm = RLOO(algorithm_config(name="rloo"))
    first = advantages_of(algorithm, groups_with_returns([1, 0, 0], [1, 1, 0]))
    second = advantages_of(algorithm, groups_with_returns([1, 0, 0], [0, 0, 0]))
    np.testing.assert_array_equal(first[:3], second[:3])


@pytest.mark.parametrize(("normalize", "standardised"), [(None, False), (False, False), (True, True)])
def test_batch_normalisation_is_off_unless_asked_for(normalize, standardised):
    algorithm = RLOO(algorithm_config(name="rloo", normalize_advantages=normalize))
    found = advantages_of(algorithm, groups_with_returns([1, 0, 0, 0]))
    assert (abs(found.std() - 1) < 1e-3) == standardised


def test_ppo_normalises_unless_told_not_to():
    trajectories = groups_with_returns([1, 0, 0, 0])
    scores = [Scores(values=np.zeros(3, np.float32), logprobs=None)] * 4
    stds = [
        PPO(algorithm_config(normalize_advantages=choice)).make_batch(trajectories, scores, version=0).advantages.std()
        for choice in (None, True, False)
    ]
    assert stds[0] == stds[1] == pytest.approx(1, abs=1e-3)
    assert stds[2] < 0.9


def test_there_is_no_critic_in_the_loss():
    algorithm = RLOO(algorithm_config(name="rloo"))
    assert "values" not in algorithm.needs
    rows = loss_rows(values=torch.zeros(4, requires_grad=True))
    terms = algorithm.loss(rows, Normalizers(ratios=8.0, tokens=24.0, rows=4.0))
    assert float(terms.value) == 0
    terms.policy.backward()
    assert rows.logprobs.grad is not None
    assert rows.logprobs.grad.abs().sum() > 0
    assert rows.values.grad is None
