"""Stored episodes on disk: one safetensors file each, written once, so that a commit writes only what is new."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from vlarl_ray.types import FrameRef, StoredEpisode

Fetch = Callable[[Sequence[FrameRef]], Sequence[Any]]


class EpisodeStore:
    """Files of the episodes that a checkpoint refers to.

    Args:
        folder: Where they lie; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[str, str] = {}
        self._before: set[str] = set()

    def write(self, episodes: Sequence[StoredEpisode], fetch: Fetch) -> dict[str, str]:
        """Write the episodes that are not there yet, and delete those that neither this call nor the last one names.

        Those of the last call belong to a checkpoint that may still be needed.

        Args:
            episodes: All that the coming checkpoint refers to.
            fetch: Resolves frame references.

        Returns:
            sha256 of each file by key, to be committed with the checkpoint.
        """
        new = [episode for episode in episodes if episode.key not in self._digests]
        for episode, frames in zip(new, fetch([episode.frames for episode in new]), strict=True):
            self._digests[episode.key] = self._write(episode, np.ascontiguousarray(frames))
        current = {episode.key for episode in episodes}
        for key in set(self._digests) - current - self._before:
            self._path(key).unlink(missing_ok=True)
            del self._digests[key]
        self._before = current
        return {key: self._digests[key] for key in sorted(current)}

    def read(self, digests: Mapping[str, str], put: Callable[[Any], FrameRef]) -> dict[str, StoredEpisode]:
        """Read and verify the episodes of a checkpoint.

        Args:
            digests: What `write` returned.
            put: Stores frames and returns a reference to them.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        episodes = {}
        for key, digest in digests.items():
            path = self._path(key)
            data = path.read_bytes() if path.exists() else b""
            if hashlib.sha256(data).hexdigest() != digest:
                what = "is damaged" if data else "is missing"
                raise ValueError(f"{path} {what}; the checkpoint that refers to it cannot be resumed.")
            arrays = load(data)
            facts = json.loads(bytes(arrays["facts"]).decode())
            episodes[key] = StoredEpisode(
                key=key,
                frames=put(arrays["frames"]),
                proprio=arrays["proprio"],
                actions=arrays["actions"],
                num_env_steps=arrays["num_env_steps"],
                **facts,
            )
        self._digests = dict(digests)
        self._before = set(digests)
        return episodes

    def _write(self, episode: StoredEpisode, frames: np.ndarray) -> str:
        names = ("task_id", "instruction", "length", "pinned")
        facts = json.dumps({name: getattr(episode, name) for name in names})
        data = save(
            {
                "frames": frames,
                "proprio": np.ascontiguousarray(episode.proprio),
                "actions": np.ascontiguousarray(episode.actions),
                "num_env_steps": np.ascontiguousarray(episode.num_env_steps),
                "facts": np.frombuffer(facts.encode(), dtype=np.uint8),
            }
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(episode.key)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return hashlib.sha256(data).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"
