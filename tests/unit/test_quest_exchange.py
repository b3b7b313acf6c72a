"""QueST in the published layout: exported, imported, evaluated and trained from, with equal outputs throughout."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.toy_run import evaluations, toy_config
from tests.small_openvla import INSTRUCTIONS
from tests.small_quest import quest_observations, random_codes, small_quest
from vlarl_ray.cli import main
from vlarl_ray.config import EvaluationConfig, ExperimentConfig, ModelConfig
from vlarl_ray.config_loader import ConfigError
from vlarl_ray.launch import run_evaluate, run_training
from vlarl_ray.models import ActionNormalizer, load_model
from vlarl_ray.models.official import is_official, read_official
from vlarl_ray.models.policy_export import export_policy
from vlarl_ray.models.policy_import import import_policy
from vlarl_ray.warm_start import check_policy

PUBLISHED: dict[str, Any] = {"conv_kernels": (5, 3), "conv_strides": (2, 1)}
"""Convolutions of the published code for 2 actions to a code."""
VARIANTS: dict[str, dict[str, Any]] = {
    "vectors": {},
    "learned rows, outputs to spare": {"task_encoding": "embedding", "prior_vocab_size": 31},
    "two cameras, no numbers": {"cameras": ("front", "wrist"), "lowdim": ()},
    "numbers alone, behind an MLP": {"cameras": (), "lowdim_hidden_sizes": (7, 5)},
    "a code for each action": {"conv_kernels": (3, 2), "conv_strides": (1, 1)},
}


@pytest.fixture(params=VARIANTS)
def model(request):
    return small_quest(**{**PUBLISHED, **VARIANTS[request.param]})


def exported(model, folder, **options):
    model.save(folder.with_name(f"{folder.name} policy"))
    return export_policy(folder.with_name(f"{folder.name} policy"), folder, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Not to be changed."""
    return exported(small_quest(**PUBLISHED), tmp_path_factory.mktemp("quest") / "official")


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "official")


def equal_outputs(first, second):
    inputs, codes = quest_observations(first), random_codes(first)
    greedy, logprobs = first.sample(inputs, temperature=0.0, noise=None)
    found, again = second.sample(inputs, temperature=0.0, noise=None)
    assert torch.equal(found, greedy)
    assert torch.equal(again, logprobs)
    assert torch.equal(second(inputs, codes).actions.logits, first(inputs, codes).actions.logits)
    assert torch.equal(second(inputs, codes).values, first(inputs, codes).values)
    assert torch.equal(second.decode_actions(codes), first.decode_actions(codes))
    actions = torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(second.encode_actions(actions), first.encode_actions(actions))
    assert torch.equal(second.encode_prompts(INSTRUCTIONS)[0], first.encode_prompts(INSTRUCTIONS)[0])


