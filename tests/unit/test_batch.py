import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_model import TinyVLA, algorithm_config, as_groups, make_trajectories
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.learner.batch import BatchReader, DealtRows, PromptCache, deal_rows, deal_trajectories, epoch_minibatches
from vlarl_ray.types import Scores

SHAPES = {
    "num_rows": st.integers(1, 60), "world_size": st.integers(1, 7),
    "num_minibatches": st.integers(1, 9), "micro_batch_size": st.integers(1, 17),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(**SHAPES)
def test_every_row_is_visited_exactly_once_per_epoch(num_rows, world_size, num_minibatches, micro_batch_size):
    visited = []
    for rows in epoch_minibatches(num_rows, num_minibatches, seed=1, version=2, epoch=0):
        dealt = [
            deal_rows(rows, rank=r, world_size=world_size, micro_batch_size=micro_batch_size) for r in range(world_size)
        ]
        shapes = [[len(part.rows) for part in parts] for parts in dealt]
        assert all(shape == shapes[0] for shape in shapes), "ranks with other numbers of passes hang the group"
        assert max(shapes[0]) <= micro_batch_size
        visited += [row for parts in dealt for part in parts for row in part.rows[part.real].tolist()]
        assert all(set(part.rows) <= set(rows) for parts in dealt for part in parts)
    assert sorted(visited) == list(range(num_rows))


def test_order_differs_between_epochs_and_updates_and_seeds_but_not_between_calls():
    """Regression for R-1: one permutation, re-used in every epoch and every iteration."""

    def order(**changes):
        key = {"seed": 0, "version": 5, "epoch": 1, **changes}
        return np.concatenate(epoch_minibatches(50, 4, **key)).tolist()

    assert order() == order()
    assert len({tuple(order(**c)) for c in ({}, {"epoch": 0}, {"version": 4}, {"version": 6}, {"seed": 1})}) == 5


def test_minibatches_hold_different_rows_in_each_epoch():
    """Regression for the sin of fixed minibatches: which rows share a step must change too."""
    sets = [{frozenset(rows.tolist()) for rows in epoch_minibatches(40, 4, seed=0, version=0, epoch=e)} for e in (0, 1)]
    assert not sets[0] & sets[1]


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(2, 65), max_size=30), world_size=st.integers(1, 6))
def test_every_trajectory_is_scored_by_one_rank_and_loads_are_even(sizes, world_size):
    shares = deal_trajectories(sizes, world_size)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def reader_for(lengths, rows, fetched):
    trajectories = make_trajectories(lengths)
    values = [Scores(values=np.zeros(t.num_decisions + 1, np.float32), logprobs=None) for t in trajectories]
    batch = PPO(algorithm_config()).make_batch(as_groups(trajectories), values, version=0)

    def fetch(references):
        fetched.append(len(references))
        return list(references)

    model = TinyVLA()
    return trajectories, batch, BatchReader(batch, rows, fetch, PromptCache(model), torch.device("cpu"))


def test_micro_batch_holds_the_frames_and_numbers_of_its_rows():
    rows = np.array([4, 0, 7])
    trajectories, batch, reader = reader_for([3, 5, 2], np.arange(10), [])
    micro = reader.read(DealtRows(rows, np.array([True, True, False])))
    expected = [trajectories[1].frames[1], trajectories[0].frames[0], trajectories[1].frames[4]]
    np.testing.assert_array_equal(micro.inputs.images, np.stack(expected))
    np.testing.assert_array_equal(micro.inputs.proprio[0], trajectories[1].proprio[1])
    np.testing.assert_array_equal(micro.tokens, batch.action_tokens[rows])
    assert micro.weights.tolist() == [1, 1, 0]
    ids, _ = TinyVLA().encode_prompts(["push it", "reach", "push it"])
    assert torch.equal(micro.inputs.prompt_ids, ids)


def test_only_needed_trajectories_are_fetched_and_once():
    fetched = []
    _, _, reader = reader_for([3, 5, 2], np.array([0, 1, 9, 1]), fetched)
    reader.read(DealtRows(np.array([0, 9]), np.array([True, True])))
    assert fetched == [2]
    with pytest.raises(KeyError):
        reader.read(DealtRows(np.array([4]), np.array([True])))
