"""What every registered model must do, whatever it looks like inside."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from tests.small_openvla import INSTRUCTIONS, TINY, observations, tiny, tiny_oft
from tests.small_quest import quest_observations, small_quest
from vlarl_ray.config import LoraConfig
from vlarl_ray.models import VLAModel, action_logprobs, load_model, new_policy
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.lora import attach_lora, lora_layers
from vlarl_ray.registry import MODELS, resolve


def pixel_mlp(seed=0, **changes):
    """The toy suites' model, with logits and values that differ from zero."""
    model = new_policy(dataclasses.replace(TINY, architecture="pixel_mlp", **changes), INSTRUCTIONS, seed)
    with torch.no_grad():
        model.output_layer.weight.mul_(40)
        model.value_head[-1].weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


VARIANTS = {
    "openvla": (tiny, {}),
    "openvla autoregressive": (tiny, {"decoding": "autoregressive"}),
    "openvla_oft tokens": (tiny_oft, {"action_head": "tokens", "num_cameras": 1, "proprio_dim": 0}),
    "openvla_oft laplace": (tiny_oft, {}),
    "openvla_oft gaussian, two passes": (tiny_oft, {"action_head": "gaussian", "passes": "two"}),
    "openvla_oft l1": (tiny_oft, {"action_head": "l1"}),
    "pixel_mlp": (pixel_mlp, {}),
    "pixel_mlp gaussian": (pixel_mlp, {"action_head": "gaussian"}),
    "quest": (small_quest, {}),
    "quest, two cameras": (small_quest, {"cameras": ("front", "wrist"), "task_encoding": "embedding"}),
}


@pytest.fixture(params=VARIANTS)
def build(request):
    builder, changes = VARIANTS[request.param]
    return lambda: builder(**changes)


def observed(model, batch=3):
    return (quest_observations if model.model_config.architecture == "quest" else observations)(model, batch)


def noise(model, batch=3):
    return model.draw_noise(np.stack([np.ones(batch), np.arange(batch)], 1).astype(np.uint64))


def head(output):
    """What the actions depend on: logits, or locations."""
    return output.actions.logits if hasattr(output.actions, "logits") else output.actions.location


def test_every_registered_model_is_covered_here():
    assert {re.split("[ ,]", variant)[0] for variant in VARIANTS} == MODELS.keys()
    for name in MODELS:
        assert issubclass(resolve(MODELS, name, what="model.architecture"), VLAModel)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_sampled_logprob_is_the_scored_logprob(build, temperature):
    model = build()
    inputs = observed(model)
    samples, sampled = model.sample(inputs, temperature=temperature, noise=noise(model))
    actions = model(inputs, samples).actions
    torch.testing.assert_close(sampled, actions.log_prob(samples, temperature=temperature), rtol=0, atol=1e-4)
    if model.model_config.action_head == "tokens":
        columns = samples - model.first_action_token
        scored = action_logprobs(actions.logits, columns, temperature=temperature)
        torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-4)
    assert (sampled.std(0) > 1e-3).all()


def test_output_has_one_value_per_row_and_one_distribution_per_number(build):
    model = build()
    inputs = observed(model, 4)
    samples, _ = model.sample(inputs, temperature=0.0, noise=None)
    output = model(inputs, samples)
    assert output.values.shape == (4,)
    num_tokens, ids = model.sample_space(model.model_config)
    assert head(output).shape[:2] == samples.shape == (4, model.num_action_tokens) == (4, num_tokens)
    assert model.tokens_of_chunk or num_tokens == model.chunk_length * model.action_dim
    if ids is not None:
        assert head(output).shape[2] == len(ids)
        assert ((samples >= ids.start) & (samples < ids.stop)).all()
    assert samples.is_floating_point() == (ids is None)
    assert dataclasses.is_dataclass(output.actions)  # FSDP must find the tensors of an output, and looks into these
    assert output.values.dtype == head(output).dtype == torch.float32
    assert (output.actions.mode_error(samples) == 0).all()


def test_actions_round_trip_within_half_a_bin(build):
    model = build()
    samples, _ = model.sample(observed(model), temperature=1.0, noise=noise(model))
    actions = model.decode_actions(samples)
    assert actions.shape == (3, model.chunk_length, model.action_dim)
    if model.tokens_of_chunk:
        pytest.skip("codes of a whole block lose detail; see tests/unit/test_quest_autoencoder.py")
    assert (model.decode_actions(model.encode_actions(actions)) - actions).abs().max() < 1e-6


def test_prompts_have_one_fixed_length(build):
    model = build()
    first, lengths = model.encode_prompts(INSTRUCTIONS)
    second, _ = model.encode_prompts(INSTRUCTIONS[:1])
    assert first.shape[1] == second.shape[1]
    assert (lengths <= first.shape[1]).all()


