"""Exactly-once accounting."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.counting_env import CountingEnv, EchoClient, make_task
from vlarl_ray.rollout.env_worker import EnvWorker
from vlarl_ray.rollout.episode import EpisodeFailure
from vlarl_ray.rollout.ledger import InlinePool, PoisonTaskError, RolloutLedger


class UnreliablePool:
    """Runs episodes for real, then delivers results shuffled, some twice, some as failures first."""

    def __init__(self, *, fail: dict[int, int] | None = None, duplicate: bool = False, seed: int = 0) -> None:
        self.capacity = 3
        self._fail = dict(fail or {})
        self._duplicate = duplicate
        self._rng = random.Random(seed)
        self._outcomes: list = []
        self.submitted: list[int] = []
        self.cancelled = False

    def submit(self, task):
        self.submitted.append(task.slot)
        if self._fail.get(task.slot, 0) > 0:
            self._fail[task.slot] -= 1
            self._outcomes.append(EpisodeFailure(task, "worker died"))
            return
        worker = EnvWorker(CountingEnv, EchoClient(), num_envs=2)
        worker.submit(task)
        while not worker.is_idle:
            self._outcomes += worker.turn()
        if self._duplicate:
            self._outcomes.append(replace(self._outcomes[-1], worker=99))

    def collect(self):
        self._rng.shuffle(self._outcomes)
        taken, self._outcomes = self._outcomes[:2], self._outcomes[2:]
        return taken

    def cancel_all(self):
        self.cancelled = True


TASKS = [make_task(slot, init_state_id=1 + slot % 7) for slot in range(12)]


@pytest.mark.parametrize("seed", range(5))
def test_results_come_in_slot_order_whatever_order_they_arrive_in(seed):
    ledger = RolloutLedger(UnreliablePool(seed=seed), max_attempts=3)
    assert [t.task.slot for t in ledger.run(TASKS)] == list(range(12))
    assert ledger.counters.completed == 12


def test_the_first_result_wins_and_duplicates_are_counted():
    ledger = RolloutLedger(UnreliablePool(duplicate=True), max_attempts=3)
    trajectories = ledger.run(TASKS)
    assert len({t.task.identity for t in trajectories}) == 12
    assert ledger.counters.completed == 12
    assert ledger.counters.duplicates_dropped >= 1


def test_a_failed_episode_is_redone_with_the_same_identity_and_seed():
    pool = UnreliablePool(fail={4: 2})
    ledger = RolloutLedger(pool, max_attempts=3)
    trajectories = ledger.run(TASKS)
    assert pool.submitted.count(4) == 3
    assert trajectories[4].task == TASKS[4]
    assert ledger.counters.redone == 2


def test_a_task_that_always_fails_is_poison_and_ends_the_run():
    pool = UnreliablePool(fail={4: 99})
    with pytest.raises(PoisonTaskError, match=r"count, train initial state 5 failed 3 times .*worker died"):
        RolloutLedger(pool, max_attempts=3).run(TASKS)
    assert pool.cancelled


def test_no_more_than_the_capacity_is_submitted_at_a_time():
    pool = UnreliablePool()
    most = 0
    collect = pool.collect

    def watch():
        nonlocal most
        most = max(most, len(pool._outcomes))
        return collect()

    pool.collect = watch
    RolloutLedger(pool, max_attempts=3).run(TASKS)
    assert most <= 3


def test_two_tasks_with_one_identity_are_refused():
    with pytest.raises(ValueError, match="share one identity"):
        RolloutLedger(UnreliablePool(), max_attempts=3).run([TASKS[0], TASKS[0]])


def test_a_late_result_of_another_iteration_is_dropped():
    pool = UnreliablePool()
    pool._outcomes.append(EpisodeFailure(make_task(0, iteration=9), "late"))
    ledger = RolloutLedger(pool, max_attempts=1)
    ledger.run(TASKS)
    assert ledger.counters.duplicates_dropped == 1


def test_inline_pool_runs_every_task():
    worker = EnvWorker(CountingEnv, EchoClient(), num_envs=4)
    ledger = RolloutLedger(InlinePool(worker, capacity=5), max_attempts=1)
    assert [t.first_success_env_step for t in ledger.run(TASKS)] == [1 + slot % 7 for slot in range(12)]


def test_collecting_from_an_idle_pool_is_an_error_and_not_a_hang():
    worker = EnvWorker(CountingEnv, EchoClient(), num_envs=4)
    with pytest.raises(RuntimeError, match="nothing submitted"):
        InlinePool(worker, capacity=5).collect()
