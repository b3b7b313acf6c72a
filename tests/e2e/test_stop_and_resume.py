"""A training process that is asked to stop, or killed, and resumed: nothing is lost, and nothing is different."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.toy_run import evaluations, numbers, summary
from vlarl_ray.checkpoint import load_latest

ROOT = Path(__file__).parents[2]
WORDS = ("train", "jobs/toy.yaml", "--inline", "--num_iterations", "30", "--metrics.progress", "false")


def vlarl(run_dir, *more):
    command = [str(Path(sys.executable).parent / "vlarl"), *WORDS, "--run-dir", str(run_dir), *more]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_rows(run_dir, count):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{run_dir} has no {count} rows")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    assert vlarl(run_dir).wait() == 0
    return run_dir


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_it_goes_on_where_it_was(whole, tmp_path, number, code):
    process = vlarl(tmp_path, "--checkpoint.every_updates", "7")
    wait_for_rows(tmp_path, 10)
    process.send_signal(number)
    assert process.wait() == code
    done = len(numbers(tmp_path))
    checkpoint = load_latest(str(tmp_path))
    assert checkpoint is not None
    if number != signal.SIGKILL:  # a wish to stop is granted after the iteration, with a checkpoint
        assert checkpoint.state["iteration"] == done == summary(tmp_path)["iterations"] < 30
        assert summary(tmp_path)["final"] is None
    assert vlarl(tmp_path, "--checkpoint.every_updates", "7", "--resume").wait() == 0
    assert numbers(tmp_path) == numbers(whole)
    assert [(e["label"], e["success_rate"]) for e in evaluations(tmp_path)] == [
        (e["label"], e["success_rate"]) for e in evaluations(whole)
    ]
    assert summary(tmp_path)["planned_iterations"] == summary(tmp_path)["iterations"] == 30


@pytest.mark.parametrize("budget", [("--max_rl_seconds", "0.01"), ("--max_rl_env_steps", "100")])
def test_a_run_that_has_used_its_budget_ends_and_says_so(tmp_path, budget):
    assert vlarl(tmp_path, *budget).wait() == 0
    assert (summary(tmp_path)["iterations"], summary(tmp_path)["planned_iterations"]) == (1, 30)
    assert "1 of 30 planned iterations" in (tmp_path / "report.html").read_text()
