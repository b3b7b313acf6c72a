"""Whole runs in one process: complete, reproducible, resumable, and stopped where the weights are wrong."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.toy_run import episodes, evaluations, numbers, summary, toy_config, with_lag
from tests.small_quest import quest_config
from vlarl_ray.checkpoint import load_latest
from vlarl_ray.config import OFTConfig, SamplingConfig, SelfBCConfig
from vlarl_ray.config_loader import ConfigError
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.launch import run_evaluate, run_sft, run_training
from vlarl_ray.metrics.logger import read_jsonl
from vlarl_ray.train import SamplerMismatchError
from vlarl_ray.weights.canary import CanaryError


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """One run from demonstrations to report; later tests start from its policy."""
    run_dir = tmp_path_factory.mktemp("run")
    assert run_training(toy_config(run_dir), inline=True, resume=False) == 0
    return run_dir


def from_policy(finished_run, run_dir, **changes):
    return toy_config(run_dir, policy=str(finished_run / "policy"), **changes)


def test_a_run_leaves_a_complete_folder(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "config.json", "metrics.jsonl", "evaluations.jsonl", "episodes.parquet", "checkpoints", "videos", "report.html",
        "summary.json", "policy", "policy_final", "demos",
    }  # fmt: skip
    assert [row["version"] for row in numbers(finished_run)] == [1, 2, 3]
    assert [row["label"] for row in evaluations(finished_run)] == ["warm_start", "final"]
    rows = episodes(finished_run)
    assert len(rows) == 3 * 8 + 2 * 4
    assert {row["split"] for row in rows} == {"train", "eval"}
    assert len(list((finished_run / "videos").glob("*.mp4"))) == 1


def test_the_summary_adds_up(finished_run):
    figures = summary(finished_run)
    trained = [row for row in episodes(finished_run) if row["split"] == "train"]
    assert figures["env_steps"] == sum(row["env_steps"] for row in trained)
    assert figures["final"]["episodes"] == 4
    assert figures["published_bytes_per_update"] == numbers(finished_run)[0]["publish/bytes"]
    assert 0 < figures["published_bytes_per_update"] < figures["model_bytes"]
    assert figures["total_seconds"] > figures["rl_seconds"] > 0


def test_the_plan_of_memory_is_compared_once_after_the_first_update_that_trains_everything(finished_run):
    rows = read_jsonl(finished_run / "metrics.jsonl")
    assert ["memory/measured_bytes" in row for row in rows] == [False, True, False]  # the first trains the critic only
    assert rows[1]["memory/planned_bytes"] == pytest.approx(rows[1]["memory/measured_bytes"], rel=0.15)


def test_the_sampler_ratio_is_measured_in_every_update(finished_run):
    for row in numbers(finished_run):
        assert row["learn/sampler_ratio_decisions"] >= 8
        assert row["learn/sampler_ratio_max_error"] <= 1e-4
        assert row["canary/max_abs_logprob_diff"] <= 1e-4


def test_the_trained_policy_is_saved_merged_and_evaluates_as_in_the_run(finished_run):
    before = {path.name: path.read_bytes() for path in finished_run.iterdir() if path.is_file()}
    run_evaluate(toy_config(finished_run), str(finished_run / "policy_final"))
    result = json.loads((finished_run / "evaluation-0.json").read_text())
    final = evaluations(finished_run)[-1]
    assert final["label"] == "final"
    assert (result["success_rate"], result["per_task"]) == (final["success_rate"], final["per_task"])
    after = {path.name: path.read_bytes() for path in finished_run.iterdir() if path.is_file()}
    assert {name: after[name] for name in before} == before  # evaluating changes nothing of the run


def test_the_same_seed_gives_the_same_numbers_f62(finished_run, tmp_path):
    for name in ("a", "b"):
        run_training(from_policy(finished_run, tmp_path / name), inline=True, resume=False)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert episodes(tmp_path / "a") == episodes(tmp_path / "b")
    run_training(from_policy(finished_run, tmp_path / "c", seed=1), inline=True, resume=False)
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


def test_n_plus_m_updates_equal_n_save_load_m_f61(finished_run, tmp_path):
    run_training(from_policy(finished_run, tmp_path / "whole"), inline=True, resume=False)
    first = from_policy(finished_run, tmp_path / "parts", num_iterations=2)
    run_training(first, inline=True, resume=False)
    run_training(replace(first, num_iterations=3), inline=True, resume=True)
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")
    whole, parts = load_latest(str(tmp_path / "whole")), load_latest(str(tmp_path / "parts"))
    assert whole is not None
    assert parts is not None
    assert whole.state["learner"] == parts.state["learner"]
    for file, tensors in whole.arrays.items():
        for name, value in tensors.items():
            assert (value == parts.arrays[file][name]).all(), name
    assert [row["label"] for row in evaluations(tmp_path / "parts")].count("warm_start") == 1


def test_openvla_oft_runs_from_demonstrations_to_report_and_its_server_is_its_learner(tmp_path):
    """RIPT-VLA's variant: two passes, the prompt detached, a Laplace head beside one of the locations."""
    cfg = toy_config(tmp_path, num_iterations=2)
    oft = OFTConfig(passes="two", detach_prompt=True)
    model = replace(cfg.model, architecture="openvla_oft", action_head="laplace", proprio_dim=2, oft=oft)
    assert run_training(replace(cfg, model=model), inline=True, resume=False) == 0
    assert [row["learn/grad_norm_actor"] > 0 for row in numbers(tmp_path)] == [False, True]  # the first warms up
    for row in numbers(tmp_path):
        assert row["learn/sampler_ratio_max_error"] <= 1e-4
        assert row["canary/max_abs_logprob_diff"] <= 1e-4
    assert (tmp_path / "policy_final" / "config.json").exists()


