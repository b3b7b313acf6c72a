"""`ray job submit` against a local head with token authentication runs the smoke preset."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.sim, pytest.mark.timeout(400)]
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def head(tmp_path):
    """A head of its own, in its own process group, that wants a token."""
    token = tmp_path / "token"
    token.write_text("a-token-of-the-test-0123456789abcdef")
    token.chmod(0o600)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    gcs, dashboard = free_port(), free_port()
    # The path of Ray's sockets is limited to 107 bytes, which a folder of pytest's may exceed.
    folder = Path("/tmp") / f"vlarl-head-{os.getpid()}"
    command = [
        BIN / "ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=4",
        f"--temp-dir={folder}", "--object-store-memory=1100000000", "--disable-usage-stats",
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    yield f"http://127.0.0.1:{dashboard}", environment
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status(url: str) -> int:
    try:
        return urllib.request.urlopen(f"{url}/api/jobs/", timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def submit(address: str, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Submit and follow; a head that is not ready yet answers 500 for some seconds."""
    command = [BIN / "ray", "job", "submit", f"--address={address}", f"--working-dir={REPOSITORY}", "--", *words]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def test_a_submitted_run_joins_the_cluster_and_needs_its_token(head, tmp_path):
    address, environment = head
    deadline = time.monotonic() + 60
    while status(address) == 0 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert status(address) == 401  # without the token

    relative = submit(address, environment, BIN / "vlarl", "train", "jobs/smoke.yaml", "--run-dir", "runs/lost")
    assert relative.returncode != 0
    assert "absolute" in relative.stdout + relative.stderr

    run_dir = tmp_path / "run"
    done = submit(address, environment, BIN / "vlarl", "train", "jobs/smoke.yaml", "--run-dir", run_dir)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["final"]["episodes"] == 2
