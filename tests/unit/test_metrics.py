import logging
import time

import numpy as np
import pytest

from tests.fake_episodes import QUIET, TASKS, make_task, make_trajectory
from vlarl_ray.config import MetricsConfig
from vlarl_ray.metrics import (
    METRICS,
    Metric,
    MetricsLogger,
    ProgressSink,
    Timer,
    WandbSink,
    describe_metric,
    is_timing_metric,
    read_jsonl,
    summarize_rollout,
)
from vlarl_ray.metrics.episodes import EpisodeTable, read_episodes
from vlarl_ray.types import EpisodeTiming


def no_hash(task):
    return f"{task.task_id}-{task.init_state_id}"


# -- timer


def test_timer_adds_up_repeated_sections_and_counts_nested_ones_in_both():
    timer = Timer()
    with timer("update"):
        for _ in range(2):
            with timer("rollout"):
                time.sleep(0.02)
    times = timer.flush()
    assert times["time/rollout_s"] >= 0.04
    assert times["time/update_s"] >= times["time/rollout_s"]


def test_timer_counts_a_section_inside_itself_once():
    timer = Timer()
    with timer("learn"), timer("learn"):
        time.sleep(0.02)
    assert 0.02 <= timer.flush()["time/learn_s"] < 0.04


def test_timer_separates_waiting_from_working():
    timer = Timer()
    with timer("rollout"):
        time.sleep(0.1)
    with timer("learn"):
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    times = timer.flush()
    assert times["time/rollout_driver_cpu_s"] < 0.05 <= times["time/learn_driver_cpu_s"]


def test_timer_keeps_a_section_that_raised_and_starts_over_after_flush():
    timer = Timer()
    with pytest.raises(RuntimeError), timer("rollout"):
        raise RuntimeError
    assert set(timer.flush()) == {"time/rollout_s", "time/rollout_driver_cpu_s"}
    assert timer.flush() == {}


# -- catalogue


def test_catalogue_holds_everything_a_report_of_a_training_run_needs():
    # algorithms.md, feature 64
    required = [
        "learn/clip_fraction", "learn/approx_kl", "learn/ratio_max", "learn/entropy", "learn/explained_variance",
        "rollout/accept_rate", "rollout/success_rate", "rollout/episode_env_steps", "time/physics_cpu_s",
        "time/render_cpu_s", "time/inference_cpu_s", "time/learn_s", "time/publish_s", "time/rollout_s", "time/gpu_s",
        "throughput/env_steps_per_s",
    ]  # fmt: skip
    assert [name for name in required if name not in METRICS] == []
    assert all(metric.unit and metric.meaning.endswith(".") for metric in METRICS.values())


def test_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'learn/approx_kl'"):
        describe_metric("learn/aprox_kl")
    with pytest.raises(ValueError, match="not in the catalogue"):
        describe_metric("learn/approx_kl/drawer-close-v3")


def test_metric_of_a_plug_in_needs_an_entry_of_its_own():
    extra = {"learn/cloning_loss": Metric("nats", "Behaviour cloning loss.")}
    assert describe_metric("learn/cloning_loss", extra=extra).unit == "nats"


# -- rollout summary


def test_rollout_summary_counts_every_attempted_episode():
    episodes = [
        make_trajectory(make_task(TASKS[0]), first_success=10),
        make_trajectory(make_task(TASKS[0])),
        make_trajectory(make_task(TASKS[1]), first_success=12),
        make_trajectory(make_task(TASKS[1]), first_success=14),
    ]
    metrics = summarize_rollout(episodes, wall_s=2.0)
    assert metrics["rollout/success_rate"] == 0.75
    assert metrics[f"rollout/success_rate/{TASKS[0]}"] == 0.5
    assert metrics["rollout/env_steps"] == 10 + 20 + 12 + 14
    assert metrics["rollout/num_decisions"] == 2 + 4 + 3 + 3
    assert metrics["rollout/steps_to_success"] == 12.0
    assert metrics["rollout/steps_to_success_all"] == 14.0
    assert metrics["rollout/episode_return"] == 0.75
    assert metrics["rollout/truncated_fraction"] == 0.25
    assert metrics["throughput/env_steps_per_s"] == 28.0
    assert metrics["time/render_cpu_ms_per_decision"] == pytest.approx(1e3 * 4 * 0.03 / 12)


def test_rollout_summary_logs_only_catalogued_names():
    for name in summarize_rollout([make_trajectory()], wall_s=1.0):
        describe_metric(name)


def test_rollout_without_a_success_has_no_steps_to_success():
    assert summarize_rollout([make_trajectory()], wall_s=1.0)["rollout/steps_to_success"] is None


def test_rollout_without_episodes_is_refused():
    with pytest.raises(ValueError, match="got 0 episodes"):
        summarize_rollout([], wall_s=1.0)


