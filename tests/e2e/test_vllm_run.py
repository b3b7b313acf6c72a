"""A whole run on Ray whose policy is served by vLLM; in each iteration the server is lost, each time otherwise."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm")

import ray
from ray.exceptions import RayError

from tests.e2e.toy_run import evaluations, numbers, summary
from vlarl_ray.config_loader import load_config
from vlarl_ray.launch import run_training

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # a minute on a machine of its own: vLLM starts four times


@dataclass
class Saboteur:
    """Loses the run's server while it answers requests, in each iteration in another way."""

    run_dir: Path
    is_over: threading.Event = field(default_factory=threading.Event)
    processes: list[psutil.Process] = field(default_factory=list)
    """Server and engine of each life."""
    survivors: list[psutil.Process] = field(default_factory=list)
    """What was still there of a lost server when its successor answered."""

    def work(self) -> None:
        for iteration, fault in enumerate((self.kill_server, self.kill_engine, self.hang_engine)):
            server, engine = self.wait_for_rollout(iteration)
            self.survivors += [process for process in self.processes if _is_alive(process)]
            self.processes += [server, engine]
            self.stop_in_a_request(engine)
            fault(server, engine)

    def kill_server(self, server: psutil.Process, engine: psutil.Process) -> None:
        server.kill()  # its engine, which is stopped, can do nothing about it

    def kill_engine(self, server: psutil.Process, engine: psutil.Process) -> None:
        engine.kill()

    def hang_engine(self, server: psutil.Process, engine: psutil.Process) -> None:
        pass  # it does already

    def wait_for_rollout(self, iteration: int) -> tuple[psutil.Process, psutil.Process]:
        """Wait until the server answers requests of an iteration; returns it and vLLM's process."""
        while not self.is_over.wait(0.02):
            try:
                if _rows(self.run_dir, "evaluations") and _rows(self.run_dir, "metrics") == iteration:
                    server = ray.get_actor("inference-server-0")
                    if ray.get(server.health.remote(), timeout=5) == iteration and _rows_in_flight():
                        process = psutil.Process(ray.get(server.describe.remote(), timeout=5)["pid"])
                        [engine] = [child for child in process.children() if "EngineCore" in " ".join(child.cmdline())]
                        return process, engine
            except (RayError, ValueError):  # not there yet, or not again
                pass
        raise RuntimeError(f"the run ended before iteration {iteration}")

    def stop_in_a_request(self, engine: psutil.Process) -> None:
        while not self.is_over.wait(0.02):
            if _rows_in_flight():
                os.kill(engine.pid, signal.SIGSTOP)
                time.sleep(0.5)  # what it answered before has arrived by then
                if _rows_in_flight():
                    return
                os.kill(engine.pid, signal.SIGCONT)


def _rows_in_flight() -> int:
    return ray.get(ray.get_actor("inference-server-0").rows_in_flight.remote(), timeout=5)


def _rows(run_dir: Path, name: str) -> int:
    path = run_dir / f"{name}.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    overrides = ["--run_dir", str(run_dir), "--num_iterations", "3", "--inference.deadline_s", "20"]
    saboteur = Saboteur(run_dir)
    thread = threading.Thread(target=saboteur.work, name="saboteur")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        thread.start()
        try:
            cfg = load_config("jobs/smoke_vllm.yaml", [*overrides, "--metrics.progress", "false"])
            assert run_training(cfg, inline=False, resume=False) == 0
        finally:
            saboteur.is_over.set()
            thread.join()
    return run_dir, saboteur


def test_a_policy_learns_from_what_vllm_sampled(run):
    run_dir, _ = run
    rows = numbers(run_dir)
    assert [row["version"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["learn/sampler_ratio_max_error"] < 1e-4
        assert row["learn/sampler_ratio_decisions"] > 16
        assert row["canary/max_abs_logprob_diff"] < 1e-4
        assert row["publish/delta_kept"] == pytest.approx(1.0, abs=1e-6)
        assert row["publish/bytes"] < row["publish/model_bytes"]
        assert row["learn/approx_kl"] > 1e-6  # the weights moved, so each publication had something to show
    assert [row["label"] for row in evaluations(run_dir)] == ["warm_start", "final"]
    assert summary(run_dir)["final"]["episodes"] == 4


def test_servers_that_were_killed_lost_their_engine_or_hung_are_restarted_and_counted(run):
    run_dir, saboteur = run
    assert [row["publish/server_restarts"] for row in numbers(run_dir)] == [1, 2, 3]
    assert [row["rollout/episodes_redone"] for row in numbers(run_dir)] == [0, 0, 0]
    assert len(saboteur.processes) == 6
    assert len({process.pid for process in saboteur.processes}) == 6
    assert not saboteur.survivors
    assert not [process for process in saboteur.processes if _is_alive(process)]
