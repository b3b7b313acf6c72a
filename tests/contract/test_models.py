"""What every registered model must do, whatever it looks like inside."""

import dataclasses

import pytest
import torch

from tests.small_openvla import INSTRUCTIONS, TINY, noise, observations, tiny
from vlarl_ray.config import LoraConfig
from vlarl_ray.models import VLAModel, action_logprobs, load_model, new_policy
from vlarl_ray.models.lora import attach_lora
from vlarl_ray.registry import MODELS, resolve


def pixel_mlp(seed=0, **changes):
    """The toy suites' model, with logits and values that differ from zero."""
    model = new_policy(dataclasses.replace(TINY, architecture="pixel_mlp", **changes), INSTRUCTIONS, seed)
    with torch.no_grad():
        model.output_layer.weight.mul_(40)
        model.value_head[-1].weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


BUILDERS = {"openvla": tiny, "pixel_mlp": pixel_mlp}


@pytest.fixture(params=sorted(MODELS))
def build(request):
    return BUILDERS[request.param]


def test_every_registered_model_is_covered_here():
    assert BUILDERS.keys() == MODELS.keys()
    for name in MODELS:
        assert issubclass(resolve(MODELS, name, what="model.architecture"), VLAModel)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_sampled_logprob_is_the_scored_logprob(build, temperature):
    model = build()
    inputs = observations(model)
    tokens, sampled = model.sample(inputs, temperature=temperature, noise=noise(model))
    columns = tokens - model.first_action_token
    scored = action_logprobs(model(inputs, tokens).actions.logits, columns, temperature=temperature)
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-4)


def test_output_has_one_value_per_row_and_logits_per_action_token(build):
    model = build()
    inputs = observations(model, 4)
    tokens, _ = model.sample(inputs, temperature=0.0, noise=None)
    output = model(inputs, tokens)
    assert output.values.shape == (4,)
    assert output.actions.logits.shape[:2] == (4, model.num_action_tokens) == (4, model.chunk_length * model.action_dim)
    assert dataclasses.is_dataclass(output.actions)  # FSDP must find the tensors of an output, and looks into these
    assert output.values.dtype == output.actions.logits.dtype == torch.float32


def test_actions_round_trip_within_half_a_bin(build):
    model = build()
    tokens, _ = model.sample(observations(model), temperature=1.0, noise=noise(model))
    actions = model.decode_actions(tokens)
    assert actions.shape == (3, model.chunk_length, model.action_dim)
    assert (model.decode_actions(model.encode_actions(actions)) - actions).abs().max() < 1e-6


def test_prompts_have_one_fixed_length(build):
    model = build()
    first, lengths = model.encode_prompts(INSTRUCTIONS)
    second, _ = model.encode_prompts(INSTRUCTIONS[:1])
    assert first.shape[1] == second.shape[1]
    assert (lengths <= first.shape[1]).all()


def test_value_changes_with_image_and_prompt_but_not_with_padding(build):
    model = build()
    inputs = observations(model)
    tokens, _ = model.sample(inputs, temperature=0.0, noise=None)
    values = model(inputs, tokens).values
    other_images = dataclasses.replace(inputs, images=255 - inputs.images)
    assert ((model(other_images, tokens).values - values).abs() > 1e-4).all()
    ids, lengths = model.encode_prompts(INSTRUCTIONS[1:] + INSTRUCTIONS[:1])
    reworded = dataclasses.replace(inputs, prompt_ids=ids, prompt_lengths=lengths)
    assert ((model(reworded, tokens).values - values).abs() > 1e-4).all()
    longer = dataclasses.replace(inputs, prompt_ids=torch.nn.functional.pad(inputs.prompt_ids, (0, 6), value=9))
    torch.testing.assert_close(model(longer, tokens).values, values, rtol=0, atol=1e-5)


def test_fsdp_units_are_disjoint_submodules_that_hold_the_value_head(build):
    model = build()
    units = list(model.fsdp_units())
    parameters = [id(parameter) for unit in units for parameter in unit.parameters()]
    assert len(parameters) == len(set(parameters))
    assert units[-1] is model.value_head


def test_reference_policy_is_the_model_before_adapters(build):
    inputs = observations(build())
    before, model = build()(inputs), build()
    attach_lora(model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.05)
    assert (model(inputs).actions.logits - before.actions.logits).abs().max() > 1e-3
    with model.adapters_disabled():
        assert torch.equal(model(inputs).actions.logits, before.actions.logits)


def test_saved_model_is_the_same_model(build, tmp_path):
    model = build()
    model.save(tmp_path)
    inputs = observations(model)
    assert torch.equal(load_model(tmp_path)(inputs).actions.logits, model(inputs).actions.logits)
    assert load_model(tmp_path).model_config == model.model_config
