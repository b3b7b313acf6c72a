"""The Ray actors: thin shells around `EnvWorker`, `InferenceServer` and `Learner`, which know nothing of Ray.

Plain classes here; `remote/system.py` turns them into actors and says how often each may restart.

Imports of torch and of simulators happen inside the actors, so an env worker never loads torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.inference.base import make_engine, make_server, merge_requests
from vlarl_ray.remote.client import RemoteClient
from vlarl_ray.remote.keeper import longest_start_s
from vlarl_ray.types import ActReply, ActRequest, FrameRef, TaskSpec, TrainBatch, Trajectory
from vlarl_ray.weights.update import WeightUpdate

_LOG = logging.getLogger(__name__)


class EnvWorkerActor:
    """An env worker: episodes come in as calls, one thread runs the simulators and holds their GL context.

    Args:
        cfg: The run.
        index: Number of this worker.
        servers: Names of the inference server actors.
    """

    def __init__(self, cfg: ExperimentConfig, index: int, servers: Sequence[str]) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._inbox: queue.SimpleQueue[tuple[TaskSpec, Callable[[Any], None]] | None] = queue.SimpleQueue()
        """Episodes to run; None abandons those before it."""
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(cfg, index, servers), name="simulators", daemon=True)
        self._thread.start()

    async def run_episode(self, task: TaskSpec) -> tuple[Any, FrameRef]:
        """Run one episode; returns (trajectory without frames, frames), (failure, None), or None twice if cancelled."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future = loop.create_future()

        def answer(outcome: Any) -> None:
            loop.call_soon_threadsafe(done.set_result, outcome)

        self._inbox.put((task, answer))
        outcome = await done
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, Trajectory):
            return replace(outcome, frames=None), outcome.frames
        return outcome, None

    async def cancel_all(self) -> None:
        """Abandon every episode that was submitted before."""
        self._inbox.put(None)

    async def describe(self) -> dict[str, Any]:
        """Process id and GPUs of this worker."""
        return {"pid": os.getpid(), "gpu_ids": ray.get_gpu_ids()}

    def _run(self, cfg: ExperimentConfig, index: int, servers: Sequence[str]) -> None:
        from vlarl_ray.envs import make_suite
        from vlarl_ray.rollout.env_worker import EnvWorker

        waiting: dict[tuple[str, int, int], Callable[[Any], None]] = {}
        try:
            gpu_ids = ray.get_gpu_ids()
            suite = make_suite(cfg.env, egl_device_id=int(gpu_ids[0]) if gpu_ids else None)
            worker = EnvWorker(
                suite.make_env,
                RemoteClient([ray.get_actor(name) for name in servers], home=index % len(servers)),
                num_envs=cfg.rollout.envs_per_worker,
                index=index,
                # by then a hung server was noticed, and another started in its place
                deadline_s=cfg.inference.deadline_s + longest_start_s(cfg.cluster),
            )
            while True:
                while worker.is_idle or not self._inbox.empty():
                    item = self._inbox.get()
                    if item is None:
                        worker.cancel_all()
                        for answer in waiting.values():
                            answer(None)
                        waiting.clear()
                        continue
                    task, answer = item
                    waiting[task.identity] = answer
                    worker.submit(task)
                for outcome in worker.turn():
                    waiting.pop(outcome.task.identity)(outcome)
        except Exception as error:  # noqa: BLE001 - whatever ends the thread must reach those who wait on it
            # The thread is the worker: without it every call must fail, now and later.
            _LOG.exception("env worker %d stopped", index)
            for answer in waiting.values():
                answer(error)
            while True:
                item = self._inbox.get()
                if item is not None:
                    item[1](error)


