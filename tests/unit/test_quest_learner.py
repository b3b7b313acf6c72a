"""RL on QueST: what is trained, what is not, and the way of its codes from the engine to the loss."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.counting_env import CountingEnv
from tests.learner_runs import run_ranks
from tests.small_openvla import INSTRUCTIONS
from tests.small_quest import quest_observations, random_codes, small_quest
from tests.tiny_model import algorithm_config, as_groups, learner_config, make_task
from vlarl_ray.algorithms.losses import reduce_log_ratio
from vlarl_ray.algorithms.policy_loss import count_normalizers
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.config import AlgorithmConfig, ExperimentConfig, InferenceConfig, LoraConfig
from vlarl_ray.config_loader import ConfigError
from vlarl_ray.inference.base import DirectClient, split_reply
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.learner.batch import DealtRows, DemoReader, PromptCache, deal_trajectories
from vlarl_ray.learner.learner import Learner
from vlarl_ray.models.lora import attach_lora, lora_layers
from vlarl_ray.rollout.env_worker import EnvWorker
from vlarl_ray.trained_policy import save_trained_policy
from vlarl_ray.types import ActRequest, DemoRows, Scores, Trajectory
from vlarl_ray.warm_start import check_policy
from vlarl_ray.weights.update import WeightUpdate

LENGTHS = (3, 2, 1, 4)
TRAINED = ("policy_prior.", "value_head.")


def request(model, rows=4, *, temperature=1.0):
    inputs = quest_observations(model, rows)
    return ActRequest(
        images=inputs.images.numpy(),
        proprio=inputs.proprio.numpy(),
        instructions=tuple(INSTRUCTIONS[i % 3] for i in range(rows)),
        noise_keys=np.array([[9, row] for row in range(rows)], dtype=np.uint64),
        temperature=temperature,
        policy_version=0,
    )


def trajectories(model, lengths=LENGTHS, *, last_steps=2):
    """Episodes whose last chunk is executed in part, with codes drawn from the model."""
    made = []
    for slot, length in enumerate(lengths):
        inputs = quest_observations(model, length + 1, seed=slot)
        instruction = INSTRUCTIONS[slot % 3]
        ids, lens = model.encode_prompts([instruction] * (length + 1))
        inputs = dataclasses.replace(inputs, prompt_ids=ids, prompt_lengths=lens)
        noise = model.draw_noise(np.array([[slot, s] for s in range(length)], dtype=np.uint64))
        codes, logprobs = model.sample(inputs.rows(slice(0, length)), temperature=1.0, noise=noise)
        steps = np.full(length, model.chunk_length, np.int32)
        steps[-1] = last_steps
        rewards = np.zeros((length, model.chunk_length), np.float32)
        rewards[-1, last_steps - 1] = float(slot % 2)
        made.append(
            Trajectory(
                task=make_task(slot=slot, instruction=instruction),
                frames=inputs.images.numpy(),
                proprio=inputs.proprio.numpy(),
                tokens=codes.numpy().astype(np.int32),
                behaviour_logprobs=logprobs.numpy(),
                policy_versions=np.zeros(length, np.int32),
                rewards=rewards,
                num_env_steps=steps,
                executed_actions=np.zeros((length, model.chunk_length, 3), np.float32),
                terminated=bool(slot % 2),
                truncated=not slot % 2,
                success=bool(slot % 2),
                success_at_last_step=bool(slot % 2),
                first_success_env_step=int(steps.sum()) if slot % 2 else None,
                tokens_of_chunk=True,
            )
        )
    return made


def batch_of(made, **changes):
    algorithm = PPO(algorithm_config(ratio_level="chunk", **changes))
    rng = np.random.default_rng(0)
    scores = [Scores(rng.standard_normal(t.num_decisions + 1).astype(np.float32), None) for t in made]
    return algorithm.make_batch(as_groups(made), scores, version=0)


def learner_of(train, *, level="chunk", **changes):
    model = small_quest()
    cfg = learner_config(train=train, actor_learning_rate=1e-3, **changes)
    if train == "lora":
        attach_lora(model, cfg.lora, seed=1, critic=cfg.critic, detach_value=cfg.detach_value)
    return model, Learner(cfg, PPO(algorithm_config(ratio_level=level)), model, seed=3)


# what is trained


@pytest.mark.parametrize("train", ["full", "lora"])
def test_an_update_changes_prior_and_value_head_alone(train):
    model, learner = learner_of(train)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = trajectories(small_quest())
    metrics = learner.update(batch_of(made))
    assert metrics["learn/first_ratio_error"] < 1e-4
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"policy_prior", "value_head"}
    update = learner.weight_update(1)
    assert all(name.startswith(TRAINED) for name in [*update.adapters, *update.tensors])
    kinds = {"full": (False, True), "lora": (True, False)}[train]
    assert (bool(update.adapters), any(name.startswith("policy_prior.") for name in update.tensors)) == kinds


@pytest.fixture(scope="module")
def ranks_alone_and_two(folder):
    """Results of one rank by way of training, and of two."""
    made, ways = trajectories(small_quest()), ("full", "lora")
    jobs = [
        ("update_folder", {"folder": str(folder), "train": way, "batch": batch_of(made), "trajectories": made})
        for way in ways
    ]
    [alone], pair = run_ranks(1, jobs), run_ranks(2, jobs)
    return {way: (alone[i], [rank[i] for rank in pair]) for i, way in enumerate(ways)}


@pytest.mark.parametrize("train", ["full", "lora"])
def test_two_ranks_score_and_learn_what_one_does(ranks_alone_and_two, train):
    alone, both = ranks_alone_and_two[train]
    two = both[0]
    # forward, each its share
    shares = deal_trajectories([length + 1 for length in LENGTHS], 2)
    for share, rank in zip(shares, both, strict=True):
        for index, ours in zip(share, rank["scores"], strict=True):
            np.testing.assert_allclose(ours.logprobs, alone["scores"][index].logprobs, atol=1e-5)
            np.testing.assert_allclose(ours.values, alone["scores"][index].values, atol=1e-5)
    # backward: norms before clipping, and what Adam keeps of the clipped gradients
    norms = {name: norm for name, norm in alone["metrics"].items() if name.startswith("learn/grad_norm_")}
    assert len(norms) == 2
    assert {name: two["metrics"][name] for name in norms} == pytest.approx(norms, rel=1e-4)
    assert alone["moments"].keys() == two["moments"].keys()
    first = {name: moment for name, moment in alone["moments"].items() if name.endswith("/exp_avg")}
    assert {name.partition(".")[0] for name, moment in first.items() if np.abs(moment).max() > 1e-3} == {
        "policy_prior", "value_head",
    }  # fmt: skip
    for name, moment in alone["moments"].items():
        np.testing.assert_allclose(two["moments"][name], moment, atol=1e-5, err_msg=name)
    # step
    start = dict(small_quest().named_parameters())
    moved = [np.abs(value - start[n].numpy(force=True)).max() for n, value in two["parameters"].items() if n in start]
    assert max(moved) > 1e-5
    assert alone["parameters"].keys() == two["parameters"].keys()
    assert all(name.startswith(TRAINED) for name in two["parameters"])
    for name, value in alone["parameters"].items():
        np.testing.assert_allclose(two["parameters"][name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("target", ["all-linear", r".*(linear1|projection|action_proj|project_in)"])
def test_frozen_modules_get_no_adapters_whatever_is_asked_for(target):
    model = small_quest()
    attach_lora(model, LoraConfig(rank=2, target_modules=target), seed=0)
    assert lora_layers(model)
    assert all(name.startswith("policy_prior.") for name in lora_layers(model))


def test_adapters_reach_every_linear_layer_of_the_prior():
    model = small_quest()
    attach_lora(model, LoraConfig(rank=2), seed=0)
    layers = [
        f"policy_prior.decoder.layers.{i}.{n}" for i in range(2) for n in ("self_attn.out_proj", "linear1", "linear2")
    ]
    assert lora_layers(model).keys() == {f"{name}.weight" for name in [*layers, "policy_prior.head"]}


@pytest.mark.parametrize("level", ["token", "chunk"])
def test_scores_before_the_update_are_those_of_the_sampler(level):
    _, learner = learner_of("full", level=level)
    made = trajectories(small_quest())
    for trajectory, score in zip(made, learner.score(made), strict=True):
        np.testing.assert_allclose(score.logprobs, trajectory.behaviour_logprobs, atol=1e-4)
        assert score.values.shape == (trajectory.num_decisions + 1,)


def test_a_separate_critic_reads_the_context_through_its_own_adapters():
    model, learner = learner_of("lora", critic="separate")
    inputs, codes = quest_observations(model), random_codes(model)
    with torch.no_grad():
        before = model(inputs, codes)
    learner.update(batch_of(trajectories(small_quest())))
    with torch.no_grad():
        after = model(inputs, codes)
    assert (after.values - before.values).abs().min() > 1e-5
    assert any(".critic." in name for name in dict(model.named_parameters()))


def test_a_learner_refuses_half_precision():
    model = small_quest()
    with pytest.raises(ValueError, match=r"this model computes in float32 only"):
        Learner(learner_config(train="full", dtype="bfloat16"), PPO(algorithm_config()), model)


# from the engine to the loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quest")
    small_quest().save(folder)
    return folder


def engine_of(folder):
    engine = TorchEngine(folder, InferenceConfig(batch_size=4), deterministic=True)
    engine.load(WeightUpdate(version=0, lora_scale=1.0, adapters={}, tensors={}))
    return engine


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_engine_serves_what_the_learner_publishes_and_it_can_be_saved(folder, train, tmp_path):
    _, learner = learner_of(train)
    learner.update(batch_of(trajectories(small_quest())))
    engine, update = engine_of(folder), learner.weight_update(1)
    asked = request(small_quest())
    codes = random_codes(small_quest(), 4).numpy().astype(np.int32)
    before = engine.logprobs(asked, codes)
    engine.load(update)
    served = engine.logprobs(asked, codes)
    assert np.abs(served - before).max() > 1e-3
    np.testing.assert_allclose(served, learner.logprobs(asked, codes), atol=1e-4)
    np.testing.assert_allclose(engine_of(save_trained_policy(folder, update, tmp_path)).logprobs(asked, codes), served)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys() == small_quest().state_dict().keys()  # buffers among them
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= update.adapters.keys() | update.tensors.keys()
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}


def test_replies_say_that_their_tokens_are_of_the_chunk(folder):
    reply = engine_of(folder).sample(request(small_quest()))
    assert (reply.actions.shape, reply.tokens.shape, reply.tokens.dtype) == ((4, 3, 3), (4, 4), np.int32)
    assert reply.tokens_of_chunk
    assert all(part.tokens_of_chunk for part in split_reply(reply, [1, 3]))


def test_an_episode_that_ends_inside_a_chunk_keeps_all_of_its_codes(folder):
    """Codes say what the chunk is as a whole: those drawn last matter to the first of its actions too."""

    class Seeing(CountingEnv):
        proprio_dim = 4

        def observe(self):
            seen = super().observe()
            return dataclasses.replace(
                seen,
                images=np.zeros((1, 32, 32, 3), np.uint8),
                proprio=np.zeros(4, np.float32),
                instruction=INSTRUCTIONS[0],
            )

    worker = EnvWorker(Seeing, DirectClient(engine_of(folder)), num_envs=2)
    worker.submit(dataclasses.replace(make_task(), init_state_id=5))
    ended = []
    while not worker.is_idle:
        ended += worker.turn()
    [trajectory] = ended
    assert trajectory.tokens_of_chunk
    assert trajectory.num_env_steps.tolist() == [3, 2]
    assert trajectory.token_mask().tolist() == [[True] * 4] * 2


def test_ratios_are_counted_per_code_or_per_chunk_and_not_per_action():
    made = trajectories(small_quest())
    batch = batch_of(made)
    assert batch.token_mask.all()
    assert batch.token_mask.shape == (sum(LENGTHS), 4)
    assert batch.num_actions_per_decision == 3
    for level, per_row in (("token", 4), ("chunk", 1)):
        assert count_normalizers(batch, np.arange(2), level).ratios == 2 * per_row
        log_ratio, mask = reduce_log_ratio(torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool), 3, level)
        assert log_ratio.tolist() == [[4 / per_row] * per_row] * 2
        assert mask.all()


@pytest.mark.parametrize("last_steps", [1, 3])
def test_a_ratio_per_action_is_refused_even_where_codes_could_be_shared_out(last_steps):
    made = trajectories(small_quest(chunk_length=4), last_steps=last_steps)
    assert made[0].tokens.shape[1] % made[0].rewards.shape[1] == 0
    scores = [Scores(np.zeros(t.num_decisions + 1, np.float32), None) for t in made]
    with pytest.raises(ValueError, match="set it to 'token' or 'chunk'"):
        PPO(algorithm_config(ratio_level="action")).make_batch(as_groups(made), scores, version=0)


def test_a_run_that_starts_from_a_quest_policy_is_refused_a_ratio_per_action_at_once(folder):
    cfg = ExperimentConfig(policy=str(folder))
    with pytest.raises(ConfigError, match=r"algorithm\.ratio_level = action: quest's codes"):
        check_policy(cfg, folder)
    per_code = dataclasses.replace(cfg, algorithm=AlgorithmConfig(ratio_level="token"))
    assert check_policy(per_code, folder) == small_quest().model_config


def test_tokens_that_fit_no_env_step_are_refused_without_the_flag():
    [trajectory] = trajectories(small_quest(), [2])
    with pytest.raises(ValueError, match="4 tokens cannot be shared out among 3 env steps"):
        dataclasses.replace(trajectory, tokens_of_chunk=False).token_mask()


@pytest.mark.parametrize(("level", "per_decision"), [("token", 4), ("chunk", 1)])
def test_a_fixed_horizon_counts_all_codes_of_every_decision(level, per_decision):
    made = trajectories(small_quest())  # the horizon, 40 env steps, takes 14 decisions of 3
    rng = [Scores(np.zeros(t.num_decisions + 1, np.float32), None) for t in made]
    algorithm = PPO(algorithm_config(ratio_level=level, loss_normalization="fixed_horizon"))
    batch = algorithm.make_batch(as_groups(made), rng, version=0)
    ratios = batch.token_mask.sum(1) * per_decision / 4
    total = float((batch.weights * ratios).sum() / ratios.sum())
    assert total == pytest.approx(ratios.sum() / (14 * per_decision * len(made)), rel=1e-5)


def test_importance_weights_are_over_all_codes_of_a_chunk():
    made = trajectories(small_quest(), [2])
    shifted = made[0].behaviour_logprobs - np.float32(0.1)
    algorithm = PPO(algorithm_config(ratio_level="token", old_logprobs="learner"))
    scores = [Scores(np.zeros(3, np.float32), made[0].behaviour_logprobs)]
    batch = algorithm.make_batch(
        as_groups([dataclasses.replace(made[0], behaviour_logprobs=shifted)]), scores, version=0
    )
    np.testing.assert_allclose(batch.weights, np.exp(0.4), rtol=1e-5)


def test_cloned_chunks_are_coded_with_their_last_executed_action_repeated():
    model = small_quest()
    actions = np.random.default_rng(0).standard_normal((2, 3, 3)).astype(np.float32)
    executed = np.array([[True, True, False], [True, True, True]])
    rows = DemoRows(
        frames=(np.zeros((3, 1, 32, 32, 3), np.uint8),),
        instructions=(INSTRUCTIONS[0],),
        episode_index=np.zeros(2, np.int32),
        decision_index=np.arange(2, dtype=np.int32),
        proprio=np.zeros((2, 4), np.float32),
        actions=actions,
        action_mask=executed,
    )
    reader = DemoReader(rows, np.arange(2), list, PromptCache(model), model, torch.device("cpu"))
    cloned = reader.read(DealtRows(np.arange(2), np.array([True, False])))
    actions[0, 2] = actions[0, 1]
    assert torch.equal(cloned.tokens, model.encode_actions(torch.from_numpy(actions)))
    assert cloned.mask.tolist() == [[True] * 4, [False] * 4]