def test_equal_episodes_give_equal_rows_apart_from_timing(tmp_path):
    rows = []
    for index, speed in enumerate((1.0, 3.0)):
        log = MetricsLogger(tmp_path / str(index), QUIET)
        timer = Timer()
        with timer("rollout"):
            time.sleep(0.01 * speed)
        episode = make_trajectory(first_success=7, timing=EpisodeTiming(speed, speed, speed, speed))
        parts = [summarize_rollout([episode], wall_s=speed), timer.flush()]
        log.log(*(parts if index else parts[::-1]), iteration=0, version=1)
        log.close()
        rows += read_jsonl(tmp_path / str(index) / "metrics.jsonl")
    untimed = [{name: value for name, value in row.items() if not is_timing_metric(name)} for row in rows]
    assert untimed[0] == untimed[1]
    assert rows[0] != rows[1]
    assert list(rows[0]) == list(rows[1]), "the order of the fields is fixed too"


# -- logger


def test_row_is_readable_at_once_and_holds_null_where_a_metric_is_undefined(tmp_path):
    log = MetricsLogger(tmp_path, QUIET)
    log.log({"learn/entropy": np.float32(1.5), "learn/explained_variance": None}, iteration=3, version=2)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"iteration": 3, "version": 2, "learn/entropy": 1.5, "learn/explained_variance": None}
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_non_finite_metric_is_an_error_that_names_it_and_writes_nothing(tmp_path, value):
    log = MetricsLogger(tmp_path, QUIET)
    with pytest.raises(ValueError, match=r"'learn/entropy' is .* in iteration 4"):
        log.log({"learn/approx_kl": 0.0, "learn/entropy": value}, iteration=4, version=4)
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_metric_from_two_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'learn/entropy' is logged twice"):
        MetricsLogger(tmp_path, QUIET).log({"learn/entropy": 1.0}, {"learn/entropy": 2.0}, iteration=0, version=0)


