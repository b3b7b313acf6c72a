"""`vlarl doctor`: a check that fails says how to mend what it found."""

import os

import pytest

from vlarl_ray.cli import main
from vlarl_ray.config_loader import load_config
from vlarl_ray.doctor import (
    check_disk,
    check_memory,
    check_shared_memory,
    check_suite,
    check_token,
    check_version,
    plan_of,
)
from vlarl_ray.memory_plan import MemoryPart, MemoryPlan


def test_pinned_versions_are_found_and_match():
    assert check_version("ray").ok
    assert check_version("torch").ok


def test_too_little_room_fails_with_a_fix(tmp_path):
    assert check_disk(str(tmp_path / "not" / "yet"), wanted_bytes=1).ok
    finding = check_disk(str(tmp_path), wanted_bytes=1 << 60)
    assert not finding.ok
    assert "--run-dir" in finding.fix
    assert str(finding).startswith("FAIL  disk")
    assert "fix: " in str(finding)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_dir_that_cannot_be_written_fails(tmp_path):
    tmp_path.chmod(0o500)
    assert not check_disk(str(tmp_path / "run")).ok


def test_shared_memory_below_the_object_store_fails_with_a_fix(tmp_path):
    assert check_shared_memory(str(tmp_path), wanted_bytes=1).ok
    assert "--shm-size" in check_shared_memory(str(tmp_path), wanted_bytes=1 << 60).fix
    assert not check_shared_memory(str(tmp_path / "missing")).ok


@pytest.mark.parametrize(("mode", "ok"), [(0o600, True), (0o400, True), (0o644, False), (0o660, False)])
def test_a_token_that_others_can_read_fails(tmp_path, mode, ok):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(mode)
    finding = check_token({"RAY_AUTH_TOKEN_PATH": str(token)})
    assert finding.ok == ok
    assert ok or finding.fix == f"chmod 600 {token}"
    assert "secret" not in str(finding)


def test_a_cluster_without_token_authentication_fails(tmp_path):
    environ = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    assert check_token(environ).ok
    assert not check_token({**environ, "RAY_ADDRESS": "10.0.0.1:6379"}).ok


def test_a_preset_is_planned_for_and_what_does_not_fit_says_what_to_lower(tmp_path):
    job = load_config("jobs/toy.yaml", ["--run_dir", str(tmp_path)])
    plan = plan_of(job)
    assert check_memory(job, plan).ok
    assert plan.table.count("\n") == 10  # two processes with six parts and three
    huge = MemoryPlan((MemoryPart("learner rank", "activations", 2**50),))
    finding = check_memory(job, huge)
    assert not finding.ok
    assert "learner.micro_batch_size" in finding.fix


def test_a_libero_preset_is_planned_for_without_weights_or_simulator(tmp_path, monkeypatch):
    small = [word for name in ("num_layers", "dino.depth", "siglip.depth") for word in (f"--model.{name}", "2")]
    job = load_config("jobs/libero_goal_ript_oft.yaml", small)
    plan = plan_of(job)
    assert plan.total("learner rank") > plan.total("inference server") / 4 > 2**28
    assert check_suite(load_config("jobs/toy.yaml", [])) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    finding = check_suite(job)
    assert (finding.ok, finding.name) == (False, "LIBERO")
    assert finding.fix.startswith("run pip install --no-deps")
    (tmp_path / "libero" / "bddl_files").mkdir(parents=True)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert "name the folder with env.assets" in check_suite(job).fix
    for name in ("scenes", "stable_scanned_objects", "turbosquid_objects", "articulated_objects"):
        (tmp_path / "libero" / "assets" / name).mkdir(parents=True)
    assert check_suite(job).ok


def test_doctor_takes_a_preset_and_overrides(capsys, tmp_path):
    words = ["doctor", "--preset", "jobs/toy.yaml", "--learner.micro_batch_size", "64", "--run-dir", str(tmp_path)]
    main(words)
    printed = capsys.readouterr().out
    assert "inference server" in printed
    assert main([*words[:2], "jobs/none.yaml"]) == 2
