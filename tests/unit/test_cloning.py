"""Self behaviour cloning in the learner: F55 (combined loss), F56 (padding), and the numbers ChunkPPO hands over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.fake_episodes import make_task as fake_task
from tests.fake_episodes import make_trajectory
from tests.learner_runs import LENGTHS
from tests.tiny_model import NUM_BINS, algorithm_config, as_groups, learner_config, make_trajectories, tiny_model
from vlarl_ray.algorithms.chunk_ppo import ChunkPPO, demo_rows
from vlarl_ray.algorithms.demo_buffer import DemoDraw
from vlarl_ray.algorithms.losses import cloning_loss
from vlarl_ray.config import SelfBCConfig
from vlarl_ray.learner.learner import Learner
from vlarl_ray.models.base import PolicyInputs
from vlarl_ray.registry import ALGORITHMS, resolve
from vlarl_ray.types import Scores, StoredEpisode, TrajectoryGroup

ONE_STEP = {"num_epochs": 1, "num_minibatches": 1, "critic_warmup_updates": 0, "value_loss_coef": 0.0}


def successes():
    """Stored episodes whose actions have tokens of their own."""
    rng = np.random.default_rng(5)
    stored = []
    for slot, trajectory in enumerate(make_trajectories([3, 4, 2])):
        actions = rng.integers(0, NUM_BINS, trajectory.executed_actions.shape).astype(np.float32)
        steps = int(trajectory.num_env_steps.sum())
        done = replace(trajectory, executed_actions=actions, success=True, first_success_env_step=steps)
        stored.append(replace(StoredEpisode.from_trajectory(done), key=str(slot)))
    return stored


def every_decision(stored):
    pairs = [(i, k) for i, episode in enumerate(stored) for k in range(len(episode.num_env_steps))]
    return DemoDraw(tuple(stored), *np.array(pairs).T)


def make_batch(algorithm, *, demos=None, **changes):
    trajectories = make_trajectories(LENGTHS)
    rng = np.random.default_rng(1)
    scores = [Scores(rng.standard_normal(t.num_decisions + 1).astype(np.float32), None) for t in trajectories]
    ppo = super(ChunkPPO, algorithm).make_batch(as_groups(trajectories), scores, version=0)
    return replace(ppo, demos=demos, **changes)


def updated(*, learner=None, demos=None, num_updates=1, **changes):
    """Parameters after an update, by name."""
    cfg = learner_config(**learner or {})
    algorithm = ChunkPPO(algorithm_config(name="chunk_ppo", **ONE_STEP))
    rank = Learner(cfg, algorithm, tiny_model(cfg), seed=3)
    metrics = [rank.update(make_batch(algorithm, demos=demos, **changes)) for _ in range(num_updates)]
    return rank.state_dict()[0]["parameters"], metrics


FULL = {"train": "full", "micro_batch_size": 4}


def test_registered_under_its_name():
    assert resolve(ALGORITHMS, "chunk_ppo", what="algorithm.name") is ChunkPPO


def test_f55_without_the_policy_gradient_an_update_is_a_step_of_supervised_fine_tuning():
    stored = successes()
    drawn = [(episode, k) for episode in stored for k in range(len(episode.num_env_steps))]
    found, metrics = updated(learner=FULL, demos=demo_rows(every_decision(stored)), policy_weight=0.0, bc_weight=1.0)

    cfg = learner_config(**FULL)
    model = tiny_model(cfg)
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("value_head.")}
    ids, lengths = model.encode_prompts([episode.instruction for episode, _ in drawn])
    inputs = PolicyInputs(
        torch.from_numpy(np.stack([episode.frames[k] for episode, k in drawn])),
        ids,
        lengths,
        torch.from_numpy(np.stack([episode.proprio[k] for episode, k in drawn])),
    )
    columns = torch.from_numpy(np.stack([episode.actions[k] for episode, k in drawn])).flatten(1).long()
    executed = torch.tensor([[s < e.num_env_steps[k] for s in range(model.chunk_length)] for e, k in drawn])
    mask = executed.repeat_interleave(model.action_dim, dim=1).flatten()
    losses = functional.cross_entropy(model(inputs).actions.logits.flatten(0, 1), columns.flatten(), reduction="none")
    loss = losses[mask].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), cfg.max_grad_norm)
    adamw = torch.optim.AdamW(
        parameters.values(),
        lr=cfg.actor_learning_rate,
        betas=cfg.adam_betas,
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
    )
    adamw.step()
    assert metrics[0]["learn/bc_loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_f55_without_cloning_an_update_is_ppo(train):
    demos = demo_rows(every_decision(successes()))
    with_demos, metrics = updated(learner={"train": train}, demos=demos, bc_weight=0.0)
    without, _ = updated(learner={"train": train})
    assert metrics[0]["learn/grad_norm_bc"] > 0
    for name, value in without.items():
        np.testing.assert_array_equal(with_demos[name], value, err_msg=name)


def test_the_two_gradients_add_up_with_their_weights():
    demos = demo_rows(every_decision(successes()))
    _, [both] = updated(learner=FULL, demos=demos, policy_weight=0.5, bc_weight=2.0)
    _, [policy] = updated(learner=FULL, policy_weight=0.5)
    assert both["learn/grad_norm_policy"] == pytest.approx(policy["learn/grad_norm_actor"], rel=1e-6)
    _, [cloned] = updated(learner=FULL, demos=demos, policy_weight=0.0, bc_weight=1.0)
    assert both["learn/grad_norm_bc"] == pytest.approx(cloned["learn/grad_norm_actor"], rel=1e-6)
    low = abs(2 * both["learn/grad_norm_bc"] - both["learn/grad_norm_policy"])
    high = 2 * both["learn/grad_norm_bc"] + both["learn/grad_norm_policy"]
    assert low <= both["learn/grad_norm_actor"] <= high


def test_f56_what_lies_behind_the_end_of_an_episode_changes_nothing():
    stored = successes()
    garbage = []
    for episode in stored:
        actions = episode.actions.copy()
        last = int(episode.num_env_steps[-1])
        actions[-1, last:] = NUM_BINS - 1 - actions[-1, last:]
        garbage.append(replace(episode, actions=actions))
    assert any((a.actions != b.actions).any() for a, b in zip(stored, garbage, strict=True))
    first, second = (
        updated(learner=FULL, demos=demo_rows(every_decision(s)), policy_weight=0.0, bc_weight=1.0)[0]
        for s in (stored, garbage)
    )
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


def test_f56_pads_get_no_gradient():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    cloning_loss(logprobs, mask).backward()
    assert logprobs.grad is not None
    np.testing.assert_array_equal(logprobs.grad.numpy(), [[-0.5, -0.5, 0], [0, 0, 0]])


def test_cloning_waits_for_the_critic_s_warm_up():
    cfg = learner_config(train="full")
    settings = {**ONE_STEP, "critic_warmup_updates": 1, "value_loss_coef": 0.5}
    algorithm = ChunkPPO(algorithm_config(name="chunk_ppo", **settings))
    model = tiny_model(cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rank = Learner(cfg, algorithm, model, seed=3)
    rank.update(make_batch(algorithm, demos=demo_rows(every_decision(successes())), bc_weight=1.0))
    after = rank.state_dict()[0]["parameters"]
    moved = {name for name, value in before.items() if (value.numpy() != after[name]).any()}
    assert moved
    assert all(name.startswith("value_head.") for name in moved)


def chunk_ppo(**self_bc):
    return ChunkPPO(algorithm_config(name="chunk_ppo", self_bc=SelfBCConfig(**self_bc)))


def offered(algorithm, *lengths, version=0, task_id="a"):
    trajectories = [
        make_trajectory(fake_task(task_id, slot=slot, max_env_steps=50), first_success=length)
        for slot, length in enumerate(lengths)
    ]
    groups = [TrajectoryGroup((t,)) for t in trajectories]
    scores = [Scores(np.zeros(t.num_decisions + 1, np.float32), None) for t in trajectories]
    return algorithm.make_batch(groups, scores, version=version)


def test_a_batch_carries_as_many_decisions_to_clone_as_it_has_rows():
    algorithm = chunk_ppo(schedule="constant", policy_weight=0.7, bc_weight=0.3)
    batch = offered(algorithm, 12, None, 30)
    assert batch.demos is not None
    assert len(batch.demos) == len(batch) == 3 + 10 + 6
    assert (batch.policy_weight, batch.bc_weight) == (0.7, 0.3)
    assert [episode.length for episode in algorithm.stored_episodes] == [12, 30]
    assert algorithm.metrics()["buffer/rejected_fail"] == 1
    assert algorithm.metrics()["learn/bc_weight"] == 0.3


def test_without_a_success_there_is_nothing_to_clone():
    batch = offered(chunk_ppo(), None, None)
    assert batch.demos is None
    assert batch.bc_weight == 0


def test_what_is_cloned_differs_between_updates_and_not_between_calls():
    def drawn(version):
        batch = offered(chunk_ppo(), 12, 20, 30, version=version)
        return batch.demos.decision_index.tolist() + batch.demos.episode_index.tolist()

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_its_state_is_restored_with_the_episodes():
    first, second = chunk_ppo(schedule="success_adaptive"), chunk_ppo(schedule="success_adaptive")
    offered(first, 12, 20)
    first.observe_update({}, success_rate=1.0)
    second.load_state_dict(first.state_dict(), {episode.key: episode for episode in first.stored_episodes})
    assert [e.key for e in second.stored_episodes] == [e.key for e in first.stored_episodes]
    assert second.schedule.weights(1) == first.schedule.weights(1) != (1, 1)


def test_rows_are_those_that_were_drawn():
    stored = successes()
    drawn = DemoDraw(tuple(stored), np.array([2, 0, 2, 2]), np.array([0, 1, 0, 1]))
    rows = demo_rows(drawn)
    assert len(rows.frames) == len(rows.instructions) == 2  # the one not drawn is not referred to
    for row, (which, k) in enumerate(zip(drawn.episode_index, drawn.decision_index, strict=True)):
        episode = stored[which]
        assert rows.frames[rows.episode_index[row]] is episode.frames
        assert rows.decision_index[row] == k
        np.testing.assert_array_equal(rows.actions[row], episode.actions[k])
        np.testing.assert_array_equal(rows.proprio[row], episode.proprio[k])
        assert rows.action_mask[row].sum() == episode.num_env_steps[k]
