import json

import pytest

from tests.fake_episodes import TASKS, FakeSuite, make_evaluation, make_task, make_trajectory
from vlarl_ray.evaluation_results import summarize_evaluation
from vlarl_ray.metrics import describe_metric


def summarize(trajectories, *, suite=None, tasks=TASKS, states=4):
    return summarize_evaluation(trajectories, suite or FakeSuite(), task_ids=tasks, states_per_task=states)


def test_450_of_500_successes_give_the_textbook_interval():
    tasks = [f"task-{i}" for i in range(10)]
    result = summarize(make_evaluation(tasks, 50, success=lambda task, s: s >= 5), tasks=tasks, states=50)
    assert (result.success_rate, result.episodes) == (0.9, 500)
    assert (result.ci_low, result.ci_high) == pytest.approx((0.871, 0.923), abs=1e-3)


def test_both_steps_to_success_conventions():
    episodes = [
        make_trajectory(make_task(TASKS[0], split="eval", init_state_id=s, max_env_steps=500), first_success=first)
        for s, first in enumerate([10, None, 30])
    ]
    result = summarize(episodes, tasks=TASKS[:1], states=3)
    assert (result.steps_to_success, result.steps_to_success_all) == (20.0, 180.0)


def test_per_task_rows_and_seed_are_kept_in_the_order_of_the_tasks():
    episodes = make_evaluation(success=lambda task, s: task == TASKS[1] or s == 0)
    result = summarize(episodes[::-1])
    assert [row.task_id for row in result.per_task] == list(TASKS)
    assert [row.success_rate for row in result.per_task] == [0.25, 1.0, 0.25]
    assert result.seed == 2**63 + 5


def test_any_step_success_differs_from_last_step_success_where_episodes_run_on():
    episodes = make_evaluation()
    episodes[0] = make_trajectory(
        episodes[0].task, first_success=11, success_at_last_step=False, terminated=False, truncated=True
    )
    result = summarize(episodes)
    assert result.success_rate == 1.0
    assert result.last_step_success_rate == pytest.approx(11 / 12)


def test_disjoint_initial_states_are_labelled_held_out():
    assert summarize(make_evaluation()).split == "held-out"


def test_one_initial_state_shared_with_training_changes_the_label_and_is_counted_f69():
    result = summarize(make_evaluation(), suite=FakeSuite(shared=[2]))
    assert (result.split, result.num_shared_init_states) == ("shared-init", 3)


def test_shared_state_that_is_not_evaluated_does_not_matter():
    assert summarize(make_evaluation(), suite=FakeSuite(shared=[7])).split == "held-out"


def test_episode_counted_twice_is_refused():
    episodes = make_evaluation()
    with pytest.raises(ValueError, match="1 counted twice, first drawer-close-v3, initial state 2"):
        summarize([*episodes, episodes[2]])


def test_missing_episode_is_refused():
    with pytest.raises(ValueError, match="1 missing, first window-open-v3, initial state 1"):
        summarize([e for e in make_evaluation() if (e.task.task_id, e.task.init_state_id) != (TASKS[1], 1)])


def test_episode_outside_the_enumeration_is_refused():
    with pytest.raises(ValueError, match="not part of the enumeration"):
        summarize(make_evaluation(states=5))


def test_two_ids_of_one_initial_state_are_refused():
    class Repeating(FakeSuite):
        def init_state_hash(self, task_id, split, init_state_id):
            return super().init_state_hash(task_id, split, init_state_id % 3)

    with pytest.raises(ValueError, match="initial states 0 and 3 are the same state"):
        summarize(make_evaluation(), suite=Repeating())


def test_training_episode_is_refused():
    episodes = make_evaluation()
    episodes[0] = make_trajectory(make_task(split="train"))
    with pytest.raises(ValueError, match="split 'train'"):
        summarize(episodes)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.7), ("max_env_steps", 30), ("seed", 1), ("policy_version", 9)]
)
def test_unlike_settings_in_one_evaluation_are_refused(field, value):
    episodes = make_evaluation()
    changes = {"split": "eval", "temperature": 0.0, field: value}
    episodes[0] = make_trajectory(make_task(TASKS[0], **changes), first_success=11)
    with pytest.raises(ValueError, match=f"differ in {field}"):
        summarize(episodes)


def test_result_is_json_and_its_metrics_are_in_the_catalogue():
    result = summarize(make_evaluation(success=lambda task, s: False))
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["steps_to_success"] is None
    assert record["per_task"][1]["task_id"] == TASKS[1]
    for name in result.metrics():
        describe_metric(name)