def test_value_changes_with_image_and_prompt_but_not_with_padding(build):
    model = build()
    inputs = observed(model)
    samples, _ = model.sample(inputs, temperature=0.0, noise=None)
    values = model(inputs, samples).values
    other_images = dataclasses.replace(inputs, images=255 - inputs.images)
    assert ((model(other_images, samples).values - values).abs() > 1e-4).all()
    ids, lengths = model.encode_prompts(INSTRUCTIONS[1:] + INSTRUCTIONS[:1])
    reworded = dataclasses.replace(inputs, prompt_ids=ids, prompt_lengths=lengths)
    assert ((model(reworded, samples).values - values).abs() > 1e-4).all()
    longer = dataclasses.replace(inputs, prompt_ids=torch.nn.functional.pad(inputs.prompt_ids, (0, 6), value=9))
    torch.testing.assert_close(model(longer, samples).values, values, rtol=0, atol=1e-5)


def test_value_and_first_token_do_not_depend_on_the_chunk(build):
    model = build()
    inputs = observed(model)
    one, _ = model.sample(inputs, temperature=1.0, noise=noise(model))
    output, other = model(inputs, one), model(inputs, one.roll(1, 1))
    torch.testing.assert_close(output.values, other.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(head(output)[:, 0], head(other)[:, 0], rtol=0, atol=1e-6)


def test_fsdp_units_are_disjoint_submodules_that_hold_the_heads(build):
    model = build()
    units = list(model.fsdp_units())
    parameters = [id(parameter) for unit in units for parameter in unit.parameters()]
    assert len(parameters) == len(set(parameters))
    assert units[-1] is model.value_head
    heads = [module for name, module in model.named_children() if f"{name}." in HEADS]
    assert all(any(unit is module for unit in units) for module in heads)  # alone, as they alone compute in fp32
    frozen = {id(p) for name, p in model.named_parameters() if name.startswith(model.frozen_modules)}
    assert not frozen & set(parameters)


def test_reference_policy_is_the_model_before_adapters(build):
    before, model = build(), build()
    inputs = observed(before)
    tokens, _ = before.sample(inputs, temperature=0.0, noise=None)
    expected = head(before(inputs, tokens))
    attach_lora(model, LoraConfig(rank=2), seed=0)
    assert not any(name.startswith(HEADS) for name in lora_layers(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.05)
    assert (head(model(inputs, tokens)) - expected).abs().max() > 1e-3
    with model.adapters_disabled():
        assert torch.equal(head(model(inputs, tokens)), expected)


def test_every_trainable_parameter_gets_a_gradient(build):
    """With adapters and without; what is carried but not computed has no adapters. Learners freeze frozen modules."""
    for adapts in (False, True):
        model = build()
        if adapts:
            attach_lora(model, LoraConfig(rank=2), seed=0)
        inputs = observed(model)
        samples, _ = model.sample(inputs, temperature=1.0, noise=noise(model))
        output = model(inputs, samples)
        (output.actions.log_prob(samples, temperature=1.0).mean() + output.values.sum()).backward()
        lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert [name for name in lacking if not name.startswith(model.frozen_modules)] == []


def test_saved_model_is_the_same_model(build, tmp_path):
    model = build()
    model.save(tmp_path)
    loaded, inputs = load_model(tmp_path), observed(model)
    samples, logprobs = model.sample(inputs, temperature=1.0, noise=noise(model))
    again, others = loaded.sample(inputs, temperature=1.0, noise=noise(model))
    assert torch.equal(samples, again)
    assert torch.equal(logprobs, others)
    assert torch.equal(model(inputs, samples).values, loaded(inputs, samples).values)
    assert torch.equal(loaded.decode_actions(samples), model.decode_actions(samples))
    assert loaded.encode_prompts(INSTRUCTIONS)[0].equal(model.encode_prompts(INSTRUCTIONS)[0])
    assert loaded.model_config == model.model_config
    assert (loaded.normalizer, loaded.proprio_normalizer) == (model.normalizer, model.proprio_normalizer)


def test_half_precision_leaves_the_heads_alone(build, tmp_path):
    build().save(tmp_path)
    if "bfloat16" not in build().dtypes:
        with pytest.raises(ValueError, match="computes in float32 only"):
            load_model(tmp_path, dtype="bfloat16")
        return
    model = load_model(tmp_path, dtype="bfloat16")
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all((dtype == torch.float32) == name.startswith(HEADS) for name, dtype in types.items())
    inputs = observed(model)
    samples, logprobs = model.sample(inputs, temperature=1.0, noise=noise(model))
    output = model(inputs, samples)
    assert output.values.dtype == logprobs.dtype == head(output).dtype == torch.float32