def test_a_policy_comes_back_as_it_was(model, tmp_path):
    folder = exported(model, tmp_path / "official", max_file_bytes=20_000)
    assert is_official(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    back = import_policy(folder, tmp_path / "back", ModelConfig(), unnorm_key=None, seed=5)
    equal_outputs(model, load_model(back))
    assert not list(back.glob("model*"))  # weights are referred to, not copied
    again = export_policy(back, tmp_path / "again")
    assert [path.name for path in again.glob("model*")] == ["model.safetensors"]
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    equal_outputs(model, load_model(import_policy(again, tmp_path / "third", ModelConfig(), unnorm_key=None, seed=6)))


def test_what_the_published_code_reads_has_its_names_alone(checkpoint):
    model = small_quest(**PUBLISHED)
    assert {path.name for path in checkpoint.iterdir()} == {
        "config.json", "model.safetensors", "heads.safetensors", "task_embeddings.safetensors",
    }  # fmt: skip
    names = load_file(checkpoint / "model.safetensors").keys()
    added = {name for name in model.state_dict() if name.startswith("value_head.")} | {"task_embeddings"}
    assert names == model.state_dict().keys() - added


def test_a_value_head_that_a_checkpoint_lacks_starts_from_the_seed_at_value_0(copy, tmp_path):
    (copy / "heads.safetensors").unlink()
    first, same, other = (
        load_model(import_policy(copy, tmp_path / str(i), ModelConfig(), unnorm_key=None, seed=seed))
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first.value_head[0].weight, same.value_head[0].weight)
    assert not torch.equal(first.value_head[0].weight, other.value_head[0].weight)
    assert (first(quest_observations(first), random_codes(first)).values == 0).all()


def test_vectors_may_be_of_half_precision_and_lie_among_the_weights(copy, tmp_path):
    path = copy / "task_embeddings.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    path.unlink()
    save_file({**load_file(copy / "model.safetensors"), **half}, copy / "model.safetensors")
    small = ModelConfig()
    back = load_model(import_policy(copy, tmp_path / "back", small, unnorm_key=None, seed=0))
    assert torch.equal(back.task_embeddings, half["task_embeddings"].float())
    assert torch.isfinite(back.context(quest_observations(back))).all()


def edit(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instructions": None}, "has no `instructions`; list there what the policy was taught, in the order of"),
        ({"instructions": INSTRUCTIONS[1:]}, r"task_embeddings has shape \(3, 6\); 2 instructions need \(2, 6\)"),
        ({"instructions": "push"}, "`instructions` must be a list of texts"),
        ({"instructions": [*INSTRUCTIONS[1:], 3]}, "`instructions` must be a list of texts"),
        ({"image_embed_dim": None, "obs_reduction": None}, r"lacks image_embed_dim, obs_reduction; give them"),
        ({"action_horizon": 9}, r"contradicts itself:\s+model\.chunk_length = 9: a skill has only .* = 8 actions"),
        ({"image_embed_dim": "eight"}, "is not as the published code's config.*Input should be a valid integer"),
        ({"shape_meta": 3}, r"lacks shape_meta\.action_dim"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_followed_says_what_to_mend(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_official(copy, ModelConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample_factor": 3}, "downsample_factor = 3: .* must be a power of two"),
        ({"fsq_level": None, "codebook_size": 32}, "codebook_size = 32: the published code has levels for 16, 64"),
    ],
)
def test_an_autoencoder_that_the_published_code_would_not_make_is_refused(copy, changes, message):
    coder = json.loads((copy / "config.json").read_text())["autoencoder"]
    edit(copy, autoencoder={**coder, **changes})
    with pytest.raises(ValueError, match=message):
        read_official(copy, ModelConfig())


def test_more_instructions_than_learned_rows_are_refused(tmp_path):
    folder = exported(small_quest(**PUBLISHED, task_encoding="embedding"), tmp_path / "official")
    edit(folder, instructions=[f"push {i}" for i in range(7)])
    with pytest.raises(ValueError, match=r"lists 7 instructions, but shape_meta\.task\.n_tasks = 6"):
        read_official(folder, ModelConfig())


def test_missing_vectors_say_where_to_put_them(copy):
    (copy / "task_embeddings.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no task_embeddings\.safetensors; .*'task_embeddings' \[3, 6\]"):
        read_official(copy, ModelConfig())


def test_every_tensor_that_does_not_fit_is_named_before_a_policy_folder_is_made(copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    del tensors["policy_prior.lnf.bias"]
    save_file({**tensors, "extra": torch.zeros(2), "obs_proj.bias": torch.zeros(3)}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="3 tensors are not what the config describes") as caught:
        import_policy(copy, tmp_path / "back", ModelConfig(), unnorm_key=None, seed=0)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: policy_prior.lnf.bias",
        "shape: obs_proj.bias is (3,), the config says (16,)",
        "unknown: extra (2,)",
    ]
    assert not (tmp_path / "back").exists()


def test_a_pickle_is_refused_with_how_to_convert_it(copy):
    torch.save({"model": load_file(copy / "model.safetensors")}, copy / "multitask_model_final.pth")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"multitask_model_final\.pth.*python -m vlarl_ray\.models\.unpickle"):
        read_official(copy, ModelConfig())


def test_what_the_checkpoint_settles_may_not_be_said_otherwise(copy):
    with pytest.raises(ValueError, match=r"model\.chunk_length = 2, but the checkpoint .* has 3; leave it out"):
        read_official(copy, ModelConfig(chunk_length=2))
    with pytest.raises(ValueError, match=r"value_hidden_sizes = \(9,\), but the checkpoint .* has \(8,\)"):
        read_official(copy, ModelConfig(value_hidden_sizes=(9,)))
    with pytest.raises(ValueError, match=r"unnorm_key = 'libero': QueST checkpoints have no action statistics"):
        read_official(copy, ModelConfig(), unnorm_key="libero")
    with pytest.raises(ConfigError, match=r"algorithm\.ratio_level = action: quest's codes"):
        check_policy(ExperimentConfig(policy=str(copy)), copy)


def test_policies_without_a_published_counterpart_are_not_exported(tmp_path):
    message = r"conv_kernels = \[5, 3, 3\] .* the published code has \[5, 3\] with \[2, 1\]"
    with pytest.raises(ValueError, match=message):
        exported(small_quest(), tmp_path / "official")
    model = small_quest(**PUBLISHED)
    model.normalizer = ActionNormalizer((-1.0,) * 3, (2.0,) * 3, (True,) * 3)
    with pytest.raises(ValueError, match="have no place for statistics; share it as a policy folder"):
        exported(model, tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"official policy", "other policy"}


def toy_quest(instructions=("reach the cross",)):
    """A QueST for the toy suite."""
    return small_quest(instructions=list(instructions), **PUBLISHED, action_dim=2, lowdim=(("position", 2),))


def test_instructions_that_the_policy_does_not_know_are_told_before_anything_is_simulated(tmp_path, capsys):
    folder = exported(toy_quest(["reach the star", "push"]), tmp_path / "official")
    policies = [folder, folder.with_name("official policy")]
    for policy in policies:
        cfg = replace(toy_config(tmp_path / "run"), model=ModelConfig())
        cfg = replace(cfg, algorithm=replace(cfg.algorithm, ratio_level="token"))
        cfg = replace(cfg, model=load_model(policy).model_config if policy == policies[1] else cfg.model)
        message = r"'reach-a', 'reach the cross', is not among .* did you mean 'reach the star'\?"
        with pytest.raises(ConfigError, match=message):
            run_evaluate(cfg, str(policy))
    assert not (tmp_path / "run").exists()


def test_a_published_checkpoint_is_evaluated_and_trained_from_as_it_is(tmp_path, capsys):
    model = toy_quest()
    folder = exported(model, tmp_path / "official")
    cfg = toy_config(tmp_path / "run", model=ModelConfig(), evaluation=EvaluationConfig(states_per_task=2))
    cfg = replace(
        cfg,
        env=replace(cfg.env, max_env_steps=6),
        rollout=replace(cfg.rollout, groups_per_update=2),
        algorithm=replace(cfg.algorithm, ratio_level="token", critic_warmup_updates=0),
    )
    assert run_evaluate(cfg, str(folder)) == 0
    assert json.loads((tmp_path / "run" / "evaluation-0.json").read_text())["episodes"] == 2

    cfg = replace(cfg, run_dir=str(tmp_path / "trained"), policy=str(folder), num_iterations=1)
    assert run_training(cfg, inline=True, resume=False) == 0
    assert [row["label"] for row in evaluations(tmp_path / "trained")] == ["warm_start", "final"]
    assert main(["export", str(tmp_path / "trained"), "--to", str(tmp_path / "improved")]) == 0
    improved = read_official(tmp_path / "improved", cfg.model)
    merged = load_model(tmp_path / "trained" / "policy_final").state_dict()
    changed = set()
    for name in improved.weights:
        assert np.array_equal(improved.weights.read(name), merged[name]), name
        changed |= {name} if not torch.equal(merged[name], model.state_dict()[name]) else set()
    assert {name.partition(".")[0] for name in changed} == {"policy_prior", "value_head"}
