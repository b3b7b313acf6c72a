from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny_model import algorithm_config, as_groups, make_trajectories
from vlarl_ray.algorithms.advantages import chunk_rewards, gae
from vlarl_ray.algorithms.losses import clipped_surrogate, reduce_log_ratio
from vlarl_ray.algorithms.policy_loss import count_normalizers
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.registry import ALGORITHMS, resolve
from vlarl_ray.types import Scores


def scores_for(trajectories, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Scores(
            values=rng.standard_normal(t.num_decisions + 1).astype(np.float32),
            logprobs=t.behaviour_logprobs - np.float32(1),
        )
        for t in trajectories
    ]


def ppo_batch(lengths, **changes):
    trajectories = make_trajectories(lengths)
    ppo = PPO(algorithm_config(**changes))
    return trajectories, ppo.make_batch(as_groups(trajectories), scores_for(trajectories), version=3)


def test_registered_under_its_name():
    assert resolve(ALGORITHMS, "ppo", what="algorithm.name") is PPO


def test_f4_one_row_per_decision_with_the_episode_s_advantages():
    trajectories, batch = ppo_batch([3, 5, 1], normalize_advantages=False)
    assert batch.trajectory_index.tolist() == [0] * 3 + [1] * 5 + [2]
    assert batch.decision_index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0]
    expected, targets = [], []
    for t, s in zip(trajectories, scores_for(trajectories), strict=True):
        rewards = chunk_rewards(t.rewards, t.num_env_steps, 0.99, "per_chunk")
        a, r = gae(rewards, s.values, terminated=t.terminated, gamma=0.99, gae_lambda=0.95)
        expected, targets = [*expected, *a], [*targets, *r]
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-6)
    np.testing.assert_allclose(batch.returns, targets, rtol=1e-6)
    np.testing.assert_array_equal(batch.action_tokens, np.concatenate([t.tokens for t in trajectories]))
    np.testing.assert_array_equal(batch.proprio, np.concatenate([t.proprio[:-1] for t in trajectories]))
    assert batch.policy_version == 3


def test_f5_a_truncated_episode_s_last_value_matters_and_a_terminated_one_s_does_not():
    trajectories = make_trajectories([4, 4])  # terminated, truncated
    ppo = PPO(algorithm_config(normalize_advantages=False))
    before = scores_for(trajectories)
    after = [replace(s, values=np.append(s.values[:-1], np.float32(50))) for s in before]
    first, second = (ppo.make_batch(as_groups(trajectories), s, version=0).advantages for s in (before, after))
    np.testing.assert_array_equal(first[:4], second[:4])
    assert (first[4:] != second[4:]).all()


def test_advantages_are_normalised_over_the_whole_batch_on_the_driver():
    _, batch = ppo_batch([3, 5, 1])
    assert abs(batch.advantages.mean()) < 1e-6
    assert abs(batch.advantages.std() - 1) < 1e-4


def test_old_logprobs_are_the_engine_s_unless_the_learner_s_are_asked_for():
    """Regression for the reference code's defect 1: the engine's log-probabilities were stored and never used."""
    trajectories, batch = ppo_batch([2, 3])
    stored = np.concatenate([t.behaviour_logprobs for t in trajectories])
    np.testing.assert_array_equal(batch.old_logprobs, stored)
    _, batch = ppo_batch([2, 3], old_logprobs="learner")
    np.testing.assert_array_equal(batch.old_logprobs, stored - np.float32(1))


def test_f6_tokens_of_steps_that_were_never_executed_are_masked():
    trajectories, batch = ppo_batch([2, 2])
    executed = np.concatenate([t.executed_mask() for t in trajectories])
    np.testing.assert_array_equal(batch.token_mask, np.repeat(executed, 3, axis=1))


@pytest.mark.parametrize(
    ("mode", "expected"), [("token_mean", 10 / 6), ("trajectory_mean", 1.5), ("fixed_horizon", (2 + 8) / (2 * 20))]
)
def test_f18_length_normalisation(mode, expected):
    """Episodes of 2 and 4 decisions with loss 1 and 2 per decision; horizon 20 decisions of 2 env steps."""
    _, batch = ppo_batch([2, 4], loss_normalization=mode, ratio_level="chunk")
    per_row = torch.tensor([-1.0] * 2 + [-2.0] * 4)  # the surrogate at ratio 1 is minus the advantage
    log_ratio, mask = reduce_log_ratio(torch.zeros(6, 6), torch.from_numpy(batch.token_mask), 2, "chunk")
    weights = torch.from_numpy(batch.weights)[:, None]
    normalizers = count_normalizers(batch, np.arange(6), "chunk")
    loss = clipped_surrogate(
        log_ratio, per_row, mask * weights, clip_low=0.2, clip_high=0.2, normalizer=normalizers.ratios
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", ["trajectory_mean", "fixed_horizon"])
@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_f18_weights_of_all_rows_average_what_the_mode_says(mode, level):
    trajectories, batch = ppo_batch([2, 4, 7], loss_normalization=mode, ratio_level=level)
    per_row = count_normalizers(batch, np.arange(len(batch)), level).ratios
    ratios = [count_normalizers(batch, np.array([i]), level).ratios for i in range(len(batch))]
    total = float((batch.weights * np.array(ratios)).sum() / per_row)  # the loss where every ratio's loss is 1
    horizon = {"token": 40 * 3, "action": 40, "chunk": 20}[level]
    assert total == pytest.approx(
        1.0 if mode == "trajectory_mean" else per_row / (horizon * len(trajectories)), rel=1e-5
    )


def test_mixed_temperatures_are_refused():
    hot, cold = make_trajectories([2], temperature=1.5), make_trajectories([2])
    with pytest.raises(ValueError, match=r"one sampling temperature, got \[1\.0, 1\.5\]"):
        PPO(algorithm_config()).make_batch(as_groups([*hot, *cold]), scores_for([*hot, *cold]), version=0)


def test_missing_values_are_refused():
    [trajectory] = make_trajectories([2])
    with pytest.raises(ValueError, match="PPO needs values"):
        PPO(algorithm_config()).make_batch(as_groups([trajectory]), [Scores(values=None, logprobs=None)], version=0)