def test_resume_drops_rows_written_after_the_commit(tmp_path):
    log = MetricsLogger(tmp_path, QUIET)
    log.log({"learn/entropy": 1.0}, iteration=0, version=1)
    offsets = log.offsets()
    log.log({"learn/entropy": 2.0}, iteration=1, version=2)
    resumed = MetricsLogger(tmp_path, QUIET, resume_from=offsets)
    resumed.log({"learn/entropy": 3.0}, iteration=1, version=2)
    assert [row["learn/entropy"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1.0, 3.0]


def test_resume_refuses_a_file_shorter_than_the_commit(tmp_path):
    with pytest.raises(ValueError, match="fewer than the 10 of the checkpoint"):
        MetricsLogger(tmp_path, QUIET, resume_from={"metrics.jsonl": 10, "evaluations.jsonl": 0})


def test_row_torn_by_a_kill_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "version": 1}\n{"iteration": 1, "ver')
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
    log = MetricsLogger(tmp_path, QUIET)
    log.log({"learn/entropy": 1.0}, iteration=1, version=2)
    assert [row["iteration"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_one_info_line_per_update(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = MetricsLogger(tmp_path, QUIET)
    log.log(summarize_rollout([make_trajectory()], 2.0), {"learn/approx_kl": 0.0123}, iteration=5, version=6)
    (record,) = [r for r in caplog.records if r.name.startswith("vlarl_ray.metrics")]
    assert record.getMessage().startswith("iteration 5, version 6: success 0.00, env steps/s 10, kl 0.0123")


class ListSink:
    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, row, *, step):
        self.rows.append((step, dict(row)))

    def close(self):
        self.closed = True


def test_sinks_hear_defined_metrics_of_updates_and_evaluations(tmp_path):
    sink = ListSink()
    log = MetricsLogger(tmp_path, QUIET, sinks=[sink])
    log.log({"learn/entropy": 1.0, "learn/explained_variance": None}, iteration=0, version=1)
    record = {"success_rate": 0.5, "ci_low": 0.2, "ci_high": 0.8, "episodes": 4}
    log.log_evaluation(record, {"eval/success_rate": 0.5}, label="final", iteration=1, version=1)
    log.close()
    assert sink.rows == [(0, {"learn/entropy": 1.0}), (1, {"eval/success_rate": 0.5})]
    assert sink.closed
    assert read_jsonl(tmp_path / "evaluations.jsonl") == [{"label": "final", "iteration": 1, "version": 1, **record}]


def test_tensorboard_reads_back_what_was_logged_and_hides_what_a_resume_dropped(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = MetricsConfig(tensorboard=True, progress=False)
    log = MetricsLogger(tmp_path, settings)
    for iteration, entropy in enumerate((3.0, 2.0, 1.0)):
        offsets = log.offsets() if iteration == 2 else None
        log.log({"learn/entropy": entropy}, iteration=iteration, version=iteration + 1)
    log.close()
    time.sleep(1.1)  # event files are named by the second and read in that order
    resumed = MetricsLogger(tmp_path, settings, resume_from=offsets)
    resumed.log({"learn/entropy": 1.5}, iteration=2, version=3)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("learn/entropy")] == [(0, 3.0), (1, 2.0), (2, 1.5)]


def test_progress_bar_follows_iterations_and_ignores_evaluations(capsys):
    bar = ProgressSink(10, force=True)
    bar.write({"rollout/success_rate": 0.25}, step=4)
    bar.write({"eval/success_rate": 0.9}, step=5)
    bar.close()
    drawn = capsys.readouterr().err
    assert "5/10" in drawn
    assert "success 0.25" in drawn
    assert "6/10" not in drawn


def test_wandb_without_the_package_says_what_to_install(tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"metrics.wandb_project = 'lab'.*pip install"):
            WandbSink("lab", tmp_path)
    else:
        pytest.skip("wandb is installed, so its absence cannot be tried")


# -- episodes


def episodes(start, count, **changes):
    return [make_trajectory(make_task(slot=start + i), first_success=5 + i % 3, **changes) for i in range(count)]


def slots(run_dir):
    return read_episodes(run_dir).column("slot").to_pylist()


def test_episode_row_says_what_happened(tmp_path):
    table = EpisodeTable(tmp_path)
    task = make_task(split="eval", init_state_id=7, temperature=0.0, policy_version=3)
    table.append([make_trajectory(task, first_success=12), make_trajectory(task)], no_hash)
    table.close()
    success, failure = read_episodes(tmp_path).to_pylist()
    assert success["init_hash"] == "drawer-close-v3-7"
    assert success["seed"] == 2**63 + 5
    assert (success["split"], success["temperature"], success["policy_version"]) == ("eval", 0.0, 3)
    assert (success["success"], success["first_success_env_step"], success["env_steps"]) == (True, 12, 12)
    assert (success["return"], success["worker"], success["num_decisions"]) == (1.0, 1, 3)
    assert (failure["success"], failure["first_success_env_step"], failure["truncated"]) == (False, None, True)


def test_every_episode_is_readable_after_each_append_without_closing(tmp_path):
    table = EpisodeTable(tmp_path)
    for batch in range(40):
        table.append(episodes(3 * batch, 3), no_hash)
        assert slots(tmp_path) == list(range(3 * batch + 3))
    assert EpisodeTable(tmp_path).num_rows == 120


def test_kill_between_folding_and_removing_parts_counts_no_episode_twice(tmp_path):
    table = EpisodeTable(tmp_path)
    for start, count in ((0, 80), (80, 4), (84, 4)):
        table.append(episodes(start, count), no_hash)
    part, _ = sorted((tmp_path / "episodes.parts").glob("*.parquet"))
    content = part.read_bytes()
    table.fold()
    part.write_bytes(content)
    (tmp_path / "episodes.parquet.tmp").write_bytes(b"half a file")
    assert slots(tmp_path) == list(range(88))
    reopened = EpisodeTable(tmp_path)
    reopened.append(episodes(88, 1), no_hash)
    assert slots(tmp_path) == list(range(89))
    reopened.close()
    assert slots(tmp_path) == list(range(89))
    assert not (tmp_path / "episodes.parquet.tmp").exists()
    assert list((tmp_path / "episodes.parts").iterdir()) == []


def test_kill_in_the_middle_of_a_resume_counts_no_episode_twice(tmp_path):
    table = EpisodeTable(tmp_path)
    table.append(episodes(0, 80), no_hash)
    table.append(episodes(80, 4), no_hash)
    (part,) = (tmp_path / "episodes.parts").glob("*.parquet")
    content = part.read_bytes()
    table.truncate_to(82)
    part.write_bytes(content)
    assert slots(tmp_path) == list(range(84))
    assert EpisodeTable(tmp_path, resume_from=82).num_rows == len(slots(tmp_path)) == 82


@pytest.mark.parametrize("kept", [0, 50, 80, 82, 84])
def test_resume_drops_episodes_after_the_commit_wherever_it_cuts(tmp_path, kept):
    table = EpisodeTable(tmp_path)
    table.append(episodes(0, 80), no_hash)
    table.append(episodes(80, 4), no_hash)
    resumed = EpisodeTable(tmp_path, resume_from=kept)
    assert resumed.num_rows == kept
    resumed.append(episodes(kept, 2), no_hash)
    assert slots(tmp_path) == list(range(kept + 2))


def test_resume_refuses_a_table_shorter_than_the_commit(tmp_path):
    with pytest.raises(ValueError, match="fewer than the 5 of the checkpoint"):
        EpisodeTable(tmp_path, resume_from=5)


def test_missing_part_is_an_error_not_a_gap(tmp_path):
    table = EpisodeTable(tmp_path)
    table.append(episodes(0, 80), no_hash)
    table.append(episodes(80, 4), no_hash)
    table.append(episodes(84, 4), no_hash)
    sorted((tmp_path / "episodes.parts").glob("*.parquet"))[0].unlink()
    with pytest.raises(ValueError, match="episodes 80 to 84 are missing"):
        read_episodes(tmp_path)
