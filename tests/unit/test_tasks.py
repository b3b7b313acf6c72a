"""Which tasks an iteration and an evaluation hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from vlarl_ray.config import EvaluationConfig, ExperimentConfig, RolloutConfig
from vlarl_ray.rollout.tasks import TaskSampler


class NumberedSuite:
    name = "numbered"
    task_ids = ("a", "b", "c")
    proprio_dim = 1

    def instruction(self, task_id):
        return f"do {task_id}"

    def num_init_states(self, task_id, split):
        return 10 if split == "train" else 5

    def init_state_hash(self, task_id, split, init_state_id):
        return f"{task_id}{split}{init_state_id}"

    def make_env(self):
        raise NotImplementedError


def make_sampler(*, seed: int = 0, groups: int = 12, group_size: int = 1) -> TaskSampler:
    cfg = ExperimentConfig(seed=seed, rollout=RolloutConfig(groups_per_update=groups, group_size=group_size))
    return TaskSampler(NumberedSuite(), cfg, run_id="run")


def test_an_iteration_is_a_function_of_seed_and_iteration():
    assert make_sampler().training_tasks(3, version=3) == make_sampler().training_tasks(3, version=3)
    drawn = {
        (seed, iteration): tuple(t.init_state_id for t in make_sampler(seed=seed).training_tasks(iteration, version=0))
        for seed in range(3)
        for iteration in range(3)
    }
    assert len(set(drawn.values())) == 9


def test_slots_count_up_and_groups_share_task_and_initial_state():
    tasks = make_sampler(groups=6, group_size=4).training_tasks(0, version=0)
    assert [t.slot for t in tasks] == list(range(24))
    for group in range(6):
        members = [t for t in tasks if t.group_id == group]
        assert len(members) == 4
        assert len({(t.task_id, t.init_state_id) for t in members}) == 1


def test_tasks_come_in_equal_shares_and_states_do_not_repeat_while_they_last():
    tasks = make_sampler(groups=30).training_tasks(5, version=5)
    assert Counter(t.task_id for t in tasks) == {"a": 10, "b": 10, "c": 10}
    assert len({(t.task_id, t.init_state_id) for t in tasks}) == 30


def test_more_groups_than_states_deal_a_second_deck():
    tasks = make_sampler(groups=45).training_tasks(0, version=0)
    assert max(Counter((t.task_id, t.init_state_id) for t in tasks).values()) == 2


def test_evaluation_enumerates_each_task_and_held_out_state_once():
    tasks = make_sampler().evaluation_tasks(EvaluationConfig(states_per_task=5), version=7)
    assert len({(t.task_id, t.init_state_id) for t in tasks}) == len(tasks) == 15
    assert {(t.split, t.temperature, t.policy_version) for t in tasks} == {("eval", 0.0, 7)}


def test_the_noise_of_evaluation_is_not_that_of_training():
    training = make_sampler().training_tasks(0, version=0)
    evaluation = make_sampler().evaluation_tasks(replace(EvaluationConfig(), states_per_task=5), version=0)
    assert not {t.noise_key(0) for t in training} & {t.noise_key(0) for t in evaluation}


def test_more_evaluation_states_than_there_are_is_an_error_that_says_how_many():
    with pytest.raises(ValueError, match=r"evaluation.states_per_task = 6, but a has 5 held-out .* set it to <= 5"):
        make_sampler().evaluation_tasks(EvaluationConfig(states_per_task=6), version=0)


def test_lag_is_for_training_episodes_an_evaluation_is_of_one_version_f45():
    cfg = ExperimentConfig(rollout=RolloutConfig(groups_per_update=2, max_policy_lag=1))
    sampler = TaskSampler(NumberedSuite(), cfg, run_id="run")
    assert {task.max_policy_lag for task in sampler.training_tasks(0, version=0)} == {1}
    assert {t.max_policy_lag for t in sampler.evaluation_tasks(EvaluationConfig(states_per_task=2), version=0)} == {0}
