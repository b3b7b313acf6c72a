"""What a run writes down: metrics, episodes, checkpoints, evaluations, films and the summary. It decides nothing."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlarl_ray.checkpoint import commit, load_latest
from vlarl_ray.config import ExperimentConfig
from vlarl_ray.envs.base import Suite
from vlarl_ray.episode_store import EpisodeStore
from vlarl_ray.evaluate import Evaluation
from vlarl_ray.metrics.episodes import EpisodeTable
from vlarl_ray.metrics.logger import MetricsLogger
from vlarl_ray.metrics.rollout import summarize_rollout
from vlarl_ray.metrics.sinks import MetricSink
from vlarl_ray.metrics.timer import Timer
from vlarl_ray.report.video import EpisodeFilm, video_path, write_before_after_video
from vlarl_ray.rollout.ledger import LedgerCounters
from vlarl_ray.summary import PeakMemory, RunSummary, write_summary
from vlarl_ray.types import TrajectoryGroup

_LOG = logging.getLogger(__name__)


@runtime_checkable
class Checkpointed(Protocol):
    """A learner group, to the recorder."""

    def state_dict(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        """Arrays by file and name, and JSON state."""
        ...

    def load_state_dict(self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        ...


@runtime_checkable
class RunState(Protocol):
    """The parts of a run whose state is checkpointed: `train.System`, to the recorder."""

    learner: Any
    """A `Checkpointed`."""
    algorithm: Any
    """An `Algorithm`."""
    sampler: Any
    """With `state_dict()` and `load_state_dict(state)`, JSON types."""
    transport: Any
    """A `Transport`."""


@dataclass
class Totals:
    """Sums over the run, part of every commit."""

    rl_seconds: float = 0.0
    rollout_seconds: float = 0.0
    other_seconds: float = 0.0
    """Warm start, evaluations: everything that is not RL."""
    env_steps: int = 0
    published_bytes: float = 0.0
    updates: int = 0


class RunRecorder:
    """Writes the run folder.

    Args:
        run_dir: Run folder.
        cfg: The run.
        suite: For digests of initial states.
        summary: Summary so far (expert figures, versions, machine, model size).
        sinks: Further metric sinks.
        memory: Running memory sampler.
        resume: Continue from the newest valid checkpoint, if there is one.
        seconds_before: Wall time spent before the recorder existed (the warm start).
    """

    def __init__(
        self,
        run_dir: str | Path,
        cfg: ExperimentConfig,
        suite: Suite,
        *,
        summary: RunSummary,
        memory: PeakMemory,
        sinks: Sequence[MetricSink] = (),
        resume: bool = False,
        seconds_before: float = 0.0,
    ) -> None:
        self.timer = Timer()
        self.stop_signal: int | None = None
        """Signal that asked for the end of the run."""
        self.counters = LedgerCounters()
        self._run_dir = Path(run_dir)
        self._cfg = cfg
        self._suite = suite
        self._memory = memory
        self._films_before: dict[tuple[str, int], EpisodeFilm] = {}
        self._episode_store = EpisodeStore(self._run_dir / "stored_episodes")
        self._checkpoint = load_latest(str(run_dir)) if resume else None
        state = self._checkpoint.state if self._checkpoint else {}
        self.totals = Totals(**state.get("totals", {"other_seconds": seconds_before}))
        self.summary = replace(summary, **state.get("summary", {}))
        memory.raise_peak(state.get("peak_bytes", 0))
        self._logger = MetricsLogger(
            run_dir,
            cfg.metrics,
            sinks=sinks,
            num_iterations=cfg.num_iterations,
            resume_from=state.get("offsets")
            if self._checkpoint
            else ({"metrics.jsonl": 0, "evaluations.jsonl": 0} if resume else None),
        )
        self._episodes = EpisodeTable(run_dir, resume_from=state.get("num_episodes", 0) if resume else None)
        self._iterations = self.saved_iteration = state.get("iteration", 0)
        """`saved_iteration`: where the newest checkpoint goes on; 0 without any."""
        self._mark = time.perf_counter()
        self._last_counters = replace(self.counters)
        self._num_gpus = (
            cfg.learner.num_ranks * cfg.cluster.gpus_per_rank
            + cfg.inference.num_servers * cfg.cluster.gpus_per_server
            + cfg.rollout.num_workers * cfg.cluster.gpus_per_worker
        )

    @property
    def is_over_budget(self) -> bool:
        """Whether the RL part has used up `max_rl_seconds` or `max_rl_env_steps`."""
        seconds, env_steps = self._cfg.max_rl_seconds, self._cfg.max_rl_env_steps
        return (seconds is not None and self.totals.rl_seconds >= seconds) or (
            env_steps is not None and self.totals.env_steps >= env_steps
        )

    def progress(self, iteration: int) -> float:
        """Share of the RL part done before an iteration (0 to 1): of `num_iterations` or of the budget of env steps.

        Seconds do not count: learning rates follow this, and must not depend on how fast a machine is.
        """
        share = iteration / self._cfg.num_iterations
        if self._cfg.max_rl_env_steps is not None:
            share = max(share, self.totals.env_steps / self._cfg.max_rl_env_steps)
        return min(share, 1.0)

    @contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT for a wish to stop: after the current iteration, with a checkpoint.

        A second one ends the process at once. Signals reach the main thread only, so elsewhere nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            del frame
            self.stop_signal = number
            _LOG.warning("%s: stopping after this iteration; once more stops at once", signal.Signals(number).name)
            for each, handler in before.items():
                signal.signal(each, handler)

        before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    @property
    def exit_code(self) -> int:
        """Of the process: 0, or 128 plus the number of the signal that ended the run early."""
        return 0 if self.stop_signal is None else 128 + self.stop_signal

    def restore(self, system: RunState) -> tuple[int, int]:
        """Load the checkpoint, if the run continues from one.

        Returns:
            Iteration and version to continue with; 0, 0 on a fresh run.
        """
        if self._checkpoint is None:
            return 0, 0
        state = self._checkpoint.state
        system.learner.load_state_dict(self._checkpoint.arrays, state["learner"])
        episodes = self._episode_store.read(state["stored_episodes"], system.transport.put)
        system.algorithm.load_state_dict(state["algorithm"], episodes)
        system.sampler.load_state_dict(state["sampler"])
        self._films_before = load_films(self._run_dir / "videos" / "warm_start.npz")
        _LOG.info("resumed at iteration %d, version %d", state["iteration"], state["version"])
        self._checkpoint = None
        return state["iteration"], state["version"]

    def save(self, iteration: int, version: int, system: RunState) -> None:
        """Commit everything a resumed run needs."""
        arrays, learner_state = system.learner.state_dict()
        state = {
            "iteration": iteration,
            "version": version,
            "learner": learner_state,
            "algorithm": system.algorithm.state_dict(),
            "stored_episodes": self._episode_store.write(system.algorithm.stored_episodes, system.transport.fetch),
            "sampler": system.sampler.state_dict(),
            "totals": vars(self.totals),
            "offsets": self._logger.offsets(),
            "num_episodes": self._episodes.num_rows,
            "summary": {"warm_start": self.summary.warm_start},
            "peak_bytes": self._memory.peak_bytes,
        }
        commit(str(self._run_dir), version, arrays=arrays, state=state, keep=self._cfg.checkpoint.keep)
        self.saved_iteration = iteration

    def log_update(
        self, iteration: int, version: int, groups: Sequence[TrajectoryGroup], numbers: Mapping[str, float | None]
    ) -> None:
        """Write the row of an iteration and the episodes of all its groups; the wall time since the last is RL."""
        trajectories = [t for group in groups for t in group.trajectories]
        times = self.timer.flush()
        update_s = self._lap()
        rollout = summarize_rollout(trajectories, times["time/rollout_s"])
        self.totals.rl_seconds += update_s
        self.totals.rollout_seconds += times["time/rollout_s"]
        self.totals.env_steps += sum(t.total_env_steps for t in trajectories)
        if numbers.get("publish/bytes") is not None:  # absent where no group was accepted
            self.totals.published_bytes += numbers["publish/bytes"] or 0.0
            self.totals.updates += 1
        self._episodes.append(trajectories, self._init_hash)
        extra = {
            "time/update_s": update_s,
            "time/gpu_s": update_s * self._num_gpus,
            "memory/peak_bytes": float(self._memory.peak_bytes),
            "publish/model_bytes": float(self.summary.model_bytes or 0),
            "rollout/duplicates_dropped": float(
                self.counters.duplicates_dropped - self._last_counters.duplicates_dropped
            ),
            "rollout/episodes_redone": float(self.counters.redone - self._last_counters.redone),
        }
        self._last_counters = replace(self.counters)
        self._logger.log(rollout, numbers, times, extra, iteration=iteration - 1, version=version)
        self._iterations = iteration
        self.totals.other_seconds += self._lap()

    def log_evaluation(self, label: str, evaluation: Evaluation, *, iteration: int) -> None:
        """Write an evaluation; `final` also writes the before/after films."""
        result = evaluation.result
        self._episodes.append(evaluation.trajectories, self._init_hash)
        self._logger.log_evaluation(
            result.to_dict(), result.metrics(), label=label, iteration=iteration, version=evaluation.version
        )
        films = {(film.task_id, film.init_state_id): film for film in evaluation.films}
        if label == "warm_start":
            self._films_before = films
            save_films(self._run_dir / "videos" / "warm_start.npz", films.values())
            self.summary = self.summary.with_evaluation(warm_start=result)
        if label == "final":
            self.summary = self.summary.with_evaluation(final=result)
            for key in sorted(set(films) & set(self._films_before)):
                write_before_after_video(video_path(self._run_dir, *key), self._films_before[key], films[key])
        self.totals.other_seconds += self._lap()
        self.write_summary()

    def write_summary(self) -> None:
        """Bring `summary.json` up to date."""
        totals = self.totals
        self.summary = replace(
            self.summary,
            updates=totals.updates,
            iterations=self._iterations,
            planned_iterations=self._cfg.num_iterations,
            rl_seconds=totals.rl_seconds,
            total_seconds=totals.rl_seconds + totals.other_seconds,
            env_steps=totals.env_steps,
            env_steps_per_s=totals.env_steps / totals.rollout_seconds if totals.rollout_seconds else None,
            peak_rss_bytes=self._memory.peak_bytes,
            published_bytes_per_update=totals.published_bytes / totals.updates if totals.updates else None,
        )
        write_summary(self._run_dir, self.summary)

    def close(self) -> None:
        """Fold the episode table, close files and sinks."""
        self._episodes.close()
        self._logger.close()

    def _init_hash(self, task: Any) -> str:
        return self._suite.init_state_hash(task.task_id, task.split, task.init_state_id)

    def _lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        return elapsed


def save_films(path: Path, films: Any) -> None:
    """Keep films for a later side-by-side (a resumed run has no other copy)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for film in films:
        key = f"{film.task_id}|{film.init_state_id}"
        arrays[f"{key}|frames"] = film.frames
        arrays[f"{key}|numbers"] = np.array([film.first_success_env_step or -1, *film.env_steps], dtype=np.int64)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_films(path: Path) -> dict[tuple[str, int], EpisodeFilm]:
    """Read what `save_films` wrote; empty if there is nothing."""
    if not path.exists():
        return {}
    films = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            task_id, state, kind = name.split("|")
            if kind == "frames":
                first, *env_steps = arrays[f"{task_id}|{state}|numbers"].tolist()
                films[task_id, int(state)] = EpisodeFilm(
                    task_id, int(state), arrays[name], tuple(env_steps), None if first < 0 else first
                )
    return films
