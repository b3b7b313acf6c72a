"""F54: the weight schedules, by table, and their state."""

import json

import pytest

from vlarl_ray.algorithms.weight_schedules import WeightSchedule
from vlarl_ray.config import SelfBCConfig


def schedule(name, **settings):
    return WeightSchedule(SelfBCConfig(schedule=name, **settings))


def test_f54_tanh_ramp():
    ramp = schedule("tanh_ramp", ramp_updates=100)
    assert [round(ramp.weights(t)[0], 4) for t in (0, 50, 100, 200)] == [0, 0.4621, 0.7616, 0.9640]
    assert {ramp.weights(t)[1] for t in (0, 50, 100, 200)} == {1.0}


def test_f54_linear_decay_stops_at_its_floor():
    decay = schedule("linear_decay", ramp_updates=10, min_bc_weight=0.1)
    assert [decay.weights(t) for t in (0, 5, 10, 20)] == [(1, 1), (1, 0.5), (1, 0.1), (1, 0.1)]


def test_f54_success_adaptive_follows_the_running_success():
    adaptive = schedule("success_adaptive", success_rate=0.5, bc_weight=2.0)
    assert adaptive.weights(0) == (1, 2)
    adaptive.observe(success_rate=1.0, losses={})
    assert adaptive.weights(1) == (1, 1)
    adaptive.observe(success_rate=1.0, losses={})
    assert adaptive.weights(2) == (1, 0.5)


def test_f54_kl_target_moves_by_half_as_much_again():
    adaptive = schedule("kl_target", kl_target=0.01)
    weights = []
    for kl in (0.021, 0.021, 0.01, 0.004):
        adaptive.observe(success_rate=0.0, losses={"learn/approx_kl": kl})
        weights.append(adaptive.weights(0)[1])
    assert weights == pytest.approx([1.5, 2.25, 2.25, 1.5])


def test_kl_target_comes_back_from_its_bound_at_once():
    adaptive = schedule("kl_target", kl_target=0.01, max_bc_weight=2.0)
    for _ in range(50):
        adaptive.observe(success_rate=0.0, losses={"learn/approx_kl": 1.0})
    assert adaptive.weights(0)[1] == 2
    adaptive.observe(success_rate=0.0, losses={"learn/approx_kl": 0.0})
    assert adaptive.weights(0)[1] == pytest.approx(2 / 1.5)


def test_kl_target_comes_back_from_quiet_updates_within_a_dozen():
    adaptive = schedule("kl_target", kl_target=0.01)
    for _ in range(60):
        adaptive.observe(success_rate=0.0, losses={"learn/approx_kl": 0.0})
    for _ in range(12):
        adaptive.observe(success_rate=0.0, losses={"learn/approx_kl": 1.0})
    assert adaptive.weights(0)[1] > 1


def test_kl_target_ignores_updates_of_the_critic_alone():
    adaptive = schedule("kl_target", kl_target=0.01)
    adaptive.observe(success_rate=0.0, losses={"learn/approx_kl": 0.0, "learn/critic_warmup": 1.0})
    assert adaptive.weights(0)[1] == 1


def test_f54_grad_ratio_equalises_the_gradients_within_bounds():
    adaptive = schedule("grad_ratio", bc_weight=0.5, max_bc_weight=3.0)
    assert adaptive.weights(0) == (1, 0.5)
    for policy, cloning, expected in ((4.0, 2.0, 1.0), (1.0, 0.0, 1.0), (100.0, 1.0, 3.0)):
        adaptive.observe(success_rate=0.0, losses={"learn/grad_norm_policy": policy, "learn/grad_norm_bc": cloning})
        assert adaptive.weights(1)[1] == expected


def test_entropy_adaptive_clones_less_as_the_policy_makes_up_its_mind():
    adaptive = schedule("entropy_adaptive", bc_weight=2.0)
    assert adaptive.weights(0)[1] == 2
    for entropy in (4.0, 2.0, 1.0):
        adaptive.observe(success_rate=0.0, losses={"learn/entropy": entropy})
    assert adaptive.weights(3)[1] == 0.5


def test_f54_constant():
    fixed = schedule("constant", policy_weight=0.3, bc_weight=0.7)
    fixed.observe(success_rate=1.0, losses={"learn/approx_kl": 9.0, "learn/entropy": 3.0})
    assert fixed.weights(0) == fixed.weights(99) == (0.3, 0.7)


@pytest.mark.parametrize(
    "name",
    ["tanh_ramp", "linear_decay", "success_adaptive", "kl_target", "grad_ratio", "entropy_adaptive", "constant"],
)
def test_f54_state_is_restored(name):
    first, second = schedule(name), schedule(name)
    losses = {"learn/approx_kl": 0.1, "learn/grad_norm_policy": 3.0, "learn/grad_norm_bc": 2.0, "learn/entropy": 2.0}
    for factor in (1.0, 0.5):
        first.observe(success_rate=0.6, losses={key: value * factor for key, value in losses.items()})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.weights(5) == second.weights(5)
