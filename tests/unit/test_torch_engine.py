"""The PyTorch engine serves exactly what was published."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.small_openvla import INSTRUCTIONS, tiny
from vlarl_ray.config import InferenceConfig, LoraConfig
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.models.lora import adapter_tensors, attach_lora, head_tensors
from vlarl_ray.types import ActRequest
from vlarl_ray.weights.canary import update_digests
from vlarl_ray.weights.update import WeightUpdate

SCALE = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny().save(folder)
    return folder


def make_engine(folder, *, deterministic: bool = True, batch_size: int = 4) -> TorchEngine:
    return TorchEngine(folder, InferenceConfig(batch_size=batch_size), deterministic=deterministic)


def make_update(version: int, *, size: float = 0.05) -> WeightUpdate:
    """What a learner would publish: random adapters for every linear layer, and a value head."""
    model = tiny()
    attach_lora(model, LoraConfig(rank=3, alpha=3 * SCALE), seed=version)
    rng = np.random.default_rng(version)
    adapters = {
        name: (a.numpy().copy(), (size * rng.standard_normal(b.shape)).astype(np.float32))
        for name, (a, b) in adapter_tensors(model).items()
    }
    heads = {name: (value + version).numpy().copy() for name, value in head_tensors(model).items()}
    return WeightUpdate(version=version, lora_scale=SCALE, adapters=adapters, tensors=heads)


def make_request(rows: int, *, version: int = 1, first: int = 0) -> ActRequest:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (16, 1, 32, 32, 3), dtype=np.uint8)
    keys = np.stack([np.full(16, 9), np.arange(16)], axis=1).astype(np.uint64)
    index = np.arange(first, first + rows)
    return ActRequest(
        images=images[index],
        proprio=np.zeros((rows, 4), np.float32),
        instructions=tuple(INSTRUCTIONS[i % 3] for i in index),
        noise_keys=keys[index],
        temperature=1.0,
        policy_version=version,
    )


def served(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.model.named_parameters()}


def test_every_served_tensor_equals_the_merged_weights_and_differs_from_the_base_f58(folder):
    engine, base, update = make_engine(folder), load_file(folder / "model.safetensors"), make_update(1)
    report = engine.load(update)
    weights = served(engine)
    assert set(update.adapters) | set(update.tensors) <= set(weights)
    for name, (a, b) in update.adapters.items():
        merged = base[name] + SCALE * (torch.from_numpy(b) @ torch.from_numpy(a))
        torch.testing.assert_close(weights[name], merged, rtol=0, atol=1e-6)
        assert not torch.equal(weights[name], base[name]), name
    for name, value in update.tensors.items():
        assert torch.equal(weights[name], torch.from_numpy(value)), name
    for name in set(weights) - set(update.adapters) - set(update.tensors):
        assert torch.equal(weights[name], base[name]), name
    assert report.version == engine.version == 1
    assert report.digests == update_digests(update)
    assert report.delta_kept == pytest.approx(1.0, abs=1e-6)


def test_a_hundred_updates_leave_no_trace_in_the_last(folder):
    once, often = make_engine(folder), make_engine(folder)
    for version in range(1, 101):
        often.load(make_update(version % 7 + 1, size=1.0))
    once.load(make_update(3))
    often.load(make_update(3))
    for name, value in served(once).items():
        assert torch.equal(value, served(often)[name]), name


def test_a_load_that_fails_leaves_an_engine_that_refuses(folder):
    engine, update = make_engine(folder), make_update(2)
    engine.load(make_update(1))
    update.tensors["value_head.nowhere"] = np.zeros(3, np.float32)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"'value_head.nowhere', which the served model does not have"):
        engine.load(update)
    assert engine.version is None


def test_a_tensor_of_another_shape_is_named(folder):
    update = make_update(1)
    name = next(iter(update.tensors))
    wrong = WeightUpdate(1, SCALE, {}, {name: np.zeros((1, 1, 1), np.float32)})
    with pytest.raises(ValueError, match=rf"{name}.* has shape \(1, 1, 1\)"):
        make_engine(folder).load(wrong)


def test_in_deterministic_mode_a_rows_bits_do_not_depend_on_its_neighbours(folder):
    engine = make_engine(folder, batch_size=8)
    engine.load(make_update(1))
    whole = engine.sample(make_request(11))
    for row in range(11):
        alone = engine.sample(make_request(1, first=row))
        assert (alone.tokens[0] == whole.tokens[row]).all()
        assert (alone.logprobs[0] == whole.logprobs[row]).all()


def test_scored_log_probabilities_are_the_sampled_ones(folder):
    engine = make_engine(folder)
    engine.load(make_update(1))
    request = make_request(10)
    reply = engine.sample(request)
    np.testing.assert_allclose(engine.logprobs(request, reply.tokens), reply.logprobs, atol=2e-6)


def test_weights_change_what_is_sampled(folder):
    engine = make_engine(folder)
    engine.load(make_update(1))
    before = engine.sample(make_request(10))
    engine.load(make_update(2, size=0.5))
    assert (engine.sample(make_request(10)).logprobs != before.logprobs).any()