def rloo(cfg, **sampling):
    """Leave-one-out advantages with dynamic sampling, curriculum and skipping: everything that keeps a state."""
    return replace(
        cfg,
        algorithm=replace(cfg.algorithm, name="rloo"),
        rollout=replace(cfg.rollout, group_size=4, groups_per_update=2, temperature=2.0),
        sampling=SamplingConfig(dynamic=True, skip_solved=True, curriculum="frontier", **sampling),
        env=replace(cfg.env, tasks=("reach-a", "reach-b")),
    )


def chunk_ppo(cfg):
    self_bc = SelfBCConfig(capacity=4, min_fill=2, seed_demos=2, schedule="success_adaptive")
    return replace(cfg, algorithm=replace(cfg.algorithm, name="chunk_ppo", ratio_level="chunk", self_bc=self_bc))


@pytest.mark.parametrize("change", [rloo, chunk_ppo])
def test_n_plus_m_updates_equal_n_save_load_m_for_algorithms_with_state_f61(change, tmp_path):
    whole = change(toy_config(tmp_path / "whole"))
    run_training(whole, inline=True, resume=False)
    first = replace(whole, run_dir=str(tmp_path / "parts"), num_iterations=2)
    run_training(first, inline=True, resume=False)
    run_training(replace(first, num_iterations=3), inline=True, resume=True)
    # the learning rate is constant here, so the planned number of iterations does not matter
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")
    assert episodes(tmp_path / "whole") == episodes(tmp_path / "parts")
    states = [load_latest(str(tmp_path / name)).state for name in ("whole", "parts")]
    for part in ("algorithm", "sampler", "stored_episodes", "learner"):
        assert states[0][part] == states[1][part], part


def test_dynamic_sampling_counts_every_attempt_and_learns_from_mixed_groups_only(tmp_path):
    cfg = rloo(toy_config(tmp_path))
    run_training(cfg, inline=True, resume=False)
    rows, played = numbers(tmp_path), [row for row in episodes(tmp_path) if row["split"] == "train"]
    for iteration, row in enumerate(rows):
        groups = Counter()
        for episode in played:
            if episode["iteration"] == iteration:
                groups[episode["group_id"]] += episode["success"]
        mixed = sum(0 < successes < 4 for successes in groups.values())
        assert row["rollout/groups_attempted"] == len(groups)
        assert row["rollout/num_groups"] == mixed <= 2
        assert row["rollout/accept_rate"] == pytest.approx(mixed / len(groups))
    assert sum(row["rollout/groups_attempted"] for row in rows) * 4 == len(played)


def test_f38_an_iteration_without_an_accepted_group_changes_no_weight_and_is_counted(finished_run, tmp_path):
    cfg = rloo(from_policy(finished_run, tmp_path), max_attempts_factor=1.5)
    cfg = replace(cfg, env=replace(cfg.env, tasks=("impossible",)))
    run_training(cfg, inline=True, resume=False)
    rows = numbers(tmp_path)
    assert [(row["iteration"], row["version"]) for row in rows] == [(0, 0), (1, 0), (2, 0)]
    assert all(row["rollout/accept_rate"] == 0 and row["rollout/groups_attempted"] == 3 for row in rows)
    assert all("learn/policy_loss" not in row for row in rows)
    assert load_latest(str(tmp_path)).state["iteration"] == 3  # its draws are used up
    run_training(replace(cfg, num_iterations=4), inline=True, resume=True)
    assert [(row["iteration"], row["version"]) for row in numbers(tmp_path)][3:] == [(3, 0)]
    assert [row["label"] for row in evaluations(tmp_path)].count("warm_start") == 1


