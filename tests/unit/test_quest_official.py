"""Reading checkpoints in the layout of the published code, and refusing what they may be besides."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_openvla import INSTRUCTIONS
from tests.small_quest import quest_observations, random_codes, small_quest
from vlarl_ray.models.quest_checkpoint import FSQ_LEVELS
from vlarl_ray.models.quest_official import load_quest_official
from vlarl_ray.models.unpickle import unpickle_folder

DESCRIBED = {
    "autoencoder": {
        "action_dim": 3, "encoder_dim": 16, "decoder_dim": 16, "skill_block_size": 8, "downsample_factor": 2,
        "use_causal_encoder": True, "use_causal_decoder": True, "encoder_heads": 2, "encoder_layers": 1,
        "decoder_heads": 2, "decoder_layers": 1, "vq_type": "fsq", "fsq_level": None, "codebook_dim": 64,
        "codebook_size": 16, "attn_pdrop": 0.1,
    },
    "policy_prior": {
        "action_dim": 3, "start_token": 20, "vocab_size": 20, "block_size": 4, "n_layer": 2, "n_head": 2, "n_embd": 16,
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "beam_size": 5, "temperature": 1.0,
    },
    "embed_dim": 16, "image_embed_dim": 8, "lowdim_embed_dim": 4, "obs_reduction": "cat", "action_horizon": 3,
    "shape_meta": {
        "action_dim": 3,
        "observation": {"rgb": {"image": [3, 32, 32]}, "lowdim": {"joints": 3, "gripper": 1}},
        "task": {"type": "vector", "dim": 6},
    },
}  # fmt: skip
"""Sizes in the published code's words: a codebook of "16" is 15 codes, and the prior has outputs to spare."""


def written(folder, *, prefix="", task="vector", described=DESCRIBED, drop=()):
    """A checkpoint with its official names alone, as the published code would give it; returns the model it is of."""
    sizes = {"conv_kernels": (5, 3), "conv_strides": (2, 1), "fsq_levels": (5, 3), "prior_vocab_size": 20}
    model = small_quest(task_encoding=task, dropout=0.1, **sizes)
    own = ("value_head.", "task_embeddings", *drop)
    tensors = {prefix + name: t for name, t in model.state_dict().items() if not name.startswith(own)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(described))
    return model


def with_change(section, **changes):
    return {**DESCRIBED, section: {**DESCRIBED[section], **changes}} if section else {**DESCRIBED, **changes}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_in_the_published_layout_is_the_same_policy(tmp_path, prefix):
    model = written(tmp_path, prefix=prefix)
    loaded = load_quest_official(tmp_path, instructions=INSTRUCTIONS, task_embeddings=model.task_embeddings)
    inputs, codes = quest_observations(model), random_codes(model)
    with torch.no_grad():
        assert torch.equal(loaded(inputs, codes).actions.logits, model(inputs, codes).actions.logits)
        assert torch.equal(loaded.decode_actions(codes), model.decode_actions(codes))
        assert loaded(inputs, codes).values.tolist() == [0.0] * 3
    assert loaded.model_config.quest == model.model_config.quest
    assert not loaded.training


def test_instructions_and_their_vectors_may_come_with_the_checkpoint(tmp_path):
    model = written(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**DESCRIBED, "instructions": INSTRUCTIONS}))
    with pytest.raises(ValueError, match=r"task_embeddings has shape \(0, 6\); 3 instructions need \(3, 6\)"):
        load_quest_official(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "task_embeddings": model.task_embeddings}, tmp_path / "model.safetensors")
    loaded = load_quest_official(tmp_path)
    assert loaded.encode_prompts(INSTRUCTIONS[1:])[0].tolist() == [[1], [2]]
    assert torch.equal(loaded.task_embeddings, model.task_embeddings)


def test_without_instructions_it_loads_and_knows_none(tmp_path):
    written(tmp_path)
    with pytest.raises(ValueError, match="it knows none"):
        load_quest_official(tmp_path).encode_prompts(["push"])


