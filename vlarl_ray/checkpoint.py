"""Atomic checkpoints: files first, then their sizes and hashes in a manifest, whose writing is the commit.

    <run_dir>/checkpoints/000004-step00000030/   adapter.safetensors ... state.json MANIFEST.json
                          ^ order of commits  ^ step of the run

A folder without a valid manifest was never committed: a loader passes over it and the next commit sweeps it. Nothing is
renamed (object stores cannot) and nothing is ever unpickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from pyarrow import fs

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
STATE = "state.json"
FORMAT = 1
_FOLDER = re.compile(r"(\d{6,})-step(\d{8,})")
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_TENSORS = ".safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted, or cannot be written; the message names file and reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, verified byte by byte."""

    step: int
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    """Tensors by name, by group; each group is a file `<group>.safetensors`."""
    state: dict[str, Any]
    folder: str
    """Where it was read from (a path of its file system)."""


def open_run_dir(run_dir: str) -> tuple[fs.FileSystem, str]:
    """Resolve a local path or a `pyarrow.fs` URI into a file system and a path on it."""
    if "://" in run_dir:
        return fs.FileSystem.from_uri(run_dir)
    return fs.LocalFileSystem(), run_dir


def commit(
    run_dir: str,
    step: int,
    *,
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    state: Mapping[str, Any],
    keep: int,
    filesystem: fs.FileSystem | None = None,
) -> str:
    """Write one checkpoint; it exists from the moment its manifest is complete, and not before.

    Args:
        run_dir: Run folder or URI.
        step: Updates done.
        arrays: Tensors by name, by group; each group becomes a file (`"adapter": {"q_proj.A": ...}`).
        state: Everything else, in JSON types; floats survive exactly.
        keep: Committed checkpoints to keep, at least 2; older ones are deleted once this many newer ones verify.
        filesystem: File system that `run_dir` is a path of; None derives it from `run_dir`.

    Returns:
        The folder written.

    Raises:
        CheckpointError: If a name, `keep` or `step` is not allowed, or `state` is not JSON.
    """
    files = _serialize(arrays, state)
    if keep < 2:
        raise CheckpointError(f"keep = {keep}: must be >= 2, so that a damaged newest checkpoint has a predecessor.")
    if step < 0:
        raise CheckpointError(f"step = {step}: must be >= 0.")
    system, base = (filesystem, run_dir) if filesystem else open_run_dir(run_dir)
    root = f"{base.rstrip('/')}/checkpoints"
    existing = _folders(system, root)
    sequence = max((int(_match(name)[1]) for name in existing), default=-1) + 1
    folder = f"{root}/{sequence:06d}-step{step:08d}"
    system.create_dir(folder, recursive=True)
    for name, data in files.items():
        _write(system, f"{folder}/{name}", data)
    _write(system, f"{folder}/{MANIFEST}", _manifest(step, files))
    logger.info("Committed checkpoint of step %d to %s", step, folder)
    _sweep(system, root, existing, keep)
    return folder


def load_latest(run_dir: str, *, filesystem: fs.FileSystem | None = None) -> Checkpoint | None:
    """Load the newest checkpoint that verifies; each newer one that does not is logged with its reason.

    Returns:
        None if nothing was ever committed.

    Raises:
        CheckpointError: If checkpoints were committed but none of them verifies.
    """
    system, base = (filesystem, run_dir) if filesystem else open_run_dir(run_dir)
    root = f"{base.rstrip('/')}/checkpoints"
    reasons = []
    for name in reversed(_folders(system, root)):
        folder = f"{root}/{name}"
        if not _is_file(system, f"{folder}/{MANIFEST}"):
            # a kill inside a commit leaves this, and so does a deleted manifest
            logger.warning("Skipped checkpoint %s: no %s, so it was never committed", folder, MANIFEST)
            continue
        try:
            return _load(system, folder, step=int(_match(name)[2]))
        except CheckpointError as error:
            logger.warning("Skipped damaged checkpoint %s: %s", folder, error)
            reasons.append(f"{folder}: {error}")
    if reasons:
        raise CheckpointError(
            "run_dir holds checkpoints, but none is intact; restore one of them, or start over in another run_dir.\n"
            + "\n".join(reasons)
        )
    return None


def load(folder: str) -> Checkpoint:
    """Load one checkpoint, for example to take the policy of an earlier update.

    Args:
        folder: Path or URI of its folder.

    Raises:
        CheckpointError: If it is no checkpoint, or not what was committed.
    """
    system, path = open_run_dir(folder)
    match = _FOLDER.fullmatch(path.rstrip("/").rpartition("/")[2])
    if match is None or not _is_file(system, f"{path}/{MANIFEST}"):
        raise CheckpointError(f"{folder} is no committed checkpoint; name a folder of RUN_DIR/checkpoints.")
    try:
        return _load(system, path.rstrip("/"), step=int(match[2]))
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged: {error}.") from error


def is_checkpoint(folder: str) -> bool:
    """Whether a folder's name is that of a checkpoint."""
    return _FOLDER.fullmatch(folder.rstrip("/").rpartition("/")[2]) is not None


