"""Demonstrations on disk: a folder of Parquet files, one row per env step, written once and checked when read.

Columns: `episode`, `step`, `task_id`, `instruction`, `init_state_id`, `frame` (raw uint8 bytes), `proprio`, `action`
(null in an episode's last row, which holds the state reached) and `success`. The schema's metadata says what frames and
initial states depend on; a store that does not fit the run is refused rather than mixed in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, UInt8

from vlarl_ray.config import EnvConfig

FORMAT = 1
_METADATA_KEY = b"vlarl_ray.demonstrations"
_SCHEMA = pa.schema(
    [
        ("episode", pa.int32()),
        ("step", pa.int32()),
        ("task_id", pa.string()),
        ("instruction", pa.string()),
        ("init_state_id", pa.int32()),
        ("frame", pa.binary()),
        ("proprio", pa.list_(pa.float32())),
        ("action", pa.list_(pa.float32())),
        ("success", pa.bool_()),
    ]
)
_ENV_FIELDS = ("suite", "image_size", "camera", "render_profile", "train_seed", "eval_seed", "options")


@dataclass(frozen=True)
class Demonstration:
    """One successful episode of T env steps, with a frame at every env step so that a chunk can start anywhere."""

    task_id: str
    instruction: str
    init_state_id: int
    """Of the training split; held-out initial states are never demonstrated."""
    frames: UInt8[np.ndarray, "T1 V H W 3"]
    """T+1 frames; entry t is what was seen before action t."""
    proprio: Float32[np.ndarray, "T1 P"]
    actions: Float32[np.ndarray, "T D"]
    """What the simulator received: after noise and clipping, env units."""
    success: bool = True


def chunks(
    actions: Float32[np.ndarray, "T D"], chunk_length: int
) -> tuple[Float32[np.ndarray, "T K D"], Bool[np.ndarray, "T K"]]:
    """Cut the chunk that starts at every env step; past the end the last action is repeated and the mask is False."""
    index = np.arange(len(actions))[:, None] + np.arange(chunk_length)
    return actions[np.minimum(index, len(actions) - 1)], index < len(actions)


def env_settings(env: EnvConfig) -> dict[str, Any]:
    """What frames and initial states of a demonstration depend on."""
    return json.loads(json.dumps({name: getattr(env, name) for name in _ENV_FIELDS}))


def write_demonstrations(
    path: Path, demonstrations: Iterable[Demonstration], *, settings: Mapping[str, Any], first_episode: int = 0
) -> int:
    """Write one Parquet file, a row group per episode.

    Args:
        path: File to write.
        demonstrations: Episodes; all frames of one shape.
        settings: JSON-able facts; at least those of `env_settings`.
        first_episode: Number of the first episode.

    Returns:
        How many episodes were written.

    Raises:
        ValueError: If a frame shape differs from the others.
    """
    num_written = 0
    writer: pq.ParquetWriter | None = None
    shape: list[int] = []
    try:
        for demonstration in demonstrations:
            if writer is None:
                shape = list(demonstration.frames.shape[1:])
                facts = {"format": FORMAT, "frame_shape": shape, "settings": dict(settings)}
                schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(facts, sort_keys=True)})
                writer = pq.ParquetWriter(path, schema, compression="zstd")
            if list(demonstration.frames.shape[1:]) != shape:
                found = list(demonstration.frames.shape[1:])
                raise ValueError(f"{path}: frames of {found} in a file of {shape}; one store holds one shape.")
            writer.write_table(_rows(demonstration, first_episode + num_written, writer.schema))
            num_written += 1
    finally:
        if writer is not None:
            writer.close()
    return num_written


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings a store was written with.

    Raises:
        ValueError: If the folder holds no demonstrations, or files written with different settings.
    """
    return _read_facts(path)["settings"]


