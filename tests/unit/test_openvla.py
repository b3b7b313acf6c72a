import dataclasses

import pytest
import torch

from tests.small_openvla import INSTRUCTIONS, noise, observations, tiny
from vlarl_ray.models import action_logprobs
from vlarl_ray.models.policy import DTYPES

DECODINGS = ["parallel", "autoregressive"]


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_sampled_logprobs_are_those_the_scorer_gives_f25(decoding, temperature):
    model = tiny(decoding=decoding)
    inputs = observations(model)
    tokens, sampled = model.sample(inputs, temperature=temperature, noise=noise(model) if temperature else None)
    scored = action_logprobs(
        model(inputs, tokens).actions.logits, tokens - model.first_action_token, temperature=temperature
    )
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_every_sampled_token_is_an_action_token_f20(decoding):
    model = tiny(decoding=decoding)
    inputs, drawn = observations(model, 64), []
    while sum(map(len, drawn)) < 10_000:
        drawn.append(model.sample(inputs, temperature=3.0, noise=noise(model, 64, seed=len(drawn)))[0].flatten())
    tokens = torch.cat(drawn)
    assert model.first_action_token == 511
    assert tokens.min() >= 511
    assert tokens.max() <= 766
    assert len(tokens.unique()) > 200
    assert model(inputs, tokens[: 64 * 6].view(64, 6)).actions.logits.shape == (64, 6, 256)


def test_only_autoregressive_decoding_depends_on_earlier_tokens():
    for decoding in DECODINGS:
        model = tiny(decoding=decoding)
        inputs = observations(model, 1)
        first = torch.full((1, 6), model.first_action_token)
        second = first.clone()
        second[0, 2] += 100
        difference = (model(inputs, first).actions.logits - model(inputs, second).actions.logits).abs().amax(-1)[0]
        assert (difference[:3] == 0).all()
        assert (difference[3:] > 1e-3).all() == (decoding == "autoregressive")


def test_parallel_logits_differ_between_action_positions():
    model = tiny()
    logits = model(observations(model, 1)).actions.logits[0]
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 1e-3


def test_autoregressive_scoring_without_tokens_is_refused():
    model = tiny(decoding="autoregressive")
    with pytest.raises(ValueError, match="tokens"):
        model(observations(model))


@pytest.mark.parametrize("decoding", DECODINGS)
def test_extra_right_padding_changes_nothing_f30(decoding):
    model = tiny(decoding=decoding)
    inputs = observations(model)
    tokens = torch.randint(511, 767, (3, 6))
    padding = torch.full((3, 9), 77)  # not zeros: the content of padding must not matter either
    longer = dataclasses.replace(inputs, prompt_ids=torch.cat([inputs.prompt_ids, padding], 1))
    first, second = model(inputs, tokens), model(longer, tokens)
    torch.testing.assert_close(first.values, second.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(first.actions.logits, second.actions.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.sample(inputs, temperature=0.0, noise=None)[0], model.sample(longer, temperature=0.0, noise=None)[0]
    )


def test_value_depends_on_image_and_prompt_f30():
    model = tiny()
    inputs = observations(model)
    values = model(inputs).values
    darker = dataclasses.replace(inputs, images=inputs.images // 2)
    assert ((model(darker).values - values).abs() > 1e-4).all()
    ids, lengths = model.encode_prompts([INSTRUCTIONS[2], INSTRUCTIONS[0], INSTRUCTIONS[1]])
    reworded = dataclasses.replace(inputs, prompt_ids=ids, prompt_lengths=lengths)
    assert ((model(reworded).values - values).abs() > 1e-4).all()


def test_read_out_is_the_last_prompt_token_of_every_row_f31():
    """Changing that token changes the value; changing the one after it (padding) does not; nor do later rows."""
    model = tiny()
    inputs = observations(model)
    assert len(set(inputs.prompt_lengths.tolist())) > 1
    read = model._read_positions(inputs, 1)[:, 0]
    assert read.tolist() == [model.num_patches + n - 1 for n in inputs.prompt_lengths.tolist()]
    values = model(inputs).values
    for row, length in enumerate(inputs.prompt_lengths.tolist()):
        for column, matters in ((length - 1, True), (length, False)):
            if column == inputs.prompt_ids.shape[1]:
                continue
            ids = inputs.prompt_ids.clone()
            ids[row, column] = 200
            changed = (model(dataclasses.replace(inputs, prompt_ids=ids)).values - values).abs()
            assert (changed[row] > 1e-4) == matters
            assert (torch.cat([changed[:row], changed[row + 1 :]]) < 1e-6).all()


@pytest.mark.parametrize(("steepness", "largest", "mean"), [(0.05, 1e-2, 2e-3), (0.25, 5e-2, 1e-2)])
def test_bfloat16_logprobs_are_close_and_values_stay_fp32_f29(steepness, largest, mean):
    model = tiny()
    with torch.no_grad():
        model.language_model.lm_head.weight.mul_(steepness)
    inputs = observations(model, 16)
    tokens, exact = model.sample(inputs, temperature=1.0, noise=noise(model, 16))
    for name, module in model.named_children():
        if name != "value_head":
            module.to(DTYPES["bfloat16"])
    model.action_queries.data = model.action_queries.data.bfloat16()
    output = model(inputs)
    assert output.values.dtype == output.actions.logits.dtype == torch.float32
    rounded = action_logprobs(output.actions.logits, tokens - model.first_action_token, temperature=1.0)
    assert 1e-6 < (rounded - exact).abs().max() < largest
    assert (rounded - exact).abs().mean() < mean


def test_frames_of_another_size_are_resized_and_several_cameras_refused():
    model = tiny()
    inputs = observations(model, 2, size=48)
    assert model.preprocess(inputs.images).shape == (2, 6, 32, 32)
    assert torch.isfinite(model(inputs).actions.logits).all()
    two = dataclasses.replace(inputs, images=inputs.images.expand(-1, 2, -1, -1, -1))
    with pytest.raises(ValueError, match="2 cameras"):
        model(two)


def test_frames_are_normalised_for_each_tower():
    model = tiny()
    white = torch.full((1, 1, 32, 32, 3), 255, dtype=torch.uint8)
    pixels = model.preprocess(white)[0, :, 0, 0]
    torch.testing.assert_close(
        pixels[:3],
        (1 - torch.tensor([0.484375, 0.455078125, 0.40625])) / torch.tensor([0.228515625, 0.2236328125, 0.224609375]),
    )
    assert pixels[3:].tolist() == [1.0, 1.0, 1.0]


def test_actions_round_trip_through_tokens():
    model = tiny()
    actions = torch.rand(5, 2, 3) * 2 - 1
    decoded = model.decode_actions(model.encode_actions(actions))
    assert (decoded - actions).abs().max() <= 0.0039216 + 1e-6


def test_small_model_carries_no_unused_parameters():
    model = tiny()
    output = model(observations(model))
    (output.actions.logits.square().sum() + output.values.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_rows_do_not_depend_on_the_rest_of_the_batch():
    model = tiny()
    inputs = observations(model, 8)
    whole, part = model(inputs), model(inputs.rows(slice(4, 8)))
    torch.testing.assert_close(whole.actions.logits[4:], part.actions.logits, rtol=0, atol=1e-5)
