"""Where metrics go besides the run folder's JSONL: TensorBoard, Weights & Biases, a progress bar."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm


@runtime_checkable
class MetricSink(Protocol):
    """Receives every row. Undefined metrics are left out, values are finite."""

    def write(self, row: Mapping[str, float | int], *, step: int) -> None:
        """Take the metrics of iteration `step`, by name."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class TensorBoardSink:
    """Writes scalar event files with TensorBoard's own writer, without importing torch."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        """Open a new event file.

        Args:
            folder: Where event files go; those of earlier attempts stay.
            first_step: TensorBoard hides what earlier attempts wrote from this iteration on (after a resume).
        """
        event_pb2: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        writer: Any = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._event = event_pb2.Event
        self._writer = writer.EventFileWriter(str(folder))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, row: Mapping[str, float | int], *, step: int) -> None:
        """Write one scalar for each metric."""
        values = [self._summary.Summary.Value(tag=name, simple_value=float(value)) for name, value in row.items()]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """Sends metrics to Weights & Biases (extra `wandb`)."""

    def __init__(self, project: str, run_dir: Path) -> None:
        """Start a run named after the run folder.

        Raises:
            ValueError: If the `wandb` package is not installed.
        """
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(
                f"metrics.wandb_project = {project!r} needs the wandb package ({error}); "
                "pip install 'vlarl_ray[wandb]', or set metrics.wandb_project to null."
            ) from error
        self._run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir))

    def write(self, row: Mapping[str, float | int], *, step: int) -> None:
        """Log one row."""
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class ProgressSink:
    """A progress bar over iterations on stderr; nothing is drawn where stderr is not a terminal."""

    def __init__(self, num_iterations: int | None, *, force: bool = False) -> None:
        """Draw an empty bar.

        Args:
            num_iterations: Length of the bar; None if unknown.
            force: Draw also where stderr is no terminal.
        """
        # tqdm: disable=None means "disable unless it is a terminal".
        disable = False if force else None
        self._bar = tqdm(total=num_iterations, unit="update", file=sys.stderr, disable=disable, leave=True)

    def write(self, row: Mapping[str, float | int], *, step: int) -> None:
        """Move to the end of iteration `step`; rows without a rollout (evaluations) do not move the bar."""
        if "rollout/success_rate" not in row:
            return
        self._bar.update(step + 1 - self._bar.n)
        self._bar.set_postfix_str(f"success {row['rollout/success_rate']:.2f}")

    def close(self) -> None:
        """Leave the bar as it is and move to the next line."""
        self._bar.close()


class ProgressLogHandler(logging.Handler):
    """Log handler that writes above progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one formatted record to stderr."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001 -- logging's contract: a failing handler must not end the run
            self.handleError(record)
