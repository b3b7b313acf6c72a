"""Ship one version of the weights from learner to servers, and prove that it arrived.

LearnerGroup.weight_update ─► object store ─► every server: load (merge) ─► digests, probe ─► or stop the run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlarl_ray.transport import Transport
from vlarl_ray.types import ActRequest
from vlarl_ray.weights.canary import Probe, compare_digests, compare_probe


@runtime_checkable
class PublishesWeights(Protocol):
    """What the publisher needs of the learner group."""

    def weight_update(self, version: int) -> Any:
        """Return a reference to a `(WeightUpdate)` and its `(num_bytes, digests)`."""
        ...

    def logprobs(self, request: ActRequest, tokens: np.ndarray) -> np.ndarray:
        """Score the probe under the learner's weights."""
        ...


class WeightPublisher:
    """Publishes versions; refuses to let a run continue on wrong weights.

    Args:
        learner: Source of the weights.
        servers: Targets with `load(update)` and `logprobs(request, tokens)`, as `Transport` targets.
        transport: How to reach the servers.
        probe: Batch for the comparison.
        tolerance: Largest accepted log-probability difference, nats.
        deadline_s: Longest wait for a server.
    """

    def __init__(
        self,
        learner: PublishesWeights,
        servers: Sequence[Any],
        transport: Transport,
        *,
        probe: Probe,
        tolerance: float,
        deadline_s: float,
    ) -> None:
        self._learner = learner
        self._servers = list(servers)
        self._transport = transport
        self._probe = probe
        self._tolerance = tolerance
        self._deadline_s = deadline_s
        self._previous: np.ndarray | None = None
        self._noise = 0.0

    def publish(self, version: int) -> dict[str, float]:
        """Make every server answer with version `version`.

        Returns:
            Metrics of the publication.

        Raises:
            CanaryError: If a server does not hold what was sent.
        """
        reference, num_bytes, digests = self._learner.weight_update(version)
        loads = [self._transport.call(server, "load", reference) for server in self._servers]
        reports = self._transport.get(loads, timeout_s=self._deadline_s, what="loading weights")
        for index, report in enumerate(reports):
            compare_digests(digests, report.digests, where=f"server {index}", version=version)
        gap = self._compare_probe(version)
        return {
            "publish/bytes": float(num_bytes),
            "publish/delta_kept": min(report.delta_kept for report in reports),
            "canary/max_abs_logprob_diff": gap,
        }

    def _compare_probe(self, version: int) -> float:
        request = replace(self._probe.request, policy_version=version)
        scored = [self._transport.call(server, "logprobs", request, self._probe.tokens) for server in self._servers]
        expected = self._learner.logprobs(request, self._probe.tokens)
        answers = self._transport.get(scored, timeout_s=self._deadline_s, what="scoring the probe batch")
        gaps = [
            compare_probe(
                expected,
                answer,
                self._previous,
                tolerance=self._tolerance,
                noise=self._noise,
                where=f"server {i}",
                version=version,
            )
            for i, answer in enumerate(answers)
        ]
        if self._previous is None:
            self._noise = max(gaps)
        self._previous = expected
        return max(gaps)
