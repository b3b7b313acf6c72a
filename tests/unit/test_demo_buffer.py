"""The self-BC buffer: F51 (admission), F52 (invariant), F53 (trim)."""

import itertools
import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from tests.fake_episodes import make_task, make_trajectory
from vlarl_ray.algorithms.demo_buffer import DemoBuffer
from vlarl_ray.config import SelfBCConfig
from vlarl_ray.types import StoredEpisode


def trial(length, task_id="a", *, slot=0, horizon=500):
    return make_trajectory(make_task(task_id, slot=slot, max_env_steps=horizon), first_success=length)


def filled(lengths, **settings):
    buffer = DemoBuffer(SelfBCConfig(**settings))
    assert [buffer.offer(trial(length, slot=slot)) for slot, length in enumerate(lengths)] == ["admitted"] * len(
        lengths
    )
    return buffer


def lengths_of(buffer):
    return [episode.length for episode in buffer.episodes]


def test_f51_admission_eviction_and_rejection():
    buffer = filled([80, 60, 70], capacity=3, min_fill=3)
    assert buffer.offer(trial(75)) == "rejected_long"
    assert buffer.offer(make_trajectory(make_task("a", max_env_steps=30))) == "rejected_fail"
    assert buffer.offer(trial(65)) == "admitted"
    assert lengths_of(buffer) == [60, 70, 65]
    counters = vars(buffer.counters)
    assert counters == {"offered": 6, "admitted": 4, "rejected_fail": 1, "rejected_long": 1, "evicted": 1}


def test_every_success_enters_until_the_store_has_its_minimum():
    buffer = filled([20, 400, 300], capacity=5, min_fill=3)
    assert buffer.offer(trial(350)) == "rejected_long"


@pytest.mark.parametrize(
    ("statistic", "longest_admitted"),
    [("mean", 55), ("median", 40), ("max", 100), ("best", 40), ("quantile", 70)],
)
def test_statistics(statistic, longest_admitted):
    settings = {"capacity": 9, "min_fill": 3, "statistic": statistic, "best_factor": 1.5, "quantile": 0.75}
    verdicts = [filled([27, 40, 100], **settings).offer(trial(longest_admitted + extra)) for extra in (0, 1)]
    assert verdicts == ["admitted", "rejected_long"]


def test_an_equally_long_newcomer_does_not_evict_and_of_equals_the_oldest_goes():
    buffer = filled([50, 50, 50], capacity=3, min_fill=3)
    assert buffer.offer(trial(50, slot=7)) == "rejected_long"
    assert [episode.key for episode in buffer.episodes] == ["0-0", "0-1", "0-2"]
    assert buffer.offer(trial(40, slot=8)) == "admitted"
    assert [episode.key for episode in buffer.episodes] == ["0-1", "0-2", "0-8"]


def test_f52_when_full_the_mean_length_never_grows_and_tasks_leave_each_other_alone():
    rng = np.random.default_rng(0)
    buffer = DemoBuffer(SelfBCConfig(capacity=5, min_fill=3))
    means: dict[str, list[float]] = defaultdict(list)
    for slot in range(1000):
        task = str(rng.choice(["a", "b", "c"], p=[0.8, 0.15, 0.05]))
        before = {t: buffer.mean_length(t) for t in "abc" if t != task}
        buffer.offer(trial(int(rng.integers(1, 200)), task, slot=slot))
        assert {t: buffer.mean_length(t) for t in "abc" if t != task} == before
        if sum(episode.task_id == task for episode in buffer.episodes) == 5:
            means[task].append(buffer.mean_length(task))
    assert set(means) == set("abc")
    for sequence in means.values():
        assert all(later <= earlier for earlier, later in itertools.pairwise(sequence))
        assert sequence[-1] < sequence[0]


def test_f53_success_at_step_40_of_100_is_stored_with_length_40():
    long = trial(40, horizon=100)
    lingering = replace(
        make_trajectory(make_task("a", max_env_steps=100)), success=True, first_success_env_step=38, terminated=False
    )
    stored = StoredEpisode.from_trajectory(lingering)
    assert StoredEpisode.from_trajectory(long).length == 40
    assert (stored.length, len(stored.num_env_steps), stored.num_env_steps[-1]) == (38, 8, 3)
    assert stored.actions.shape[0] == stored.proprio.shape[0] == 8


def test_a_failure_cannot_be_stored():
    with pytest.raises(ValueError, match="only successful"):
        StoredEpisode.from_trajectory(make_trajectory(make_task()))


def test_pinned_demonstrations_stay_whatever_comes():
    buffer = DemoBuffer(SelfBCConfig(capacity=2, min_fill=0, seed_demos=1))
    demo = replace(StoredEpisode.from_trajectory(trial(90)), key="demo", pinned=True)
    buffer.seed([demo, replace(demo, key="one too many")])
    assert [episode.key for episode in buffer.episodes] == ["demo"]
    for slot, length in enumerate((80, 30, 20)):
        buffer.offer(trial(length, slot=slot))
    assert sorted(lengths_of(buffer)) == [20, 90]


def test_a_rare_task_is_drawn_as_often_as_a_frequent_one():
    buffer = DemoBuffer(SelfBCConfig())
    for slot in range(20):
        buffer.offer(trial(50, "easy", slot=slot))
    buffer.offer(trial(10, "hard", slot=99))
    drawn = buffer.sample(2000, np.random.default_rng(0))
    is_hard = np.array([drawn.episodes[i].task_id == "hard" for i in drawn.episode_index])
    assert abs(is_hard.mean() - 0.5) < 0.05
    assert set(drawn.decision_index[is_hard]) == {0, 1}
    easy = np.bincount(drawn.episode_index[~is_hard], minlength=20)
    assert easy.min() > 0  # every episode of a task, every decision of an episode
    assert set(drawn.decision_index[~is_hard]) == set(range(10))


def test_an_empty_buffer_says_so():
    with pytest.raises(ValueError, match="empty"):
        DemoBuffer(SelfBCConfig()).sample(1, np.random.default_rng(0))


def test_its_state_goes_through_json():
    first = filled([80, 60, 70], capacity=3, min_fill=3)
    first.offer(trial(65, "b", slot=9))
    second = DemoBuffer(SelfBCConfig(capacity=3, min_fill=3))
    arrays = {episode.key: episode for episode in first.episodes}
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), arrays)
    assert [e.key for e in second.episodes] == [e.key for e in first.episodes]
    assert second.counters == first.counters
    assert second.offer(trial(61, slot=10)) == first.offer(trial(61, slot=10))
    assert lengths_of(second) == lengths_of(first)
