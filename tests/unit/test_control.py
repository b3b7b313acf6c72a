"""The negative control carries no information about success (F76)."""

from __future__ import annotations

import numpy as np

from tests.counting_env import CountingEnv, EchoClient, make_task
from vlarl_ray.rewards.control import shuffle_rewards
from vlarl_ray.rollout.env_worker import EnvWorker
from vlarl_ray.rollout.groups import GroupRule
from vlarl_ray.rollout.ledger import InlinePool, RolloutLedger


def make_groups(count: int = 40):
    worker = EnvWorker(CountingEnv, EchoClient(), num_envs=4)
    tasks = [make_task(slot, init_state_id=5 if slot % 2 else 0, max_env_steps=9) for slot in range(count)]
    ledger = RolloutLedger(InlinePool(worker, capacity=8), max_attempts=1)
    rule = GroupRule(num_wanted=len(tasks), max_attempts=len(tasks))
    return ledger.take(([task] for task in tasks), rule).accepted


def test_returns_are_permuted_and_paid_at_the_last_executed_step():
    groups = make_groups()
    shuffled = [g.trajectories[0] for g in shuffle_rewards(groups, seed=0, iteration=0)]
    returns = np.array([t.episode_return for t in shuffled])
    assert returns.sum() == 20
    for trajectory in shuffled:
        paid = trajectory.rewards.ravel()[trajectory.executed_mask().ravel()]
        assert paid[-1] == trajectory.episode_return
        assert trajectory.terminated
        assert not trajectory.truncated
    success = np.array([t.success for t in shuffled])
    assert 0.2 < returns[success].mean() < 0.8  # unrelated to success


def test_the_permutation_depends_on_seed_and_iteration():
    groups = make_groups()

    def returns(seed, iteration):
        return tuple(g.trajectories[0].episode_return for g in shuffle_rewards(groups, seed=seed, iteration=iteration))

    assert returns(0, 0) == returns(0, 0)
    assert len({returns(0, 0), returns(0, 1), returns(1, 0)}) == 3
