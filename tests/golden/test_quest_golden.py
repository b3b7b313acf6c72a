"""Our QueST against numbers from the published code on a tiny random checkpoint with the official names."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.golden_data import golden_path
from vlarl_ray.models import PolicyInputs, load_model
from vlarl_ray.models.quest_official import load_quest_official
from vlarl_ray.sft import imitation_loss

TOLERANCE = 1e-4
INSTRUCTIONS = ["open the drawer", "close the drawer", "push the plate", "turn on the stove"]
CAMERA = "agentview_rgb"
NAMES = [
    "conv_features", "encoder_z", "fsq_projected", "fsq_bounded", "code_indices", "codes", "code_levels",
    "reconstructed_actions", "decoded_random_indices", f"image_embedding_{CAMERA}", "lowdim_embedding_joint_states",
    "lowdim_embedding_gripper_states", "context", "prior_logits", "prior_logprobs", "prior_nll", "greedy_indices",
    "greedy_actions", "greedy_logits", "top5_indices", "top5_probs", "ript_logprobs_of_greedy",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    return golden_path("quest")


@pytest.fixture(scope="module")
def given(folder):
    return {name: torch.from_numpy(array) for name, array in np.load(folder / "inputs.npz").items()}


@pytest.fixture(scope="module")
def reference(folder):
    return {name: torch.from_numpy(array) for name, array in np.load(folder / "outputs.npz").items()}


@pytest.fixture(scope="module")
def model(folder, given):
    return load_quest_official(folder, instructions=INSTRUCTIONS, task_embeddings=given["task_emb"])


@pytest.fixture(scope="module")
def inputs(model, given):
    images = given[f"obs_{CAMERA}"].permute(0, 1, 3, 4, 2).contiguous()
    ids, lengths = model.encode_prompts(INSTRUCTIONS)
    proprio = torch.cat([given["obs_joint_states"], given["obs_gripper_states"]], dim=-1)[:, 0]
    return PolicyInputs(images, ids, lengths, proprio)


@pytest.fixture(scope="module")
def ours(model, inputs, given):
    """Our array for every name of the reference."""
    with torch.no_grad():
        return {
            **skills(model.autoencoder, given["actions"], given["random_indices"]),
            **encoded(model, inputs, given),
            **predicted(model, inputs, given["random_indices"]),
        }


def skills(autoencoder, actions, indices):
    z = autoencoder.encode(actions)
    projected = autoencoder.vq.project_in(z)
    codes, own_indices = autoencoder.vq(z)
    return {
        "conv_features": autoencoder.conv_block(autoencoder.action_proj(actions)),
        "encoder_z": z,
        "fsq_projected": projected,
        "fsq_bounded": autoencoder.vq.bound(projected),
        "code_indices": own_indices,
        "code_levels": autoencoder.vq.level_indices(own_indices),
        "codes": codes,
        "reconstructed_actions": autoencoder(actions),
        "decoded_random_indices": autoencoder.decode_indices(indices),
    }


def encoded(model, inputs, given):
    names = ("joint_states", "gripper_states")
    lowdim = {name: model.lowdim_encoders[name](given[f"obs_{name}"][:, 0])[:, None] for name in names}
    return {
        f"image_embedding_{CAMERA}": model.image_encoders[CAMERA](model.pixels(inputs.images[:, 0])),
        **{f"lowdim_embedding_{name}": embedding for name, embedding in lowdim.items()},
        "context": model.context(inputs),
    }


def predicted(model, inputs, codes):
    scored = model(inputs, codes).actions
    greedy, logprobs = model.sample(inputs, temperature=0.0, noise=None)
    logits = model(inputs, greedy).actions.logits
    # What QueST's sampler truncates to; ours does not, but the logits it would start from are these.
    top = logits.topk(5, dim=-1)
    return {
        "prior_logits": scored.logits,
        "prior_logprobs": scored.log_prob(codes, temperature=1.0),
        "prior_nll": imitation_loss(scored, codes, torch.ones_like(codes, dtype=torch.bool)),
        "greedy_indices": greedy,
        "greedy_logits": logits,
        "greedy_actions": model.autoencoder.decode_indices(greedy),
        "ript_logprobs_of_greedy": logprobs,
        "top5_indices": top.indices,
        "top5_probs": top.values.softmax(-1),
    }


@pytest.mark.parametrize("name", NAMES)
def test_array_is_the_references(ours, reference, name):
    expected = reference[name]
    if expected.is_floating_point():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=TOLERANCE)
    else:
        assert torch.equal(ours[name].to(expected.dtype), expected)


def test_no_reference_array_is_left_out(reference):
    assert set(NAMES) == reference.keys()


def test_the_policy_encodes_and_decodes_through_the_autoencoder(model, given, reference):
    assert torch.equal(model.encode_actions(given["actions"]), reference["code_indices"].long())
    decoded = model.decode_actions(reference["greedy_indices"])
    torch.testing.assert_close(decoded, reference["greedy_actions"][:, :8], rtol=0, atol=TOLERANCE)


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


def test_a_saved_checkpoint_is_the_same_policy(model, inputs, given, tmp_path):
    model.save(tmp_path)
    again = load_model(tmp_path)
    codes = given["random_indices"]
    with torch.no_grad():
        assert torch.equal(again(inputs, codes).actions.logits, model(inputs, codes).actions.logits)
        assert torch.equal(again.decode_actions(codes), model.decode_actions(codes))
    assert again.encode_prompts(INSTRUCTIONS)[0].tolist() == [[0], [1], [2], [3]]
