"""What watches inference servers and env workers tells a server that is away from a worker that hangs."""

from __future__ import annotations

import os
import signal
import time

import pytest

ray = pytest.importorskip("ray")

from tests.e2e.toy_run import toy_config  # noqa: E402
from tests.small_openvla import tiny  # noqa: E402
from vlarl_ray.envs import make_suite  # noqa: E402
from vlarl_ray.remote.actors import InferenceServerActor  # noqa: E402
from vlarl_ray.remote.keeper import ServerKeeper  # noqa: E402
from vlarl_ray.remote.pool import RayPool  # noqa: E402
from vlarl_ray.rollout.episode import EpisodeFailure  # noqa: E402
from vlarl_ray.rollout.tasks import TaskSampler  # noqa: E402

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, object_store_memory=128 * 1024 * 1024,
            log_to_driver=False, logging_level="error",
        )  # fmt: skip
        yield
        ray.shutdown()


def watch(policy_dir):
    server = ray.remote(InferenceServerActor).options(num_cpus=0.1, max_restarts=-1, max_concurrency=4)
    server = server.remote(toy_config(policy_dir), str(policy_dir))
    return server, ServerKeeper([server], deadline_s=60.0, start_deadline_s=300.0)


def test_a_server_lost_before_a_publication_is_counted_once(tmp_path):
    tiny().save(tmp_path)
    server, keeper = watch(tmp_path)
    keeper.wait_for_start()
    assert keeper.check()
    os.kill(ray.get(server.describe.remote())["pid"], signal.SIGKILL)
    while keeper.check():  # until it finds out
        time.sleep(0.1)
    keeper.revive(0)  # the publication finds out, too
    assert keeper.restarts == 1
    assert ray.get(server.health.remote()) is None
    assert keeper.check()


def test_a_server_that_cannot_start_says_why_and_is_not_waited_for(tmp_path):
    _, keeper = watch(tmp_path)
    with pytest.raises(RuntimeError, match=r"inference server 0 cannot start: [\s\S]*config\.json"):
        keeper.wait_for_start()


class SilentWorker:
    def run_episode(self, task):
        time.sleep(8)
        return EpisodeFailure(task, "answered after all", 0), None


class MendsAServer:
    """Takes longer than a worker may, and less than the worker takes; then all is well."""

    def __init__(self) -> None:
        self.is_mended = False

    def __call__(self) -> bool:
        if not self.is_mended:
            time.sleep(6)
        self.is_mended = True
        return True


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda: False, "answered after all"),
        (MendsAServer(), "answered after all"),
        (lambda: True, "env worker 0 hung"),
    ],
)
def test_a_worker_that_waits_for_a_server_is_not_taken_for_hung(tmp_path, check, reason):
    cfg = toy_config(tmp_path)
    [task, *_] = TaskSampler(make_suite(cfg.env), cfg, run_id="silent").training_tasks(0, version=0)
    worker = ray.remote(SilentWorker).options(num_cpus=0.1).remote()
    ray.get(worker.__ray_ready__.remote())
    pool = RayPool([worker], seats_per_worker=1, deadline_s=5.0, check_servers=check)
    pool.submit(task)
    [outcome] = pool.collect()
    assert isinstance(outcome, EpisodeFailure)
    assert outcome.reason == reason
