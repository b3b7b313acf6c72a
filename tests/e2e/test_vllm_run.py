"""A whole run on Ray whose policy is served by vLLM."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.e2e.toy_run import evaluations, numbers, summary
from vlarl_ray.config_loader import load_config
from vlarl_ray.launch import run_training

pytestmark = pytest.mark.ray


def test_a_policy_learns_from_what_vllm_sampled(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cfg = load_config("jobs/smoke_vllm.yaml", ["--run_dir", str(tmp_path), "--metrics.progress", "false"])
    assert run_training(cfg, inline=False, resume=False) == 0
    first, second = numbers(tmp_path)
    assert (first["version"], second["version"]) == (1, 2)
    for row in (first, second):
        assert row["learn/sampler_ratio_max_error"] < 1e-4
        assert row["learn/sampler_ratio_decisions"] > 16
        assert row["canary/max_abs_logprob_diff"] < 1e-4
        assert row["publish/delta_kept"] == pytest.approx(1.0, abs=1e-6)
        assert row["publish/bytes"] < row["publish/model_bytes"]
        assert row["learn/approx_kl"] > 1e-6  # the weights moved, so each publication had something to show
    assert [row["label"] for row in evaluations(tmp_path)] == ["warm_start", "final"]
    assert summary(tmp_path)["final"]["episodes"] == 4
