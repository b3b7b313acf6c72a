"""Continuous action heads: F23 to F27, one distribution for sampler and scorer."""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch

from tests.small_openvla import INSTRUCTIONS, TINY, observations
from vlarl_ray.config import AlgorithmConfig, ExperimentConfig, LearnerConfig
from vlarl_ray.learner.build import build_learner
from vlarl_ray.models import Gaussian, Laplace, Policy, add_scale_head, load_model, new_policy
from vlarl_ray.models.distributions import LocationScale, standard_noise
from vlarl_ray.types import Observation

WIDE = (-10.0, 10.0)
KINDS = {"gaussian": Gaussian, "laplace": Laplace}


def one(value):
    return torch.full((1, 1), float(value))


def continuous_model(kind, seed=0, **changes):
    model = new_policy(
        dataclasses.replace(TINY, architecture="pixel_mlp", action_head=kind, **changes), INSTRUCTIONS, seed
    )
    with torch.no_grad():
        model.output_layer.weight.mul_(40)
    return model


def keys(count, seed=0):
    return np.stack([np.full(count, seed), np.arange(count)], axis=1).astype(np.uint64)


@pytest.mark.parametrize(
    ("kind", "scale", "expected"),
    [(Gaussian, 0.2, 0.190499), (Laplace, 0.2, -0.083709), (Laplace, math.exp(-2), -0.170958)],
)
def test_log_densities_of_f23(kind, scale, expected):
    log_prob = kind(one(0.1), one(math.log(scale)), WIDE).log_prob(one(0.3), temperature=1.0)
    assert float(log_prob) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("kind", "reference"), [(Gaussian, scipy.stats.norm), (Laplace, scipy.stats.laplace)])
def test_densities_and_entropies_agree_with_scipy_on_random_triples_f23(kind, reference):
    rng = np.random.default_rng(0)
    action, location, log_scale = rng.normal(size=(3, 1000, 1)).astype(np.float32)
    ours = kind(torch.from_numpy(location), torch.from_numpy(log_scale), WIDE)
    for temperature in (1.0, 2.5):
        theirs = reference(location, np.exp(log_scale) * temperature)
        np.testing.assert_allclose(
            ours.log_prob(torch.from_numpy(action), temperature=temperature),
            theirs.logpdf(action),
            rtol=1e-4,
            atol=1e-4,
        )
        np.testing.assert_allclose(ours.entropy(temperature=temperature), theirs.entropy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_the_log_scale_is_clipped_in_sampler_and_scorer_f24(kind):
    raw, clipped = torch.tensor([[-3.0, 0.0, 1.0]]), torch.tensor([[-2.0, 0.0, 0.5]])
    location, noise = torch.zeros(1, 3), torch.ones(1, 3)
    ours, expected = kind(location, raw, (-2.0, 0.5)), kind(location, clipped, WIDE)
    torch.testing.assert_close(ours.log_scale, clipped)
    torch.testing.assert_close(ours.sample(temperature=1.0, noise=noise), clipped.exp())
    action = torch.tensor([[0.3, -0.2, 0.9]])
    torch.testing.assert_close(ours.log_prob(action, temperature=1.0), expected.log_prob(action, temperature=1.0))


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_has_the_distribution_and_depends_on_its_key_alone(kind):
    reference = {"gaussian": scipy.stats.norm, "laplace": scipy.stats.laplace}[kind]
    noise = standard_noise(kind, keys(500), (40,))
    assert scipy.stats.kstest(noise.ravel(), reference.cdf).pvalue > 1e-3
    assert np.array_equal(noise[7:8], standard_noise(kind, keys(500)[7:8], (40,)))


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_the_sampled_log_density_is_the_scored_one_f25(kind, temperature):
    model = continuous_model(kind)
    inputs = observations(model)
    samples, sampled = model.sample(inputs, temperature=temperature, noise=model.draw_noise(keys(3)))
    scored = model(inputs, samples).actions.log_prob(samples, temperature=temperature)
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-5)


