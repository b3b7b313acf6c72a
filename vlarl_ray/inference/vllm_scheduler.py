"""Lets the rows of a request enter vLLM's batch together. Imported in vLLM's processes only."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vlarl_ray.inference.vllm_start import GROUP, SIZE


class WholeRequests(Scheduler):
    """Keeps rows back until the last of their request is there.

    `AsyncLLM` sends rows one by one, and an idle engine starts on the first at once: it would take the first alone,
    then the few that came meanwhile, and so on, each in passes of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept_back: dict[str, list[Any]] = {}

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
        return super().finish_requests(request_ids if gone is None else gone, finished_status)
