"""Defects of the released code of VLA-RL, RIPT-VLA and their relatives, put into ours: the test that guards must fail.

A-n are those of VLA-RL's released code, "RIPT" those of RIPT-VLA's, P-n, R-n and V-n those noticed in them and in other
frameworks. Defects that only a whole run shows have their test in tests/e2e (A-2: the base weights are served).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tests.contract import test_algorithms, test_models
from tests.small_openvla import tiny
from tests.tiny_model import algorithm_config
from tests.unit import test_action_tokens, test_batch, test_groups, test_learner, test_ppo
from tests.unit.test_losses import loss_rows
from vlarl_ray.algorithms import batch as batch_module
from vlarl_ray.algorithms import policy_loss, ppo
from vlarl_ray.learner.batch import DealtRows
from vlarl_ray.learner.learner import Learner
from vlarl_ray.learner.scoring import Scorer
from vlarl_ray.learner.update import Updater
from vlarl_ray.models import action_tokens
from vlarl_ray.models.openvla import OpenVLA
from vlarl_ray.rollout.groups import GroupIntake
from vlarl_ray.rollout.ledger import RolloutLedger

Patch = Callable[[object, str, object], None]


@dataclass(frozen=True)
class Defect:
    """How to put a defect in, and the test that must fail then."""

    put_in: Callable[[Patch], None]
    guard: Callable[[], object]


def old_logprobs_of_the_first_forward(patch):
    original = ppo.PPO.loss
    patch(ppo.PPO, "loss", lambda self, rows, n: original(self, replace(rows, old_logprobs=rows.logprobs.detach()), n))


def old_logprobs_of_the_learner_only(patch):
    patch(batch_module, "_old_logprobs", lambda cfg, trajectories, scores: np.concatenate([s.logprobs for s in scores]))


def value_read_at_the_last_position(patch):
    def last(self, inputs, count):
        end = inputs.prompt_ids.shape[1] - 1 + self.num_patches
        return torch.full((len(inputs.images), 1), end) + torch.arange(count)

    patch(OpenVLA, "_read_positions", last)


def scores_with_a_graph(patch):
    patch(Scorer, "_forward", Scorer._forward.__wrapped__)


def a_step_for_every_micro_batch(patch):
    original = Learner._plan

    def plan(self, batch):
        return [replace(m, passes=[part]) for m in original(self, batch) for part in m.passes]

    patch(Learner, "_plan", plan)


def a_step_after_the_kl_stop(patch):
    def step(self):
        for optimizer in self._optimizers():
            for shard in optimizer.shards.values():
                shard.mul_(0.999)  # what weight decay and momentum do with gradients of zero

    patch(Updater, "_drop_gradients", step)


def truncation_taken_for_termination(patch):
    original = ppo.gae
    patch(ppo, "gae", lambda *args, **named: original(*args, **{**named, "terminated": True}))


def probability_left_to_other_tokens(patch):
    def log_softmax(logits, temperature):
        scaled = logits.float() / (temperature or 1.0)
        with_eos = torch.cat([scaled, torch.zeros_like(scaled[..., :1])], -1)
        return torch.log_softmax(with_eos, -1)[..., :-1]

    patch(action_tokens, "_log_softmax", log_softmax)


def small_batches_are_not_normalised(patch):
    original = batch_module.normalize_advantages
    patch(batch_module, "normalize_advantages", lambda rows: rows if len(rows) <= 9 else original(rows))


def the_critic_is_frozen(patch):
    def step(self, statistics, *, warms_up):
        if not warms_up:
            self._actor.step(statistics["grad_norm_actor"])

    patch(Updater, "_step", step)


def padding_rows_count(patch):
    original = test_batch.deal_rows

    def deal(rows, **named):
        return [DealtRows(part.rows, np.ones_like(part.real)) for part in original(rows, **named)]

    patch(test_batch, "deal_rows", deal)


def the_last_row_is_dropped(patch):
    original = test_batch.deal_rows

    def deal(rows, **named):
        return original(rows[:-1] if len(rows) > 1 else rows, **named)

    patch(test_batch, "deal_rows", deal)


def one_permutation_for_ever(patch):
    original = test_batch.epoch_minibatches
    patch(
        test_batch,
        "epoch_minibatches",
        lambda *args, seed, version, epoch: original(*args, seed=seed, version=0, epoch=0),
    )


def masked_tokens_count(patch):
    original = policy_loss.reduce_log_ratio
    patch(
        policy_loss,
        "reduce_log_ratio",
        lambda log_ratio, mask, num, level: original(log_ratio, torch.ones_like(mask), num, level),
    )


def the_kl_coefficient_is_not_used(patch):
    patch(policy_loss, "_reference_kl", lambda rows, mask: 0.0 * rows.logprobs.sum())


def uniform_groups_are_tried_for_ever(patch):
    patch(GroupIntake, "is_done", property(lambda self: len(self.accepted) >= self.rule.num_wanted))
    original = RolloutLedger.take

    def take(self, draws, rule):
        def at_most():
            for count, draw in enumerate(draws):
                assert count < 1000, "it would go on for ever"
                yield draw

        return original(self, at_most(), rule)

    patch(RolloutLedger, "take", take)


def kl_moves_the_loss():
    rows = loss_rows()
    reference = rows.logprobs.detach() + 0.3 * torch.randn(
        rows.logprobs.shape, generator=torch.Generator().manual_seed(0)
    )
    losses = [
        policy_loss.policy_terms(
            algorithm_config(kl_coef=kl_coef), replace(rows, reference_logprobs=reference), test_algorithms.NORMALIZERS
        ).loss
        for kl_coef in (0.0, 0.5)
    ]
    assert abs(float(losses[1] - losses[0])) > 1e-4


DEFECTS = {
    "A-1 old log-probabilities of the first forward": Defect(
        old_logprobs_of_the_first_forward, test_learner.test_f12_old_logprobs_stay_frozen_while_the_policy_moves
    ),
    "A-1 the engine's are not used": Defect(
        old_logprobs_of_the_learner_only, test_ppo.test_old_logprobs_are_the_engine_s_unless_the_learner_s_are_asked_for
    ),
    "A-3 critic reads a pad position": Defect(
        value_read_at_the_last_position,
        lambda: test_models.test_value_changes_with_image_and_prompt_but_not_with_padding(tiny),
    ),
    "A-4, V-1 no_grad is not entered": Defect(
        scores_with_a_graph, lambda: test_learner.test_scores_are_the_log_probabilities_the_sampler_recorded(1.0)
    ),
    "A-5, V-2 a step per micro-batch": Defect(
        a_step_for_every_micro_batch, test_learner.test_f15_micro_batches_accumulate_to_one_step_per_minibatch
    ),
    "A-6 a step after the KL stop": Defect(
        a_step_after_the_kl_stop, test_learner.test_f16_after_a_kl_stop_nothing_changes_in_the_remaining_minibatches
    ),
    "A-7 truncation as termination": Defect(
        truncation_taken_for_termination,
        test_ppo.test_f5_a_truncated_episode_s_last_value_matters_and_a_terminated_one_s_does_not,
    ),
    "A-8 probability of other tokens": Defect(
        probability_left_to_other_tokens,
        test_action_tokens.test_temperature_divides_the_logits_of_score_and_sample_alike_f44,
    ),
    "A-10 small batches are not normalised": Defect(
        small_batches_are_not_normalised,
        test_ppo.test_advantages_are_normalised_over_the_whole_batch_on_the_driver,
    ),
    "A-12 frozen critic": Defect(
        the_critic_is_frozen,
        lambda: test_learner.test_f32_warm_up_moves_only_the_critic_for_exactly_n_updates("lora"),
    ),
    "P-1 the last step is dropped": Defect(
        the_last_row_is_dropped, test_batch.test_every_row_is_visited_exactly_once_per_epoch
    ),
    "P-2 padding enters the loss": Defect(
        padding_rows_count, test_batch.test_every_row_is_visited_exactly_once_per_epoch
    ),
    "RIPT masked tokens enter the loss": Defect(
        masked_tokens_count,
        lambda: test_algorithms.test_f36_rows_of_weight_zero_and_masked_tokens_change_neither_loss_nor_gradient(
            ppo.PPO(algorithm_config())
        ),
    ),
    "RIPT the KL coefficient is not used": Defect(the_kl_coefficient_is_not_used, kl_moves_the_loss),
    "P-3 uniform groups for ever": Defect(
        uniform_groups_are_tried_for_ever,
        test_groups.test_f38_constant_failure_ends_after_the_most_attempts_with_nothing_accepted,
    ),
    "R-1 one permutation": Defect(
        one_permutation_for_ever,
        test_batch.test_order_differs_between_epochs_and_updates_and_seeds_but_not_between_calls,
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_its_guard_fails_when_the_defect_is_put_in_and_passes_without(name, monkeypatch):
    defect = DEFECTS[name]
    defect.guard()
    defect.put_in(monkeypatch.setattr)
    with pytest.raises((AssertionError, RuntimeError)):
        defect.guard()
