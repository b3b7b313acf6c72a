"""Policies in the published layouts: exported, imported, evaluated and trained from, with equal outputs throughout."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.e2e.toy_run import evaluations, toy_config
from tests.small_openvla import INSTRUCTIONS, observations, tiny, tiny_oft
from vlarl_ray.cli import main
from vlarl_ray.config import EvaluationConfig, ModelConfig, OFTConfig, PreprocessingConfig
from vlarl_ray.config_loader import ConfigError
from vlarl_ray.launch import run_evaluate, run_training
from vlarl_ray.models import ActionNormalizer, load_model, new_policy
from vlarl_ray.models.official import is_official, read_official
from vlarl_ray.models.policy_export import export_policy
from vlarl_ray.models.policy_import import import_policy
from vlarl_ray.models.tokenizer import PromptTokenizer
from vlarl_ray.warm_start import check_policy

MASKED = ActionNormalizer((-1.0, -2.0, -3.0), (1.0, 2.0, 3.0), (True, True, False))


def openvla(**changes):
    config = replace(tiny().model_config, decoding="autoregressive", chunk_length=1, **changes)
    return new_policy(config, INSTRUCTIONS, 0, normalizer=MASKED)


BUILDERS = {
    "openvla": openvla,
    "openvla, bicubic": lambda: openvla(preprocessing=PreprocessingConfig(interpolation="bicubic")),
    "oft l1": lambda: tiny_oft(action_head="l1"),
    "oft laplace, two passes": lambda: tiny_oft(action_head="laplace", passes="two"),
    "oft tokens": lambda: tiny_oft(action_head="tokens"),
}


@pytest.fixture(params=BUILDERS)
def model(request):
    return BUILDERS[request.param]()


def equal_outputs(first, second):
    inputs = observations(first)
    tokens, logprobs = first.sample(inputs, temperature=0.0, noise=None)
    found, again = second.sample(inputs, temperature=0.0, noise=None)
    assert torch.equal(found, tokens)
    assert torch.equal(again, logprobs)
    assert torch.equal(second.decode_actions(found), first.decode_actions(tokens))
    assert torch.equal(second(inputs, tokens).values, first(inputs, tokens).values)


@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000])
def test_a_policy_comes_back_as_it_was(model, tmp_path, max_file_bytes):
    model.save(tmp_path / "policy")
    folder = export_policy(tmp_path / "policy", tmp_path / "official", max_file_bytes=max_file_bytes)
    assert is_official(folder)
    assert (len(list(folder.glob("model*.safetensors"))) > 1) == (max_file_bytes < 10**9)
    import_policy(folder, tmp_path / "back", model.model_config, unnorm_key=None, seed=5)
    back = load_model(tmp_path / "back")
    equal_outputs(model, back)
    assert not (tmp_path / "back" / "model.safetensors").exists()  # weights are referred to, not copied
    equal_outputs(model, load_model(export_again(tmp_path)))


def export_again(tmp_path):
    export_policy(tmp_path / "back", tmp_path / "again")
    back = json.loads((tmp_path / "back" / "config.json").read_text())["model"]
    wanted = load_model(tmp_path / "back").model_config
    assert back["architecture"] == wanted.architecture
    return import_policy(tmp_path / "again", tmp_path / "third", wanted, unnorm_key=None, seed=6)


def test_heads_that_a_checkpoint_lacks_start_from_the_seed(tmp_path):
    openvla().save(tmp_path / "policy")
    folder = export_policy(tmp_path / "policy", tmp_path / "official")
    (folder / "heads.safetensors").unlink()
    wanted = openvla().model_config
    first, same, other = (
        load_model(import_policy(folder, tmp_path / str(i), wanted, unnorm_key=None, seed=seed))
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first.value_head[0].weight, same.value_head[0].weight)
    assert not torch.equal(first.value_head[0].weight, other.value_head[0].weight)
    inputs = observations(first)
    tokens, _ = first.sample(inputs, temperature=0.0, noise=None)
    assert (first(inputs, tokens).values == 0).all()  # value 0 at first


def test_policies_without_a_published_counterpart_are_not_exported(tmp_path):
    tiny().save(tmp_path / "policy")
    with pytest.raises(ValueError, match="other policies are shared as policy folders"):
        export_policy(tmp_path / "policy", tmp_path / "official")
    assert not (tmp_path / "official").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]
    with pytest.raises(FileExistsError, match="is not empty"):
        export_policy(tmp_path / "policy", tmp_path / "policy")


def test_an_import_whose_checkpoint_is_gone_says_so(tmp_path):
    openvla().save(tmp_path / "policy")
    folder = export_policy(tmp_path / "policy", tmp_path / "official")
    import_policy(folder, tmp_path / "back", openvla().model_config, unnorm_key=None, seed=0)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="put the checkpoint back, or import it again"):
        load_model(tmp_path / "back")


def test_a_checkpoint_for_another_robot_is_refused_before_anything_is_simulated(tmp_path):
    model = openvla()
    model.save(tmp_path / "policy")
    folder = export_policy(tmp_path / "policy", tmp_path / "official")
    cfg = replace(
        toy_config(tmp_path / "run"), model=replace(ModelConfig(), max_prompt_tokens=14, value_hidden_sizes=(8,))
    )
    with pytest.raises(ConfigError, match=r"model\.action_dim = 3: the simulators of toy have 2"):
        run_evaluate(cfg, str(folder))
    assert not (tmp_path / "run").exists()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist: its prompts cannot be encoded"):
        run_evaluate(cfg, str(folder))


def test_frame_steps_are_added_to_what_a_checkpoint_says_of_its_processor(tmp_path):
    openvla(preprocessing=PreprocessingConfig(interpolation="bicubic")).save(tmp_path / "policy")
    folder = export_policy(tmp_path / "policy", tmp_path / "official")
    wanted = ModelConfig(preprocessing=PreprocessingConfig(frame_steps=("jpeg", "center_crop"), crop_area=0.8))
    found = read_official(folder, wanted).model.preprocessing
    assert (found.interpolation, found.frame_steps, found.crop_area) == ("bicubic", ("jpeg", "center_crop"), 0.8)
    letterbox = PreprocessingConfig(frame_steps=("jpeg",), resize_strategy="letterbox")
    with pytest.raises(ValueError, match=r"model\.preprocessing = .*but the checkpoint"):
        read_official(folder, ModelConfig(preprocessing=letterbox))


def test_a_policy_for_two_cameras_is_refused_where_there_is_one(tmp_path):
    tiny_oft(num_cameras=2, proprio_dim=0).save(tmp_path / "policy")
    export_policy(tmp_path / "policy", tmp_path / "official")
    cfg = toy_config(tmp_path / "run")
    wanted = replace(ModelConfig(), architecture="openvla_oft", oft=OFTConfig(num_cameras=2), value_hidden_sizes=(8,))
    for name, model in (("policy", ModelConfig()), ("official", wanted)):
        with pytest.raises(ConfigError, match=r"env\.camera names 1 camera .* takes 2 frames an observation"):
            check_policy(replace(cfg, model=model), tmp_path / name)
    with pytest.raises(ConfigError, match=r"env\.camera names 1 camera"):
        run_evaluate(cfg, str(tmp_path / "policy"))


def test_an_instruction_that_makes_too_long_a_prompt_is_refused_before_anything_starts(tmp_path):
    cfg = toy_config(tmp_path / "run", policy=str(tmp_path / "policy"))
    tokenizer = PromptTokenizer.train(["go"], vocab_size=cfg.model.text_vocab_size)
    most = len(tokenizer.encode("go"))
    cfg = replace(cfg, model=replace(cfg.model, max_prompt_tokens=most))
    new_policy(cfg.model, ["go"], 0).save(tmp_path / "policy")
    with pytest.raises(ConfigError, match=rf"'reach the cross', makes a prompt of \d+ tokens, but .*_tokens = {most};"):
        run_training(cfg, inline=False, resume=False)
    assert not (tmp_path / "run").exists()


def test_a_published_checkpoint_is_evaluated_and_trained_from_as_it_is(tmp_path, capsys):
    cfg = toy_config(tmp_path / "run")
    config = replace(cfg.model, decoding="autoregressive", chunk_length=1, max_prompt_tokens=40)
    model = new_policy(config, ["reach the cross"], 0)
    model.save(tmp_path / "policy")
    assert main(["export", str(tmp_path / "policy"), "--to", str(tmp_path / "official")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "official")
    wanted = replace(type(config)(), max_prompt_tokens=40, value_hidden_sizes=config.value_hidden_sizes)
    plain = replace(cfg, model=wanted, evaluation=EvaluationConfig(states_per_task=2))
    assert run_evaluate(plain, str(tmp_path / "official")) == 0
    result = json.loads((tmp_path / "run" / "evaluation-0.json").read_text())
    assert result["episodes"] == 2

    trained = replace(plain, run_dir=str(tmp_path / "trained"), policy=str(tmp_path / "official"), num_iterations=1)
    trained = replace(trained, algorithm=replace(trained.algorithm, critic_warmup_updates=0))
    assert run_training(trained, inline=True, resume=False) == 0
    assert [row["label"] for row in evaluations(tmp_path / "trained")] == ["warm_start", "final"]
    assert main(["export", str(tmp_path / "trained"), "--to", str(tmp_path / "improved")]) == 0
    improved = read_official(tmp_path / "improved", plain.model)
    merged = load_model(tmp_path / "trained" / "policy_final").state_dict()
    changed = 0
    for name in improved.weights:
        assert torch.equal(improved.weights.read(name).float(), merged[name]), name
        changed += not torch.equal(merged[name], model.state_dict()[name]) if name in model.state_dict() else 0
    assert changed > 10
