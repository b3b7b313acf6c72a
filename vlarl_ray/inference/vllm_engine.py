"""The vLLM engine: many observations at once through one `AsyncLLM`, and weights that follow the learner's.

ActRequest ─► gate (open, right version) ─► one generation per row ─► ActReply, stamped with the version that answered
WeightUpdate ─► gate closed, rows drained ─► pause, caches cleared ─► workers merge and load, or replace adapters
             ─► version stamped ─► resume ─► gate open
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Num

from vlarl_ray.config import InferenceConfig, LoraConfig
from vlarl_ray.inference.base import EngineLostError, check_version
from vlarl_ray.inference.gate import CpuMeter, Gate
from vlarl_ray.inference.vllm_lora import lora_request
from vlarl_ray.inference.vllm_rows import Rows
from vlarl_ray.inference.vllm_start import shared_memory, start_engine
from vlarl_ray.models.policy import empty_model
from vlarl_ray.types import ActReply, ActRequest
from vlarl_ray.vllm_checks import unserved_adapters
from vlarl_ray.weights.adapters import check_adapters_only
from vlarl_ray.weights.canary import compare_digests
from vlarl_ray.weights.merge import served_names, write_update
from vlarl_ray.weights.update import LoadReport, WeightUpdate

_LOG = logging.getLogger(__name__)

_SHUTDOWN_S = 2.0
_DEATH_POLL_S = 0.5
_WORKER_CLASSES = {
    "merged": "vlarl_ray.inference.vllm_worker.UpdateLoading",
    "native": "vlarl_ray.inference.vllm_lora.AdapterLoading",
}

Result = TypeVar("Result")


class VllmEngine:
    """Serves an OpenVLA policy with autoregressive decoding. Calls may come from several threads.

    Args:
        policy_dir: Policy folder that the learner started from too; its weights are the pristine base.
        cfg: Precision, threads, and the engine's own settings.
        deterministic: Must be False: rounding depends on which requests share a batch.
        device: `cpu` or `cuda`; vLLM takes the GPUs that this process sees.
        lora: What adapters updates will bring; needed where `cfg.vllm.lora` is native.
        worker_class: What is mixed into vLLM's workers to load updates; None takes what `cfg.vllm.lora` asks for.

    Raises:
        ValueError: If vLLM cannot serve this policy, or the settings do not fit it.
    """

    def __init__(
        self,
        policy_dir: str | Path,
        cfg: InferenceConfig,
        *,
        deterministic: bool,
        device: str = "cpu",
        lora: LoraConfig | None = None,
        worker_class: str | None = None,
    ) -> None:
        if deterministic:
            raise ValueError("trust.deterministic = true: vLLM's rounding depends on the batch; set it to false.")
        self._cfg = cfg
        self._device = device
        self._policy_dir = Path(policy_dir).resolve()
        self._policy, self._pristine = empty_model(self._policy_dir)
        model = self._policy.model_config
        if model.architecture != "openvla" or model.decoding != "autoregressive":
            raise ValueError(
                f"inference.engine = vllm serves openvla with autoregressive decoding; {self._policy_dir} holds "
                f"{model.architecture} with {model.decoding} decoding. Set inference.engine to torch."
            )
        self._lora = lora if cfg.vllm.lora == "native" else None
        """Adapters that vLLM applies itself; None where they are merged."""
        if cfg.vllm.lora == "native":
            if lora is None:
                raise ValueError("inference.vllm.lora = native: the engine must be told the adapters' rank and layers.")
            problem = unserved_adapters(lora, model)
            if problem is not None:
                raise ValueError(problem)
        self.version: int | None = None

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._update_file: BinaryIO | None = None
        """Of the update loaded last."""
        try:
            self._engine: Any = self._run(self._start(worker_class or _WORKER_CLASSES[cfg.vllm.lora]))
            self._rows = Rows(self._engine, self._policy, num_bins=model.num_action_bins)
        except BaseException:
            self.close()
            raise

    def act(self, request: ActRequest) -> Future[ActReply]:
        """Answer every row of the request; rows of all callers are decoded together as they come."""
        return asyncio.run_coroutine_threadsafe(self._act(request), self._loop)

    def sample(self, request: ActRequest) -> ActReply:
        """Answer every row of the request, and wait for it."""
        return self.act(request).result()

    def load(self, update: WeightUpdate) -> LoadReport:
        """Serve the update on the pristine base weights and take its version; requests that came before finish first.

        Raises:
            CanaryError: If vLLM's workers did not load the same.
            EngineLostError: If vLLM's process is gone.
            ValueError: If the update names a tensor that the model lacks, or that adapters cannot serve.
        """
        return self._run(self._load(update))

    def logprobs(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L"]:
        """Score given tokens: each is asked for after those before it, in a request of its own."""
        return self._run(self._logprobs(request, tokens))

    def diagnose(
        self,
        request: ActRequest,
        tokens: Num[np.ndarray, "B L"],
        expected: Float32[np.ndarray, "B L"],
        tolerance: float,
    ) -> str:
        """Find out why scores are not the expected ones: a cache that outlived its weights, or wrong layers."""
        return self._run(self._unless_lost(self._diagnose(request, tokens, expected, tolerance)))

    def health(self) -> int | None:
        """Return the version in place, after a round trip to vLLM's process.

        Raises:
            EngineLostError: If that process is gone.
        """
        return self._run(self._health())

    def close(self) -> None:
        """End vLLM's processes."""
        engine = self.__dict__.pop("_engine", None)
        if engine is not None:
            self._run(_cancel_others())  # vLLM's own among them, which would report the end of its process as an error
            engine.shutdown(timeout=_SHUTDOWN_S)
            engine.shutdown = lambda: None  # vLLM's finaliser calls it again as the interpreter ends, where it fails
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_SHUTDOWN_S)
        self._forget_update()

    async def _start(self, worker_class: str) -> Any:
        self._gate = Gate()
        with tempfile.TemporaryDirectory(prefix="vlarl-vllm-") as folder:  # vLLM reads it as it starts, not later
            engine = start_engine(
                self._policy_dir,
                self._cfg,
                Path(folder),
                device=self._device,
                worker_class=worker_class,
                lora=self._lora,
            )
        self._cpu = CpuMeter()
        return engine

    async def _act(self, request: ActRequest) -> ActReply:
        async with self._gate.passed():
            check_version(self.version, request)
            version = self.version
            assert version is not None
            with _lost_engines_named():
                completions = await self._rows.sampled(request)
            tokens = np.array([c.token_ids for c in completions], np.int32)
            logprobs = np.array(
                [[at[t].logprob for at, t in zip(c.logprobs, c.token_ids, strict=True)] for c in completions],
                np.float32,
            )
        answered = {span.version for c in completions for span in c.weight_versions or ()}
        if answered != {str(version)}:
            raise RuntimeError(f"vLLM answered a request for version {version} with weights {sorted(answered)}.")
        return ActReply(
            actions=self._policy.decode_actions(torch.from_numpy(tokens.astype(np.int64))).numpy(),
            tokens=tokens,
            logprobs=logprobs,
            policy_version=version,
            inference_cpu_s=self._cpu.since_last(),
            tokens_of_chunk=self._policy.tokens_of_chunk,
        )

    async def _load(self, update: WeightUpdate) -> LoadReport:
        start = time.perf_counter()
        async with self._gate.closed():
            self.version = None  # a load that fails half-way must not answer
            # refuses what cannot be served, before anything changes
            if self._lora is None:
                served_names(update, self._pristine)
            else:
                check_adapters_only(update, self._pristine)
            self._forget_update()
            self._update_file = await asyncio.to_thread(nameless_file, update)
            with _lost_engines_named():
                reports = await self._unless_lost(self._replace_weights(update.version))
            for rank, report in enumerate(reports[1:], start=1):
                where = f"loader of vLLM worker {rank}, against that of worker 0"
                compare_digests(reports[0]["checksums"], report["checksums"], where=where, version=update.version)
            self._rows.lora_request = None if self._lora is None else lora_request(update)
            self.version = update.version
        kept, asked = (sum(report[key] for report in reports) for key in ("kept", "asked"))
        return LoadReport(
            version=update.version,
            digests=reports[0]["digests"],
            delta_kept=kept / asked if asked else 1.0,
            seconds=time.perf_counter() - start,
            checksums=reports[0]["checksums"],
            dtype=self._cfg.dtype,
            lora=self._cfg.vllm.lora,
        )

    async def _replace_weights(self, version: int) -> list[dict[str, Any]]:
        """Let the workers load an update while nothing runs and nothing is cached; returns their reports."""
        await self._engine.pause_generation(mode="wait", clear_cache=True)
        try:
            reports = await self._ask_workers("load_update")
            # Empty already; cleared again so that nothing a worker did meanwhile can outlive the old weights.
            await self._engine.reset_prefix_cache()
            await self._engine.reset_encoder_cache()
            await self._engine.update_weight_version(str(version))
        finally:
            if not self._engine.errored:
                await self._engine.resume_generation()
        return reports

    async def _ask_workers(self, method: str) -> list[Any]:
        """Call a method of `UpdateLoading` in every worker, on the update loaded last."""
        assert self._update_file is not None
        path = f"/proc/{os.getpid()}/fd/{self._update_file.fileno()}"
        return await self._engine.collective_rpc(method, args=(path, str(self._policy_dir)))

    def _forget_update(self) -> None:
        if self._update_file is not None:
            self._update_file.close()

    async def _diagnose(self, request: ActRequest, tokens: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
        async def agrees() -> bool:
            return bool(np.abs(await self._logprobs(request, tokens) - expected).max() <= tolerance)

        await self._engine.reset_prefix_cache()
        if await agrees():
            return "its prefix cache held keys and values of older weights"
        await self._engine.reset_encoder_cache()
        await self._engine.reset_prefix_cache()
        if await agrees():
            return "its image cache held embeddings of older weights"
        wrong = sorted(name for names in await self._ask_workers("wrong_layers") for name in names)
        return f"layers that compute with other weights: {', '.join(wrong)}" if wrong else ""

    async def _health(self) -> int | None:
        with _lost_engines_named():
            await self._unless_lost(self._engine.get_weight_version())
        return self.version

    async def _logprobs(self, request: ActRequest, tokens: np.ndarray) -> np.ndarray:
        async with self._gate.passed():
            check_version(self.version, request)
            with _lost_engines_named():
                return await self._rows.scored(request, tokens)

    async def _unless_lost(self, work: Awaitable[Result]) -> Result:
        """Wait for what vLLM's process is asked to do; vLLM itself waits for ever if the process dies meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_DEATH_POLL_S)
                if self._engine.errored and not task.done():
                    raise EngineLostError("vLLM's engine process is gone: it did not finish what it was asked to do.")
            return task.result()
        finally:
            task.cancel()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@contextmanager
def _lost_engines_named() -> Iterator[None]:
    """Turn vLLM's word for a dead process into ours."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineLostError(f"vLLM's engine process is gone: {error}") from error


def nameless_file(update: WeightUpdate) -> BinaryIO:
    """Write an update to a file in memory that has no name, so that nothing stays behind if this process is killed."""
    with tempfile.TemporaryDirectory(prefix="vlarl-vllm-", dir=shared_memory()) as folder:
        path = Path(folder) / "update.safetensors"
        write_update(update, path)
        return path.open("rb")


async def _cancel_others() -> None:
    """End the tasks that vLLM leaves behind, which hold its objects."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
