"""Our OpenVLA as policies and learners call it, against published numbers; test_parity compares all arrays."""

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks._official_folder import OPENVLA_7B
from tests.golden_data import golden_path
from tests.reference_folder import openvla_case
from vlarl_ray.models import PolicyInputs
from vlarl_ray.models.action_tokens import action_logprobs
from vlarl_ray.models.openvla import OpenVLA

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["openvla", "openvla_small_vocab"])
def golden(request):
    return openvla_case(golden_path(request.param))


def scored(golden, index, *, extra_padding=0):
    """The model's distribution of the reference's tokens, and the reference's logits of the action bins."""
    model = golden.with_pixels(golden.model(index), slice(index, index + 1))
    inputs = golden.policy_inputs([golden.prompt_ids(index)])
    ids = F.pad(inputs.prompt_ids, (0, extra_padding))
    inputs = PolicyInputs(inputs.images, ids, inputs.prompt_lengths, inputs.proprio)
    tokens = golden.output(f"prompt{index}_action_tokens")[None]
    with torch.no_grad():
        actions = model(inputs, tokens).actions
    return actions.logits[0], golden.output(f"prompt{index}_action_logits_window")[:, :256], tokens[0]


@pytest.mark.parametrize("extra_padding", [0, 5])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_teacher_forced_logits_are_the_references_whatever_the_padding(golden, index, extra_padding):
    logits, expected, _ = scored(golden, index, extra_padding=extra_padding)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


def test_masked_logprobs_are_the_references_renormalised_over_the_action_bins(golden):
    logits, window, tokens = scored(golden, 0)
    columns = golden.model().action_tokenizer.columns(tokens)
    ours = action_logprobs(logits[None], columns[None], temperature=1.0)[0]
    expected = torch.log_softmax(window.double(), -1).gather(1, columns[:, None])[:, 0]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_decoded_actions_are_the_references(golden, index):
    model = golden.with_pixels(golden.model(index), slice(index, index + 1))
    tokens, _ = model.sample(golden.policy_inputs([golden.prompt_ids(index)]), temperature=0.0, noise=None)
    actions = model.decode_actions(tokens)[0, 0].double()
    torch.testing.assert_close(actions, golden.output(f"prompt{index}_actions"), rtol=0, atol=1e-6)


def test_parameter_names_and_shapes_at_7b_are_the_official_ones():
    path = golden_path("openvla_7b_parameters.json")
    official = {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    with torch.device("meta"):
        model = OpenVLA(OPENVLA_7B)
    ours = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith("value_head.")}
    assert ours == official
