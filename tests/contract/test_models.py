"""What every registered model must do, whatever it looks like inside."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.small_openvla import INSTRUCTIONS, TINY, observations, tiny
from tests.small_quest import quest_observations, small_quest
from vlarl_ray.config import LoraConfig
from vlarl_ray.models import VLAModel, action_logprobs, load_model, new_policy
from vlarl_ray.models.lora import attach_lora
from vlarl_ray.registry import MODELS, resolve


def pixel_mlp(seed=0, **changes):
    """The toy suites' model, with logits and values that differ from zero."""
    model = new_policy(dataclasses.replace(TINY, architecture="pixel_mlp", **changes), INSTRUCTIONS, seed)
    with torch.no_grad():
        model.action_head.weight.mul_(40)
        model.value_head[-1].weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


BUILDERS = {"openvla": tiny, "pixel_mlp": pixel_mlp, "quest": small_quest}


def observed(model, batch=3):
    return (quest_observations if model.model_config.architecture == "quest" else observations)(model, batch)


def noise(model, batch=3):
    return model.draw_noise(np.array([[7, row] for row in range(batch)], dtype=np.uint64))


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
    inputs = observed(model)
    tokens, sampled = model.sample(inputs, temperature=temperature, noise=noise(model))
    columns = tokens - model.first_action_token
    scored = action_logprobs(model(inputs, tokens).actions.logits, columns, temperature=temperature)
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-4)


def test_output_has_one_value_per_row_and_logits_per_action_token(build):
    model = build()
    inputs = observed(model, 4)
    tokens, _ = model.sample(inputs, temperature=0.0, noise=None)
    output = model(inputs, tokens)
    num_tokens, ids = model.sample_space(model.model_config)
    assert output.values.shape == (4,)
    assert output.actions.logits.shape == (4, model.num_action_tokens, len(ids))
    assert model.num_action_tokens == num_tokens
    assert model.tokens_of_chunk or num_tokens == model.chunk_length * model.action_dim
    assert ((tokens >= ids.start) & (tokens < ids.stop)).all()
    assert dataclasses.is_dataclass(output.actions)  # FSDP must find the tensors of an output, and looks into these
    assert output.values.dtype == output.actions.logits.dtype == torch.float32


def test_actions_round_trip_within_half_a_bin(build):
    model = build()
    if model.tokens_of_chunk:
        pytest.skip("codes of a whole block lose detail; see tests/unit/test_quest.py")
    tokens, _ = model.sample(observed(model), temperature=1.0, noise=noise(model))
    actions = model.decode_actions(tokens)
    assert (model.decode_actions(model.encode_actions(actions)) - actions).abs().max() < 1e-6


def test_actions_decode_from_samples_and_encode_to_samples(build):
    model = build()
    tokens, _ = model.sample(observed(model), temperature=1.0, noise=noise(model))
    actions = model.decode_actions(tokens)
    assert (actions.shape, actions.dtype) == ((3, model.chunk_length, model.action_dim), torch.float32)
    encoded = model.encode_actions(actions)
    assert (encoded.shape, encoded.dtype) == (tokens.shape, tokens.dtype)
    model.check_samples(encoded)
    with pytest.raises(ValueError, match="another"):
        model.check_samples(encoded + 10_000)


def test_prompts_have_one_fixed_length(build):
    model = build()
    first, lengths = model.encode_prompts(INSTRUCTIONS)
    second, _ = model.encode_prompts(INSTRUCTIONS[:1])
    assert first.shape[1] == second.shape[1]
    assert (lengths <= first.shape[1]).all()


def test_value_changes_with_image_and_prompt_but_not_with_padding(build):
    model = build()
    inputs = observed(model)
    tokens, _ = model.sample(inputs, temperature=0.0, noise=None)
    values = model(inputs, tokens).values
    other_images = dataclasses.replace(inputs, images=255 - inputs.images)
    assert ((model(other_images, tokens).values - values).abs() > 1e-4).all()
    ids, lengths = model.encode_prompts(INSTRUCTIONS[1:] + INSTRUCTIONS[:1])
    reworded = dataclasses.replace(inputs, prompt_ids=ids, prompt_lengths=lengths)
    assert ((model(reworded, tokens).values - values).abs() > 1e-4).all()
    longer = dataclasses.replace(inputs, prompt_ids=torch.nn.functional.pad(inputs.prompt_ids, (0, 6), value=9))
    torch.testing.assert_close(model(longer, tokens).values, values, rtol=0, atol=1e-5)


def test_value_and_first_token_do_not_see_the_tokens_that_are_scored(build):
    model = build()
    inputs = observed(model)
    tokens, _ = model.sample(inputs, temperature=1.0, noise=noise(model))
    output, other = model(inputs, tokens), model(inputs, tokens.flip(0))
    assert torch.equal(output.values, other.values)
    assert torch.equal(output.actions.logits[:, 0], other.actions.logits[:, 0])


def test_fsdp_units_are_disjoint_submodules_that_hold_the_value_head(build):
    model = build()
    units = list(model.fsdp_units())
    parameters = [id(parameter) for unit in units for parameter in unit.parameters()]
    assert len(parameters) == len(set(parameters))
    assert units[-1] is model.value_head
    frozen = {id(p) for name, p in model.named_parameters() if name.startswith(model.frozen_modules)}
    assert not frozen & set(parameters)


def test_reference_policy_is_the_model_before_adapters(build):
    model = build()
    inputs = observed(model)
    tokens, _ = model.sample(inputs, temperature=0.0, noise=None)
    before = build()(inputs, tokens)
    attach_lora(model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.05)
    assert (model(inputs, tokens).actions.logits - before.actions.logits).abs().max() > 1e-3
    with model.adapters_disabled():
        assert torch.equal(model(inputs, tokens).actions.logits, before.actions.logits)


def test_saved_model_is_the_same_model(build, tmp_path):
    model = build()
    model.save(tmp_path)
    inputs = observed(model)
    tokens, logprobs = model.sample(inputs, temperature=0.0, noise=None)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(inputs, tokens).actions.logits, model(inputs, tokens).actions.logits)
    assert torch.equal(loaded.sample(inputs, temperature=0.0, noise=None)[1], logprobs)
    assert torch.equal(loaded.decode_actions(tokens), model.decode_actions(tokens))
    assert loaded.model_config == model.model_config
    assert loaded.encode_prompts(INSTRUCTIONS)[0].equal(model.encode_prompts(INSTRUCTIONS)[0])