def _serialize(arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]) -> dict[str, bytes]:
    """Turn the content into bytes per file, `state.json` last.

    Raises:
        CheckpointError: On a bad file name or content that is not JSON.
    """
    files = {}
    for group, tensors in arrays.items():
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"group {group!r} becomes a file name: use letters, digits, '_' and '-' only.")
        files[group + _TENSORS] = safetensors.numpy.save(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        )
    try:
        files[STATE] = _canonical(dict(state))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state must hold JSON types and finite numbers only: {error}.") from error
    return files


def _canonical(value: Any) -> bytes:
    """Encode JSON in the one way the loader accepts, so that any changed byte shows."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    body = {
        "format": FORMAT,
        "step": step,
        "files": {name: {"size": len(data), "sha256": _sha256(data)} for name, data in files.items()},
    }
    return _canonical({"body": body, "sha256": _sha256(_canonical(body))})


def _load(system: fs.FileSystem, folder: str, *, step: int) -> Checkpoint:
    """Verify and decode one folder.

    Raises:
        CheckpointError: Naming the first file that is not what was committed.
    """
    files = {name: data for name, data in _verified_files(system, folder, step=step)}
    try:
        state = json.loads(files.pop(STATE))
        arrays = {name.removesuffix(_TENSORS): safetensors.numpy.load(data) for name, data in files.items()}
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"its content does not decode ({error})") from error
    return Checkpoint(step=step, arrays=arrays, state=state, folder=folder)


def _verified_files(system: fs.FileSystem, folder: str, *, step: int) -> list[tuple[str, bytes]]:
    """Read every file that the manifest lists.

    Raises:
        CheckpointError: If the manifest is not canonical and self-consistent, or a file differs from it.
    """
    raw = _read(system, folder, MANIFEST)
    try:
        manifest = json.loads(raw)
        body, digest = manifest["body"], manifest["sha256"]
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        recorded = (body["format"], body["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is not a manifest ({type(error).__name__})") from error
    if raw != _canonical(manifest) or digest != _sha256(_canonical(body)):
        raise CheckpointError(f"{MANIFEST} was changed: its own checksum does not match")
    if recorded != (FORMAT, step):
        raise CheckpointError(f"{MANIFEST} is of (format, step) = {recorded}, the folder of {(FORMAT, step)}")
    files = []
    for name, (size, sha256) in listed.items():
        # a manifest comes from outside: it may only name plain files inside its own folder
        if name != STATE and not (name.endswith(_TENSORS) and _GROUP.fullmatch(name.removesuffix(_TENSORS))):
            raise CheckpointError(f"{MANIFEST} lists {name!r}, which is no file name of a checkpoint")
        data = _read(system, folder, name, size)
        if _sha256(data) != sha256:
            raise CheckpointError(f"{name}: sha256 differs from the manifest's")
        files.append((name, data))
    return files


def _sweep(system: fs.FileSystem, root: str, older: list[str], keep: int) -> None:
    """Delete uncommitted folders, and committed ones that have `keep` verified newer ones (the new one included)."""
    verified = 1
    for name in reversed(older):
        folder = f"{root}/{name}"
        if not _is_file(system, f"{folder}/{MANIFEST}"):
            logger.info("Swept uncommitted checkpoint folder %s", folder)
        elif verified < keep:
            try:
                _verified_files(system, folder, step=int(_match(name)[2]))
                verified += 1
            except CheckpointError as error:
                logger.warning("Checkpoint %s is damaged and does not count towards keep: %s", folder, error)
            continue
        else:
            # manifest first: a kill during the deletion leaves an uncommitted folder, never a damaged one
            system.delete_file(f"{folder}/{MANIFEST}")
        system.delete_dir(folder)


def _folders(system: fs.FileSystem, root: str) -> list[str]:
    """Names of checkpoint folders, in order of commit."""
    infos = system.get_file_info(fs.FileSelector(root, allow_not_found=True))
    names = [info.base_name for info in infos if info.type == fs.FileType.Directory]
    return sorted((name for name in names if _FOLDER.fullmatch(name)), key=lambda name: int(_match(name)[1]))


def _match(name: str) -> re.Match[str]:
    match = _FOLDER.fullmatch(name)
    assert match is not None
    return match


def _is_file(system: fs.FileSystem, path: str) -> bool:
    return system.get_file_info(path).type == fs.FileType.File


def _write(system: fs.FileSystem, path: str, data: bytes) -> None:
    with system.open_output_stream(path) as stream:
        stream.write(data)


def _read(system: fs.FileSystem, folder: str, name: str, size: int | None = None) -> bytes:
    """Read a file, of the given size if one is given.

    Raises:
        CheckpointError: If it is missing or has another size.
    """
    info = system.get_file_info(f"{folder}/{name}")
    if info.type != fs.FileType.File:
        raise CheckpointError(f"{name} is missing")
    if size is not None and info.size != size:
        raise CheckpointError(f"{name} has {info.size} bytes, committed were {size}")
    with system.open_input_stream(f"{folder}/{name}") as stream:
        return stream.read()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
