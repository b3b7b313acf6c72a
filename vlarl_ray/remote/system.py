"""Build the distributed parts of a run as Ray actors, and take them down."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.remote.actors import EnvWorkerActor, InferenceServerActor, LearnerRankActor
from vlarl_ray.remote.cluster import Places, reserve
from vlarl_ray.remote.keeper import ServerKeeper, longest_start_s
from vlarl_ray.remote.pool import RayPool
from vlarl_ray.remote.transport import RayTransport

_LOG = logging.getLogger(__name__)


@dataclass
class RemoteSystem:
    """Handles of every actor of a run."""

    pool: RayPool
    servers: list[Any]
    ranks: list[Any]
    workers: list[Any]
    transport: RayTransport
    places: Places
    keeper: ServerKeeper

    def process_ids(self) -> list[int]:
        """Process ids of all actors on this machine (for the memory figure)."""
        calls = [actor.describe.remote() for actor in (*self.workers, *self.servers, *self.ranks)]
        return [answer["pid"] for answer in ray.get(calls, timeout=120)]

    def close(self) -> None:
        """End all actors and give their places back."""
        for actor in (*self.workers, *self.servers):
            ray.kill(actor)
        for rank in self.ranks:
            # Killed rather than asked: a rank that shares a gloo group may abort at interpreter exit.
            ray.kill(rank)
        self.places.release()


def build_remote(cfg: ExperimentConfig, policy_dir: str) -> RemoteSystem:
    """Reserve places, start the actors and connect them.

    Raises:
        ClusterTooSmallError: If there is no room; nothing is left running.
        RuntimeError: If an actor does not start.
    """
    places = reserve(cfg)
    cluster = cfg.cluster
    # workers get names: handles would not survive a restart
    names = [f"inference-server-{index}" for index in range(cfg.inference.num_servers)]
    servers = [
        _actor(
            InferenceServerActor,
            max_restarts=-1,
            name=names[index],
            # Both halves of its workers may wait at once, and those of another server that is down; a few more for
            # weights, probe and description, and for questions after its load.
            max_concurrency=4 * -(-cfg.rollout.num_workers // cfg.inference.num_servers) + 8,
            num_cpus=cluster.cpus_per_server,
            num_gpus=cluster.gpus_per_server,
            scheduling_strategy=_bundle(places.inference, index),
        ).remote(cfg, policy_dir)
        for index in range(cfg.inference.num_servers)
    ]
    workers = [
        _actor(
            EnvWorkerActor,
            max_restarts=-1,
            name=f"env-worker-{index}",
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            scheduling_strategy="SPREAD" if bundle is None else _bundle(places.inference, bundle),
        ).remote(cfg, index, names)
        for index, bundle in enumerate(places.worker_bundle)
    ]
    ranks = [
        _actor(
            LearnerRankActor,
            max_restarts=0,
            name=f"learner-rank-{rank}",
            num_cpus=cluster.cpus_per_rank,
            num_gpus=cluster.gpus_per_rank,
            scheduling_strategy=_bundle(places.learner, rank),
        ).remote(cfg, policy_dir, rank, cfg.learner.num_ranks)
        for rank in range(cfg.learner.num_ranks)
    ]
    transport, wait_s = RayTransport(), longest_start_s(cluster)
    [address] = transport.get([ranks[0].pick_address.remote()], timeout_s=wait_s, what="starting learner rank 0")
    transport.get([rank.start.remote(address) for rank in ranks], timeout_s=wait_s, what="starting the learner group")
    keeper = ServerKeeper(servers, deadline_s=cfg.inference.deadline_s, start_deadline_s=wait_s)
    keeper.wait_for_start()
    pool = RayPool(
        workers,
        seats_per_worker=cfg.rollout.envs_per_worker,
        deadline_s=cfg.rollout.episode_deadline_s,
        check_servers=keeper.check,
    )
    return RemoteSystem(pool, servers, ranks, workers, transport, places, keeper)


def _actor(kind: type, *, max_restarts: int, **options: Any) -> Any:
    """Make an actor class. Ray never retries calls (that would run them at least once); the ledger redoes episodes."""
    return ray.remote(kind).options(max_restarts=max_restarts, max_task_retries=0, **options)


def _bundle(group: Any, index: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