def test_learned_task_rows_need_no_vectors(tmp_path):
    meta = {**DESCRIBED["shape_meta"], "task": {"type": "onehot", "n_tasks": 6}}
    model = written(tmp_path, task="embedding", described={**DESCRIBED, "shape_meta": meta})
    loaded = load_quest_official(tmp_path, instructions=INSTRUCTIONS)
    inputs = quest_observations(model)
    with torch.no_grad():
        assert torch.equal(loaded.context(inputs), model.context(inputs))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("autoencoder", {"vq_type": "vq"}, "autoencoder.vq_type = 'vq' is not supported; it must be 'fsq'"),
        ("autoencoder", {"use_causal_decoder": False}, "use_causal_decoder = False is not supported"),
        ("autoencoder", {"decoder_dim": 32}, "decoder_dim = 32 is not supported; it must be 16"),
        ("policy_prior", {"start_token": 15}, "start_token = 15 is not supported; it must be 20"),
        (None, {"obs_reduction": "stack"}, "obs_reduction = 'stack' is not supported"),
        (None, {"image_encoder": {"pretrained": True}}, "image_encoder.pretrained = True is not supported"),
        (None, {"image_encoder": {"language_fusion": "film"}}, "image_encoder.language_fusion = 'film'"),
    ],
)
def test_variants_that_are_not_quest_as_published_are_refused(tmp_path, section, changes, message):
    written(tmp_path, described=with_change(section, **changes))
    with pytest.raises(ValueError, match=message):
        load_quest_official(tmp_path)


def test_images_of_several_sizes_are_refused(tmp_path):
    observation = {"rgb": {"image": [3, 32, 32], "wrist": [3, 64, 64]}, "lowdim": {}}
    written(tmp_path, described=with_change("shape_meta", observation=observation))
    with pytest.raises(ValueError, match=r"images must be \[3, S, S\], of one size"):
        load_quest_official(tmp_path)


def test_a_checkpoint_of_other_sizes_or_with_a_gap_is_refused(tmp_path):
    written(tmp_path, described=with_change("autoencoder", encoder_layers=2))
    with pytest.raises(ValueError, match=r"(?s)12 tensors are not what the config.*missing: autoencoder\.encoder\."):
        load_quest_official(tmp_path)
    model = written(tmp_path, drop=("policy_prior.lnf.",))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"extra": torch.zeros(2), "obs_proj.bias": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="4 tensors are not what the config") as caught:
        load_quest_official(tmp_path, instructions=INSTRUCTIONS, task_embeddings=model.task_embeddings)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: policy_prior.lnf.bias",
        "missing: policy_prior.lnf.weight",
        "shape: obs_proj.bias is (3,), the config says (16,)",
        "unknown: extra (2,)",
    ]


def test_a_pickle_is_never_opened_but_converted_by_the_user(tmp_path):
    written(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "multitask_model_final.pth").write_bytes(b"not even a pickle")
    with pytest.raises(ValueError, match=r"multitask_model_final\.pth.*python -m vlarl_ray\.models\.unpickle"):
        load_quest_official(tmp_path)


def test_a_pickle_that_was_converted_is_the_same_policy(tmp_path):
    """As the published code saves it: weights beside the optimiser's state, named as data-parallel training does."""
    model = written(tmp_path, prefix="module.")
    state = {"model": load_file(tmp_path / "model.safetensors"), "optimizers": [{"state": {}}], "epoch": 3}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "multitask_model_final.pth")
    [made] = unpickle_folder(tmp_path)
    assert made.name == "multitask_model_final.safetensors"
    loaded = load_quest_official(tmp_path, instructions=INSTRUCTIONS, task_embeddings=model.task_embeddings)
    inputs, codes = quest_observations(model), random_codes(model)
    with torch.no_grad():
        assert torch.equal(loaded(inputs, codes).actions.logits, model(inputs, codes).actions.logits)
    made.with_name("second.safetensors").write_bytes(made.read_bytes())
    with pytest.raises(ValueError, match=r"second\.safetensors, and no model\.safetensors; rename the one to read"):
        load_quest_official(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has neither model\.safetensors nor"):
        load_quest_official(tmp_path)
    written(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_quest_official(tmp_path)


def test_codebook_sizes_mean_the_levels_that_the_published_code_takes_for_them():
    assert {2**power: math.prod(levels) for power, levels in FSQ_LEVELS.items()} == {
        16: 15, 64: 64, 256: 240, 512: 512, 1024: 1000, 2048: 1920, 4096: 4375,
    }  # fmt: skip
