"""Dynamic sampling: F36-F39, and that results do not depend on who finishes first."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.fake_episodes import make_task, make_trajectory
from tests.unit.test_tasks import NumberedSuite
from vlarl_ray.config import ExperimentConfig, RolloutConfig, SamplingConfig
from vlarl_ray.rollout.groups import GroupIntake, GroupRule, accept_rates
from vlarl_ray.rollout.ledger import RolloutLedger
from vlarl_ray.rollout.tasks import TaskSampler
from vlarl_ray.types import TrajectoryGroup

FRAMES = np.zeros((1, 1, 2, 2, 3), np.uint8)


def group(*successes, task_id="a"):
    members = [
        make_trajectory(make_task(task_id, slot=slot), first_success=5 if success else None, frames=FRAMES)
        for slot, success in enumerate(successes)
    ]
    return TrajectoryGroup(tuple(members))


def mean_group(mean):
    return group(*([True] * round(8 * mean) + [False] * round(8 * (1 - mean))))


class ScriptedPool:
    """Episodes whose outcome is a function of their task, delivered in random order, some long after others."""

    def __init__(self, outcome, *, capacity=8, seed=0, straggler=None):
        self.capacity = capacity
        self._outcome = outcome
        self._rng = random.Random(seed)
        self._running = []
        self._straggler = straggler
        self.submitted = []
        self.cancelled = 0

    def submit(self, task):
        self._running.append(task)
        self.submitted.append(task)

    def collect(self):
        assert self._running, "collect() with nothing submitted would hang"
        ready = [task for task in self._running if task.group_id != self._straggler] or self._running
        task = self._rng.choice(ready)
        self._running.remove(task)
        return [make_trajectory(task, first_success=5 if self._outcome(task) else None, frames=FRAMES)]

    def cancel_all(self):
        self.cancelled += len(self._running)
        self._running.clear()


def draws_of(num_groups=10_000, size=4):
    for index in range(num_groups):
        yield [make_task(slot=index * size + k, group_id=index, init_state_id=index) for k in range(size)]


def by_group(kinds):
    """Outcome of a task: group g is of kind `kinds[g % len]`: all succeed, all fail, or every other one succeeds."""

    def outcome(task):
        kind = kinds[task.group_id % len(kinds)]
        return {"all": True, "none": False, "mixed": task.slot % 2 == 0}[kind]

    return outcome


def take(pool, rule):
    return RolloutLedger(pool, max_attempts=3).take(draws_of(), rule)


DYNAMIC = GroupRule(num_wanted=4, max_attempts=100, rejects_uniform=True)


@pytest.mark.parametrize("seed", range(5))
def test_f36_only_mixed_groups_are_kept_exactly_as_many_as_wanted_and_in_draw_order(seed):
    intake = take(ScriptedPool(by_group(["all", "none", "mixed"]), seed=seed), DYNAMIC)
    assert [g.trajectories[0].task.group_id for g in intake.accepted] == [2, 5, 8, 11]
    assert [g.trajectories[0].task.group_id for g in intake.attempted] == list(range(12))


@pytest.mark.parametrize("straggler", [0, 2, 5])
def test_a_slow_group_is_waited_for_rather_than_replaced_by_a_quick_one(straggler):
    intake = take(ScriptedPool(by_group(["all", "none", "mixed"]), straggler=straggler), DYNAMIC)
    assert [g.trajectories[0].task.group_id for g in intake.accepted] == [2, 5, 8, 11]


@pytest.mark.parametrize("capacity", [1, 3, 8, 64])
def test_results_do_not_depend_on_how_much_runs_ahead(capacity):
    intake = take(ScriptedPool(by_group(["none", "mixed"]), capacity=capacity), DYNAMIC)
    assert [g.trajectories[0].task.group_id for g in intake.attempted] == list(range(8))


def test_what_ran_ahead_for_nothing_is_cancelled_and_counts_for_nothing():
    pool = ScriptedPool(by_group(["none", "mixed"]), capacity=64)
    ledger = RolloutLedger(pool, max_attempts=3)
    seen = [len(ledger.take(draws_of(), DYNAMIC).attempted) for _ in range(30)]
    assert seen == [8] * 30
    assert pool.cancelled == ledger.counters.cancelled > 0


def test_early_stop_at_a_fraction():
    cfg = ExperimentConfig(
        rollout=RolloutConfig(groups_per_update=10), sampling=SamplingConfig(dynamic=True, early_stop_fraction=0.75)
    )
    assert len(take(ScriptedPool(by_group(["mixed"])), GroupRule.from_config(cfg)).accepted) == 8


def test_f37_accuracy_band():
    rule = GroupRule(num_wanted=9, max_attempts=9, rejects_uniform=True, min_success=0.1, max_success=0.9)
    assert [mean for mean in (0, 0.125, 0.5, 0.875, 1) if rule.accepts(mean_group(mean))] == [0.125, 0.5, 0.875]


def test_the_band_is_inclusive_and_uniform_groups_never_pass():
    rule = GroupRule(num_wanted=9, max_attempts=9, rejects_uniform=True, min_success=0.5, max_success=0.5)
    assert rule.accepts(mean_group(0.5))
    assert not rule.accepts(mean_group(0.625))
    assert not replace(rule, min_success=0.0, max_success=1.0).accepts(mean_group(1))


def test_f38_constant_failure_ends_after_the_most_attempts_with_nothing_accepted():
    pool = ScriptedPool(by_group(["none"]))
    intake = take(pool, GroupRule(num_wanted=4, max_attempts=12, rejects_uniform=True))
    assert (len(intake.accepted), len(intake.attempted)) == (0, 12)
    assert accept_rates(intake, ["drawer-close-v3"])["rollout/accept_rate"] == 0
    assert len({task.group_id for task in pool.submitted}) == 12  # never more are started than may be judged


def test_without_dynamic_sampling_every_group_counts():
    rule = GroupRule.from_config(ExperimentConfig(rollout=RolloutConfig(groups_per_update=5)))
    intake = take(ScriptedPool(by_group(["all", "none"])), rule)
    assert len(intake.accepted) == len(intake.attempted) == 5


def test_a_group_from_two_initial_states_is_an_internal_error_that_names_both():
    members = tuple(make_trajectory(make_task("a", slot=slot, init_state_id=3 + slot)) for slot in range(2))
    with pytest.raises(AssertionError, match="a from train state 3 and a from train state 4"):
        GroupIntake(DYNAMIC).offer(TrajectoryGroup(members))


def test_frames_of_rejected_groups_are_let_go_at_once():
    intake = GroupIntake(replace(DYNAMIC, num_wanted=1))
    assert not intake.offer(group(True, True))
    assert intake.offer(group(True, False))
    assert [t.frames is None for g in intake.attempted for t in g.trajectories] == [True, True, False, False]
    with pytest.raises(ValueError, match="nothing more is judged"):
        intake.offer(group(True, False))


def test_the_ledger_holds_no_frames_of_rejected_groups():
    class Frames:
        """Stands for frames; can be watched."""

    alive: weakref.WeakSet[Frames] = weakref.WeakSet()
    most = 0

    class WatchingPool(ScriptedPool):
        def collect(self):
            nonlocal most
            gc.collect()
            most = max(most, len(alive))
            done = [replace(trajectory, frames=Frames()) for trajectory in super().collect()]
            alive.update(trajectory.frames for trajectory in done)
            return done

    take(WatchingPool(by_group(["none"]), capacity=4), GroupRule(num_wanted=1, max_attempts=20, rejects_uniform=True))
    assert most <= 8  # of 80: at most the groups that are under way


def test_accept_rates_per_task():
    intake = GroupIntake(DYNAMIC)
    for g in (group(True, False), group(True, True), group(True, True, task_id="b")):
        intake.offer(g)
    rates = accept_rates(intake, ["a", "b", "c"])
    assert [rates[f"rollout/accept_rate/{task}"] for task in "abc"] == [0.5, 0, None]
    assert rates["rollout/accept_rate"] == pytest.approx(1 / 3)


def make_sampler(**sampling):
    cfg = ExperimentConfig(
        rollout=RolloutConfig(groups_per_update=6, group_size=2), sampling=SamplingConfig(**sampling)
    )
    return TaskSampler(NumberedSuite(), cfg, run_id="r")


def drawn(sampler, count, iteration=0):
    draws = sampler.draws(iteration, version=0)
    return [next(draws) for _ in range(count)]


def contexts(draws):
    return [(draw.tasks[0].task_id, draw.tasks[0].init_state_id) for draw in draws]


def finish(draws, solved):
    """The groups of some draws, solved throughout where `solved` says so."""
    return [
        TrajectoryGroup(
            tuple(
                make_trajectory(task, first_success=5 if solved((task.task_id, task.init_state_id)) else None)
                for task in draw.tasks
            )
        )
        for draw in draws
    ]


def test_f39_a_solved_context_is_skipped_four_times_then_tried_again():
    sampler = make_sampler(skip_solved=True)
    target = contexts(drawn(sampler, 1))[0]
    tried, skipped = [], 0
    for iteration in range(7):
        draws = drawn(sampler, 30, iteration)  # at least one whole deck: 3 tasks x 10 states
        tried.append(target in contexts(draws))
        skipped += sum(draw.skipped.count(target) for draw in draws)
        sampler.observe(finish(draws, lambda context: context == target))
        if tried.count(True) == 2:
            break
    assert tried[0]
    assert tried.count(True) == 2
    assert skipped == 4


def test_an_unsolved_context_is_not_skipped():
    sampler = make_sampler(skip_solved=True)
    draws = drawn(sampler, 30)
    sampler.observe(finish(draws, lambda context: False))
    assert not any(draw.skipped for draw in drawn(sampler, 30, 1))


def test_groups_that_ran_ahead_change_nothing_of_later_draws():
    later = []
    for ahead in (0, 7):
        sampler = make_sampler(skip_solved=True, curriculum="hardest")
        for iteration in range(4):
            draws = drawn(sampler, 12 + ahead, iteration)[:12]
            sampler.observe(finish(draws, lambda context: context[1] % 2 == 0))
        later.append(contexts(drawn(sampler, 12, 4)))
    assert later[0] == later[1]


def test_a_restored_sampler_draws_the_same():
    first = make_sampler(skip_solved=True, curriculum="hardest")
    first.observe(finish(drawn(first, 20), lambda context: context[0] == "a"))
    second = make_sampler(skip_solved=True, curriculum="hardest")
    assert contexts(drawn(first, 20, 1)) != contexts(drawn(second, 20, 1))
    second.load_state_dict(first.state_dict())
    assert contexts(drawn(first, 20, 1)) == contexts(drawn(second, 20, 1))


def test_the_curriculum_draws_the_hard_task_more_often():
    sampler = make_sampler(curriculum="hardest", curriculum_temperature=0.2, curriculum_rate=0.5)
    for iteration in range(5):
        draws = drawn(sampler, 12, iteration)
        sampler.observe(finish(draws, lambda context: context[0] != "b"))
    counts = Counter(task for task, _ in contexts(drawn(sampler, 60, 9)))
    assert counts["b"] > 0.8 * 60


def test_f35_members_of_a_group_share_task_state_and_instruction():
    suite = NumberedSuite()
    for draw in drawn(make_sampler(), 12):
        assert len({suite.init_state_hash(t.task_id, t.split, t.init_state_id) for t in draw.tasks}) == 1
        assert len({t.instruction for t in draw.tasks}) == 1
        assert len({t.slot for t in draw.tasks}) == 2
