"""Our OpenVLA-OFT in batches and with padding, against published numbers; test_parity compares all arrays."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.golden_data import golden_path
from vlarl_ray.models.parity_oft import OFTReference

PROMPTS = [0, 1, 2]


@pytest.fixture(scope="module")
def golden():
    return OFTReference(golden_path("openvla_oft"))


def padded(inputs, extra_padding):
    """Longer prompts, whose padding must not matter."""
    ids = F.pad(inputs.prompt_ids, (0, extra_padding))
    ids[torch.arange(ids.shape[1]) >= inputs.prompt_lengths[:, None]] = 77
    return dataclasses.replace(inputs, prompt_ids=ids)


def close(ours, expected):
    torch.testing.assert_close(ours.detach().double(), expected.double(), rtol=0, atol=1e-4)


def steps(chunk):
    """[B, K*D] as [B, K, D]."""
    return chunk.unflatten(-1, (8, 7))


@pytest.mark.parametrize("extra_padding", [0, 5])
@pytest.mark.parametrize("index", PROMPTS)
def test_actions_of_one_pass_are_the_references_whatever_the_padding(golden, index, extra_padding):
    model = golden.oft_model(pixels=slice(index, index + 1))
    actions = model(padded(golden.prompt_inputs(index), extra_padding)).actions
    close(steps(actions.location[0]), golden.output(f"prompt{index}_normalized_actions"))
    close(steps(actions.log_scale[0]), golden.output(f"prompt{index}_log_b"))


def test_prompts_of_several_lengths_in_one_batch_give_the_references(golden):
    prompts = [golden.prompt_ids(index) for index in PROMPTS]
    assert len(set(map(len, prompts))) > 1
    inputs = golden.policy_inputs(prompts, golden.proprio(slice(3)))
    actions = golden.oft_model(pixels=slice(3))(padded(inputs, 0)).actions
    for index in PROMPTS:
        close(steps(actions.location[index]), golden.output(f"prompt{index}_normalized_actions"))
        close(steps(actions.log_scale[index]), golden.output(f"prompt{index}_log_b"))


@pytest.mark.parametrize("extra_padding", [0, 5])
def test_two_passes_are_ript_vlas_whatever_the_padding(golden, extra_padding):
    model = golden.oft_model(pixels=slice(3), passes="two")
    actions = model(padded(golden.ript_inputs(), extra_padding)).actions
    close(steps(actions.location), golden.output("ript_mean"))
    close(steps(actions.log_scale), golden.output("ript_log_b"))


def test_the_training_batch_holds_rows_of_several_lengths(golden):
    """Else it would not tell whether padding is hidden."""
    assert len(set(golden.batch_inputs().prompt_lengths.tolist())) == 3


def test_the_mistakes_listed_beside_the_references_have_the_size_given_there(golden):
    """So these arrays do depend on what the mistakes break."""
    inputs, expected = golden.prompt_inputs(0), golden.output("prompt0_normalized_actions")
    effects = golden.meta["effect_of_common_mistakes"]
    swapped, raw, stopped, causal, late = (golden.oft_model(pixels=slice(0, 1)) for _ in range(5))
    pixels = golden.input("pixel_values")[:1].roll(6, 1)
    swapped.preprocess = lambda images: pixels
    raw.proprio_normalizer = None
    stopped.model_config = dataclasses.replace(
        stopped.model_config, oft=dataclasses.replace(stopped.model_config.oft, stop_token_id=1)
    )
    decoder = causal.language_model.model
    plain = decoder.forward
    decoder.forward = lambda embeddings, read, lengths: plain(embeddings, read)
    mistaken = {
        "two images swapped": swapped._hidden(inputs, 56),
        "raw proprio": raw._hidden(inputs, 56),
        "stop token replaced by BOS": stopped._hidden(inputs, 56),
        "stock causal attention": causal._hidden(inputs, 56),
        "hidden states taken one position later": late._hidden(inputs, 57)[:, 1:],
    }
    for mistake, hidden in mistaken.items():
        difference = (steps(late.action_head(hidden)[0]) - expected).abs().max().item()
        assert difference == pytest.approx(effects[mistake], abs=1e-3), mistake
