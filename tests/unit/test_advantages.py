import numpy as np
import pytest

from vlarl_ray.algorithms.advantages import (
    chunk_rewards,
    explained_variance,
    gae,
    group_normalized_advantages,
    leave_one_out_advantages,
    normalize_advantages,
)


def test_f1_leave_one_out_matches_the_specification():
    np.testing.assert_allclose(
        leave_one_out_advantages(np.array([1.0, 0, 0, 0])), [1, -1 / 3, -1 / 3, -1 / 3], atol=1e-9
    )
    eight = leave_one_out_advantages(np.array([0, 0, 1, 0, 0, 1, 0, 0]))
    np.testing.assert_allclose(sorted(set(eight.round(6))), [-0.285714, 0.857143])
    np.testing.assert_allclose(leave_one_out_advantages(np.array([0.2, 0.8, 0.5])), [-0.45, 0.45, 0], atol=1e-9)
    assert not leave_one_out_advantages(np.ones(5)).any()


def test_f1_one_rollout_has_no_leave_one_out_baseline():
    with pytest.raises(ValueError, match=r"got 1; set rollout\.group_size >= 2"):
        leave_one_out_advantages(np.array([1.0]))


def test_f2_group_normalised_matches_the_specification():
    np.testing.assert_allclose(
        group_normalized_advantages(np.array([1.0, 0, 0, 0])), [1.499997, -0.499999, -0.499999, -0.499999], atol=1e-6
    )
    eight = group_normalized_advantages(np.array([0, 0, 1, 0, 0, 1, 0, 0]))
    np.testing.assert_allclose(sorted(set(eight.round(5))), [-0.54006, 1.62018], atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_f2_equal_returns_give_zero_not_nan(value):
    assert group_normalized_advantages(np.full(7, value, np.float32)).tolist() == [0.0] * 7


def test_f3_episodes_without_discount_see_the_reward_ahead_and_nothing_behind_their_end():
    first, _ = gae(np.array([0, 0, 0, 0, 1.0]), np.zeros(6), terminated=True, gamma=1.0, gae_lambda=1.0)
    second, _ = gae(np.zeros(2), np.zeros(3), terminated=False, gamma=1.0, gae_lambda=1.0)
    assert [*first, *second] == [1, 1, 1, 1, 1, 0, 0]


def test_f4_chunk_level_discounts_per_chunk_or_per_env_step():
    rewards, values = np.array([0.0, 1.0]), np.array([0.4, 0.6, 123.0])
    settings = {"terminated": True, "gamma": 0.99, "gae_lambda": 0.95}
    per_chunk, returns = gae(rewards, values, **settings)
    np.testing.assert_allclose(per_chunk, [0.5702, 0.4], atol=1e-9)
    np.testing.assert_allclose(returns, [0.9702, 1.0], atol=1e-9)
    smdp, _ = gae(rewards, values, num_env_steps=np.array([4, 4]), discount_mode="smdp", **settings)
    np.testing.assert_allclose(smdp, [0.541384, 0.4], atol=1e-6)


def test_f5_truncated_episode_bootstraps_from_last_value_and_terminated_does_not():
    """Regression for the reference code's defect 7: truncation handled as termination."""
    rewards, values = np.zeros(2), np.array([0.4, 0.6, 0.5])
    truncated, _ = gae(rewards, values, terminated=False, gamma=0.99, gae_lambda=0.95)
    terminated, _ = gae(rewards, values, terminated=True, gamma=0.99, gae_lambda=0.95)
    np.testing.assert_allclose(truncated, [0.095247, -0.105], atol=1e-6)
    np.testing.assert_allclose(terminated, [-0.3703, -0.6], atol=1e-6)


def test_f6_success_inside_the_last_chunk_is_pooled_and_later_steps_are_left_out():
    rewards = np.zeros((3, 4))
    rewards[2, 1] = 1.0
    rewards[2, 3] = 99.0  # behind the end of the episode
    steps = np.array([4, 4, 2])
    assert chunk_rewards(rewards, steps, 0.9, "per_chunk").tolist() == [0, 0, 1]
    assert chunk_rewards(rewards, steps, 0.9, "smdp").tolist() == [0, 0, 0.9]


def test_gae_refuses_values_without_the_final_observation():
    with pytest.raises(ValueError, match="one value more than rewards, got 2 values for 2 rewards"):
        gae(np.zeros(2), np.zeros(2), terminated=False, gamma=0.9, gae_lambda=0.9)


def test_smdp_without_executed_lengths_is_refused():
    with pytest.raises(ValueError, match=r"smdp.*num_env_steps"):
        gae(np.zeros(2), np.zeros(3), terminated=False, gamma=0.9, gae_lambda=0.9, discount_mode="smdp")


def test_f34_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns = np.array([0.0, 1.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert abs(explained_variance(np.full(3, 7.0), returns)) < 1e-12
    assert explained_variance(returns, np.full(3, 7.0)) == 0.0


def test_normalised_advantages_have_zero_mean_and_unit_std_and_equal_ones_vanish():
    advantages = normalize_advantages(np.float32([1, 2, 3, 10]))
    assert abs(advantages.mean()) < 1e-6
    assert abs(advantages.std() - 1) < 1e-5
    assert not normalize_advantages(np.full(4, 0.1, np.float32)).any()


def test_f7_baseline_scope_same_context_or_whole_batch():
    groups = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert [leave_one_out_advantages(group).tolist() for group in groups] == [[0, 0], [0, 0]]
    np.testing.assert_allclose(leave_one_out_advantages(groups.reshape(-1)), [2 / 3, 2 / 3, -2 / 3, -2 / 3])
