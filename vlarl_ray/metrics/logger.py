"""The run folder's append-only tables: `metrics.jsonl` (a row per update) and `evaluations.jsonl`, and who else hears.

Timer.flush, summarize_rollout, learner statistics ──► MetricsLogger.log ──► metrics.jsonl
EvaluationResult ──────────────► MetricsLogger.log_evaluation ──► evaluations.jsonl
                                             └──► sinks (TensorBoard, W&B, Ray metrics, progress bar), one log line
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlarl_ray.metrics.catalogue import Metric, MetricValue, describe_metric
from vlarl_ray.metrics.sinks import MetricSink, ProgressSink, TensorBoardSink, WandbSink

logger = logging.getLogger(__name__)

_LINE_PARTS = (
    ("success", "rollout/success_rate", ".2f"),
    ("steps to success", "rollout/steps_to_success", ".0f"),
    ("env steps/s", "throughput/env_steps_per_s", ".0f"),
    ("kl", "learn/approx_kl", ".4f"),
    ("clipped", "learn/clip_fraction", ".2f"),
    ("explained variance", "learn/explained_variance", ".2f"),
    ("rollout s", "time/rollout_s", ".1f"),
    ("learn s", "time/learn_s", ".1f"),
    ("publish s", "time/publish_s", ".2f"),
)


@runtime_checkable
class MetricsSettings(Protocol):
    """What the logger reads of `config.MetricsConfig`, which lies in a layer above."""

    @property
    def tensorboard(self) -> bool:
        """Write TensorBoard event files."""
        ...

    @property
    def wandb_project(self) -> str | None:
        """Weights & Biases project."""
        ...

    @property
    def progress(self) -> bool:
        """Show a progress bar."""
        ...


class MetricsLogger:
    """Owns `metrics.jsonl`, `evaluations.jsonl` and the sinks of a run.

    A fresh logger appends to what is there. To resume, take `offsets()` at each commit and pass them as `resume_from`:
    rows written after the commit are dropped, because they will be written again.
    """

    def __init__(
        self,
        run_dir: str | Path,
        settings: MetricsSettings,
        *,
        sinks: Sequence[MetricSink] = (),
        num_iterations: int | None = None,
        resume_from: Mapping[str, int] | None = None,
        extra_metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        """Open the files and the sinks that `settings` asks for.

        Args:
            run_dir: Run folder on a local (or mounted) file system; created if missing.
            settings: The `metrics` section of the config.
            sinks: Further sinks; the logger closes them.
            num_iterations: Length of the progress bar.
            resume_from: `offsets()` of the commit that the run continues from.
            extra_metrics: Names beyond the catalogue, of plug-ins.
        """
        self._extra = dict(extra_metrics or {})
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: _AppendOnlyFile(folder / name) for name in ("metrics.jsonl", "evaluations.jsonl")}
        if resume_from is not None:
            self.truncate_to(resume_from)
        self._sinks = list(sinks)
        if settings.tensorboard:
            self._sinks.append(TensorBoardSink(folder / "tensorboard", first_step=self._next_iteration()))
        if settings.wandb_project is not None:
            self._sinks.append(WandbSink(settings.wandb_project, folder))
        if settings.progress:
            self._sinks.append(ProgressSink(num_iterations))

    def log(self, *parts: Mapping[str, MetricValue | np.generic], iteration: int, version: int) -> None:
        """Write the row of one iteration, to the file, the sinks and one INFO line.

        Args:
            parts: Metrics from different sources; None marks a metric that is undefined this time (written as null).
            iteration: Number of the attempt, from 0.
            version: Version of the weights after it.

        Raises:
            ValueError: If a metric is unknown, is named twice, or is NaN or infinite.
        """
        row = self._checked(parts, iteration)
        self._files["metrics.jsonl"].append({"iteration": iteration, "version": version, **row})
        self._send(iteration, row)
        shown = [f"{label} {row[name]:{form}}" for label, name, form in _LINE_PARTS if row.get(name) is not None]
        logger.info("iteration %d, version %d: %s", iteration, version, ", ".join(shown))

    def log_evaluation(
        self,
        record: Mapping[str, Any],
        metrics: Mapping[str, MetricValue | np.generic],
        *,
        label: str,
        iteration: int,
        version: int,
    ) -> None:
        """Write one evaluation.

        Args:
            record: The result as JSON types (`EvaluationResult.to_dict()`).
            metrics: Its `eval/...` figures for the sinks (`EvaluationResult.metrics()`).
            label: `warm_start`, `update` or `final`.
            iteration: Iterations finished before it.
            version: Version of the weights that were evaluated.
        """
        row = self._checked([metrics], iteration)
        head = {"label": label, "iteration": iteration, "version": version}
        self._files["evaluations.jsonl"].append({**head, **record})
        self._send(iteration, row)
        logger.info(
            "evaluation (%s), version %d: success %.3f [%.3f, %.3f], %d episodes",
            label, version, record["success_rate"], record["ci_low"], record["ci_high"], record["episodes"],
        )  # fmt: skip

    def offsets(self) -> dict[str, int]:
        """Sizes in bytes of the files, after forcing them to disk: part of a commit."""
        return {name: file.synced_size() for name, file in self._files.items()}

    def truncate_to(self, offsets: Mapping[str, int]) -> None:
        """Drop what was written after `offsets` were taken.

        Raises:
            ValueError: If a file is shorter than its offset, or the offset is not at the end of a row.
        """
        for name, file in self._files.items():
            file.truncate(offsets[name])

    def close(self) -> None:
        """Close files and sinks."""
        for file in self._files.values():
            file.close()
        for sink in self._sinks:
            sink.close()

    def _checked(
        self, parts: Sequence[Mapping[str, MetricValue | np.generic]], iteration: int
    ) -> dict[str, MetricValue]:
        row: dict[str, MetricValue] = {}
        for part in parts:
            for name, value in part.items():
                describe_metric(name, extra=self._extra)
                if name in row:
                    raise ValueError(f"metric {name!r} is logged twice in iteration {iteration}; log it in one place.")
                row[name] = _finite(name, value, iteration)
        return dict(sorted(row.items()))

    def _send(self, iteration: int, row: Mapping[str, MetricValue]) -> None:
        defined = {name: value for name, value in row.items() if value is not None}
        for sink in self._sinks:
            sink.write(defined, step=iteration)

    def _next_iteration(self) -> int:
        rows = read_jsonl(self._files["metrics.jsonl"].path)
        return rows[-1]["iteration"] + 1 if rows else 0


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a table of the run folder; a missing file is empty, a last row torn by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _finite(name: str, value: MetricValue | np.generic, iteration: int) -> MetricValue:
    if value is None:
        return None
    if isinstance(value, (bool, np.bool_, int, np.integer)):
        return int(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(
            f"metric {name!r} is {number} in iteration {iteration}; metrics must be finite. "
            "Where it is undefined log None; otherwise look for the first non-finite number upstream of it."
        )
    return number


class _AppendOnlyFile:
    """Rows of JSON, one a line; each is written whole and handed to the operating system at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._file = path.open("ab")
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: dropped a row of %d bytes that a kill left unfinished", path, len(content) - whole)
            self._file.truncate(whole)

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def synced_size(self) -> int:
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def truncate(self, size: int) -> None:
        actual = self.synced_size()
        if size > actual:
            raise ValueError(
                f"{self.path} has {actual} bytes, fewer than the {size} of the checkpoint; "
                "it was changed from outside. Restore it, or resume from an older checkpoint."
            )
        if size and self.path.read_bytes()[size - 1 : size] != b"\n":
            raise ValueError(f"{self.path}: offset {size} of the checkpoint is inside a row; the file was changed.")
        self._file.truncate(size)

    def close(self) -> None:
        self._file.close()