def load_demonstrations(
    path: Path | str,
    *,
    env: EnvConfig | None = None,
    suite: str | None = None,
    task_ids: Sequence[str] | None = None,
) -> list[Demonstration]:
    """Read a store, and check that it fits.

    Args:
        path: Folder of Parquet files.
        env: Suite, camera, render profile and seeds the run uses; the store's must be equal.
        suite: Name of the suite; checked where `env` does not say.
        task_ids: Tasks to return; each must have a demonstration. None returns all.

    Raises:
        ValueError: If the folder holds no demonstrations, files of different settings, a foreign schema, broken
            episodes, no demonstration of a task, or was made with another suite, camera, render profile or seed.
    """
    path = Path(path)
    facts = _read_facts(path)
    expected: dict[str, Any] = env_settings(env) if env is not None else {} if suite is None else {"suite": suite}
    for name, wanted in expected.items():
        stored = facts["settings"].get(name)
        if stored != wanted:
            raise ValueError(
                f"demos.path = {path}: recorded with env.{name} = {stored!r}, but the run has {wanted!r}; "
                "collect anew (demos.path: null), or set the run to what was recorded."
            )
    demonstrations = [
        _episode(group, facts["frame_shape"], path)
        for file in _files(path)
        for group in _row_groups(file)
        if task_ids is None or group["task_id"][0].as_py() in task_ids
    ]
    missing = sorted(set(task_ids or ()) - {demonstration.task_id for demonstration in demonstrations})
    if missing:
        raise ValueError(
            f"demos.path = {path}: no demonstration of {missing}; collect them, or drop them from env.tasks."
        )
    return demonstrations


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet"))


def _read_facts(path: Path) -> dict[str, Any]:
    files = _files(path)
    if not files:
        raise ValueError(
            f"demos.path = {path}: no Parquet files; give the folder `vlarl collect` wrote, or null to collect."
        )
    facts: dict[str, Any] = {}
    for file in files:
        schema = pq.read_schema(file)
        if not schema.equals(_SCHEMA) or _METADATA_KEY not in (schema.metadata or {}):
            raise ValueError(f"{file}: its columns are not those of a demonstration store; has {schema.names}.")
        found = json.loads(schema.metadata[_METADATA_KEY])
        if found["format"] != FORMAT:
            raise ValueError(
                f"{file}: format {found['format']}, this version reads {FORMAT}; collect the demonstrations anew."
            )
        if facts and found != facts:
            different = [k for k, v in found["settings"].items() if facts["settings"].get(k) != v] or ["frame_shape"]
            raise ValueError(
                f"{file}: {different} differ from {files[0].name}; a store holds demonstrations of one setting."
            )
        facts = found
    return facts


def _row_groups(file: Path) -> Iterable[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group)


def _rows(demonstration: Demonstration, episode: int, schema: pa.Schema) -> pa.Table:
    num_rows = len(demonstration.frames)
    constant = {
        "episode": episode,
        "task_id": demonstration.task_id,
        "instruction": demonstration.instruction,
        "init_state_id": demonstration.init_state_id,
    }
    columns = {name: [value] * num_rows for name, value in constant.items()} | {
        "step": list(range(num_rows)),
        "frame": [frame.tobytes() for frame in demonstration.frames],
        "proprio": demonstration.proprio.tolist(),
        "action": [*demonstration.actions.tolist(), None],
        "success": [False] * (num_rows - 1) + [demonstration.success],
    }
    return pa.table([pa.array(columns[field.name], type=field.type) for field in schema], schema=schema)


def _episode(rows: pa.Table, frame_shape: Sequence[int], path: Path) -> Demonstration:
    steps = rows["step"].to_pylist()
    actions = rows["action"].to_pylist()
    episode, task_id = rows["episode"][0].as_py(), rows["task_id"][0].as_py()
    whole = steps == list(range(len(steps))) and len(set(rows["episode"].to_pylist())) == 1
    if not whole or len(steps) < 2 or actions[-1] is not None or None in actions[:-1]:
        raise ValueError(f"{path}: episode {episode} of {task_id} is not whole; collect the demonstrations anew.")
    frames = np.frombuffer(b"".join(rows["frame"].to_pylist()), dtype=np.uint8)
    return Demonstration(
        task_id=task_id,
        instruction=rows["instruction"][0].as_py(),
        init_state_id=rows["init_state_id"][0].as_py(),
        frames=frames.reshape(len(steps), *frame_shape).copy(),
        proprio=np.array(rows["proprio"].to_pylist(), dtype=np.float32),
        actions=np.array(actions[:-1], dtype=np.float32),
        success=rows["success"][-1].as_py(),
    )