def test_a_sampler_that_is_wider_than_the_scorer_would_be_seen_f25():
    """The released RIPT code samples with five times the scale it scores with."""
    model = continuous_model("laplace")
    inputs = observations(model)
    original = LocationScale.sample

    def widened(self, *, temperature, noise):
        return original(self, temperature=5 * temperature, noise=noise)

    with mock.patch.object(LocationScale, "sample", widened):
        samples, _ = model.sample(inputs, temperature=1.0, noise=model.draw_noise(keys(3)))
    actions = model(inputs).actions
    spread = (samples - actions.location).abs().mean() / actions.log_scale.exp().mean()
    assert spread > 3  # an honest Laplace sample has a mean absolute deviation of one scale
    honest, _ = model.sample(inputs, temperature=1.0, noise=model.draw_noise(keys(3)))
    assert (honest - actions.location).abs().mean() / actions.log_scale.exp().mean() < 2


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_adding_a_scale_head_leaves_the_mean_bit_identical_and_greedy_actions_are_the_mean_f26(kind):
    deterministic = continuous_model("l1")
    stochastic = add_scale_head(deterministic, kind, log_scale=-1.5)
    inputs = observations(deterministic)
    before, after = deterministic(inputs).actions, stochastic(inputs).actions
    assert isinstance(after, KINDS[kind])
    assert torch.equal(before.location, after.location)
    assert torch.equal(after.log_scale, torch.full_like(after.log_scale, -1.5))
    samples, _ = stochastic.sample(inputs, temperature=0.0, noise=None)
    assert torch.equal(samples, before.location)
    with pytest.raises(ValueError, match="a scale head is added to 'l1' policies only"):
        add_scale_head(stochastic, kind)


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_scale_head_gets_no_gradient_f26(tmp_path, trained):
    continuous_model("laplace").save(tmp_path)
    cfg = ExperimentConfig(
        model=load_model(tmp_path).model_config,
        algorithm=AlgorithmConfig(name="ppo"),
        learner=LearnerConfig(num_ranks=1, train_scale_head=trained),
    )
    learner = build_learner(cfg, tmp_path, rank=0, world_size=1, store_address=None)
    model = learner.model
    output = model(observations(model))
    (output.actions.log_prob(torch.zeros(3, model.num_action_tokens), temperature=1.0).sum()).backward()
    gradients = [p.grad is not None for name, p in model.named_parameters() if name.startswith("scale_head.")]
    assert gradients == [trained] * 4
    names = learner.weight_update(1).tensors
    assert any(name.startswith("scale_head.") for name in names) == trained


def test_a_policy_without_likelihood_is_refused_by_the_learner(tmp_path):
    continuous_model("l1").save(tmp_path)
    cfg = ExperimentConfig(learner=LearnerConfig(num_ranks=1))
    with pytest.raises(ValueError, match="'l1' has no likelihood"):
        build_learner(cfg, tmp_path, rank=0, world_size=1, store_address=None)


def test_a_policy_without_likelihood_can_be_evaluated(tmp_path):
    continuous_model("l1").save(tmp_path)
    cfg = ExperimentConfig(learner=LearnerConfig(num_ranks=1))
    learner = build_learner(cfg, tmp_path, rank=0, world_size=1, store_address=None, evaluates_only=True)
    assert learner.weight_update(0) is not None


def test_the_scale_head_as_a_moving_reference_is_refused(tmp_path):
    continuous_model("gaussian").save(tmp_path)
    cfg = ExperimentConfig(algorithm=AlgorithmConfig(kl_coef=0.1), learner=LearnerConfig(num_ranks=1))
    with pytest.raises(ValueError, match=r"set learner.train_scale_head to false"):
        build_learner(cfg, tmp_path, rank=0, world_size=1, store_address=None)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "l1"])
def test_a_continuous_policy_survives_its_folder_and_acts_alike(tmp_path, kind):
    model = continuous_model(kind, log_scale_range=(-2.0, 0.5))
    model.save(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.model_config == model.model_config
    inputs = observations(model)
    assert torch.equal(loaded(inputs).actions.location, model(inputs).actions.location)
    assert torch.equal(loaded(inputs).actions.log_scale, model(inputs).actions.log_scale)


def test_a_policy_in_use_records_unclipped_numbers_and_scores_them():
    policy = Policy(continuous_model("gaussian"))
    frame = np.zeros((1, 32, 32, 3), np.uint8)
    seen = [Observation(frame, np.zeros(2, np.float32), text) for text in INSTRUCTIONS]
    chunks = policy.act(seen, temperature=4.0, seed=3)
    assert chunks[0].tokens.dtype == np.float32
    assert max(np.abs(chunk.tokens).max() for chunk in chunks) > 1  # what the simulator clips is scored as drawn
    scored = policy.log_probs(seen, chunks, temperature=4.0)
    np.testing.assert_allclose(scored, np.stack([chunk.logprobs for chunk in chunks]), atol=1e-5)


def test_noise_and_temperature_must_agree():
    gaussian = Gaussian(one(0), one(0), WIDE)
    with pytest.raises(ValueError, match="if and only if"):
        gaussian.sample(temperature=1.0, noise=None)
    with pytest.raises(ValueError, match="if and only if"):
        gaussian.sample(temperature=0.0, noise=one(1))
    with pytest.raises(ValueError, match="negative"):
        gaussian.log_prob(one(0), temperature=-1.0)