def test_self_cloning_starts_from_the_demonstrations_and_admits_successes(tmp_path):
    run_training(chunk_ppo(toy_config(tmp_path)), inline=True, resume=False)
    rows = numbers(tmp_path)
    assert rows[0]["buffer/offered"] == 8
    assert rows[0]["buffer/episodes"] >= 2
    assert rows[-1]["buffer/offered"] == 24
    assert rows[-1]["learn/bc_loss"] > 0  # not in the first update, which warms up the critic
    assert "learn/bc_loss" not in rows[0]
    stored = {path.stem for path in (tmp_path / "stored_episodes").glob("*.safetensors")}
    assert set(load_latest(str(tmp_path)).state["stored_episodes"]) <= stored


@pytest.mark.parametrize(
    ("policy", "algorithm"),
    [("tokens", "ppo"), ("gaussian", "ppo"), ("gaussian", "rloo"), ("laplace", "chunk_ppo"), ("flow", "ppo")],
)
def test_one_trainer_runs_every_kind_of_policy_unchanged_f27(tmp_path, policy, algorithm):
    cfg = toy_config(tmp_path, num_iterations=2)
    architecture = "tests.flow_policy:FlowPolicy" if policy == "flow" else "pixel_mlp"
    head = "l1" if policy == "flow" else policy
    cfg = replace(
        cfg,
        env=replace(cfg.env, max_env_steps=48),
        sft=replace(cfg.sft, num_steps=200),
        model=replace(cfg.model, architecture=architecture, action_head=head, proprio_dim=2),
        algorithm=replace(cfg.algorithm, name=algorithm, critic_warmup_updates=0),
        rollout=replace(cfg.rollout, groups_per_update=24, group_size=1 if "ppo" in algorithm else 2),
    )
    assert run_training(cfg, inline=True, resume=False) == 0
    for row in numbers(tmp_path):
        assert row["learn/sampler_ratio_max_error"] <= 1e-4
        assert row["canary/max_abs_logprob_diff"] <= 1e-4
    assert max(row["learn/grad_norm_actor"] for row in numbers(tmp_path)) > 0
    assert numbers(tmp_path)[-1]["version"] == 2


