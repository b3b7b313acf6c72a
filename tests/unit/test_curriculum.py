"""Curriculum (F40), and draws that depend on nothing but seed, iteration and frozen state."""

import json

import numpy as np
import pytest

from tests.fake_episodes import make_task, make_trajectory
from vlarl_ray.rollout.curriculum import Curriculum, task_probabilities
from vlarl_ray.types import TrajectoryGroup


@pytest.mark.parametrize(
    ("mode", "temperature", "expected"),
    [
        ("hardest", 1.0, [0.5065, 0.3072, 0.1863]),
        ("frontier", 1.0, [0.2741, 0.4519, 0.2741]),
        ("frontier", 0.1, [0.0066, 0.9867, 0.0066]),
        ("uniform", 1.0, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_f40_probabilities(mode, temperature, expected):
    found = task_probabilities(np.array([0.0, 0.5, 1.0]), mode, temperature)
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_small_temperature_does_not_overflow():
    found = task_probabilities(np.array([0.0, 1.0]), "hardest", 1e-4)
    np.testing.assert_allclose(found, [1, 0], atol=1e-12)


def group(task_id, *successes):
    members = [make_trajectory(make_task(task_id), first_success=5 if success else None) for success in successes]
    return TrajectoryGroup(tuple(members))


def test_f40_the_moving_average_on_a_given_trace():
    curriculum = Curriculum(["a", "b"], mode="hardest", rate=0.1)
    assert curriculum.success == {"a": 0.5, "b": 0.5}
    curriculum.observe([group("a", True, True), group("a", False, False), group("b", True, False)])
    assert curriculum.success["a"] == pytest.approx((0.5 + 0.1 * 0.5) * 0.9)
    assert curriculum.success["b"] == pytest.approx(0.5)


def test_its_state_goes_through_json_and_new_tasks_keep_the_prior():
    first = Curriculum(["a", "b"], mode="hardest")
    first.observe([group("a", True)])
    second = Curriculum(["b", "a", "c"], mode="hardest")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.success == {"a": first.success["a"], "b": 0.5, "c": 0.5}
