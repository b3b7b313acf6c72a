"""Dropout on the adapters' inputs: PEFT's, of rows rather than of passes, and in passes that learn only."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch

from benchmarks.memory import compare
from tests.learner_runs import LENGTHS, build, fixed_batch, three_updates
from tests.small_openvla import observations, tiny, tiny_oft
from tests.tiny_model import algorithm_config, make_trajectories
from tests.unit.test_cloning import demo_rows, every_decision, successes, updated
from tests.unit.test_learner import largest_difference
from tests.unit.test_lora import SMALL, perturb
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.config import LoraConfig
from vlarl_ray.config_checks import check_config
from vlarl_ray.config_loader import load_config
from vlarl_ray.models.lora import LoraLinear, adapter_dropout, adapter_tensors, attach_lora, head_tensors, save_adapter
from vlarl_ray.models.lora_dropout import drop, row_seeds

DROPPING = LoraConfig(rank=3, alpha=6.0, dropout=0.5)


def attached(model=None, config=DROPPING):
    model = model or tiny()
    attach_lora(model, config, seed=3)
    return perturb(model)


def layer(rank=2, dropout=0.3):
    torch.manual_seed(0)
    made = LoraLinear(torch.nn.Linear(64, 8), LoraConfig(rank=rank, dropout=dropout), ["default"], name="some.layer")
    with torch.no_grad():
        made.pair("default")[1].normal_()
    return made


def seeds(count=4, **changes):
    options = {"num_rows": 100, "seed": 0, "version": 2, "minibatch": 1, "is_cloning": False, **changes}
    return row_seeds(np.arange(count), **options)


@pytest.mark.parametrize("rank", [2, 24])  # of both ways of computing
def test_the_input_of_the_adapter_is_dropped_and_scaled_and_nothing_else_f28(rank):
    made, x = layer(rank), torch.randn(4, 5, 64)
    a, b = made.pair("default")
    dropped = drop(x, seeds(), layer="some.layer:default", probability=0.3)
    with adapter_dropout(made, seeds()):
        found = made(x)
    torch.testing.assert_close(found, made.base_layer(x) + made.scale * (dropped @ a.T @ b.T))
    zero = dropped == 0
    assert 0.25 < zero.float().mean() < 0.35
    torch.testing.assert_close(dropped[~zero], x[~zero] / 0.7)


def test_it_is_that_of_peft_on_average():
    made, x = layer(dropout=0.5), torch.randn(1, 64)
    reference = peft.tuners.lora.Linear(
        made.base_layer, "default", config=peft.LoraConfig(lora_dropout=0.5), r=2, lora_alpha=32
    ).train()
    with torch.no_grad():
        for theirs, ours in zip((reference.lora_A, reference.lora_B), made.pair("default"), strict=True):
            theirs["default"].weight.copy_(ours)
        theirs = reference(x.expand(20000, -1))
        with adapter_dropout(made, seeds(20000, num_rows=20000)):
            ours = made(x.expand(20000, -1))
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread * (2 / 20000) ** 0.5).all()
    torch.testing.assert_close(ours.std(0), spread, rtol=0.03, atol=0)


@pytest.mark.parametrize("model", [tiny, tiny_oft], ids=["openvla", "oft, several cameras"])
def test_a_row_is_dropped_alike_in_whatever_pass_it_comes(model):
    model = attached(model())
    inputs, drawn = observations(model), seeds(3)

    def logits(rows):
        with adapter_dropout(model, drawn[rows]):
            actions = model(inputs.rows(torch.from_numpy(rows))).actions
            return (actions.logits if hasattr(actions, "logits") else actions.location).detach()

    whole = logits(np.arange(3))
    torch.testing.assert_close(logits(np.array([2, 0])), whole[[2, 0]], rtol=0, atol=1e-5)
    drawn = seeds(3, version=3)
    assert (logits(np.arange(3)) - whole).abs().max() > 1e-3


def test_outside_the_context_and_with_adapters_disabled_nothing_is_dropped():
    model, plain = attached(), attached(config=replace(DROPPING, dropout=0.0))
    inputs = observations(model)
    with adapter_dropout(model, seeds(3)), model.adapters_disabled():
        assert torch.equal(model(inputs).actions.logits, tiny()(inputs).actions.logits)
    assert torch.equal(model(inputs).actions.logits, plain(inputs).actions.logits)
    with adapter_dropout(plain, seeds(3)):
        assert torch.equal(model(inputs).actions.logits, plain(inputs).actions.logits)


def test_seeds_differ_between_rows_minibatches_updates_and_runs():
    draws = [seeds(), seeds(seed=1), seeds(version=3), seeds(minibatch=2), seeds(is_cloning=True)]
    assert len({int(seed) for draw in draws for seed in draw}) == 20
    some = row_seeds(np.array([3, 1]), num_rows=100, seed=0, version=2, minibatch=1, is_cloning=False)
    assert some.tolist() == seeds()[[3, 1]].tolist()


def test_layers_drop_different_places():
    x = torch.ones(4, 64)
    first, second = (drop(x, seeds(), layer=name, probability=0.5) for name in ("a:default", "a:critic"))
    assert 0.3 < (first == second).float().mean() < 0.7


def test_f15_micro_batches_add_up_to_the_same_step_with_dropout():
    runs = [three_updates(learner={"micro_batch_size": size, "lora": DROPPING}) for size in (20, 3)]
    assert largest_difference(*(run["state"][0]["parameters"] for run in runs)) < 1e-6
    plain = three_updates(learner={"micro_batch_size": 20, "lora": replace(DROPPING, dropout=0.0)})
    assert largest_difference(runs[0]["state"][0]["parameters"], plain["state"][0]["parameters"]) > 1e-4


def test_cloning_passes_drop_too_and_apart_from_the_others():
    demos, plain = demo_rows(every_decision(successes())), replace(DROPPING, dropout=0.0)

    def loss(lora, size):
        learner = {"lora": lora, "micro_batch_size": size, "actor_learning_rate": 0.01}
        weights = {"policy_weight": 0.0, "bc_weight": 1.0}
        return updated(learner=learner, demos=demos, num_updates=2, **weights)[1][-1]["learn/bc_loss"]

    assert loss(DROPPING, 4) == pytest.approx(loss(DROPPING, 20), rel=1e-6)
    assert abs(loss(DROPPING, 20) - loss(plain, 20)) > 1e-5


def test_scores_have_no_dropout_and_updates_do_f12():
    learner = build(learner={"lora": DROPPING, "actor_learning_rate": 0.01})
    learner.update(fixed_batch(PPO(algorithm_config()), version=0))
    trajectories = make_trajectories(LENGTHS, model=learner.model)
    for trajectory, score in zip(trajectories, learner.score(trajectories), strict=True):
        np.testing.assert_allclose(score.logprobs, trajectory.behaviour_logprobs, atol=1e-5)
    batch = fixed_batch(PPO(algorithm_config()), version=1, model=learner.model)
    assert learner.update(batch)["learn/first_ratio_error"] > 1e-3  # where it is below 1e-4 without


def test_the_saved_adapter_says_how_it_was_trained(tmp_path):
    model = attached()
    save_adapter(tmp_path, adapter_tensors(model), head_tensors(model), DROPPING)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.5
    save_adapter(tmp_path, adapter_tensors(model), head_tensors(model), SMALL)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.0


def test_memory_for_the_masks_is_planned():
    small = ["--learner.micro_batch_size", "8", "--algorithm.num_minibatches", "1", "--algorithm.num_epochs", "1"]
    small += ["--inference.batch_size", "2"]
    plain, dropping = (
        compare(load_config("jobs/smoke.yaml", ["--learner.lora.dropout", value, *small]))["learner rank: activations"]
        for value in ("0", "0.1")
    )
    assert dropping["planned"] == pytest.approx(dropping["measured"], rel=0.15)
    assert dropping["measured"] > 1.05 * plain["measured"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--learner.train", "full"], "is of adapters, and learner.train = full has none"),
        (["--algorithm.target_kl", "0.02"], "part of the KL that algorithm.target_kl = 0.02 goes by"),
        (
            ["--algorithm.name", "chunk_ppo", "--algorithm.self_bc.schedule", "kl_target"],
            "part of the KL that algorithm.self_bc.schedule = kl_target goes by",
        ),
    ],
)
def test_what_dropout_would_spoil_is_refused(overrides, message):
    cfg = load_config(None, [*overrides, "--run_dir", "none"])
    assert not [p for p in check_config(cfg) if "learner.lora.dropout" in p.fields]
    dropping = replace(cfg, learner=replace(cfg.learner, lora=DROPPING))
    [problem] = [p for p in check_config(dropping) if "learner.lora.dropout" in p.fields]
    assert message in problem.message
