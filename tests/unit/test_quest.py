"""QueST as a policy: skills drawn code by code, instructions it knows, and sizes that fit together."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from tests.small_openvla import INSTRUCTIONS
from tests.small_quest import official_size, quest_config, quest_observations, random_codes, small_quest
from vlarl_ray.models import Policy, load_policy, new_policy
from vlarl_ray.models.quest import QueST
from vlarl_ray.quest_checks import quest_problems
from vlarl_ray.types import Observation


def noise(model, batch=3):
    return model.draw_noise(np.array([[7, row] for row in range(batch)], dtype=np.uint64))


@pytest.mark.parametrize("vocabulary", [None, 31])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.0, 2.0])
def test_sampler_and_scorer_agree_at_every_temperature(temperature, vocabulary):
    model = small_quest(prior_vocab_size=vocabulary)
    inputs = quest_observations(model, 6)
    codes, sampled = model.sample(inputs, temperature=temperature, noise=noise(model, 6) if temperature else None)
    scored = model(inputs, codes).actions.log_prob(codes, temperature=temperature)
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-4)
    assert (codes.shape, codes.dtype) == ((6, 4), torch.int64)


def test_rows_drawn_among_other_instructions_are_scored_alike_alone():
    model = small_quest()
    inputs = quest_observations(model, 6)
    assert inputs.prompt_ids.unique().tolist() == [0, 1, 2]
    with torch.no_grad():
        codes, sampled = model.sample(inputs, temperature=1.0, noise=noise(model, 6))
        for row in reversed(range(6)):
            alone = model(inputs.rows(slice(row, row + 1)), codes[row : row + 1]).actions
            scored = alone.log_prob(codes[row : row + 1], temperature=1.0)
            torch.testing.assert_close(scored[0], sampled[row], rtol=0, atol=1e-4)
        mixed_up = dataclasses.replace(inputs, prompt_ids=inputs.prompt_ids.roll(1, 0))
        others = model(mixed_up, codes).actions.log_prob(codes, temperature=1.0)
    assert (others - sampled).abs().amax(1).min() > 1e-2


def test_cached_decoding_gives_the_logits_of_a_whole_pass():
    model = small_quest()
    context, codes = model.context(quest_observations(model)), random_codes(model)
    with torch.no_grad():
        logits, taken = model.policy_prior.sample(context, lambda logits, index: codes[:, index : index + 1])
        whole, _ = model.policy_prior(context, codes[:, :-1])
    assert torch.equal(taken, codes)
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


def test_codes_are_not_truncated_to_the_likeliest_five_and_never_lie_beyond_the_codebook():
    model = small_quest(prior_vocab_size=64)
    inputs = quest_observations(model, 1).rows(torch.zeros(200, dtype=torch.int64))
    codes, _ = model.sample(inputs, temperature=3.0, noise=noise(model, 200))
    assert codes.max() < 24
    assert len(codes[:, 0].unique()) > 5


def test_a_rows_noise_depends_on_its_key_alone():
    model = small_quest()
    keys = np.array([[7, 1], [7, 2], [7, 3]], dtype=np.uint64)
    assert torch.equal(model.draw_noise(keys)[1:], model.draw_noise(keys[1:]))
    assert model.draw_noise(keys).shape == (3, 4, 24)


def test_each_code_is_scored_given_those_before_it_only():
    model = small_quest()
    inputs, codes = quest_observations(model), random_codes(model)
    changed = codes.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 24
    with torch.no_grad():
        before, after = model(inputs, codes).actions.logits, model(inputs, changed).actions.logits
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3] - after[:, 3]).abs().amax(-1).min() > 1e-3


def test_scoring_needs_the_codes():
    model = small_quest()
    with pytest.raises(ValueError, match="tokens must be given"):
        model(quest_observations(model))


def test_the_policy_object_acts_and_scores_and_refuses_codes_of_another_model():
    policy = Policy(small_quest())
    observations = [
        Observation(np.full((1, 32, 32, 3), 9 * i, np.uint8), np.full(4, i, np.float32), INSTRUCTIONS[i])
        for i in range(3)
    ]
    chunks = policy.act(observations, temperature=1.0, seed=3)
    assert chunks[0].actions.shape == (3, 3)
    np.testing.assert_allclose(
        policy.log_probs(observations, chunks), np.stack([chunk.logprobs for chunk in chunks]), atol=1e-4
    )
    wrong = [dataclasses.replace(chunk, tokens=chunk.tokens + 24) for chunk in chunks]
    with pytest.raises(ValueError, match=r"is no code; allowed are 0\.\.23"):
        policy.log_probs(observations, wrong)


def test_an_unknown_instruction_lists_the_known_ones_nearest_first():
    with pytest.raises(ValueError, match=r"'open the windows' is unknown.*first: 'open the window', "):
        small_quest().encode_prompts(["open the windows"])


def test_many_known_instructions_are_cut_short():
    model = small_quest(instructions=[f"task {i}" for i in range(40)])
    with pytest.raises(ValueError, match=r"'task 3'.*, \.\.\. \(40 in all\)") as caught:
        model.encode_prompts(["task 3x"])
    assert str(caught.value).count("'task") == 13


def test_a_policy_without_instructions_says_so():
    with pytest.raises(ValueError, match="it knows none"):
        QueST(quest_config()).encode_prompts(["push"])


def test_a_prompt_is_the_row_of_its_vector():
    model = small_quest(instructions=["a", "b", "a"])
    ids, lengths = model.encode_prompts(["b", "a"])
    assert (ids.tolist(), lengths.tolist()) == ([[1], [0]], [1, 1])
    inputs = quest_observations(model)
    with torch.no_grad():
        model.task_embeddings[1] += 1
        changed = model.context(dataclasses.replace(inputs, prompt_ids=torch.tensor([[1]] * 3)))
        expected = model.task_encoder(model.task_embeddings[1])
    torch.testing.assert_close(changed[:, 0], expected.expand(3, -1))


def test_tasks_can_be_learned_rows_instead():
    model = small_quest(task_encoding="embedding", task_size=3)
    assert "task_embeddings" not in model.state_dict()
    inputs = quest_observations(model)
    with torch.no_grad():
        assert torch.equal(model.context(inputs)[:, 0], model.task_encoder.weight)
    with pytest.raises(ValueError, match="task_size = 2, but there are 3 instructions"):
        small_quest(task_encoding="embedding", task_size=2)


def test_the_class_reaches_the_published_size():
    config = official_size()
    assert not list(quest_problems(config))
    with torch.device("meta"):
        model = QueST(config)
    assert (model.num_action_tokens, config.quest.codebook_size) == (8, 1000)
    counted = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in model.named_children()}
    assert counted["policy_prior"] == pytest.approx(11.4, abs=0.1)
    assert counted["autoencoder"] == pytest.approx(6.5, abs=0.4)
    assert model.policy_prior.head.weight.shape == (1000, 384)


WRONG = {
    "norms": ({"autoencoder_dim": 20}, "autoencoder_dim = 20: must be a multiple of 8"),
    "encoder heads": ({"encoder_heads": 3}, "must be a multiple of model.quest.encoder_heads = 3"),
    "prior heads": ({"prior_heads": 3}, "prior_dim = 16: must be a multiple of model.quest.prior_heads = 3; set 15"),
    "odd features": ({"image_embed_dim": 7}, "image_embed_dim = 7: must be a multiple of 2"),
    "kernels": ({"conv_kernels": (3,)}, "must hold as many entries as model.quest.conv_strides = [2, 1, 1]"),
    "block": ({"block_length": 9}, "block_length = 9: must be a multiple of 2, the product"),
    "chunk": ({"block_length": 2}, "chunk_length = 3: a skill has only model.quest.block_length = 2 actions"),
    "levels": ({"fsq_levels": ()}, "fsq_levels = []: must hold at least one"),
    "vocabulary": ({"prior_vocab_size": 20}, "prior_vocab_size = 20: must be at least 24"),
    "blind": ({"cameras": (), "lowdim": ()}, "the policy would see nothing"),
    "twins": ({"cameras": ("a", "a")}, "the names ['a', 'a'] must be different"),
    "dot": ({"lowdim": (("a.b", 4),)}, "the names ['a.b'] must be different, and name parameters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sizes_that_contradict_each_other_are_refused(case):
    changes, message = WRONG[case]
    config = quest_config(**changes)
    found = [text for _, text in quest_problems(config)]
    assert len(found) == 1, found
    assert message in found[0]
    with pytest.raises(ValueError, match=re.escape(message)):
        new_policy(config, INSTRUCTIONS, 0)


def test_proprioception_and_action_head_must_fit():
    odd = dataclasses.replace(quest_config(), proprio_dim=3, action_head="gaussian")
    first, second = (text for _, text in quest_problems(odd))
    assert "model.proprio_dim = 3: must be 4, the sum" in first
    assert "quest acts in codes; set it to tokens" in second


def test_one_seed_gives_one_model_to_the_bit():
    first, again, other = (small_quest(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(torch.isfinite(tensor).all() for tensor in first.values())


def test_half_precision_is_refused(tmp_path):
    small_quest().save(tmp_path)
    with pytest.raises(ValueError, match="a quest policy computes in float32 only"):
        load_policy(tmp_path, dtype="bfloat16")
