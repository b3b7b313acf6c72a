"""All ranks of the learner as one: calls every rank, waits with a deadline, merges. Never touches a frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Num

from vlarl_ray.learner.batch import deal_trajectories
from vlarl_ray.learner.memory import MeasuredMemory
from vlarl_ray.transport import Transport
from vlarl_ray.types import ActRequest, Scores, TrainBatch, Trajectory


class LearnerGroup:
    """The learner, to the driver.

    Args:
        ranks: `Learner`s, or actors with the same methods, as targets of `transport`; rank r at index r. Ranks resolve
            frame references themselves: `fetch` is not passed to them.
        transport: How to call them.
        deadline_s: Longest wait for a call.
    """

    def __init__(self, ranks: Sequence[Any], transport: Transport, *, deadline_s: float) -> None:
        if not ranks:
            raise ValueError("LearnerGroup needs >= 1 ranks, got 0; set learner.num_ranks >= 1.")
        self._ranks = list(ranks)
        self._transport = transport
        self._deadline_s = deadline_s

    def score(self, trajectories: Sequence[Trajectory]) -> list[Scores]:
        """Score trajectories under the current weights; one entry for each, in order."""
        shares = deal_trajectories([t.num_decisions + 1 for t in trajectories], len(self._ranks))
        scored: dict[int, Scores] = {}
        for share, scores in zip(shares, self._all("score", list(trajectories)), strict=True):
            scored.update(zip(share, scores, strict=True))
        return [scored[i] for i in range(len(trajectories))]

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """Update the weights; returns metrics `learn/...`, which are global."""
        return self._all("update", batch)[0]

    def measured_memory(self) -> MeasuredMemory | None:
        """Return what the rank with the most tensors took in the first update that trained everything."""
        ranks = self._all("measured_memory")
        return None if None in ranks else max(ranks, key=lambda rank: rank.total)

    def weight_update(self, version: int) -> tuple[Any, int, dict[str, str]]:
        """Gather what servers need.

        Returns:
            A reference to the `WeightUpdate`, which stays where it is; its bytes; digests taken on the learner.
        """
        handles = self._call("weight_update", version)
        self._transport.get(handles[1:], timeout_s=self._deadline_s, what="gathering weights")
        summary = self._transport.call(self._ranks[0], "weight_update_summary", version)
        [(num_bytes, digests)] = self._transport.get([summary], timeout_s=self._deadline_s, what="gathering weights")
        return handles[0], num_bytes, digests

    def expected_checksums(self, update: Any, dtype: str, lora: str = "merged") -> dict[str, str]:
        """Fingerprint what a server must load for an update, given by reference, see `Learner`; on rank 0."""
        asked = self._transport.call(self._ranks[0], "expected_checksums", update, dtype, lora)
        [checksums] = self._transport.get([asked], timeout_s=self._deadline_s, what="merging weights")
        return checksums

    def logprobs(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L"]:
        """Score given tokens under the current weights."""
        return self._all("logprobs", request, tokens)[0]

    def state_dict(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        """Collect arrays by file and name, and JSON state; they load into any number of ranks."""
        return self._all("state_dict")[0]

    def load_state_dict(self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self._all("load_state_dict", arrays, state)

    def shutdown(self) -> None:
        """Make all ranks leave their process group."""
        self._all("shutdown")

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._transport.get(
            self._call(method, *args), timeout_s=self._deadline_s, what=f"Learner.{method} on {len(self._ranks)} ranks"
        )

    def _call(self, method: str, *args: Any) -> list[Any]:
        return [self._transport.call(rank, method, *args) for rank in self._ranks]
