"""The run folder's `episodes.parquet`: one row per episode, training and evaluation, that survives a kill.

    append ──► episodes.parts/<first row>-<end row>.parquet ──► (folded now and then, and on close) episodes.parquet

Every file appears by rename, whole or not at all; parts that a kill left behind although they were folded are ignored.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlarl_ray.types import TaskSpec, Trajectory

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),
        ("iteration", pa.int64()),
        ("slot", pa.int64()),
        ("group_id", pa.int64()),
        ("split", pa.string()),
        ("suite", pa.string()),
        ("task", pa.string()),
        ("init_state_id", pa.int64()),
        ("init_hash", pa.string()),
        ("seed", pa.uint64()),
        ("temperature", pa.float64()),
        ("success", pa.bool_()),
        ("success_at_last_step", pa.bool_()),
        ("first_success_env_step", pa.int64()),
        ("env_steps", pa.int64()),
        ("num_decisions", pa.int64()),
        ("max_env_steps", pa.int64()),
        ("terminated", pa.bool_()),
        ("truncated", pa.bool_()),
        ("return", pa.float64()),
        ("policy_version", pa.int64()),
        ("worker", pa.int64()),
    ]
)
"""`first_success_env_step` is 1-based and null without success; `policy_version` is the oldest among the decisions."""

_FOLD_FRACTION = 8
"""Parts are folded once they hold 1/8 of the folded rows: the work stays linear in the length of the run."""


class EpisodeTable:
    """Appends episodes and keeps `episodes.parquet` nearly up to date; `read_episodes` sees every row at any time."""

    def __init__(self, run_dir: str | Path, *, resume_from: int | None = None) -> None:
        """Open the table of a run folder.

        Args:
            run_dir: Run folder on a local (or mounted) file system; created if missing.
            resume_from: `num_rows` at the commit that the run continues from; later rows are dropped.
        """
        self._run_dir = Path(run_dir)
        _parts_folder(self._run_dir).mkdir(parents=True, exist_ok=True)
        for leftover in (*self._run_dir.glob("*.parquet.tmp"), *_parts_folder(self._run_dir).glob("*.tmp")):
            leftover.unlink()
        self._folded = _folded_rows(self._run_dir)
        self._rows = max([self._folded, *(end for _, end, _ in _parts(self._run_dir))])
        if resume_from is not None:
            self.truncate_to(resume_from)

    @property
    def num_rows(self) -> int:
        """Rows on disk: part of a commit."""
        return self._rows

    def append(self, trajectories: Sequence[Trajectory], init_hash: Callable[[TaskSpec], str]) -> None:
        """Add one row per episode.

        Args:
            trajectories: Finished episodes of one iteration or evaluation.
            init_hash: Digest of a task's initial state, from `Suite.init_state_hash`.
        """
        if not trajectories:
            return
        rows = pa.Table.from_pylist([_row(t, init_hash(t.task)) for t in trajectories], schema=SCHEMA)
        end = self._rows + len(trajectories)
        _write(rows, _parts_folder(self._run_dir) / f"{self._rows:012d}-{end:012d}.parquet")
        self._rows = end
        if (self._rows - self._folded) * _FOLD_FRACTION >= self._folded:
            self.fold()

    def fold(self) -> None:
        """Rewrite `episodes.parquet` with every row and remove the parts."""
        _write(read_episodes(self._run_dir), self._run_dir / "episodes.parquet")
        self._folded = self._rows
        for _, _, path in _parts(self._run_dir):
            path.unlink()

    def truncate_to(self, num_rows: int) -> None:
        """Drop the rows after the first `num_rows`.

        Raises:
            ValueError: If the table is shorter.
        """
        if num_rows > self._rows:
            raise ValueError(
                f"{self._run_dir}/episodes.parquet has {self._rows} rows, fewer than the {num_rows} of the checkpoint; "
                "it was changed from outside. Restore it, or resume from an older checkpoint."
            )
        if num_rows < self._rows:
            # One rename keeps the old table readable until the new one is whole; parts of dropped rows go first.
            kept = read_episodes(self._run_dir).slice(0, num_rows)
            for start, _, path in _parts(self._run_dir):
                if start >= num_rows:
                    path.unlink()
            _write(kept, self._run_dir / "episodes.parquet")
            for _, _, path in _parts(self._run_dir):
                path.unlink()
            self._rows = self._folded = num_rows

    def close(self) -> None:
        """Fold the parts."""
        if self._rows > self._folded or not (self._run_dir / "episodes.parquet").exists():
            self.fold()


def read_episodes(run_dir: str | Path) -> pa.Table:
    """Read every episode of a run folder, of a finished, running or killed run, in the order they were written.

    Raises:
        ValueError: If rows are missing between two files.
    """
    folder = Path(run_dir)
    folded = folder / "episodes.parquet"
    tables = [pq.read_table(folded, schema=SCHEMA) if folded.exists() else SCHEMA.empty_table()]
    end = tables[0].num_rows
    for start, stop, path in _parts(folder):
        if stop <= end:
            continue
        if start > end:
            raise ValueError(f"{folder}: episodes {end} to {start} are missing; a file of episodes.parts/ was removed.")
        tables.append(pq.read_table(path, schema=SCHEMA).slice(end - start))
        end = stop
    return pa.concat_tables(tables)


def _row(trajectory: Trajectory, init_hash: str) -> dict[str, object]:
    task = trajectory.task
    return {
        "run_id": task.run_id,
        "iteration": task.iteration,
        "slot": task.slot,
        "group_id": task.group_id,
        "split": task.split,
        "suite": task.suite,
        "task": task.task_id,
        "init_state_id": task.init_state_id,
        "init_hash": init_hash,
        "seed": task.seed,
        "temperature": task.temperature,
        "success": trajectory.success,
        "success_at_last_step": trajectory.success_at_last_step,
        "first_success_env_step": trajectory.first_success_env_step,
        "env_steps": trajectory.total_env_steps,
        "num_decisions": trajectory.num_decisions,
        "max_env_steps": task.max_env_steps,
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "return": trajectory.episode_return,
        "policy_version": int(trajectory.policy_versions.min()),
        "worker": trajectory.worker,
    }


def _parts_folder(run_dir: Path) -> Path:
    return run_dir / "episodes.parts"


def _parts(run_dir: Path) -> list[tuple[int, int, Path]]:
    """(first row, end row, file) of every part, in order."""
    found = []
    for path in sorted(_parts_folder(run_dir).glob("*.parquet")):
        start, _, end = path.stem.partition("-")
        found.append((int(start), int(end), path))
    return found


def _folded_rows(run_dir: Path) -> int:
    path = run_dir / "episodes.parquet"
    return pq.read_metadata(path).num_rows if path.exists() else 0


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_suffix(".parquet.tmp")
    pq.write_table(table, temporary, compression="zstd")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
