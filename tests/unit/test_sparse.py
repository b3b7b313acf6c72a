import numpy as np
import pytest

from vlarl_ray.rewards.sparse import sparse_rewards


def test_reward_is_one_exactly_once_at_the_first_success():
    successes = [[False, False, False], [False, True, True], [False, True]]
    rewards = sparse_rewards(successes, 3)
    assert rewards.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert rewards.dtype == np.float32


def test_failed_episode_earns_nothing():
    assert sparse_rewards([[False] * 4] * 3, 4).sum() == 0


def test_unexecuted_steps_earn_nothing():
    assert sparse_rewards([[False], [True]], 5).tolist() == [[0] * 5, [1, 0, 0, 0, 0]]


def test_more_steps_than_the_chunk_holds_are_refused():
    with pytest.raises(ValueError, match="decision 1 has 3"):
        sparse_rewards([[False, False], [False, False, True]], 2)
