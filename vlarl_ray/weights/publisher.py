"""Ship one version of the weights from learner to servers, and prove that it arrived.

LearnerGroup.weight_update ─► `Delivery` ─► every server: load (merge) ─► digests, checksums, probe ─► or stop the run
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlarl_ray.transport import Transport
from vlarl_ray.types import ActRequest
from vlarl_ray.weights.canary import CanaryError, Probe, ProbeComparison, compare_digests
from vlarl_ray.weights.channel import TransferError
from vlarl_ray.weights.delivery import Delivery, ObjectStoreDelivery
from vlarl_ray.weights.update import LoadReport

_LOG = logging.getLogger(__name__)

_LOADING, _SCORING = "loading weights", "scoring the probe batch"
_LOST = (RuntimeError, TimeoutError)
"""What a server that is gone or hangs looks like; a `CanaryError`, too, which none is."""


@runtime_checkable
class PublishesWeights(Protocol):
    """What the publisher needs of the learner group."""

    def weight_update(self, version: int) -> Any:
        """Return a reference to a `(WeightUpdate)` and its `(num_bytes, digests)`."""
        ...

    def expected_checksums(self, update: Any, dtype: str, lora: str) -> dict[str, str]:
        """Fingerprint what a server of this precision and kind must load for an update, given by reference."""
        ...

    def logprobs(self, request: ActRequest, tokens: np.ndarray) -> np.ndarray:
        """Score the probe under the learner's weights."""
        ...


