"""A run's adapters as a folder of PEFT's: what PEFT computes with it is what the run's learner computed."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.toy_run import toy_config
from tests.learner_runs import build, fixed_batch
from tests.tiny_model import INSTRUCTIONS, algorithm_config, learner_config, small_openvla
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.checkpoint import commit
from vlarl_ray.cli import main
from vlarl_ray.config_loader import config_to_json
from vlarl_ray.models import load_model
from vlarl_ray.models.base import PolicyInputs
from vlarl_ray.models.lora import CRITIC, lora_layers
from vlarl_ray.models.official import read_official
from vlarl_ray.models.policy_export import export_policy
from vlarl_ray.models.policy_import import import_policy

OPENVLA = {"decoding": "autoregressive", "chunk_length": 1}


@pytest.fixture(scope="module", params=["shared", "separate"])
def run(request, tmp_path_factory):
    """A run folder with two checkpoints, and the learner of the newer one."""
    run_dir, settings = tmp_path_factory.mktemp("run"), {"critic": request.param, "actor_learning_rate": 0.02}
    small_openvla(learner_config(train="full"), **OPENVLA).save(run_dir / "policy")
    return train(run_dir, settings)


def train(run_dir, settings):
    learner = build(learner=settings, openvla=OPENVLA)
    config = replace(toy_config(run_dir), learner=learner_config(**settings))
    (run_dir / "config.json").write_text(config_to_json(config))
    for version in range(2):
        learner.update(fixed_batch(PPO(algorithm_config()), version=version, model=learner.model))
        arrays, state = learner.state_dict()
        commit(str(run_dir), version + 1, arrays=arrays, state={"version": version + 1, "learner": state}, keep=2)
    return run_dir, learner.model


def observed(model):
    """Three observations, and a token for each."""
    images = torch.randint(256, (3, 1, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    inputs = PolicyInputs(images, *model.encode_prompts(INSTRUCTIONS[:3]), torch.zeros(3, 0))
    return inputs, torch.full((3, model.num_action_tokens), model.first_action_token)


def test_peft_loads_the_adapter_onto_the_base_and_computes_what_the_learner_does_f28(run, tmp_path, capsys):
    run_dir, trained = run
    assert main(["export", str(run_dir), "--to", str(tmp_path / "adapter"), "--adapter"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "adapter")
    description = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    base = load_model(description["base_model_name_or_path"])
    assert (description["r"], description["lora_alpha"]) == (3, 6.0)

    inputs, tokens = observed(trained)
    untrained = base(inputs, tokens)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).base_model.model
    theirs.load_state_dict(load_file(tmp_path / "adapter" / "heads.safetensors"), strict=False)
    found, expected = theirs(inputs, tokens), trained(inputs, tokens)
    assert (found.actions.logits - untrained.actions.logits).abs().max() > 1e-2
    torch.testing.assert_close(found.actions.logits, expected.actions.logits, rtol=0, atol=1e-6)
    for layer in lora_layers(trained).values():
        layer.merges = False  # wide ranks are merged as they are trained, which rounds otherwise
    expected = trained(inputs, tokens)
    assert torch.equal(found.actions.logits, expected.actions.logits)
    if trained.critic == "shared":
        assert torch.equal(found.values, expected.values)
        assert (found.values - untrained.values).abs().max() > 1e-3


def test_a_separate_critic_s_adapters_are_a_second_adapter_to_peft(run, tmp_path):
    run_dir, trained = run
    main(["export", str(run_dir), "--to", str(tmp_path / "adapter"), "--adapter"])
    if trained.critic == "shared":
        assert not (tmp_path / "adapter" / CRITIC).exists()
        return
    base = load_model(run_dir / "policy")
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    model.load_adapter(str(tmp_path / "adapter" / CRITIC), CRITIC)
    model.set_adapter(CRITIC)
    theirs = model.base_model.model
    theirs.load_state_dict(load_file(tmp_path / "adapter" / "heads.safetensors"), strict=False)
    inputs, tokens = observed(trained)
    torch.testing.assert_close(theirs(inputs, tokens).values, trained(inputs, tokens).values, rtol=0, atol=1e-6)


def test_the_adapter_of_an_earlier_checkpoint_and_its_merged_policy_are_that_checkpoint_s(run, tmp_path):
    run_dir, _ = run
    first, second = sorted((run_dir / "checkpoints").iterdir())
    for name, source in (("first", first), ("second", second), ("newest", run_dir)):
        assert main(["export", str(source), "--to", str(tmp_path / name), "--adapter"]) == 0
    tensors = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second", "newest")}
    assert all(torch.equal(tensors["second"][name], tensor) for name, tensor in tensors["newest"].items())
    assert any(not torch.equal(tensors["first"][name], tensor) for name, tensor in tensors["newest"].items())

    assert main(["export", str(first), "--to", str(tmp_path / "merged")]) == 0
    config = load_model(run_dir / "policy").model_config
    merged = read_official(tmp_path / "merged", config).weights
    base = load_model(run_dir / "policy")
    plain = peft.PeftModel.from_pretrained(base, str(tmp_path / "first")).merge_and_unload()
    plain.load_state_dict(load_file(tmp_path / "first" / "heads.safetensors"), strict=False)
    for name, tensor in plain.state_dict().items():
        # PEFT merges by a matrix product, which sums in another order than servers and exports do
        torch.testing.assert_close(merged.read(name), tensor, rtol=0, atol=1e-6, msg=name)


def test_the_base_of_a_run_from_a_published_checkpoint_is_that_checkpoint(run, tmp_path):
    run_dir, trained = run
    official = export_policy(run_dir / "policy", tmp_path / "official")
    new, settings = tmp_path / "run", {"critic": trained.critic}
    import_policy(official, new / "policy", trained.model_config, unnorm_key=None, seed=0)
    train(new, settings)
    assert main(["export", str(new), "--to", str(tmp_path / "adapter"), "--adapter"]) == 0
    description = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == str(official)


def test_what_has_no_adapter_says_so_and_leaves_nothing(run, tmp_path, capsys):
    run_dir, _ = run
    full = tmp_path / "full"
    small_openvla(learner_config(train="full"), **OPENVLA).save(full / "policy")
    train(full, {"train": "full"})
    empty = tmp_path / "empty"
    (empty / "policy").mkdir(parents=True)
    (empty / "config.json").write_text((run_dir / "config.json").read_text())
    [damaged, _] = sorted((full / "checkpoints").iterdir())
    (damaged / "parameters.safetensors").write_bytes(b"")
    target = str(tmp_path / "out")
    for source, message in (
        (full, "learner.train = full"),
        (empty, "holds no checkpoint yet"),
        (tmp_path / "none", "belongs to no run"),
        (damaged, "is damaged: parameters.safetensors has 0 bytes"),
        (full / "checkpoints" / "000009-step00000009", "is no committed checkpoint"),
    ):
        assert main(["export", str(source), "--to", target, "--adapter"]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert "Traceback" not in printed
    assert main(["export", str(run_dir), "--to", str(full), "--adapter"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
