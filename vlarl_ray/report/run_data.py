"""Read a run folder for its report: whatever is there, of a finished, running or killed run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlarl_ray.metrics import read_jsonl
from vlarl_ray.summary import RunSummary, read_summary


@dataclass(frozen=True)
class RunData:
    """Contents of one run folder."""

    run_dir: Path
    config: Mapping[str, Any]
    """Resolved config; empty if it was not written."""
    rows: Sequence[Mapping[str, Any]]
    """Of `metrics.jsonl`."""
    evaluations: Sequence[Mapping[str, Any]]
    """Of `evaluations.jsonl`."""
    summary: RunSummary
    """Of `summary.json`; empty if it was not written yet."""
    films: Sequence[Path]
    """Relative to the run folder."""

    @property
    def name(self) -> str:
        """Name of the run, or of its folder."""
        return str(self.config.get("name", self.run_dir.name))

    @property
    def is_finished(self) -> bool:
        """Whether the evaluation after training is there."""
        return self.summary.final is not None

    @property
    def before(self) -> Mapping[str, Any] | None:
        """Evaluation of the warm start."""
        return next((e for e in self.evaluations if e["label"] == "warm_start"), None)

    @property
    def after(self) -> Mapping[str, Any] | None:
        """Evaluation after training, or the newest one if the run is not finished."""
        return next((e for e in reversed(self.evaluations) if e["label"] != "warm_start"), None)

    def series(self, name: str) -> tuple[list[int], list[float | int]]:
        """Iterations in which a metric is defined, and its values."""
        points = [(row["iteration"], row[name]) for row in self.rows if row.get(name) is not None]
        return [iteration for iteration, _ in points], [value for _, value in points]

    def env_steps_before(self) -> dict[int, int]:
        """Env steps of training before each iteration; one entry more than there are iterations."""
        total, before = 0, {0: 0}
        for row in self.rows:
            total += row.get("rollout/env_steps") or 0
            before[row["iteration"] + 1] = total
        return before


def read_run(run_dir: str | Path) -> RunData:
    """Read what a report needs.

    Raises:
        ValueError: If the folder holds no run.
    """
    folder = Path(run_dir)
    config = folder / "config.json"
    if not config.exists() and not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} is no run folder: it holds neither config.json nor metrics.jsonl; check --run-dir.")
    films = [path for path in sorted((folder / "videos").glob("*.mp4")) if not path.name.endswith(".tmp.mp4")]
    return RunData(
        run_dir=folder,
        config=json.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
        rows=read_jsonl(folder / "metrics.jsonl"),
        evaluations=read_jsonl(folder / "evaluations.jsonl"),
        summary=read_summary(folder) or RunSummary(),
        films=[path.relative_to(folder) for path in films],
    )
