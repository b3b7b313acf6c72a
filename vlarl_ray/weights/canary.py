"""Prove after each publication that the servers hold the learner's weights: digests, then a probe batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Num

from vlarl_ray.types import ActRequest
from vlarl_ray.weights.update import WeightUpdate

_CONTINUOUS_PROBE_TEMPERATURE = 10.0
_SIGMAS = 6.0
"""Of the error that rounding makes, were it Gaussian: over thousands of publications no right server may stop a run."""


class CanaryError(RuntimeError):
    """A server's weights are not the learner's; the run must stop."""


def update_digests(update: WeightUpdate) -> dict[str, str]:
    """Fingerprint every tensor of an update.

    Returns:
        sha256 of shape and bytes by name; adapters appear as `<base weight>:A` and `<base weight>:B`, and with them
        their `lora_scale`.
    """
    named = dict(update.tensors)
    if update.adapters:
        named["lora_scale"] = np.array(update.lora_scale)
    for name, (a, b) in update.adapters.items():
        named[f"{name}:A"], named[f"{name}:B"] = a, b
    return {name: _digest(value) for name, value in named.items()}


def _digest(value: np.ndarray) -> str:
    header = f"{value.dtype.str}{value.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(value).tobytes()).hexdigest()


def compare_digests(learner: Mapping[str, str], server: Mapping[str, str], *, where: str, version: int) -> None:
    """Require that what entered a server's loader is what left the learner.

    Raises:
        CanaryError: Naming the first tensor that differs or is missing.
    """
    for name in sorted(set(learner) | set(server)):
        if learner.get(name) != server.get(name):
            state = "is missing" if name not in server else "was not sent" if name not in learner else "differs"
            raise CanaryError(f"version {version}, {where}: tensor {name!r} {state} (learner and server disagree).")


@dataclass(frozen=True)
class Probe:
    """A fixed batch whose log-probabilities are compared between learner and servers."""

    request: ActRequest
    tokens: Num[np.ndarray, "B L"]


def make_probe(
    instructions: Sequence[str],
    *,
    image_shape: tuple[int, int, int, int],
    proprio_dim: int,
    token_ids: range | None,
    num_tokens: int,
    seed: int,
    rows: int = 8,
) -> Probe:
    """Draw a probe of random images and random action samples; it needs no simulator and never changes in a run.

    Args:
        instructions: Instructions to cycle through.
        image_shape: `(V, H, W, 3)`.
        proprio_dim: P.
        token_ids: Of the action tokens; None where actions are continuous.
        num_tokens: L.
        seed: Seed of the run.
        rows: B.
    """
    rng = np.random.default_rng([seed, 0xCA11A])
    request = ActRequest(
        images=rng.integers(0, 256, (rows, *image_shape), dtype=np.uint8),
        proprio=rng.standard_normal((rows, proprio_dim)).astype(np.float32),
        instructions=tuple(instructions[i % len(instructions)] for i in range(rows)),
        noise_keys=np.zeros((rows, 2), dtype=np.uint64),
        # Far from a narrow density, rounding in its location is amplified; a wide one compares as much without it.
        temperature=_CONTINUOUS_PROBE_TEMPERATURE if token_ids is None else 1.0,
        policy_version=0,
    )
    if token_ids is None:
        return Probe(request, rng.uniform(-1, 1, (rows, num_tokens)).astype(np.float32))
    return Probe(request, rng.integers(token_ids.start, token_ids.stop, (rows, num_tokens)).astype(np.int32))


class ProbeComparison:
    """Compares the servers' scores of a probe with the learner's, one publication after another.

    Two questions. The largest difference has to be within the tolerance, which is wide in bfloat16. And over the whole
    probe a server has to have gone the way that the learner went since the version before: that finds a stale server
    within the tolerance. Whatever lies across that way is rounding, and says how sure the answer is.

    Args:
        tolerance: Largest accepted difference, nats.
    """

    def __init__(self, *, tolerance: float) -> None:
        self.tolerance = tolerance
        self.version = -1
        self.learner: Float32[np.ndarray, "B L"] | None = None
        """The learner's log-probabilities at this version."""
        self._previous: Float32[np.ndarray, "B L"] | None = None
        """The same at the publication before; None at the first."""

    def begin(self, version: int, learner: Float32[np.ndarray, "B L"]) -> None:
        """Take the learner's log-probabilities of a new version."""
        self.version, self.learner, self._previous = version, learner, self.learner

    def compare(self, server: Float32[np.ndarray, "B L"], *, where: str) -> float:
        """Require that a server scores the probe as the learner does at this version, and not as at the one before.

        Returns:
            The largest absolute log-probability difference, nats.

        Raises:
            CanaryError: If it exceeds the tolerance, or the server stayed at the version before.
        """
        assert self.learner is not None
        gap = float(np.abs(self.learner - server).max())
        if not gap <= self.tolerance:
            raise CanaryError(
                f"version {self.version}, {where}: probe log-probabilities differ from the learner's by {gap:.3g} nats "
                f"(allowed {self.tolerance:.3g}); the served weights are not version {self.version}."
            )
        if self._previous is not None:
            share, least = _way_gone(self._previous, self.learner, server)
            if share < least:
                raise CanaryError(
                    f"version {self.version}, {where}: the server answers like version {self.version - 1} rather than "
                    f"{self.version}: on the probe it went {share:.2f} of the way between them, {least:.2f} at least "
                    "would be rounding."
                )
        return gap


def _way_gone(
    previous: Float32[np.ndarray, "B L"], learner: Float32[np.ndarray, "B L"], server: Float32[np.ndarray, "B L"]
) -> tuple[float, float]:
    """Return the server's share of the way from one version to the next, and the least that a right one goes.

    A right server goes all of it and a stale one nothing, each but for rounding: it shortens the way of a right one by
    up to its square where it is the learner's, and adds an error that falls with the number of probe values.
    """
    change, moved = (scores.astype(np.float64).ravel() - previous.ravel() for scores in (learner, server))
    length = float(np.linalg.norm(change))
    if length == 0.0:
        return 1.0, 0.5
    share = float(moved @ change) / length**2
    rounding = float(np.linalg.norm(moved - share * change)) / length
    return share, min(0.5, 1.0 - rounding**2 - _SIGMAS * rounding / change.size**0.5)
