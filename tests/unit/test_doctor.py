"""`vlarl doctor`: a check that fails says how to mend what it found."""

import os

import pytest

from vlarl_ray.doctor import check_disk, check_shared_memory, check_token, check_version


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
