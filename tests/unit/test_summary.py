import json
import multiprocessing
import time

import numpy as np
import pytest

from tests.fake_episodes import TASKS, FakeSuite, make_evaluation
from vlarl_ray.evaluation_results import summarize_evaluation
from vlarl_ray.summary import (
    PeakMemory,
    RunSummary,
    describe_machine,
    installed_versions,
    read_summary,
    write_summary,
)


def evaluation(rate_of_states):
    episodes = make_evaluation(success=lambda task, s: s < rate_of_states)
    return summarize_evaluation(episodes, FakeSuite(), task_ids=TASKS, states_per_task=4)


def test_summary_has_the_promised_fields(tmp_path):
    summary = RunSummary().with_evaluation(warm_start=evaluation(2))
    content = json.loads(write_summary(tmp_path, summary).read_text())
    promised = {
        "warm_start", "final", "rl_seconds", "total_seconds", "env_steps", "env_steps_per_s", "peak_rss_bytes",
        "published_bytes_per_update", "model_bytes", "versions", "expert_steps_to_success",
    }  # fmt: skip
    assert promised <= set(content)
    assert set(content["warm_start"]) == {
        "success_rate", "ci_low", "ci_high", "episodes", "steps_to_success", "split",
    }  # fmt: skip
    assert content["warm_start"]["success_rate"] == 0.5
    assert content["final"] is None


def test_later_evaluation_keeps_the_earlier_one_and_round_trips(tmp_path):
    write_summary(tmp_path, RunSummary(env_steps=3).with_evaluation(warm_start=evaluation(2)))
    first = read_summary(tmp_path)
    write_summary(tmp_path, first.with_evaluation(final=evaluation(4)))
    second = read_summary(tmp_path)
    assert (second.warm_start["success_rate"], second.final["success_rate"]) == (0.5, 1.0)
    assert second.env_steps == 3


def test_failed_write_leaves_the_old_summary(tmp_path):
    write_summary(tmp_path, RunSummary(env_steps=3))
    with pytest.raises(ValueError, match="JSON"):
        write_summary(tmp_path, RunSummary(env_steps_per_s=float("nan")))
    assert read_summary(tmp_path).env_steps == 3


def test_missing_summary_is_none_and_unknown_field_an_error(tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"sucess": 1}')
    with pytest.raises(ValueError, match="sucess"):
        read_summary(tmp_path)


def test_versions_and_machine_are_named():
    versions = installed_versions()
    assert versions["python"].startswith("3.11")
    assert versions["numpy"] == np.__version__
    assert "cores" in describe_machine()


def _hold(num_bytes, ready, release):
    block = np.ones(num_bytes, np.uint8)
    ready.set()
    release.wait(20)
    del block


def test_peak_memory_counts_children_and_keeps_the_peak_after_they_are_gone():
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    size = 200_000_000
    with PeakMemory(interval_s=0.05) as memory:
        before = memory.sample()
        child = context.Process(target=_hold, args=(size, ready, release))
        child.start()
        assert ready.wait(20)
        time.sleep(0.3)
        release.set()
        child.join()
        after = memory.sample()
    assert memory.peak_bytes - before > 0.9 * size
    assert after - before < 0.5 * size


def test_memory_shared_by_two_processes_counts_once():
    context = multiprocessing.get_context("fork")
    block = np.ones(300_000_000, np.uint8)
    ready, release = context.Event(), context.Event()
    alone = PeakMemory().sample()
    child = context.Process(target=_hold, args=(1, ready, release))
    child.start()
    assert ready.wait(20)
    together = PeakMemory().sample()
    release.set()
    child.join()
    assert together - alone < 0.3 * block.nbytes


def test_peak_of_an_interrupted_run_is_kept():
    with PeakMemory(initial_peak_bytes=10**15) as memory:
        pass
    assert memory.peak_bytes == 10**15
