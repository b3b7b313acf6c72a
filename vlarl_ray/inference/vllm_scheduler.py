"""Lets the rows of a request enter vLLM's batch together, and their log-probabilities leave it together.

Imported in vLLM's processes only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import RequestStatus

from vlarl_ray.inference.vllm_start import GROUP, SIZE


class WholeRequests(Scheduler):
    """Keeps rows back until the last of their request is there, and log-probabilities until the last of their row is.

    `AsyncLLM` sends rows one by one, and an idle engine starts on the first at once: it would take the first alone,
    then the few that came meanwhile, and so on, each in passes of its own.

    vLLM sends what a row gained after every token. The token itself is a small integer, and each must go out: vLLM
    notes the version of the weights that made it on its way. Its log-probability is three arrays, though, that cost
    more to pack and unpack than all else of the message, and nobody reads them before the row is complete.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept_back: dict[str, list[Any]] = {}
        self._logprobs: dict[str, list[LogprobsLists]] = {}
        """Of rows that are not complete, by their id."""

    def add_request(self, request: Any) -> None:
        """Take a row in, or keep it back."""
        extra = (request.sampling_params and request.sampling_params.extra_args) or {}
        if GROUP not in extra:
            super().add_request(request)
            return
        rows = self._kept_back.setdefault(extra[GROUP], [])
        rows.append(request)
        if len(rows) == extra[SIZE]:
            for row in self._kept_back.pop(extra[GROUP]):
                super().add_request(row)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Any]:
        """End rows; a request that loses one while it is kept back is let in, as it will not become whole."""
        gone = None if request_ids is None else {request_ids} if isinstance(request_ids, str) else set(request_ids)
        for group, rows in list(self._kept_back.items()):
            if gone is None or any(row.request_id in gone for row in rows):
                for row in self._kept_back.pop(group):
                    super().add_request(row)
        for request_id in list(self._logprobs) if gone is None else gone:
            self._logprobs.pop(request_id, None)
        return super().finish_requests(request_ids if gone is None else gone, finished_status)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        """Return what goes out after a step; log-probabilities with the last token of their row."""
        sent: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)
        for output in (output for outputs in sent.values() for output in outputs.outputs):
            if output.new_logprobs is not None:
                self._logprobs.setdefault(output.request_id, []).append(output.new_logprobs)
            parts = self._logprobs.pop(output.request_id, None) if output.finished else None
            output.new_logprobs = joined(parts) if parts else None
        return sent


def joined(parts: list[LogprobsLists]) -> LogprobsLists:
    """Join the log-probabilities of consecutive tokens of a row.

    Their first column is of the sampled token. How many others there are depends on all rows of a step, not only on
    this one; only columns that each step has were asked for.
    """
    width = min(part.logprobs.shape[1] for part in parts)
    return LogprobsLists(
        np.concatenate([part.logprob_token_ids[:, :width] for part in parts]),
        np.concatenate([part.logprobs[:, :width] for part in parts]),
        np.concatenate([part.sampled_token_ranks for part in parts]),
    )
