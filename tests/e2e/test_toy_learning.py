"""F73, F76: every algorithm learns the 2-D reach task from seed 0, and shuffled rewards do not.

Five seeds, self-cloning against PPO alone (F74) and an impossible task (F75): python -m benchmarks.toy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.toy import PRESET, VARIANTS
from tests.e2e.toy_run import evaluations

ROOT = Path(__file__).parents[2]


def run(run_dir: Path, variant: str) -> tuple[dict, dict]:
    """Evaluations of 200 held-out states before and after RL, as the command line gives them."""
    words = [PRESET, "--inline", "--run-dir", run_dir, "--metrics.progress", "false", *VARIANTS[variant]]
    vlarl = Path(sys.executable).parent / "vlarl"
    subprocess.run(
        [str(vlarl), "train", *map(str, words)], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    before, after = evaluations(run_dir)
    assert (before["label"], after["label"]) == ("warm_start", "final")
    assert before["episodes"] == after["episodes"] == 200
    assert before["temperature"] == after["temperature"] == 1.0
    return before, after


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo", "chunk_ppo"])
def test_it_goes_from_one_success_in_three_to_nine_in_ten_f73(tmp_path, algorithm):
    before, after = run(tmp_path, algorithm)
    assert before["success_rate"] <= 0.4
    assert after["success_rate"] >= 0.9
    assert after["steps_to_success"] < before["steps_to_success"]


def test_shuffled_rewards_do_not_raise_success_f76(tmp_path):
    before, after = run(tmp_path, "shuffled")
    assert after["ci_low"] <= before["ci_high"]
