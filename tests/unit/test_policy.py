import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_openvla import INSTRUCTIONS, TINY, tiny
from vlarl_ray.config import LoraConfig, ModelConfig
from vlarl_ray.models import ActionNormalizer, Policy, load_model, load_policy, new_policy
from vlarl_ray.models.lora import attach_lora
from vlarl_ray.types import Observation


def observations(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Observation(
            images=rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8),
            proprio=np.zeros(4, np.float32),
            instruction=INSTRUCTIONS[index % 3],
        )
        for index in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    tiny().save(tmp_path / "policy")
    return tmp_path / "policy"


def test_default_model_has_about_a_million_parameters():
    model = new_policy(ModelConfig(), INSTRUCTIONS, 0)
    assert 1.0e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.5e6


def test_same_seed_gives_the_same_weights_bit_for_bit_and_another_does_not():
    first, second, third = (new_policy(TINY, INSTRUCTIONS, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["projector.fc1.weight"], third["projector.fc1.weight"])


def test_making_a_policy_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    new_policy(TINY, INSTRUCTIONS, 5)
    assert torch.equal(torch.rand(1), expected)


def test_a_new_policy_starts_near_uniform_actions_and_at_value_zero():
    policy = Policy(new_policy(TINY, INSTRUCTIONS, 0))
    (chunk,) = policy.act(observations(1), temperature=1.0, seed=0)
    assert chunk.logprobs == pytest.approx(-np.log(256), abs=1.0)
    assert policy.model(policy._inputs(observations(2))).values.tolist() == [0.0, 0.0]


def test_instructions_that_do_not_fit_are_refused_at_once():
    with pytest.raises(ValueError, match="max_prompt_tokens = 5"):
        new_policy(dataclasses.replace(TINY, max_prompt_tokens=5), INSTRUCTIONS, 0)


def test_a_folder_gives_back_the_same_policy(tmp_path):
    normalizer = ActionNormalizer((0.0, 0.0, 0.0), (2.0, 2.0, 2.0), (True, True, False))
    model = new_policy(TINY, INSTRUCTIONS, 0, normalizer=normalizer, metadata={"render_profile": "fast"})
    model.save(tmp_path)
    loaded = load_policy(str(tmp_path))
    assert loaded.model.metadata == {"render_profile": "fast"}
    assert loaded.model.model_config == TINY
    for ours, theirs in zip(Policy(model).act(observations()), loaded.act(observations()), strict=True):
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert np.array_equal(ours.actions, theirs.actions)
        assert np.array_equal(ours.logprobs, theirs.logprobs)


def test_a_folder_of_an_earlier_version_lacks_statistics_that_then_have_their_defaults(folder):
    path = folder / "config.json"
    description = json.loads(path.read_text())
    del description["proprio_statistics"], description["action_statistics"]["epsilon"], description["model"]["oft"]
    path.write_text(json.dumps(description))
    model = load_model(folder)
    assert model.proprio_normalizer is None
    assert model.normalizer.epsilon == 0
    assert model.model_config == TINY


def test_a_uri_is_a_folder_too(folder):
    loaded = load_policy(folder.as_uri())
    assert np.array_equal(loaded.act(observations())[0].tokens, load_policy(folder).act(observations())[0].tokens)


def test_half_precision_leaves_the_value_head_alone(folder):
    model = load_model(folder, dtype="bfloat16")
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert all((dtype == torch.float32) == name.startswith("value_head.") for name, dtype in types.items())


def test_chunks_have_their_documented_shapes_and_types():
    (chunk,) = Policy(tiny()).act(observations(1))
    assert chunk.actions.shape == (2, 3)
    assert chunk.actions.dtype == np.float32
    assert chunk.tokens.shape == chunk.logprobs.shape == (6,)
    assert chunk.tokens.dtype == np.int32
    assert np.abs(chunk.actions).max() <= 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_scores_are_the_logprobs_of_acting(temperature):
    policy = Policy(tiny())
    chunks = policy.act(observations(), temperature=temperature, seed=1)
    scores = policy.log_probs(observations(), chunks, temperature=temperature)
    np.testing.assert_allclose(scores, np.stack([chunk.logprobs for chunk in chunks]), atol=1e-5)


def test_acting_is_reproducible_by_seed_and_random_without():
    policy = Policy(tiny())

    def tokens(seed):
        return np.stack([chunk.tokens for chunk in policy.act(observations(), temperature=1.5, seed=seed)])

    assert np.array_equal(tokens(3), tokens(3))
    assert not np.array_equal(tokens(3), tokens(4))
    assert not np.array_equal(tokens(None), tokens(None))
    assert policy.act([]) == []


def test_more_observations_than_one_pass_holds():
    policy, many = Policy(tiny()), observations(70)
    chunks = policy.act(many)
    assert len(chunks) == 70
    assert np.array_equal(chunks[66].tokens, policy.act(many[66:67])[0].tokens)
    assert policy.log_probs(many, chunks).shape == (70, 6)


def test_unequal_numbers_of_observations_and_chunks_are_refused():
    policy = Policy(tiny())
    with pytest.raises(ValueError, match="3 observations and 2 chunks"):
        policy.log_probs(observations(), policy.act(observations(2)))


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model = tiny()
    attach_lora(model, LoraConfig(rank=2), seed=0)
    with pytest.raises(ValueError, match="adapters"):
        model.save(tmp_path)


def test_damaged_folders_are_refused_with_the_culprits_name(folder):
    tensors, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    save_file({n: t for n, t in tensors.items() if n != "projector.fc2.bias"}, path)
    with pytest.raises(ValueError, match=r"missing: projector\.fc2\.bias"):
        load_policy(folder)
    save_file({**tensors, "projector.fc2.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"projector\.fc2\.bias is \(3,\)"):
        load_policy(folder)
    save_file({**tensors, "projector.fc2.bias": tensors["projector.fc2.bias"].double()}, path)
    with pytest.raises(ValueError, match=r"type: projector\.fc2\.bias is F64"):
        load_policy(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_policy(folder)


def test_a_config_that_is_none_is_refused(folder):
    path = folder / "config.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "format": "other"}))
    with pytest.raises(ValueError, match="format = 'other'"):
        load_policy(folder)
    path.write_text(json.dumps({**description, "model": {"hidden_sise": 3}}))
    with pytest.raises(ValueError, match="hidden_sise"):
        load_policy(folder)
    path.write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        load_policy(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_policy(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_policy(folder.parent)
