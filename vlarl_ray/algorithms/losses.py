"""Losses as pure tensor functions. Every loss is a masked sum over a denominator, so that shares of a batch add up."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

RatioLevel = Literal["token", "action", "chunk"]


def reduce_log_ratio(
    log_ratio: Float[Tensor, "B L"], token_mask: Bool[Tensor, "B L"], num_actions: int, level: RatioLevel
) -> tuple[Float[Tensor, "B M"], Bool[Tensor, "B M"]]:
    """Sum token log-ratios to the level at which ratios are taken and clipped.

    Args:
        log_ratio: `new - old` log-probability of each of L tokens; step-major (L = K*D) at the level `action`.
        token_mask: False for tokens of env steps that were never executed; these never enter.
        num_actions: K.
        level: `token` keeps M = L ratios, `action` sums to M = K, `chunk` to M = 1.

    Returns:
        Log-ratios at that level (0 where masked) and their mask.

    Raises:
        ValueError: If the level is unknown, or is `action` and L no multiple of K.

    Example:
        >>> log_ratio, mask = torch.tensor([[0.1, 0.2, -0.1, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
        >>> reduce_log_ratio(log_ratio, mask, 2, "action")[0].exp()
        tensor([[1.3499, 0.9048]])
    """
    rows, tokens = log_ratio.shape
    # Masked tokens are replaced, not multiplied by zero: an infinite log-ratio there would poison value and gradient.
    kept = torch.where(token_mask, log_ratio, 0.0)
    if level == "token":
        return kept, token_mask
    if level == "action":
        if tokens % num_actions:
            raise ValueError(f"{tokens} action tokens cannot be split into num_actions = {num_actions} actions.")
        shape = (rows, num_actions, tokens // num_actions)
        return kept.reshape(shape).sum(-1), token_mask.reshape(shape).any(-1)
    if level == "chunk":
        return kept.sum(-1, keepdim=True), token_mask.any(-1, keepdim=True)
    raise ValueError(f"ratio level = {level!r} is unknown; set algorithm.ratio_level to 'token', 'action' or 'chunk'.")


def clipped_surrogate(
    log_ratio: Float[Tensor, "*R"],
    advantages: Float[Tensor, "*A"],
    mask: Float[Tensor, "*R"] | Bool[Tensor, "*R"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    normalizer: float | int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Compute PPO's clipped surrogate, `sum(mask * max(-rho A, -clip(rho) A)) / normalizer`.

    Args:
        log_ratio: Log importance ratios, `[B]` or `[B, M]`.
        advantages: One per row; with `[B, M]` ratios every ratio of a row gets the row's advantage.
        mask: Which ratios count, or their weights.
        clip_low: Ratios are clipped below at `1 - clip_low`.
        clip_high: Ratios are clipped above at `1 + clip_high`.
        dual_clip: Bounds the loss of negative advantages at `dual_clip * |A|`.
        normalizer: Denominator; None takes `mask.sum()`.

    Source:
        Schulman et al. 2017 (arXiv:1707.06347); dual clip: Ye et al. 2020 (arXiv:1912.09729).
    """
    log_ratio = torch.where(mask != 0, log_ratio, 0.0)
    advantages = _per_ratio(advantages, log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is not None:
        bounded = torch.minimum(loss, -dual_clip * advantages)
        loss = torch.where(advantages < 0, bounded, loss)
    return masked_sum(loss, mask) / _denominator(mask, normalizer)


def value_loss(
    values: Float[Tensor, " B"],
    old_values: Float[Tensor, " B"],
    returns: Float[Tensor, " B"],
    mask: Float[Tensor, " B"] | Bool[Tensor, " B"],
    *,
    clip: float | None,
    shape: Literal["squared", "huber"] = "squared",
    huber_delta: float = 10.0,
    normalizer: float | int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Compute the value loss, half squared error or Huber, the worse of clipped and unclipped.

    Args:
        values: Current values.
        old_values: Values the targets were computed with.
        returns: Value targets.
        mask: Rows that count, or their weights.
        clip: `values` may move this far from `old_values` before the clipped branch takes over; None: no clipping.
        shape: Shape of the error.
        huber_delta: Error at which the Huber loss turns linear (slope `huber_delta`).
        normalizer: Denominator; None takes `mask.sum()`.
    """
    loss = _error(values, returns, shape, huber_delta)
    if clip is not None:
        moved = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, _error(moved, returns, shape, huber_delta))
    return masked_sum(loss, mask) / _denominator(mask, normalizer)


def approx_kl(log_ratio: Float[Tensor, "*R"], mask: Float[Tensor, "*R"] | Bool[Tensor, "*R"]) -> Float[Tensor, ""]:
    """Sum the k3 estimator of KL(old || new), `(rho - 1) - log rho`, which is never negative.

    Args:
        log_ratio: `log p_new - log p_old` of samples of the old policy.
        mask: Ratios that count, or their weights.

    Source:
        Schulman 2020, "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = torch.where(mask != 0, log_ratio, 0.0)
    return masked_sum(torch.expm1(log_ratio) - log_ratio, mask)


def kl_to_reference(
    logprobs: Float[Tensor, "B L"],
    reference_logprobs: Float[Tensor, "B L"],
    mask: Float[Tensor, "B L"] | Bool[Tensor, "B L"],
) -> Float[Tensor, ""]:
    """Sum the k3 estimator of KL(policy || reference) over the taken tokens (differentiable in `logprobs`)."""
    return approx_kl(reference_logprobs - logprobs, mask)


def clip_fraction(
    log_ratio: Float[Tensor, "*R"],
    mask: Float[Tensor, "*R"] | Bool[Tensor, "*R"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, ""]:
    """Count (weighted by `mask`) the ratios that lie outside the clip range."""
    ratio = torch.where(mask != 0, log_ratio, 0.0).exp()
    outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
    return masked_sum(outside.to(log_ratio.dtype), mask)


def cloning_loss(
    logprobs: Float[Tensor, "B L"],
    mask: Float[Tensor, "B L"] | Bool[Tensor, "B L"],
    *,
    normalizer: float | int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Compute behaviour cloning's loss, the mean negative log-probability of demonstrated action tokens.

    Args:
        logprobs: Of the demonstrated tokens under the policy.
        mask: Which tokens count, or their weights: those behind the end of an episode do not.
        normalizer: Denominator; None takes `mask.sum()`.
    """
    return -masked_sum(logprobs, mask) / _denominator(mask, normalizer)


def masked_sum(x: Float[Tensor, "*R"], mask: Float[Tensor, "*R"] | Bool[Tensor, "*R"]) -> Float[Tensor, ""]:
    """Sum `mask * x`; what is masked may be infinite or NaN without entering the sum."""
    kept = torch.where(mask != 0, x, 0.0)
    return (kept * mask.to(x.dtype)).sum()


def _per_ratio(advantages: Tensor, log_ratio: Tensor) -> Tensor:
    while advantages.ndim < log_ratio.ndim:
        advantages = advantages.unsqueeze(-1)
    return advantages.expand_as(log_ratio)


def _error(values: Tensor, returns: Tensor, shape: str, delta: float) -> Tensor:
    if shape == "huber":
        return functional.huber_loss(values, returns, reduction="none", delta=delta)
    return 0.5 * (values - returns) ** 2


def _denominator(mask: Tensor, normalizer: float | int | Tensor | None) -> float | int | Tensor:
    if normalizer is not None:
        return normalizer
    total = mask.sum()
    return torch.where(total == 0, torch.ones_like(total), total)  # nothing to average: the sum is 0 anyway