class InferenceServerActor:
    """An inference server: concurrent calls are batched on one engine.

    Its methods block on threads of Ray's pool: an asyncio actor costs 0.4 ms more CPU time a call.
    """

    def __init__(self, cfg: ExperimentConfig, policy_dir: str) -> None:
        import torch

        torch.set_num_threads(cfg.inference.num_threads)
        engine = make_engine(cfg, policy_dir, device=pick_device(cfg.inference.device))
        self._receiver: Any = None
        if cfg.inference.weight_transport != "object_store":
            from vlarl_ray.weights.channel import Receiver

            device, timeout_s = pick_device(cfg.inference.device), cfg.inference.deadline_s / 2
            self._receiver = Receiver(cfg.inference.weight_transport, device=device, timeout_s=timeout_s)
        self._server = make_server(
            engine, batch_size=cfg.inference.batch_size, batch_window_ms=cfg.inference.batch_window_ms
        )
        self._in_flight = 0
        self._lock = threading.Lock()

    def act(self, *parts: ActRequest) -> tuple[ActReply, int]:
        """Answer one worker's half, which may come in parts; beside the reply, the rows still in flight."""
        request = merge_requests(parts)
        with self._lock:
            self._in_flight += len(request)
        try:
            reply = self._server.act(request).result()
        finally:
            with self._lock:
                self._in_flight -= len(request)
        return reply, self._in_flight

    def rows_in_flight(self) -> int:
        """Rows that wait for an answer."""
        return self._in_flight

    def load(self, update: WeightUpdate) -> Any:
        """Merge new weights; returns a `LoadReport`."""
        return self._server.load(update).result()

    def load_offered(self, offer: Any, rank: int) -> Any:
        """Receive the weights of an `Offer`, answering meanwhile, and merge them; returns a `LoadReport`."""
        return self._server.load(self._receiver.receive(offer, rank)).result()

    def logprobs(self, request: ActRequest, tokens: np.ndarray) -> np.ndarray:
        """Score the probe batch."""
        return self._server.logprobs(request, tokens).result()

    def diagnose(self, *question: Any) -> str:
        """What is wrong with the probe's scores, see `Engine.diagnose`."""
        return self._server.diagnose(*question).result()

    def health(self) -> int | None:
        """Version in place, None where there is none yet; see `Engine.health`."""
        return self._server.health().result()

    def describe(self) -> dict[str, Any]:
        """Process id and GPUs of this server."""
        return {"pid": os.getpid(), "gpu_ids": ray.get_gpu_ids()}


class LearnerRankActor:
    """One rank of the learner group."""

    def __init__(self, cfg: ExperimentConfig, policy_dir: str, rank: int, world_size: int) -> None:
        self._args = (cfg, policy_dir, rank, world_size)
        self._learner: Any = None
        self._sender: Any = None
        """On rank 0, where weights are broadcast."""

    def pick_address(self) -> tuple[str, int]:
        """Choose where the process group meets; called on rank 0."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: tuple[str, int]) -> None:
        """Build the model, shard it and join the process group."""
        import torch

        from vlarl_ray.learner.build import build_learner

        cfg, policy_dir, rank, world_size = self._args
        device = pick_device(cfg.learner.device)
        torch.set_num_threads(cfg.learner.num_threads)
        self._learner = build_learner(
            cfg,
            policy_dir,
            rank=rank,
            world_size=world_size,
            store_address=address,
            device=device,
        )
        if cfg.inference.weight_transport != "object_store" and rank == 0:
            from vlarl_ray.weights.channel import Sender

            timeout_s = cfg.inference.deadline_s / 2  # the rest is for loading
            self._sender = Sender(cfg.inference.weight_transport, address[0], device=device, timeout_s=timeout_s)

    def score(self, trajectories: Sequence[Trajectory]) -> Any:
        """Score this rank's share."""
        return self._learner.score(trajectories, _fetch)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """Update the weights."""
        return self._learner.update(batch, _fetch)

    def measured_memory(self) -> Any:
        """Bytes of this rank's tensors in an update."""
        return self._learner.measured_memory()

    def weight_update(self, version: int) -> WeightUpdate | None:
        """Gather what servers need; stays in the object store, for those whom a broadcast does not reach too."""
        update = self._learner.weight_update(version)
        if self._sender is not None:
            self._sender.hold(update)
        return update

    def offer_weights(self, version: int, num_servers: int, renew: bool) -> Any:
        """Announce the last weight update, which `send_weights` broadcasts; see `Sender.offer`."""
        return self._sender.offer(version, num_servers, renew=renew)

    def send_weights(self) -> None:
        """Broadcast the weight update that was announced."""
        self._sender.send()

    def weight_update_summary(self, version: int) -> tuple[int, dict[str, str]]:
        """Bytes and digests of the last weight update."""
        return self._learner.weight_update_summary(version)

    def expected_checksums(self, update: WeightUpdate, dtype: str, lora: str) -> dict[str, str]:
        """Fingerprint what a server must load."""
        return self._learner.expected_checksums(update, dtype, lora)

    def logprobs(self, request: ActRequest, tokens: np.ndarray) -> np.ndarray:
        """Score the probe batch."""
        return self._learner.logprobs(request, tokens)

    def state_dict(self) -> Any:
        """Collect everything training needs to go on."""
        return self._learner.state_dict()

    def load_state_dict(self, *state: Any) -> None:
        """Restore `state_dict`."""
        self._learner.load_state_dict(*state)

    def shutdown(self) -> None:
        """Leave the process group."""
        self._learner.shutdown()

    def describe(self) -> dict[str, Any]:
        """Process id and GPUs of this rank."""
        return {"pid": os.getpid(), "gpu_ids": ray.get_gpu_ids()}


def _fetch(references: Sequence[Any]) -> list[Any]:
    """Resolve frame references; numpy arrays are views of shared memory, one copy a node."""
    return ray.get(list(references))


def pick_device(wanted: str) -> str:
    """Resolve `auto` to the GPU this process was assigned, if any."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
