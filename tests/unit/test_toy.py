import time

import numpy as np
import pytest

from vlarl_ray.envs import make_env, shared_init_states, single_task
from vlarl_ray.envs.toy import ToySuite, optimal_num_steps

REACH = ("reach-a", "reach-b", "reach-c")


@pytest.mark.parametrize("task_id", REACH)
def test_expert_needs_exactly_the_optimal_number_of_steps(task_id):
    suite = ToySuite((task_id,))
    env = suite.make_env()
    for state in range(50):
        env.reset(single_task(suite, task_id, state))
        taken = next(n for n in range(1, 50) if env.step(env.expert_action()).success)
        assert taken == optimal_num_steps(suite.init_state("train", state))


def test_the_optimum_is_a_lower_bound_for_random_policies():
    suite = ToySuite(("reach-a",))
    env = suite.make_env()
    rng = np.random.default_rng(0)
    for state in range(50):
        env.reset(single_task(suite, "reach-a", state))
        for step in range(1, 40):
            if env.step(rng.uniform(-1, 1, 2).astype(np.float32)).success:
                assert step >= optimal_num_steps(suite.init_state("train", state))
                break


def test_impossible_task_never_succeeds():
    suite = ToySuite(("impossible",))
    env = suite.make_env()
    env.reset(single_task(suite, "impossible"))
    assert not any(env.step(env.expert_action()).success for _ in range(40))


def test_the_same_action_moves_the_tasks_differently():
    moves = {}
    for task_id in REACH:
        env = make_env("toy", task=task_id)
        before = env.reset(single_task(env.suite, task_id)).proprio
        env.step(np.array([1, 0], np.float32))
        moves[task_id] = tuple(np.round(env.observe().proprio - before, 3).tolist())
    assert len(set(moves.values())) == 3


def test_disc_and_cross_are_where_the_state_says():
    suite = ToySuite(("reach-a",), image_size=64)
    env = suite.make_env()
    frame = env.reset(single_task(suite, "reach-a", 3)).images[0].astype(int)
    x, y, goal_x, goal_y = suite.init_state("train", 3)
    for channel, (u, v) in ((0, (x, y)), (1, (goal_x, goal_y))):
        rows, columns = np.nonzero(frame[..., channel] > 200)
        assert abs(columns.mean() / 63 - u) < 0.02
        assert abs(1 - rows.mean() / 63 - v) < 0.02


def test_splits_share_no_initial_state():
    suite = ToySuite(REACH)
    assert shared_init_states(suite) == frozenset()
    with pytest.raises(ValueError, match="eval_seed = 42"):
        ToySuite(REACH, train_seed=42, eval_seed=42)


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'reach-a'"):
        ToySuite(("reach-aa",))


def test_step_costs_less_than_50_microseconds():
    suite = ToySuite(("reach-a",))
    env = suite.make_env()
    env.reset(single_task(suite, "reach-a"))
    action = np.array([0.1, 0.1], np.float32)
    costs = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(500):
            env.step(action)
        costs.append((time.process_time() - start) / 500)
    assert min(costs) < 50e-6
