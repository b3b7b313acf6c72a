"""The policy part that PPO and its relatives share: surrogate, entropy bonus, KL penalty, and their statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlarl_ray.algorithms.base import LossRows, Normalizers, Stateless
from vlarl_ray.algorithms.losses import (
    RatioLevel,
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    kl_to_reference,
    masked_sum,
    reduce_log_ratio,
)
from vlarl_ray.config import AlgorithmConfig
from vlarl_ray.types import TrainBatch


class PolicyGradient(Stateless):
    """What algorithms that train on `policy_terms` read off their config."""

    def __init__(self, cfg: AlgorithmConfig) -> None:
        self.cfg = cfg

    @property
    def needs_reference(self) -> bool:
        """Whether a KL penalty is on."""
        return self.cfg.kl_coef > 0

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether an entropy bonus is on."""
        return self.cfg.entropy_coef > 0

    def normalizers(self, batch: TrainBatch, rows: np.ndarray) -> Normalizers:
        """Count what the minibatch made of `rows` is averaged over."""
        return count_normalizers(batch, rows, self.cfg.ratio_level)


@dataclass(frozen=True)
class PolicyTerms:
    """Policy loss share of some rows, and statistics as in `LossTerms`."""

    loss: Tensor
    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]


def policy_terms(cfg: AlgorithmConfig, rows: LossRows, normalizers: Normalizers) -> PolicyTerms:
    """Compute the clipped surrogate with the optional terms of `cfg`.

    A term whose coefficient is 0 is not computed at all, so it cannot change a bit of the loss.

    Raises:
        ValueError: If `cfg.kl_coef` is set and the rows carry no reference log-probabilities.
    """
    log_ratio, mask = reduce_log_ratio(
        rows.logprobs - rows.old_logprobs, rows.token_mask, rows.num_actions, cfg.ratio_level
    )
    log_ratio = log_ratio.clamp(-cfg.max_log_ratio, cfg.max_log_ratio)
    row_weights = rows.weights[:, None]
    clip = {"clip_low": cfg.clip_ratio_low, "clip_high": cfg.clip_ratio_high}
    loss = rows.policy_weight * clipped_surrogate(
        log_ratio, rows.advantages, mask * row_weights, dual_clip=cfg.dual_clip, normalizer=normalizers.ratios, **clip
    )
    if cfg.entropy_coef:
        entropy = masked_sum(rows.entropy, rows.token_mask * row_weights) / normalizers.tokens
        loss = loss - cfg.entropy_coef * entropy
    if cfg.kl_coef:
        loss = loss + cfg.kl_coef * _reference_kl(rows, rows.token_mask * row_weights) / normalizers.tokens

    with torch.no_grad():
        real = row_weights > 0
        counted, tokens = mask & real, rows.token_mask & real
        log_ratio = log_ratio.detach()
        sums = {
            "approx_kl": approx_kl(log_ratio, counted) / normalizers.ratios,
            "clip_fraction": clip_fraction(log_ratio, counted, **clip) / normalizers.ratios,
            "entropy": masked_sum(rows.entropy.detach(), tokens) / normalizers.tokens,
        }
        if rows.reference_logprobs is not None:
            sums["kl_to_reference"] = _reference_kl(rows, tokens).detach() / normalizers.tokens
        ratio = torch.where(counted, log_ratio, 0.0).exp()
        maxima = {"ratio_max": ratio.max(), "ratio_error": (ratio - 1.0).abs().max()}
    return PolicyTerms(loss=loss, sums=sums, maxima=maxima)


def count_normalizers(batch: TrainBatch, rows: Int[np.ndarray, " M"], level: RatioLevel) -> Normalizers:
    """Count ratios, tokens and rows of the minibatch made of `rows`; never below 1, so that nothing divides by 0."""
    mask = batch.token_mask[rows]
    ratios = count_ratios(mask, batch.num_actions_per_decision, level).sum()
    return Normalizers(
        ratios=max(float(ratios), 1.0), tokens=max(float(mask.sum()), 1.0), rows=max(float(mask.any(1).sum()), 1.0)
    )


def count_ratios(token_mask: Bool[np.ndarray, "B L"], num_actions: int, level: RatioLevel) -> Int[np.ndarray, " B"]:
    """Count the executed ratios of each row."""
    per_row = {"token": token_mask.shape[1], "action": num_actions, "chunk": 1}[level]
    return token_mask.reshape(len(token_mask), per_row, -1).any(-1).sum(-1)


def _reference_kl(rows: LossRows, mask: Tensor) -> Tensor:
    if rows.reference_logprobs is None:
        raise ValueError(
            "algorithm.kl_coef is set, but the learner gave no reference log-probabilities; set it to 0, or train with "
            "learner.train = 'lora', where the reference is the policy with its adapters disabled."
        )
    return kl_to_reference(rows.logprobs, rows.reference_logprobs, mask)
