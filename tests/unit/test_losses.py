import json
import math

import numpy as np
import pytest
import torch

from tests.golden_data import golden_path
from vlarl_ray.algorithms.base import LossRows, Normalizers
from vlarl_ray.algorithms.losses import approx_kl, clip_fraction, clipped_surrogate, reduce_log_ratio, value_loss
from vlarl_ray.algorithms.policy_loss import policy_terms
from vlarl_ray.config import AlgorithmConfig

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def surrogate(ratio, advantage, **options):
    ratio, advantage = torch.tensor([ratio]), torch.tensor([advantage])
    return clipped_surrogate(ratio.log(), advantage, torch.ones(1, dtype=torch.bool), **CLIP, **options).item()


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [1.105171, 1.221403, 0.904837, 1.0]),
        ("action", [1.349859, 0.904837]),
        ("chunk", [1.221403]),
    ],
)
def test_f8_ratio_at_each_level(level, expected):
    log_ratio = torch.tensor([[0.1, 0.2, -0.1, 0.0]])
    reduced, mask = reduce_log_ratio(log_ratio, torch.ones(1, 4, dtype=torch.bool), 2, level)
    np.testing.assert_allclose(reduced.exp()[0], expected, atol=1e-5)
    assert mask.all()


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_masked_tokens_never_enter_a_ratio_even_if_infinite(level):
    log_ratio = torch.tensor([[0.1, math.inf, math.nan, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False, False, False]])
    reduced, kept = reduce_log_ratio(log_ratio, mask, 2, level)
    loss = clipped_surrogate(reduced, torch.ones(1), kept, **CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.1))
    np.testing.assert_allclose(log_ratio.grad, [[-math.exp(0.1), 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1, -1.28), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8), (1.25, 1, -1.25)],
)
def test_f9_clip_low_and_high(ratio, advantage, expected):
    assert surrogate(ratio, float(advantage)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("ratio", "advantage", "expected"), [(5.0, -1, 3.0), (2.0, -1, 2.0), (5.0, 1, -1.28)])
def test_f10_dual_clip_bounds_negative_advantages_only(ratio, advantage, expected):
    assert surrogate(ratio, float(advantage), dual_clip=3.0) == pytest.approx(expected, abs=1e-5)


def test_f11_every_executed_token_gets_the_advantage_of_its_chunk():
    log_ratio = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    clipped_surrogate(log_ratio, torch.tensor([2.0, -1.0]), mask, normalizer=1.0, **CLIP).backward()
    assert log_ratio.grad.tolist() == [[-2, -2, 0], [1, 1, 1]]


