"""The canary catches servers that do not hold the learner's weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlarl_ray.weights.canary import CanaryError, compare_digests, compare_probe, make_probe, update_digests
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


def compare(learner, server, previous, *, tolerance=1e-4, noise=1e-6):
    return compare_probe(learner, server, previous, tolerance=tolerance, noise=noise, where="server 0", version=3)


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
