"""The server side of a decision: an `Engine` runs the model, an `InferenceServer` batches requests across workers.

    EnvWorker ─ ActRequest ─► InferenceServer queue ─► one batch ─► Engine.sample ─► ActReply ─► EnvWorker

A request waits for the batch in progress only; `batch_window_ms` can trade latency for fuller batches. An engine that
takes requests at any time (vLLM) gets them as they come, from a `ConcurrentServer`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Num

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.registry import ENGINES, resolve
from vlarl_ray.types import ActReply, ActRequest
from vlarl_ray.weights.update import LoadReport, WeightUpdate

_LOG = logging.getLogger(__name__)


class WrongVersionError(RuntimeError):
    """A server was asked for weights it does not hold."""


class NoWeightsError(WrongVersionError):
    """A server holds no version at all: it has just started, or a publication failed."""


class EngineLostError(RuntimeError):
    """An engine's processes are gone; only a new engine can answer."""


@runtime_checkable
class Engine(Protocol):
    """A model that can be given weights and asked for action chunks. Called from one thread, unless it says more."""

    version: int | None
    """Version of the weights in place; None until the first `load`."""

    def load(self, update: WeightUpdate) -> LoadReport:
        """Merge the update into the pristine base weights and take its version."""
        ...

    def sample(self, request: ActRequest) -> ActReply:
        """Answer every row of the request."""
        ...

    def logprobs(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L"]:
        """Score given tokens under the weights in place, through the path that sampling takes."""
        ...

    def diagnose(
        self,
        request: ActRequest,
        tokens: Num[np.ndarray, "B L"],
        expected: Float32[np.ndarray, "B L"],
        tolerance: float,
    ) -> str:
        """Say what makes `logprobs` differ from the expected ones by more than `tolerance` nats; empty if unknown."""
        ...

    def health(self) -> int | None:
        """Return the version in place, after asking every process that answering takes.

        Raises:
            EngineLostError: If one is gone.
        """
        ...

    def close(self) -> None:
        """Give back what does not end with the object, such as processes."""
        ...


@runtime_checkable
class ConcurrentEngine(Engine, Protocol):
    """An engine whose methods may be called from several threads, and which batches by itself."""

    def act(self, request: ActRequest) -> Future[ActReply]:
        """Start answering every row of the request, if the weights in place are those it asks for."""
        ...


def check_version(held: int | None, request: ActRequest) -> None:
    """Refuse to answer with weights other than those asked for.

    Raises:
        WrongVersionError: If `held` is outside [asked, asked + lag], or (`NoWeightsError`) there is none.
    """
    oldest, newest = request.policy_version, request.policy_version + request.max_policy_lag
    if held is None:
        raise NoWeightsError(f"server holds version None, request wants {oldest}..{newest}; publish first.")
    if not oldest <= held <= newest:
        raise WrongVersionError(f"server holds version {held}, request wants {oldest}..{newest}; publish first.")


class DirectClient:
    """Runs the engine in the caller's thread: the server of `--inline`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def act(self, request: ActRequest) -> Future[ActReply]:
        """Answer at once."""
        future: Future[ActReply] = Future()
        check_version(self._engine.version, request)
        future.set_result(timed_sample(self._engine, request))
        return future


def timed_sample(engine: Engine, request: ActRequest) -> ActReply:
    """Sample, and note the CPU time it took."""
    start = time.process_time()
    reply = engine.sample(request)
    return replace(reply, inference_cpu_s=time.process_time() - start)


def merge_requests(requests: Sequence[ActRequest]) -> ActRequest:
    """Concatenate requests of equal temperature and version."""
    if len(requests) == 1:
        return requests[0]
    return replace(
        requests[0],
        images=np.concatenate([r.images for r in requests]),
        proprio=np.concatenate([r.proprio for r in requests]),
        instructions=tuple(text for r in requests for text in r.instructions),
        noise_keys=np.concatenate([r.noise_keys for r in requests]),
    )


def split_request(request: ActRequest, max_rows: int) -> list[ActRequest]:
    """Undo `merge_requests`: the same rows in requests of at most `max_rows`."""
    return [
        replace(
            request,
            images=request.images[lo : lo + max_rows],
            proprio=request.proprio[lo : lo + max_rows],
            instructions=request.instructions[lo : lo + max_rows],
            noise_keys=request.noise_keys[lo : lo + max_rows],
        )
        for lo in range(0, len(request), max_rows)
    ]


def split_reply(reply: ActReply, sizes: Sequence[int]) -> list[ActReply]:
    """Undo `merge_requests` on the reply; CPU time is shared by rows."""
    bounds = np.cumsum([0, *sizes])
    return [
        replace(
            reply,
            actions=reply.actions[lo:hi],
            tokens=reply.tokens[lo:hi],
            logprobs=reply.logprobs[lo:hi],
            inference_cpu_s=reply.inference_cpu_s * float(hi - lo) / float(bounds[-1]),
        )
        for lo, hi in pairwise(bounds)
    ]


class InferenceServer:
    """Batches concurrent requests on one engine, in one thread of its own.

    Args:
        engine: The model; touched by the server's thread only.
        batch_size: Most rows to put in one batch.
        batch_window_ms: How long to wait for more rows once the first request is there.
    """

    def __init__(self, engine: Engine, *, batch_size: int, batch_window_ms: float) -> None:
        self._engine = engine
        self._batch_size = batch_size
        self._window_s = batch_window_ms / 1e3
        self._inbox: queue.SimpleQueue[tuple[object, Future] | None] = queue.SimpleQueue()
        self._held_back: tuple[object, Future] | None = None
        self._thread = threading.Thread(target=self._serve, name="inference", daemon=True)
        self._thread.start()

    def act(self, request: ActRequest) -> Future[ActReply]:
        """Queue a request."""
        return self._enqueue(request)

    def load(self, update: WeightUpdate) -> Future[LoadReport]:
        """Queue new weights; requests queued later see them."""
        return self._enqueue(lambda: self._engine.load(update))

    def logprobs(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Future:
        """Queue a scoring request (the canary's probe)."""

        def score() -> Float32[np.ndarray, "B L"]:
            check_version(self._engine.version, request)
            return self._engine.logprobs(request, tokens)

        return self._enqueue(score)

    def diagnose(self, *question: Any) -> Future[str]:
        """Queue a question for what is wrong, see `Engine`."""
        return self._enqueue(lambda: self._engine.diagnose(*question))

    def health(self) -> Future[int | None]:
        """Queue a question for the version in place; no answer means that the engine hangs."""
        return self._enqueue(self._engine.health)

    def close(self) -> None:
        """Stop the thread after what is queued."""
        self._inbox.put(None)
        self._thread.join()

    def _enqueue(self, job: object) -> Future:
        future: Future = Future()
        self._inbox.put((job, future))
        return future

    def _serve(self) -> None:
        while True:
            item = self._held_back or self._inbox.get()
            self._held_back = None
            if item is None:
                return
            job, future = item
            if isinstance(job, ActRequest):
                self._serve_batch(job, future)
            else:
                _resolve(future, job)  # type: ignore[arg-type]

    def _serve_batch(self, first: ActRequest, first_future: Future) -> None:
        requests, futures, rows = [first], [first_future], len(first)
        deadline = time.monotonic() + self._window_s
        while rows < self._batch_size:
            try:
                item = (
                    self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
                    if self._window_s
                    else self._inbox.get_nowait()
                )
            except queue.Empty:
                break
            if item is None or not _joins(first, item[0], rows, self._batch_size):
                self._held_back = item
                if item is None:
                    self._inbox.put(None)
                break
            request, future = item
            assert isinstance(request, ActRequest)
            requests.append(request)
            futures.append(future)
            rows += len(request)
        try:
            check_version(self._engine.version, first)
            reply = timed_sample(self._engine, merge_requests(requests))
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the callers, who wait on the futures
            for future in futures:
                future.set_exception(error)
            return
        for future, part in zip(futures, split_reply(reply, [len(r) for r in requests]), strict=True):
            future.set_result(part)


class ConcurrentServer:
    """Hands requests to an engine as they come."""

    def __init__(self, engine: ConcurrentEngine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(max_workers=3, thread_name_prefix="inference")

    def act(self, request: ActRequest) -> Future[ActReply]:
        """Start a request."""
        return self._engine.act(request)

    def load(self, update: WeightUpdate) -> Future[LoadReport]:
        """Start loading new weights; requests that come later see them."""
        return self._threads.submit(self._engine.load, update)

    def logprobs(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Future:
        """Start scoring (the canary's probe)."""
        return self._threads.submit(self._engine.logprobs, request, tokens)

    def diagnose(self, *question: Any) -> Future[str]:
        """Ask what is wrong, see `Engine`."""
        return self._threads.submit(self._engine.diagnose, *question)

    def health(self) -> Future[int | None]:
        """Ask for the version in place; no answer means that the engine hangs."""
        return self._threads.submit(self._engine.health)

    def close(self) -> None:
        """End the engine."""
        self._threads.shutdown()
        self._engine.close()


def make_engine(cfg: ExperimentConfig, policy_dir: str | Path, *, device: str = "cpu") -> Any:
    """Start the engine that a run asks for; one that is to apply adapters itself is told what they are."""
    engine_class = resolve(ENGINES, cfg.inference.engine, what="inference.engine")
    adapters = {"lora": cfg.learner.lora} if cfg.inference.vllm.lora == "native" else {}
    return engine_class(
        str(policy_dir), cfg.inference, deterministic=cfg.trust.deterministic, device=device, **adapters
    )


def make_server(engine: Engine, *, batch_size: int, batch_window_ms: float) -> InferenceServer | ConcurrentServer:
    """Put a server before an engine; see `InferenceServer` for the arguments."""
    if isinstance(engine, ConcurrentEngine):
        return ConcurrentServer(engine)
    return InferenceServer(engine, batch_size=batch_size, batch_window_ms=batch_window_ms)


def _joins(first: ActRequest, job: object, rows: int, batch_size: int) -> bool:
    return (
        isinstance(job, ActRequest)
        and rows + len(job) <= batch_size
        and (job.temperature, job.policy_version, job.max_policy_lag)
        == (first.temperature, first.policy_version, first.max_policy_lag)
    )


def _resolve(future: Future, job) -> None:  # noqa: ANN001 - a nullary callable
    try:
        future.set_result(job())
    except Exception as error:  # noqa: BLE001 - belongs to the caller, who waits on the future
        future.set_exception(error)
