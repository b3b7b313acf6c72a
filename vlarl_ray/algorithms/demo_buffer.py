"""Self behaviour cloning: each task's own best episodes, kept short ones first, and drawn evenly over tasks.

Trajectory ─► cut at first success ─► admit? ─► per-task store ─► sample: task, episode, decision
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from vlarl_ray.config import SelfBCConfig
from vlarl_ray.types import StoredEpisode, Trajectory

Verdict = Literal["admitted", "rejected_fail", "rejected_long"]


@dataclass
class BufferCounters:
    """What happened to offered episodes, over the whole run."""

    offered: int = 0
    admitted: int = 0
    rejected_fail: int = 0
    rejected_long: int = 0
    evicted: int = 0


@dataclass(frozen=True)
class DemoDraw:
    """M decisions of stored episodes: which episode of `episodes`, and which of its decisions."""

    episodes: tuple[StoredEpisode, ...]
    episode_index: Int[np.ndarray, " M"]
    decision_index: Int[np.ndarray, " M"]


@dataclass
class _Store:
    episodes: list[StoredEpisode] = field(default_factory=list)
    """In order of admission."""

    def lengths(self) -> list[int]:
        return [episode.length for episode in self.episodes]


class DemoBuffer:
    """Per-task stores of fixed capacity. Tasks do not evict each other, and are drawn evenly, however easy they are.

    A success enters while its task has fewer than `min_fill` episodes, and later if it is no longer than `statistic` of
    the stored lengths. A full store gives up its longest unpinned episode (the oldest of equals) for a shorter one, so
    its mean length never grows.

    Source:
        AC-PPO + self-BC (arXiv:2509.25718) describes the intent; the rules are ours.
    """

    def __init__(self, cfg: SelfBCConfig) -> None:
        self._cfg = cfg
        self._stores: dict[str, _Store] = {}
        self.counters = BufferCounters()

    def __len__(self) -> int:
        return sum(len(store.episodes) for store in self._stores.values())

    @property
    def episodes(self) -> list[StoredEpisode]:
        """All stored episodes, by task, in order of admission."""
        return [episode for task in sorted(self._stores) for episode in self._stores[task].episodes]

    def seed(self, demonstrations: Sequence[StoredEpisode]) -> None:
        """Fill empty stores with the first `seed_demos` demonstrations of each task."""
        for demonstration in demonstrations:
            store = self._stores.setdefault(demonstration.task_id, _Store())
            if len(store.episodes) < min(self._cfg.seed_demos, self._cfg.capacity):
                store.episodes.append(demonstration)

    def offer(self, trajectory: Trajectory) -> Verdict:
        """Admit an episode, or say why not."""
        verdict = self._judge(trajectory)
        self.counters.offered += 1
        setattr(self.counters, verdict, getattr(self.counters, verdict) + 1)
        return verdict

    def mean_length(self, task_id: str) -> float | None:
        """Mean env steps to success of a task's stored episodes; None without any."""
        lengths = self._stores.get(task_id, _Store()).lengths()
        return float(np.mean(lengths)) if lengths else None

    def sample(self, count: int, rng: np.random.Generator) -> DemoDraw:
        """Draw decisions: a task, then one of its episodes, then one of its decisions, all evenly, with replacement.

        Raises:
            ValueError: If the buffer is empty.
        """
        stores = [self._stores[task].episodes for task in sorted(self._stores) if self._stores[task].episodes]
        if not stores:
            raise ValueError("the demonstration buffer is empty; seed it, or wait for a success.")
        episodes = [episode for store in stores for episode in store]
        sizes = np.array([len(store) for store in stores])
        store = rng.integers(len(stores), size=count)
        index = (np.cumsum(sizes) - sizes)[store] + rng.integers(sizes[store])
        num_decisions = np.array([len(episode.num_env_steps) for episode in episodes])
        return DemoDraw(tuple(episodes), index, rng.integers(num_decisions[index]))

    def metrics(self) -> dict[str, float | None]:
        """Counters, size, and mean length per task."""
        counters = {f"buffer/{name}": float(value) for name, value in asdict(self.counters).items()}
        lengths = {f"buffer/mean_length/{task_id}": self.mean_length(task_id) for task_id in sorted(self._stores)}
        return {**counters, "buffer/episodes": float(len(self)), **lengths}

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the key of every episode in order (JSON types); the rest is in `episodes`."""
        return {"episodes": [episode.key for episode in self.episodes], "counters": asdict(self.counters)}

    def load_state_dict(self, state: Mapping[str, Any], episodes: Mapping[str, StoredEpisode]) -> None:
        """Restore `state_dict`, taking the arrays of each key from `episodes`."""
        self._stores = {}
        for key in state["episodes"]:
            self._stores.setdefault(episodes[key].task_id, _Store()).episodes.append(episodes[key])
        self.counters = BufferCounters(**state["counters"])

    def _judge(self, trajectory: Trajectory) -> Verdict:
        length = trajectory.first_success_env_step
        if length is None:
            return "rejected_fail"
        store = self._stores.setdefault(trajectory.task.task_id, _Store())
        lengths = store.lengths()
        if len(lengths) >= self._cfg.min_fill and length > self._limit(lengths):
            return "rejected_long"
        if len(lengths) >= self._cfg.capacity and not self._evict_longer_than(store, length):
            return "rejected_long"
        store.episodes.append(StoredEpisode.from_trajectory(trajectory))
        return "admitted"

    def _limit(self, lengths: Sequence[int]) -> float:
        cfg = self._cfg
        return {
            "mean": lambda: float(np.mean(lengths)),
            "median": lambda: float(np.median(lengths)),
            "max": lambda: float(np.max(lengths)),
            "best": lambda: cfg.best_factor * float(np.min(lengths)),
            "quantile": lambda: float(np.quantile(lengths, cfg.quantile)),
        }[cfg.statistic]()

    def _evict_longer_than(self, store: _Store, length: int) -> bool:
        """Evict the longest unpinned episode if it is longer than `length`."""
        unpinned = [episode for episode in store.episodes if not episode.pinned]
        longest = max(unpinned, key=lambda episode: episode.length, default=None)  # the first, thus oldest, of equals
        if longest is None or longest.length <= length:
            return False
        store.episodes = [episode for episode in store.episodes if episode is not longest]  # arrays have no ==
        self.counters.evicted += 1
        return True