def test_shares_of_a_batch_add_up_to_its_loss():
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    mask = torch.rand(6, 4, generator=generator) > 0.3
    whole = clipped_surrogate(log_ratio, advantages, mask, **CLIP)
    total = mask.sum().item()
    parts = [
        clipped_surrogate(log_ratio[rows], advantages[rows], mask[rows], normalizer=total, **CLIP)
        for rows in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_loss_over_nothing_is_zero():
    assert clipped_surrogate(torch.zeros(2), torch.ones(2), torch.zeros(2, dtype=torch.bool), **CLIP).item() == 0.0


def test_f13_clipped_branch_is_used_where_it_gives_the_larger_error():
    one = torch.ones(1, dtype=torch.bool)
    values, old = torch.tensor([1.0]), torch.tensor([0.0])

    def loss(target, clip):
        return value_loss(values, old, torch.tensor([target]), one, clip=clip).item()

    assert loss(1.0, 0.2) == pytest.approx(0.5 * 0.8**2)  # moved 1.0, clipped to 0.2, which is worse
    assert loss(-1.0, 0.2) == pytest.approx(0.5 * 2.0**2)  # the unclipped error is larger
    assert loss(1.0, None) == 0.0
    assert value_loss(torch.tensor([0.1]), old, torch.tensor([1.0]), one, clip=0.2).item() == pytest.approx(
        0.5 * 0.9**2
    )


def test_f13_huber_slope_saturates_at_delta():
    values = torch.tensor([100.0, 3.0], requires_grad=True)
    mask = torch.ones(2, dtype=torch.bool)
    zeros = torch.zeros(2)
    value_loss(values, zeros, zeros, mask, clip=None, shape="huber", huber_delta=10.0, normalizer=1.0).backward()
    assert values.grad.tolist() == [10.0, 3.0]


def test_approx_kl_is_the_k3_estimator_and_never_negative():
    log_ratio = torch.tensor([0.5, -0.5, 0.0])
    expected = [math.expm1(x) - x for x in (0.5, -0.5, 0.0)]
    assert min(expected) >= 0
    assert approx_kl(log_ratio, torch.ones(3)).item() == pytest.approx(sum(expected), rel=1e-5)


def test_clip_fraction_counts_executed_ratios_outside_the_range():
    log_ratio = torch.tensor([1.5, 0.5, 1.25, 99.0]).log()
    assert clip_fraction(log_ratio, torch.tensor([True, True, True, False]), **CLIP).item() == 2.0


def loss_rows(*, num_rows=4, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    tokens = 6

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    fields = {
        "logprobs": (draw(num_rows, tokens) - 2).requires_grad_(),
        "entropy": draw(num_rows, tokens).exp(),
        "values": draw(num_rows),
        "reference_logprobs": draw(num_rows, tokens) - 2,
        "old_logprobs": draw(num_rows, tokens) - 2,
        "old_values": draw(num_rows),
        "advantages": draw(num_rows),
        "returns": draw(num_rows),
        "token_mask": torch.ones(num_rows, tokens, dtype=torch.bool),
        "weights": torch.ones(num_rows),
        "num_actions": 2,
    }
    return LossRows(**{**fields, **changes})


NORMALIZERS = Normalizers(ratios=8.0, tokens=24.0, rows=4.0)


def test_f14_zero_coefficients_leave_the_loss_bit_identical_and_others_change_it():
    rows = loss_rows()
    plain = policy_terms(AlgorithmConfig(), rows, NORMALIZERS).loss
    poisoned = loss_rows(entropy=torch.full((4, 6), math.nan), reference_logprobs=None)
    assert policy_terms(AlgorithmConfig(), poisoned, NORMALIZERS).loss.item() == plain.item()
    with_entropy = policy_terms(AlgorithmConfig(entropy_coef=0.1), rows, NORMALIZERS).loss
    assert with_entropy.item() == pytest.approx(plain.item() - 0.1 * rows.entropy.mean().item(), rel=1e-5)
    with_kl = policy_terms(AlgorithmConfig(kl_coef=0.1), rows, NORMALIZERS).loss
    assert with_kl.item() > plain.item()


def test_the_ramp_of_the_policy_gradient_leaves_the_entropy_bonus_alone():
    rows = loss_rows(policy_weight=0.0)
    terms = policy_terms(AlgorithmConfig(entropy_coef=0.1), rows, NORMALIZERS)
    assert terms.loss.item() == pytest.approx(-0.1 * rows.entropy.mean().item(), rel=1e-5)


def test_f14_a_kl_penalty_without_reference_says_what_to_do():
    with pytest.raises(ValueError, match=r"algorithm\.kl_coef is set"):
        policy_terms(AlgorithmConfig(kl_coef=0.1), loss_rows(reference_logprobs=None), NORMALIZERS)


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_f17_garbage_rows_with_weight_zero_change_neither_loss_nor_gradient(level):
    cfg = AlgorithmConfig(ratio_level=level, entropy_coef=0.01)
    rows = loss_rows()
    garbage = loss_rows(num_rows=50, seed=9)
    joined = {}
    for name in LossRows.__dataclass_fields__:
        own, other = getattr(rows, name), getattr(garbage, name)
        joined[name] = torch.cat([own.detach(), other.detach()]) if isinstance(own, torch.Tensor) else own
    joined["logprobs"][4:] = 80.0  # would overflow the ratio
    joined["logprobs"].requires_grad_()
    joined["weights"][4:] = 0.0
    plain, padded = (policy_terms(cfg, r, NORMALIZERS) for r in (rows, LossRows(**joined)))
    assert padded.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    plain.loss.backward()
    padded.loss.backward()
    torch.testing.assert_close(joined["logprobs"].grad[:4], rows.logprobs.grad)
    assert not joined["logprobs"].grad[4:].any()
    for name, value in plain.sums.items():
        assert padded.sums[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for name, value in plain.maxima.items():
        assert padded.maxima[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_zero_advantage_gives_zero_policy_gradient():
    rows = loss_rows(advantages=torch.zeros(4))
    policy_terms(AlgorithmConfig(), rows, NORMALIZERS).loss.backward()
    assert not rows.logprobs.grad.any()


def test_log_ratio_is_clamped_against_overflow():
    rows = loss_rows(old_logprobs=torch.full((4, 6), -1e6))
    terms = policy_terms(AlgorithmConfig(max_log_ratio=3.0), rows, NORMALIZERS)
    assert math.isfinite(terms.loss.item())
    assert terms.maxima["ratio_max"].item() == pytest.approx(math.exp(3.0), rel=1e-5)


def test_golden_token_level_loss_and_gradient():
    for case in json.loads(golden_path("advantages", "rloo.json").read_text())["cases"]:
        new = torch.tensor(case["new_logprobs"], requires_grad=True)
        valid = torch.tensor(case["valid"])[:, None]
        mask = torch.tensor(case["token_mask"]) & valid
        log_ratio, kept = reduce_log_ratio(new - torch.tensor(case["old_logprobs"]), mask, 1, "token")
        clip = {"clip_low": case["clip_ratio_low"], "clip_high": case["clip_ratio_high"]}
        loss = clipped_surrogate(
            log_ratio, torch.tensor(case["advantages"]), kept, normalizer=float(mask.sum()) + 1e-6, **clip
        )
        loss.backward()
        expected = case["ript_ppo"]["token_mean"]
        assert loss.item() == pytest.approx(expected["pg_loss"], abs=2e-6)
        np.testing.assert_allclose(new.grad, expected["grad_wrt_new_logprobs"], atol=2e-6)