@runtime_checkable
class KeepsServers(Protocol):
    """What the publisher needs of whoever watches the servers."""

    restarts: int
    """Servers lost so far."""

    def revive(self, index: int) -> None:
        """Wait until a server that failed is back."""
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
        keeper: Brings back a server that dies or hangs while it loads or scores; None gives up.
        delivery: How a version gets to the servers; None takes the object store.
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
        keeper: KeepsServers | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        self._learner = learner
        self._servers = list(servers)
        self._transport = transport
        self._probe = probe
        self._comparison = ProbeComparison(tolerance=tolerance)
        self._deadline_s = deadline_s
        self._keeper = keeper
        self._delivery = delivery or ObjectStoreDelivery(servers, transport)
        self._fallbacks = 0
        self._published: tuple[int, Any, Mapping[str, str]] | None = None
        self._expected: dict[tuple[str, str], Mapping[str, str]] = {}
        self._lock = threading.Lock()

    def publish(self, version: int) -> dict[str, float]:
        """Make every server answer with version `version`.

        Returns:
            Metrics of the publication.

        Raises:
            CanaryError: If a server does not hold what was sent.
        """
        reference, num_bytes, digests = self._learner.weight_update(version)
        with self._lock:
            kinds, fallbacks = list(self._expected), self._fallbacks
            self._published, self._expected = (version, reference, digests), {}
            loads = self._delivery.start(version, reference)
            for kind in kinds:  # those of the version before: the learner merges while the servers do
                self._expected[kind] = self._learner.expected_checksums(reference, *kind)
            reports = [self._finish_load(index, handle) for index, handle in enumerate(loads)]
            self._delivery.end(num_failed=self._fallbacks - fallbacks)
            gap = self._compare_probe(version)
        return {
            "publish/bytes": float(num_bytes),
            "publish/fallbacks": float(self._fallbacks),
            "publish/delta_kept": min(report.delta_kept for report in reports),
            "publish/server_restarts": float(self._keeper.restarts if self._keeper else 0),
            "canary/max_abs_logprob_diff": gap,
        }

    def republish(self, index: int) -> None:
        """Give the weights in force to one server that has none, as after a restart; nothing while `publish` runs.

        It is asked once more, as what it answered earlier may be of a moment at which `publish` loaded it.

        Raises:
            CanaryError: If the server does not hold what was sent.
        """
        if self._published is None or not self._lock.acquire(blocking=False):
            return
        try:
            if self._holds(index, self._published[0]):
                return
            self._finish_load(index, self._transport.call(self._servers[index], "load", self._published[1]))
            answer = self._finish_probe(index, self._ask_probe(index))
            self._compare(index, answer, where=f"server {index}, restarted")
        finally:
            self._lock.release()

    def _holds(self, index: int, version: int) -> bool:
        try:
            return self._get(self._transport.call(self._servers[index], "health"), "asking for its version") == version
        except _LOST:  # it will fail in the same way when it loads
            return False

    def _finish_load(self, index: int, handle: Any) -> LoadReport:
        """Wait for a server's report and check it.

        A server that was lost meanwhile, or that a broadcast did not reach, gets the update from the object store.
        """
        assert self._published is not None
        version, reference, digests = self._published
        try:
            report = self._get(handle, _LOADING)
        except TransferError as error:
            _LOG.warning("server %d gets version %d through the object store instead: %s", index, version, error)
            self._fallbacks += 1
            return self._finish_load(index, self._transport.call(self._servers[index], "load", reference))
        except _LOST as error:
            self._revive(index, error)
            report = self._get(self._transport.call(self._servers[index], "load", reference), _LOADING)
        compare_digests(digests, report.digests, where=f"server {index}", version=version)
        if report.checksums is not None:
            kind = (report.dtype, report.lora)
            if kind not in self._expected:
                self._expected[kind] = self._learner.expected_checksums(reference, *kind)
            where = f"loader of server {index}" if report.lora == "merged" else f"adapters of server {index}"
            compare_digests(self._expected[kind], report.checksums, where=where, version=version)
        return report

    def _ask_probe(self, index: int) -> Any:
        assert self._published is not None
        request = replace(self._probe.request, policy_version=self._published[0])
        return self._transport.call(self._servers[index], "logprobs", request, self._probe.tokens)

    def _finish_probe(self, index: int, handle: Any) -> np.ndarray:
        """Wait for a server's scores; a server that was lost meanwhile gets update and probe once more."""
        assert self._published is not None
        try:
            return self._get(handle, _SCORING)
        except _LOST as error:
            self._revive(index, error)
            self._finish_load(index, self._transport.call(self._servers[index], "load", self._published[1]))
            return self._get(self._ask_probe(index), _SCORING)

    def _get(self, handle: Any, what: str) -> Any:
        [answer] = self._transport.get([handle], timeout_s=self._deadline_s, what=what)
        return answer

    def _revive(self, index: int, error: Exception) -> None:
        if self._keeper is None or isinstance(error, CanaryError):
            raise error
        _LOG.warning("server %d failed in a publication (%s: %s)", index, type(error).__name__, error)
        self._keeper.revive(index)

    def _compare_probe(self, version: int) -> float:
        scored = [self._ask_probe(index) for index in range(len(self._servers))]
        request = replace(self._probe.request, policy_version=version)
        self._comparison.begin(version, self._learner.logprobs(request, self._probe.tokens))
        answers = [self._finish_probe(index, handle) for index, handle in enumerate(scored)]
        return max(self._compare(index, answer, where=f"server {index}") for index, answer in enumerate(answers))

    def _compare(self, index: int, answer: np.ndarray, *, where: str) -> float:
        """Compare a server's answer, see `ProbeComparison`; where it is wrong, the server is asked what is wrong."""
        try:
            return self._comparison.compare(answer, where=where)
        except CanaryError as error:
            request = replace(self._probe.request, policy_version=self._comparison.version)
            question = (request, self._probe.tokens, self._comparison.learner, self._comparison.tolerance)
            try:
                asked = self._transport.call(self._servers[index], "diagnose", *question)
                [found] = self._transport.get([asked], timeout_s=self._deadline_s, what="finding out what is wrong")
            except Exception as failure:  # noqa: BLE001 - whatever it is, it must not hide that weights are wrong
                _LOG.warning("%s cannot say what is wrong: %s", where, failure)
                raise error from None
            raise (CanaryError(f"{error} Found: {found}.") if found else error) from None