@pytest.mark.parametrize(("algorithm", "level", "train"), [("ppo", "token", "full"), ("chunk_ppo", "chunk", "lora")])
def test_skills_are_trained_by_the_same_trainer(tmp_path, algorithm, level, train):
    """From nothing: autoencoder, prior, RL of the prior; codes that are no multiple of the env steps of a chunk."""
    cfg = toy_config(tmp_path, num_iterations=2)
    # So short a warm start seldom succeeds: the entropy bonus sees to it that there is a gradient.
    loss = {"ratio_level": level, "critic_warmup_updates": 0, "entropy_coef": 0.01}
    cfg = replace(
        cfg,
        sft=replace(cfg.sft, num_steps=30),
        model=quest_config(action_dim=2, lowdim=(("position", 2),)),
        algorithm=replace(cfg.algorithm, name=algorithm, **loss),
        learner=replace(cfg.learner, train=train),
    )
    assert run_training(cfg, inline=True, resume=False) == 0
    for row in numbers(tmp_path):
        assert row["learn/sampler_ratio_max_error"] <= 1e-4
        assert row["canary/max_abs_logprob_diff"] <= 1e-4
    assert max(row["learn/grad_norm_actor"] for row in numbers(tmp_path)) > 0
    assert numbers(tmp_path)[-1]["version"] == 2
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("policy", "policy_final"))
    changed = {name.partition(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert "policy_prior" in changed
    assert changed <= {"policy_prior", "value_head"}


def test_at_lag_1_each_rollout_after_the_first_is_one_update_old_f45(finished_run, tmp_path):
    """In one process nothing runs beside the learner: the next rollout comes before the update, whole."""
    cfg = with_lag(from_policy(finished_run, tmp_path))
    assert run_training(cfg, inline=True, resume=False) == 0
    assert [row["learn/policy_age_max"] for row in numbers(tmp_path)] == [0, 1, 1]
    assert [row["learn/sampler_ratio_decisions"] > 0 for row in numbers(tmp_path)] == [True, False, False]
    trained = [row for row in episodes(tmp_path) if row["split"] == "train"]
    assert sorted({(row["iteration"], row["policy_version"]) for row in trained}) == [(0, 0), (1, 0), (2, 1)]


def test_learning_rates_fall_until_whichever_limit_comes_first(finished_run, tmp_path):
    cfg = from_policy(finished_run, tmp_path, num_iterations=4, max_rl_env_steps=300)
    cfg = replace(cfg, learner=replace(cfg.learner, final_learning_rate_fraction=0.1))
    run_training(cfg, inline=True, resume=False)
    rows = numbers(tmp_path)
    before = np.cumsum([0, *(row["rollout/env_steps"] for row in rows)])[:-1]
    shares = [max(done / 4, steps / 300) for done, steps in enumerate(before)]
    assert len(rows) < 4
    assert shares[-1] > (len(rows) - 1) / 4  # env steps are what ends it
    expected = [cfg.learner.actor_learning_rate * (1 - 0.9 * share) for share in shares]
    assert [row["learn/learning_rate"] for row in rows] == pytest.approx(expected)


def test_full_training_publishes_everything(finished_run, tmp_path):
    learner = replace(toy_config(tmp_path).learner, train="full")
    run_training(from_policy(finished_run, tmp_path, learner=learner), inline=True, resume=False)
    figures = summary(tmp_path)
    assert figures["published_bytes_per_update"] == pytest.approx(figures["model_bytes"], rel=0.05)


def test_shuffled_rewards_run_through(finished_run, tmp_path):
    rollout = replace(toy_config(tmp_path).rollout, shuffle_rewards=True)
    algorithm = replace(toy_config(tmp_path).algorithm, gamma=1.0)
    cfg = from_policy(finished_run, tmp_path, rollout=rollout, algorithm=algorithm)
    assert run_training(cfg, inline=True, resume=False) == 0


def test_a_server_that_keeps_old_weights_is_caught(finished_run, tmp_path, monkeypatch):
    """The defect of a served model that never changes (algorithms 2.9 #2): the version moves, the weights do not."""
    load = TorchEngine.load

    def stale(self, update):
        if update.version == 0:
            return load(self, update)
        self.version = update.version
        return replace(load_report_of(update), version=update.version)

    monkeypatch.setattr(TorchEngine, "load", stale)
    cfg = from_policy(
        finished_run, tmp_path, algorithm=replace(toy_config(tmp_path).algorithm, critic_warmup_updates=0)
    )
    with pytest.raises(CanaryError, match="version 1"):
        run_training(cfg, inline=True, resume=False)


def load_report_of(update):
    from vlarl_ray.weights.canary import update_digests
    from vlarl_ray.weights.update import LoadReport

    return LoadReport(update.version, update_digests(update), 1.0, 0.0)


def test_a_tensor_dropped_on_the_way_is_named(finished_run, tmp_path, monkeypatch):
    load = TorchEngine.load

    def dropping(self, update):
        return load(self, replace(update, adapters=dict(list(update.adapters.items())[1:])))

    monkeypatch.setattr(TorchEngine, "load", dropping)
    with pytest.raises(CanaryError, match=r"tensor '.*:A' is missing"):
        run_training(from_policy(finished_run, tmp_path), inline=True, resume=False)


def test_an_engine_that_samples_from_another_distribution_is_caught_before_any_step(
    finished_run, tmp_path, monkeypatch
):
    """Sampling at another temperature than is scored (algorithms 3.3): the ratio between two sources shows it."""
    sample = TorchEngine.sample
    monkeypatch.setattr(
        TorchEngine,
        "sample",
        lambda self, request: sample(self, replace(request, temperature=request.temperature and 1.3)),
    )
    with pytest.raises(SamplerMismatchError, match=r"sampler_ratio is .* away from 1 \(allowed 0.0001\) at reach-a"):
        run_training(from_policy(finished_run, tmp_path), inline=True, resume=False)


def test_fine_tuning_with_other_settings_does_not_return_the_policy_that_is_there(finished_run):
    cfg = toy_config(finished_run)
    with pytest.raises(ConfigError, match=r"another configuration \(sft.num_steps differ\)"):
        run_sft(replace(cfg, sft=replace(cfg.sft, num_steps=61)))
    assert run_sft(cfg) == 0
