"""The shipped cluster files satisfy Ray's own checks and the security rules, and the cluster preset fits on them."""

import json
import pathlib

import jsonschema
import pytest
import yaml
from ray import autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config

from vlarl_ray.config_loader import load_config

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))
SCHEMA = json.loads((pathlib.Path(autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def cluster(request):
    return yaml.safe_load(request.param.read_text())


def test_ray_accepts_the_file(cluster):
    jsonschema.validate(cluster, SCHEMA)
    validate_config(prepare_config(cluster))


def test_rays_schema_refuses_a_misspelt_key(cluster):
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        jsonschema.validate({**cluster, "idle_timeout_minuts": 1}, SCHEMA)


def test_every_node_starts_ray_with_token_authentication(cluster):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in cluster[key] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0].split("ray start")[0]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


def test_the_dashboard_stays_on_loopback(cluster):
    text = json.dumps(cluster)
    assert "--dashboard-host=127.0.0.1" in text
    assert "0.0.0.0" not in text


def test_simulator_and_gpu_nodes_are_elastic_and_leave_when_idle(cluster):
    assert 0 < cluster["idle_timeout_minutes"] <= 60
    types = cluster["available_node_types"]
    for name in ("env", "gpu"):
        assert types[name]["min_workers"] == 0
        assert types[name]["max_workers"] > 0
        assert types[name]["labels"]["vlarl.io/role"] == name
    assert sum(node["max_workers"] for node in types.values()) <= cluster["max_workers"]


def test_the_cluster_preset_fits_when_all_nodes_are_there(cluster):
    cfg = load_config(str(ROOT / "jobs" / "metaworld_mt10_ppo.yaml"), [])
    roles = (
        (cfg.rollout.num_workers, cfg.cluster.cpus_per_worker, cfg.cluster.gpus_per_worker),
        (cfg.inference.num_servers, cfg.cluster.cpus_per_server, cfg.cluster.gpus_per_server),
        (cfg.learner.num_ranks, cfg.cluster.cpus_per_rank, cfg.cluster.gpus_per_rank),
    )
    nodes = cluster["available_node_types"].values()
    for index, name in ((1, "CPU"), (2, "GPU")):
        wanted = sum(role[0] * role[index] for role in roles)
        assert 0 < wanted <= sum(node["resources"].get(name, 0) * node["max_workers"] for node in nodes)
