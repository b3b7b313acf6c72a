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


def compare_probe(
    learner: Float32[np.ndarray, "B L"],
    server: Float32[np.ndarray, "B L"],
    previous: Float32[np.ndarray, "B L"] | None,
    *,
    tolerance: float,
    noise: float,
    where: str,
    version: int,
) -> float:
    """Require that a server scores the probe as the learner does at this version, and not as at the one before.

    Args:
        learner: The learner's log-probabilities at this version.
        server: The server's.
        previous: The learner's at the version before; None at the first publication.
        tolerance: Largest accepted difference, nats.
        noise: Largest difference seen between learner and servers when they held equal weights, nats.
        where: Which server, for the message.
        version: This version.

    Returns:
        The largest absolute log-probability difference, nats.

    Raises:
        CanaryError: If it exceeds `tolerance`, or the server is closer to the previous version although the two
            versions differ by more than the noise.
    """
    gap = float(np.abs(learner - server).max())
    if not gap <= tolerance:
        raise CanaryError(
            f"version {version}, {where}: probe log-probabilities differ from the learner's by {gap:.3g} nats "
            f"(allowed {tolerance:.3g}); the served weights are not version {version}."
        )
    if previous is not None:
        change = float(np.abs(learner - previous).max())
        gap_before = float(np.abs(server - previous).max())
        if change > 4 * noise and gap_before < gap:
            raise CanaryError(
                f"version {version}, {where}: the server answers like version {version - 1} "
                f"(distance {gap_before:.3g}) rather than {version} (distance {gap:.3g})."
            )
    return gap
