"""The same run on Ray: equal numbers, metrics in a scrape, places spread evenly, deaths survived."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections import Counter
from dataclasses import replace

import pytest

ray = pytest.importorskip("ray")

from tests.e2e.toy_run import episodes, numbers, toy_config, with_lag  # noqa: E402
from vlarl_ray.config import ClusterConfig, SamplingConfig  # noqa: E402
from vlarl_ray.launch import run_training  # noqa: E402
from vlarl_ray.metrics.logger import read_jsonl  # noqa: E402
from vlarl_ray.remote.cluster import ClusterTooSmallError, connect, reserve, wanted_resources  # noqa: E402
from vlarl_ray.remote.system import build_remote  # noqa: E402

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(monkeypatch):
    """A local Ray with four fake GPUs."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    context = ray.init(
        address="local", num_cpus=8, num_gpus=4, include_dashboard=False, object_store_memory=128 * 1024 * 1024,
        log_to_driver=False, logging_level="error",
    )  # fmt: skip
    yield context
    ray.shutdown()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("inline")
    run_training(toy_config(run_dir), inline=True, resume=False)
    return run_dir


def test_inline_and_ray_give_equal_numbers(policy, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    inline = toy_config(tmp_path / "inline", policy=str(policy / "policy"))
    run_training(inline, inline=True, resume=False)
    # Two workers and servers here, one there: neither worker, nor order of arrival, nor who answered may matter.
    rollout, inference = replace(inline.rollout, num_workers=2), replace(inline.inference, num_servers=2)
    on_ray = replace(inline, run_dir=str(tmp_path / "ray"), rollout=rollout, inference=inference)
    run_training(on_ray, inline=False, resume=False)
    assert numbers(tmp_path / "inline") == numbers(tmp_path / "ray")
    assert episodes(tmp_path / "inline") == episodes(tmp_path / "ray")
    measured = [read_jsonl(tmp_path / name / "metrics.jsonl")[1]["memory/measured_bytes"] for name in ("inline", "ray")]
    assert measured[0] == measured[1] > 0
    assert not ray.is_initialized()


def test_inline_and_ray_give_equal_numbers_with_dynamic_sampling_and_cancelled_episodes(policy, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    inline = toy_config(tmp_path / "inline", policy=str(policy / "policy"))
    inline = replace(
        inline,
        algorithm=replace(inline.algorithm, name="rloo"),
        rollout=replace(inline.rollout, group_size=4, groups_per_update=2, temperature=2.0),
        sampling=SamplingConfig(dynamic=True),
    )
    run_training(inline, inline=True, resume=False)
    rollout = replace(inline.rollout, num_workers=2, envs_per_worker=8)  # room to run ahead
    on_ray = replace(inline, run_dir=str(tmp_path / "ray"), rollout=rollout)
    run_training(on_ray, inline=False, resume=False)
    assert numbers(tmp_path / "inline") == numbers(tmp_path / "ray")
    assert episodes(tmp_path / "inline") == episodes(tmp_path / "ray")


def test_at_lag_1_the_next_rollout_runs_while_the_learner_learns_f45(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cfg = with_lag(toy_config(tmp_path, num_iterations=4))
    cfg = replace(cfg, env=replace(cfg.env, suite="tests.slow_toy:SlowToySuite"))
    assert run_training(cfg, inline=False, resume=False) == 0
    rows = numbers(tmp_path)
    assert [row["version"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["learn/policy_age_max"] == 0
    assert {row["learn/policy_age_max"] for row in rows[1:]} == {1}
    # weights arrive in the middle of a rollout: some of its decisions are by the old ones, some by the new
    assert any(0 < row["learn/policy_age_mean"] < 1 for row in rows[1:])
    assert all((row["learn/sampler_ratio_max_error"] or 0.0) <= 1e-4 for row in rows)
    assert len([row for row in episodes(tmp_path) if row["split"] == "train"]) == 4 * 8


def test_env_workers_share_the_gpus_of_the_servers_evenly(cluster, policy, tmp_path):
    cfg = toy_config(tmp_path)
    cfg = replace(
        cfg,
        rollout=replace(cfg.rollout, num_workers=6, envs_per_worker=2),
        inference=replace(cfg.inference, num_servers=3, device="cpu"),
        learner=replace(cfg.learner, device="cpu"),
        cluster=ClusterConfig(gpus_per_server=0.5, gpus_per_worker=0.1, gpus_per_rank=1.0),
    )
    remote = build_remote(cfg, str(policy / "policy"))
    try:
        workers = ray.get([worker.describe.remote() for worker in remote.workers])
        servers = ray.get([server.describe.remote() for server in remote.servers])
        ranks = ray.get([rank.describe.remote() for rank in remote.ranks])
    finally:
        remote.close()
    assert sorted(Counter(w["gpu_ids"][0] for w in workers).values()) == [2, 2, 2]
    assert len({s["gpu_ids"][0] for s in servers}) == 3
    for index, worker in enumerate(workers):
        assert worker["gpu_ids"] == servers[index % 3]["gpu_ids"]  # renders where its server infers
    assert ranks[0]["gpu_ids"][0] not in {s["gpu_ids"][0] for s in servers}


def test_a_cluster_too_small_is_refused_before_anything_starts_or_is_written(cluster, tmp_path, monkeypatch):
    cfg = toy_config(tmp_path / "run", cluster=ClusterConfig(cpus_per_worker=100.0, gpus_per_rank=5.0))
    assert wanted_resources(cfg) == {"CPU": 100.5, "GPU": 5.0}
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: None)  # the cluster of the fixture is joined already
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(ClusterTooSmallError, match=r"CPU: 100.5 wanted, 8 there.*GPU: 5 wanted, 4 there"):
        run_training(cfg, inline=False, resume=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()


def test_waiting_for_nodes_that_nothing_would_add_is_refused_before_ray_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cfg = toy_config(tmp_path / "run")
    with pytest.raises(ValueError, match="a locally started Ray has no autoscaler"):
        connect(replace(cfg, cluster=replace(cfg.cluster, elastic=True)))
    assert not ray.is_initialized()


def test_places_that_do_not_come_are_an_error_and_not_a_hang(cluster, tmp_path):
    cfg = toy_config(tmp_path, cluster=ClusterConfig(gpus_per_rank=3.0, gpus_per_server=2.0, placement_timeout_s=1.0))
    with pytest.raises(ClusterTooSmallError, match=r"within cluster.placement_timeout_s = 1 s"):
        reserve(cfg)
    deadline = time.monotonic() + 20
    while ray.available_resources().get("GPU", 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["GPU"] == 4  # nothing stays reserved


def test_a_killed_env_worker_costs_its_episodes_a_repetition(cluster, policy, tmp_path):
    from vlarl_ray.envs import make_suite
    from vlarl_ray.rollout.ledger import RolloutLedger
    from vlarl_ray.rollout.tasks import TaskSampler
    from vlarl_ray.transport import Transport

    cfg = toy_config(tmp_path, policy=str(policy / "policy"))
    cfg = replace(cfg, rollout=replace(cfg.rollout, num_workers=2, groups_per_update=40))
    remote = build_remote(cfg, cfg.policy)
    try:
        assert isinstance(remote.transport, Transport)
        update = remote.transport.call(remote.ranks[0], "weight_update", 0)
        remote.transport.get([s.load.remote(update) for s in remote.servers], timeout_s=60.0, what="loading")
        tasks = TaskSampler(make_suite(cfg.env), cfg, run_id="kill").training_tasks(0, version=0)
        ledger = RolloutLedger(remote.pool, max_attempts=3)
        undisturbed = ledger.run(tasks)
        victim = ray.get(remote.workers[0].describe.remote())["pid"]
        killed = []

        def kill_once(trajectory):
            if not killed:
                killed.append(victim)
                os.kill(victim, signal.SIGKILL)

        ledger.on_episode = kill_once
        disturbed = ledger.run([replace(task, run_id="again") for task in tasks])
    finally:
        remote.close()
    assert ledger.counters.redone >= 1
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert (before.tokens == after.tokens).all()
        assert before.rewards.tolist() == after.rewards.tolist()


def test_a_server_that_dies_or_hangs_is_restarted_with_its_weights_and_no_episode_is_lost(cluster, policy, tmp_path):
    from vlarl_ray.envs import make_suite
    from vlarl_ray.launch import Processes, build_system
    from vlarl_ray.rollout.tasks import TaskSampler

    cfg = toy_config(tmp_path, policy=str(policy / "policy"))
    inference = replace(cfg.inference, deadline_s=8.0)
    cfg = replace(cfg, inference=inference, rollout=replace(cfg.rollout, groups_per_update=40))
    remote = build_remote(cfg, cfg.policy)
    try:
        where = Processes(remote.pool, remote.servers, remote.ranks, remote.transport, [], [], remote.keeper)
        system = build_system(cfg, make_suite(cfg.env), where, recorder=None)
        assert system.weights.publish(0)["publish/server_restarts"] == 0
        tasks = TaskSampler(make_suite(cfg.env), cfg, run_id="kill").training_tasks(0, version=0)
        undisturbed = system.ledger.run(tasks)
        signals = [signal.SIGKILL]

        def disturb(_trajectory):
            if signals:
                os.kill(ray.get(remote.servers[0].describe.remote())["pid"], signals.pop())

        system.ledger.on_episode = disturb
        disturbed = system.ledger.run([replace(task, run_id="again") for task in tasks])
        assert remote.keeper.restarts == 1
        assert system.ledger.counters.redone == 0
        os.kill(ray.get(remote.servers[0].describe.remote())["pid"], signal.SIGSTOP)
        assert system.weights.publish(1)["publish/server_restarts"] == 2
        assert ray.get(remote.servers[0].health.remote()) == 1
    finally:
        remote.close()
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert (before.tokens == after.tokens).all()
        assert before.behaviour_logprobs.tolist() == after.behaviour_logprobs.tolist()


def test_weights_that_are_broadcast_reach_a_server_that_was_killed_too(cluster, policy, tmp_path):
    from vlarl_ray.envs import make_suite
    from vlarl_ray.launch import Processes, build_system

    cfg = toy_config(tmp_path, policy=str(policy / "policy"))
    inference = replace(cfg.inference, num_servers=2, weight_transport="gloo", deadline_s=20.0)
    cfg = replace(cfg, inference=inference, learner=replace(cfg.learner, num_ranks=2))
    remote = build_remote(cfg, cfg.policy)
    try:
        where = Processes(remote.pool, remote.servers, remote.ranks, remote.transport, [], [], remote.keeper)
        system = build_system(cfg, make_suite(cfg.env), where, recorder=None)
        for version in (0, 1):
            metrics = system.weights.publish(version)
            assert metrics["publish/fallbacks"] == 0
            assert metrics["publish/bytes"] > 0
        os.kill(ray.get(remote.servers[0].describe.remote())["pid"], signal.SIGKILL)
        broken = system.weights.publish(2)
        assert broken["publish/server_restarts"] == 1
        mended = system.weights.publish(3)  # by a group with the new server
        assert mended["publish/fallbacks"] == broken["publish/fallbacks"]
        assert [ray.get(server.health.remote()) for server in remote.servers] == [3, 3]
    finally:
        remote.close()


def test_metrics_are_seen_in_a_scrape_of_the_node(cluster):
    from vlarl_ray.remote.metrics_sink import RayMetricsSink

    RayMetricsSink("scraped-run").write({"rollout/success_rate": 0.625, "learn/approx_kl": None}, step=0)
    [node] = [n for n in ray.nodes() if n["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, found = time.monotonic() + 60, ""
    while not found and time.monotonic() < deadline:
        time.sleep(1)
        lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
        found = next((line for line in lines if line.startswith("ray_vlarl_rollout_success_rate{")), "")
    assert 'run="scraped-run"' in found
    assert found.endswith(" 0.625")
