"""Our QueST as policies and learners call it, against published numbers; test_parity compares all arrays."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from tests.golden_data import golden_path
from vlarl_ray.models import load_model
from vlarl_ray.models.parity_quest import QuestReference
from vlarl_ray.models.quest_official import load_quest_official
from vlarl_ray.sft import imitation_loss

TOLERANCE = 1e-4
INSTRUCTIONS = ["open the drawer", "close the drawer", "push the plate", "turn on the stove"]


@pytest.fixture(scope="module")
def golden():
    return QuestReference(golden_path("quest"))


@pytest.fixture(scope="module")
def folder(golden):
    return golden.folder


@pytest.fixture(scope="module")
def model(golden):
    return load_quest_official(golden.folder, instructions=INSTRUCTIONS, task_embeddings=golden.input("task_emb"))


@pytest.fixture(scope="module")
def inputs(model, golden):
    ids, lengths = model.encode_prompts(INSTRUCTIONS)
    return dataclasses.replace(golden.observations(), prompt_ids=ids, prompt_lengths=lengths)


def test_fine_tuning_lowers_the_references_loss(model, inputs, golden):
    codes = golden.input("random_indices")
    with torch.no_grad():
        loss = imitation_loss(model(inputs, codes).actions, codes, torch.ones_like(codes, dtype=torch.bool))
    torch.testing.assert_close(loss, golden.output("prior_nll"), rtol=0, atol=TOLERANCE)


def test_greedy_decoding_of_named_instructions_is_the_references(model, inputs, golden):
    codes, logprobs = model.sample(inputs, temperature=0.0, noise=None)
    assert torch.equal(codes, golden.output("greedy_indices"))
    torch.testing.assert_close(logprobs, golden.output("ript_logprobs_of_greedy"), rtol=0, atol=TOLERANCE)


def test_the_policy_encodes_and_decodes_through_the_autoencoder(model, golden):
    assert torch.equal(model.encode_actions(golden.input("actions")), golden.output("code_indices"))
    decoded = model.decode_actions(golden.output("greedy_indices"))
    torch.testing.assert_close(decoded, golden.output("greedy_actions")[:, :8], rtol=0, atol=TOLERANCE)


def test_names_and_shapes_are_the_checkpoints_but_for_the_value_head_and_the_task_vectors(folder, model):
    official = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    added = {name for name in ours if name.startswith("value_head.")} | {"task_embeddings"}
    assert {name: shape for name, shape in ours.items() if name not in added} == official


def test_our_constants_are_those_of_the_checkpoint(folder):
    model, official = load_quest_official(folder), load_file(folder / "model.safetensors")
    model.reset_special(torch.Generator())
    for name, tensor in model.state_dict().items():
        if name.endswith(("inv_freq", "pos_x", "pos_y")):
            torch.testing.assert_close(tensor, official[name], rtol=0, atol=1e-6)


def test_a_saved_checkpoint_is_the_same_policy(model, inputs, golden, tmp_path):
    model.save(tmp_path)
    again = load_model(tmp_path)
    codes = golden.input("random_indices")
    with torch.no_grad():
        assert torch.equal(again(inputs, codes).actions.logits, model(inputs, codes).actions.logits)
        assert torch.equal(again.decode_actions(codes), model.decode_actions(codes))
    assert again.encode_prompts(INSTRUCTIONS)[0].tolist() == [[0], [1], [2], [3]]
