"""A whole run on Ray whose policy is served by vLLM; in each iteration the server is lost, each time otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import psutil
import pytest

pytest.importorskip("vllm")

import ray

from tests.e2e.toy_run import evaluations, numbers, summary
from vlarl_ray import train
from vlarl_ray.config_loader import load_config
from vlarl_ray.launch import run_training

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # two minutes on two cores: vLLM starts four times


class Saboteur:
    """Loses the run's server while requests wait for it, in each iteration in another way."""

    def __init__(self) -> None:
        self.faults = iter((self.kill_server, self.kill_engine, self.hang_engine))
        self.background = ThreadPoolExecutor(1)
        self.done: list[Future[None]] = []
        self.processes: list[psutil.Process] = []
        """Server and engine of each life."""
        self.survivors: list[psutil.Process] = []
        """What was still there of a lost server when its successor had answered all of an iteration."""

    def strike(self) -> None:
        """Stop vLLM's process before the first request of an iteration, and do the next harm when requests wait."""
        self.survivors += [process for process in self.processes if _is_alive(process)]
        actor = ray.get_actor("inference-server-0")
        server = psutil.Process(ray.get(actor.describe.remote(), timeout=60)["pid"])
        [engine] = [child for child in server.children() if "EngineCore" in " ".join(child.cmdline())]
        self.processes += [server, engine]
        engine.suspend()
        self.done.append(self.background.submit(self.harm, next(self.faults), actor, server, engine))

    def harm(self, fault: Callable[..., None], actor: Any, server: psutil.Process, engine: psutil.Process) -> None:
        while not ray.get(actor.rows_in_flight.remote(), timeout=60):
            time.sleep(0.02)
        fault(server, engine)

    def kill_server(self, server: psutil.Process, engine: psutil.Process) -> None:
        server.kill()  # its engine, which is stopped, can do nothing about it

    def kill_engine(self, server: psutil.Process, engine: psutil.Process) -> None:
        engine.kill()

    def hang_engine(self, server: psutil.Process, engine: psutil.Process) -> None:
        pass  # it does already


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    overrides = ["--run_dir", str(run_dir), "--num_iterations", "3", "--inference.deadline_s", "20"]
    saboteur = Saboteur()

    def roll_out(unharmed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        saboteur.strike()
        return unharmed(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(train, "roll_out", partial(roll_out, train.roll_out))
        cfg = load_config("jobs/smoke_vllm.yaml", [*overrides, "--metrics.progress", "false"])
        assert run_training(cfg, inline=False, resume=False) == 0
    for harm in saboteur.done:
        harm.result(timeout=0)
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
