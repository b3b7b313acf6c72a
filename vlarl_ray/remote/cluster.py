"""Start or join Ray, check that the cluster is large enough, and reserve places for the actors."""

from __future__ import annotations

import logging
import os
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from vlarl_ray.config import ExperimentConfig

_LOG = logging.getLogger(__name__)


class ClusterTooSmallError(ValueError):
    """The cluster cannot hold what the config asks for."""


def connect(cfg: ExperimentConfig) -> bool:
    """Join the cluster of `cluster.address`, the one this job was submitted to, or start one here.

    Returns:
        True if a local Ray was started (and should be shut down at the end).

    Raises:
        ValueError: If nodes are to be waited for, and no cluster is there to add them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Metrics and logs of a library user are theirs; Ray's own INFO lines would break the progress bar.
    # Actors are named, so each run has a namespace of its own.
    options: dict[str, Any] = {"namespace": f"vlarl-{uuid.uuid4().hex}", "logging_level": logging.WARNING}
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **options)
        return False
    if cfg.cluster.elastic:
        raise ValueError(
            "cluster.elastic = true: there is no cluster to join, and a locally started Ray has no autoscaler. Submit "
            "the run as a Ray job, name a cluster in cluster.address, or set cluster.elastic to false."
        )
    ray.init(
        address="local",
        object_store_memory=cfg.cluster.object_store_bytes,
        include_dashboard=cfg.cluster.dashboard,
        **options,
    )
    protect_token()
    return True


def protect_token() -> None:
    """Make Ray's token file readable by its owner alone; Ray writes it under the default umask."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o600)
        _LOG.info("token file %s set to mode 0600", path)


def wanted_resources(cfg: ExperimentConfig) -> dict[str, float]:
    """CPUs and GPUs that all actors reserve together."""
    counts = (
        (cfg.rollout.num_workers, cfg.cluster.cpus_per_worker, cfg.cluster.gpus_per_worker),
        (cfg.inference.num_servers, cfg.cluster.cpus_per_server, cfg.cluster.gpus_per_server),
        (cfg.learner.num_ranks, cfg.cluster.cpus_per_rank, cfg.cluster.gpus_per_rank),
    )
    return {"CPU": sum(n * cpu for n, cpu, _ in counts), "GPU": sum(n * gpu for n, _, gpu in counts)}


def check_resources(cfg: ExperimentConfig, available: Mapping[str, float], *, elastic: bool) -> None:
    """Compare what the config reserves with what the cluster has, before any actor starts.

    Args:
        cfg: The run.
        available: Total resources of the cluster's nodes.
        elastic: Whether an autoscaler may add nodes; then a shortage is only logged.

    Raises:
        ClusterTooSmallError: Naming each resource that falls short, and the fields to change.
    """
    fields = {
        "CPU": "rollout.num_workers, learner.num_ranks or cluster.cpus_per_*",
        "GPU": "inference.num_servers, learner.num_ranks or cluster.gpus_per_*",
    }
    short = [
        f"{name}: {wanted:g} wanted, {available.get(name, 0):g} there; lower {fields[name]}, or add nodes"
        for name, wanted in wanted_resources(cfg).items()
        if wanted > available.get(name, 0) + 1e-9
    ]
    if short and elastic:
        _LOG.warning("waiting for the autoscaler: %s", "; ".join(short))
    elif short:
        raise ClusterTooSmallError("the cluster is too small. " + ". ".join(short) + ".")


@dataclass(frozen=True)
class Places:
    """Reserved places: where each server, env worker and rank goes."""

    inference: PlacementGroup
    learner: PlacementGroup
    worker_bundle: tuple[int | None, ...]
    """Bundle of the inference group an env worker shares, or None where it renders without a GPU."""

    def release(self) -> None:
        """Give the places back."""
        for group in (self.inference, self.learner):
            remove_placement_group(group)


def reserve(cfg: ExperimentConfig) -> Places:
    """Reserve places, all or nothing.

    Env workers that render on a GPU share the bundle of an inference server, dealt round robin: a bundle with a whole
    GPU is one physical GPU, so every GPU that infers renders for the same number of workers, give or take one. (Asking
    Ray for fractions alone would fill the first GPU before the second.)

    Raises:
        ClusterTooSmallError: If the places are not there within `cluster.placement_timeout_s`.
    """
    cluster, num_servers = cfg.cluster, cfg.inference.num_servers
    shares = [i % num_servers if cluster.gpus_per_worker > 0 else None for i in range(cfg.rollout.num_workers)]
    bundles = []
    for server in range(num_servers):
        guests = shares.count(server)
        gpus = cluster.gpus_per_server + guests * cluster.gpus_per_worker
        bundles.append(
            _bundle(cluster.cpus_per_server + guests * cluster.cpus_per_worker, 1.0 if 0 < gpus < 1 else gpus)
        )
    inference = placement_group(bundles, strategy="SPREAD")
    learner = placement_group(
        [_bundle(cluster.cpus_per_rank, cluster.gpus_per_rank)] * cfg.learner.num_ranks, strategy="PACK"
    )
    for name, group in (("inference servers", inference), ("learner ranks", learner)):
        if not group.wait(cluster.placement_timeout_s):
            remove_placement_group(inference)
            remove_placement_group(learner)
            raise ClusterTooSmallError(
                f"no place for the {name} within cluster.placement_timeout_s = {cluster.placement_timeout_s:g} s: "
                f"wanted {group.bundle_specs}, the cluster has {ray.cluster_resources()}, "
                f"of which free {ray.available_resources()}."
            )
    return Places(inference, learner, tuple(shares))


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    bundle = {"CPU": cpus, "GPU": gpus}
    return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}
