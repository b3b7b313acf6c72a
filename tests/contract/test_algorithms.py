"""What every algorithm must keep to, whoever wrote it: padding, masks, zero advantages, state."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from tests.tiny_model import algorithm_config, make_trajectories
from tests.unit.test_losses import loss_rows
from vlarl_ray.algorithms.base import Algorithm, LossRows, Normalizers
from vlarl_ray.registry import ALGORITHMS, resolve
from vlarl_ray.types import Scores, TrajectoryGroup

NORMALIZERS = Normalizers(ratios=8.0, tokens=24.0, rows=4.0)


@pytest.fixture(params=sorted(ALGORITHMS))
def algorithm(request):
    kind = resolve(ALGORITHMS, request.param, what="algorithm.name")
    return kind(algorithm_config(name=request.param))


def groups_and_scores(*, seed=0):
    """Two groups of three episodes, each with successes and failures."""
    trajectories = make_trajectories([3, 5, 1, 2, 4, 6], seed=seed)
    rng = np.random.default_rng(seed)
    scores = [
        Scores(rng.standard_normal(t.num_decisions + 1).astype(np.float32), t.behaviour_logprobs) for t in trajectories
    ]
    return [TrajectoryGroup(tuple(trajectories[:3])), TrajectoryGroup(tuple(trajectories[3:]))], scores


def gradient(algorithm, rows):
    rows = replace(rows, logprobs=rows.logprobs.detach().clone().requires_grad_())
    terms = algorithm.loss(rows, NORMALIZERS)
    (terms.policy + terms.value).backward()
    assert rows.logprobs.grad is not None
    return float(terms.policy.detach()), rows.logprobs.grad


def test_it_is_an_algorithm(algorithm):
    assert isinstance(algorithm, Algorithm)
    assert algorithm.needs <= {"values", "logprobs"}


def test_a_batch_has_a_row_for_every_decision_and_finite_numbers(algorithm):
    groups, scores = groups_and_scores()
    batch = algorithm.make_batch(groups, scores, version=7)
    assert len(batch) == 3 + 5 + 1 + 2 + 4 + 6
    assert batch.policy_version == 7
    for name in ("advantages", "returns", "old_values", "old_logprobs", "weights"):
        assert np.isfinite(getattr(batch, name)).all(), name
    assert np.abs(batch.advantages).sum() > 0


def test_zero_advantages_give_no_gradient(algorithm):
    rows = loss_rows()
    same = replace(rows, advantages=torch.zeros(4), old_logprobs=rows.logprobs.detach())
    assert gradient(algorithm, same)[1].abs().max() == 0


def test_f36_rows_of_weight_zero_and_masked_tokens_change_neither_loss_nor_gradient(algorithm):
    rows = loss_rows()
    padded = {}
    for field in fields(LossRows):
        value = getattr(rows, field.name)
        padded[field.name] = torch.cat([value, value[:1] * 7]) if isinstance(value, torch.Tensor) else value
    padded["weights"] = torch.cat([rows.weights, torch.zeros(1)])
    padded["token_mask"] = torch.cat([rows.token_mask, rows.token_mask[:1]])
    loss, expected = gradient(algorithm, rows)
    padded_loss, found = gradient(algorithm, LossRows(**padded))
    assert padded_loss == pytest.approx(loss, abs=1e-7)
    torch.testing.assert_close(found[:4], expected)
    assert found[4].abs().max() == 0

    mask = rows.token_mask.clone()
    mask[2, 3:] = False
    garbage = rows.logprobs.detach().clone()
    garbage[2, 3:] = -50.0
    first = gradient(algorithm, replace(rows, token_mask=mask))
    second = gradient(algorithm, replace(rows, token_mask=mask, logprobs=garbage))
    assert first[0] == second[0]
    torch.testing.assert_close(first[1], second[1])


def test_shares_of_a_minibatch_add_up_to_it(algorithm):
    rows = loss_rows()
    halves = [
        LossRows(
            **{f.name: v[s] if isinstance(v := getattr(rows, f.name), torch.Tensor) else v for f in fields(LossRows)}
        )
        for s in (slice(0, 2), slice(2, 4))
    ]
    whole = algorithm.loss(rows, NORMALIZERS)
    parts = [algorithm.loss(half, NORMALIZERS) for half in halves]
    torch.testing.assert_close(parts[0].policy + parts[1].policy, whole.policy)
    torch.testing.assert_close(parts[0].value + parts[1].value, whole.value)
    for name, total in whole.sums.items():
        torch.testing.assert_close(parts[0].sums[name] + parts[1].sums[name], total)


def test_its_state_goes_through_json_and_restores_the_next_batch(algorithm):
    groups, scores = groups_and_scores()
    algorithm.make_batch(groups, scores, version=0)
    algorithm.observe_update({"learn/approx_kl": 0.1, "learn/entropy": 1.0}, success_rate=0.5)
    other = type(algorithm)(algorithm.cfg)
    episodes = {episode.key: episode for episode in algorithm.stored_episodes}
    other.load_state_dict(json.loads(json.dumps(algorithm.state_dict())), episodes)
    groups, scores = groups_and_scores(seed=1)
    first, second = (each.make_batch(groups, scores, version=1) for each in (algorithm, other))
    np.testing.assert_array_equal(first.advantages, second.advantages)
    assert (first.policy_weight, first.bc_weight) == (second.policy_weight, second.bc_weight)
    assert (first.demos is None) == (second.demos is None)
    if first.demos is not None and second.demos is not None:
        np.testing.assert_array_equal(first.demos.actions, second.demos.actions)
    assert json.dumps(algorithm.state_dict()) == json.dumps(other.state_dict())
