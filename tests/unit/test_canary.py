"""The canary catches servers that do not hold the learner's weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlarl_ray.weights.canary import CanaryError, ProbeComparison, compare_digests, make_probe, update_digests
from vlarl_ray.weights.update import WeightUpdate

RNG = np.random.default_rng(0)
OLD, NEW = (RNG.standard_normal((4, 6)).astype(np.float32) for _ in range(2))
NOISE = (1e-6 * RNG.standard_normal((4, 6))).astype(np.float32)


def make_update(**tensors: np.ndarray) -> WeightUpdate:
    return WeightUpdate(version=3, lora_scale=1.0, adapters={"layer.weight": (OLD[:2], NEW[:, :2])}, tensors=tensors)


def test_every_tensor_has_a_digest_of_bytes_and_shape():
    digests = update_digests(make_update(head=OLD))
    assert set(digests) == {"head", "layer.weight:A", "layer.weight:B", "lora_scale"}
    assert update_digests(replace(make_update(head=OLD), lora_scale=0.5))["lora_scale"] != digests["lora_scale"]
    assert update_digests(make_update(head=OLD.reshape(6, 4)))["head"] != digests["head"]
    changed = OLD.copy()
    changed[0, 0] = np.nextafter(changed[0, 0], 9)
    assert update_digests(make_update(head=changed))["head"] != digests["head"]


@pytest.mark.parametrize(
    ("server", "message"),
    [({"head": NEW}, "'head' differs"), ({}, "'head' is missing"), ({"head": OLD, "tail": OLD}, "'tail' was not sent")],
)
def test_a_tensor_that_differs_or_is_dropped_is_named(server, message):
    learner = update_digests(make_update(head=OLD))
    with pytest.raises(CanaryError, match=f"version 3, server 1: tensor {message}"):
        compare_digests(learner, update_digests(make_update(**server)), where="server 1", version=3)


def compare(learner, server, previous, *, tolerance=1e-4):
    comparison = ProbeComparison(tolerance=tolerance)
    comparison.begin(2, previous)
    comparison.begin(3, learner)
    return comparison.compare(server, where="server 0")


def test_a_right_server_passes_and_the_gap_is_reported():
    assert compare(NEW, NEW + NOISE, OLD) == pytest.approx(np.abs(NOISE).max(), rel=0.2)


def test_a_stale_server_is_caught():
    with pytest.raises(CanaryError, match="the served weights are not version 3"):
        compare(NEW, OLD + NOISE, OLD)


def test_a_stale_server_is_caught_even_where_the_change_is_below_the_tolerance():
    small = OLD + np.float32(5e-5)
    with pytest.raises(CanaryError, match="answers like version 2"):
        compare(small, OLD + NOISE, OLD)


def test_an_update_that_changes_nothing_does_not_alarm():
    assert compare(OLD, OLD + NOISE, OLD) < 1e-4


def draw(seed, size, shape=(8, 7)):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


ROUNDING, BFLOAT16 = 0.07, 0.5
"""Nats: rms of either's rounding in bfloat16, as measured on a small policy, and the tolerance that it needs."""


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("change", [0.0, 0.02, 0.1, 0.2])
def test_in_bfloat16_a_right_server_passes_whatever_an_update_changes(seed, change):
    comparison, exact = ProbeComparison(tolerance=BFLOAT16), draw(seed, 1.0)
    for version in range(6):
        exact = exact + draw(100 * seed + version, change)
        rounding = ROUNDING * (0.4 if version == 0 else 1.0)  # adapters are zero, and so is what they add to it
        comparison.begin(version, exact + draw(1000 + 100 * seed + version, rounding))
        comparison.compare(exact + draw(2000 + 100 * seed + version, rounding), where="server 0")


def test_in_bfloat16_a_stale_server_is_caught_within_the_tolerance_and_none_hides_the_next():
    num_within = 0
    for seed in range(20):
        comparison = ProbeComparison(tolerance=BFLOAT16)
        before = draw(seed, 1.0)
        slightly = before + draw(500 + seed, 0.03)  # too little to tell versions apart
        after = slightly + draw(1000 + seed, 0.17)
        for version, exact in enumerate((before, slightly)):
            comparison.begin(version, exact + draw(2000 + 10 * seed + version, ROUNDING / 2))
            comparison.compare(before + draw(3000 + 10 * seed + version, ROUNDING / 2), where="server 0")
        learner, stale = after + draw(4000 + seed, ROUNDING / 2), slightly + draw(5000 + seed, ROUNDING / 2)
        comparison.begin(2, learner)
        if np.abs(learner - stale).max() <= BFLOAT16:
            num_within += 1
            with pytest.raises(CanaryError, match="answers like version 1"):
                comparison.compare(stale, where="server 0")
    assert num_within >= 10


def test_nan_never_passes():
    with pytest.raises(CanaryError):
        compare(NEW, np.full_like(NEW, np.nan), OLD)


def test_the_probe_is_the_same_for_one_seed_and_holds_action_tokens_only():
    def probe(seed):
        return make_probe(
            ["a", "b"], image_shape=(1, 8, 8, 3), proprio_dim=4, token_ids=range(100, 116), num_tokens=6, seed=seed
        )

    first, again, other = probe(1), probe(1), probe(2)
    assert (first.tokens == again.tokens).all()
    assert (first.request.images == again.request.images).all()
    assert (first.request.images != other.request.images).any()
    assert first.tokens.min() >= 100
    assert first.tokens.max() < 116
