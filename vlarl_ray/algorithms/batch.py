"""From trajectories and per-decision advantages to a `TrainBatch`: what every algorithm's `make_batch` ends with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32

from vlarl_ray.algorithms.advantages import normalize_advantages
from vlarl_ray.algorithms.policy_loss import count_ratios
from vlarl_ray.config import AlgorithmConfig
from vlarl_ray.types import Scores, TrainBatch, Trajectory, TrajectoryGroup, concatenate_rows


def flatten_groups(groups: Sequence[TrajectoryGroup], scores: Sequence[Scores]) -> list[Trajectory]:
    """List the trajectories of all groups, in order.

    Raises:
        ValueError: If there is no trajectory, or not one score for each.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if not trajectories or len(trajectories) != len(scores):
        raise ValueError(
            f"make_batch needs one score for each of >= 1 trajectories, "
            f"got {len(trajectories)} trajectories and {len(scores)} scores."
        )
    return trajectories


def build_batch(
    cfg: AlgorithmConfig,
    trajectories: Sequence[Trajectory],
    scores: Sequence[Scores],
    *,
    advantages: Sequence[np.ndarray],
    returns: Sequence[np.ndarray],
    normalize: bool,
    version: int,
) -> TrainBatch:
    """Stack decisions into rows, in the order of `trajectories`.

    Args:
        cfg: Says which log-probabilities the ratio refers to, and how lengths are normalised.
        trajectories: Of one update; all sampled at one temperature.
        scores: One per trajectory; where `values` is None, old values and value targets are zero.
        advantages: `f[S]` per trajectory.
        returns: Value targets, `f[S]` per trajectory.
        normalize: Standardise the advantages over the batch.
        version: Of the weights that are about to be updated.

    Raises:
        ValueError: If temperatures differ, `cfg.old_logprobs` asks for scores that are not there, or there is no such
            thing as the ratio of an action.
    """
    if cfg.ratio_level == "action" and any(trajectory.tokens_of_chunk for trajectory in trajectories):
        raise ValueError(
            "algorithm.ratio_level = 'action': this policy's tokens are of the chunk as a whole, so an action has no "
            "ratio of its own; set it to 'token' or 'chunk'."
        )
    counts = [trajectory.num_decisions for trajectory in trajectories]
    token_mask = concatenate_rows([trajectory.token_mask() for trajectory in trajectories])
    rows = _float_rows(advantages)
    return TrainBatch(
        frames=tuple(trajectory.frames for trajectory in trajectories),
        instructions=tuple(trajectory.task.instruction for trajectory in trajectories),
        trajectory_index=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        decision_index=concatenate_rows([np.arange(n, dtype=np.int32) for n in counts]),
        proprio=concatenate_rows([trajectory.proprio[:-1] for trajectory in trajectories]),
        action_tokens=concatenate_rows([trajectory.tokens for trajectory in trajectories]),
        token_mask=token_mask,
        old_logprobs=_old_logprobs(cfg, trajectories, scores),
        advantages=normalize_advantages(rows) if normalize else rows,
        returns=_float_rows(returns),
        old_values=_float_rows([_values(s, n) for s, n in zip(scores, counts, strict=True)]),
        weights=_length_weights(cfg, trajectories, token_mask) * importance_weights(cfg, trajectories, scores),
        num_actions_per_decision=trajectories[0].rewards.shape[1],
        temperature=_common_temperature(trajectories),
        policy_version=version,
    )


def importance_weights(
    cfg: AlgorithmConfig, trajectories: Sequence[Trajectory], scores: Sequence[Scores]
) -> Float32[np.ndarray, " B"]:
    """Correct for decisions drawn from other weights, or in another precision, than the ratio refers to.

    Returns:
        1 where the engine's log-probabilities are the reference. Else min(p_learner / p_engine, cap) of each chunk,
        over executed tokens: the expectation is under the distribution the chunk was drawn from.

    Source:
        Truncated importance sampling, Ionides 2008, J. Comput. Graph. Stat. 17(2).
    """
    if cfg.old_logprobs == "engine":
        return np.ones(sum(trajectory.num_decisions for trajectory in trajectories), np.float32)
    drawn = concatenate_rows([trajectory.behaviour_logprobs for trajectory in trajectories])
    mask = concatenate_rows([trajectory.token_mask() for trajectory in trajectories])
    log_weights = np.where(mask, _old_logprobs(cfg, trajectories, scores) - drawn, 0.0).sum(axis=1)
    return np.exp(np.minimum(log_weights, np.log(cfg.max_importance_weight))).astype(np.float32)


def _length_weights(
    cfg: AlgorithmConfig, trajectories: Sequence[Trajectory], token_mask: Bool[np.ndarray, "B L"]
) -> Float32[np.ndarray, " B"]:
    """Weight rows so that `sum(weight * loss) / number of ratios` is the normalisation `cfg` asks for.

    With a plain count as the denominator, any minibatch is an unbiased estimate of the whole batch in all three modes.
    """
    if cfg.loss_normalization == "token_mean":
        return np.ones(len(token_mask), np.float32)
    level, num_actions = cfg.ratio_level, trajectories[0].rewards.shape[1]
    counts = [trajectory.num_decisions for trajectory in trajectories]
    per_row = count_ratios(token_mask, num_actions, level)
    per_trajectory = np.add.reduceat(per_row, np.cumsum([0, *counts[:-1]]))
    if cfg.loss_normalization == "fixed_horizon":
        env_steps = np.array([trajectory.task.max_env_steps for trajectory in trajectories])
        decisions, num_tokens = np.ceil(env_steps / num_actions), token_mask.shape[1]
        of_chunk = trajectories[0].tokens_of_chunk
        tokens = decisions * num_tokens if of_chunk else env_steps * (num_tokens // num_actions)
        lengths = {"token": tokens, "action": env_steps, "chunk": decisions}[level]
    else:
        lengths = per_trajectory
    mean_length = per_trajectory.sum() / len(trajectories)
    return np.repeat((mean_length / np.maximum(lengths, 1)).astype(np.float32), counts)


def _old_logprobs(
    cfg: AlgorithmConfig, trajectories: Sequence[Trajectory], scores: Sequence[Scores]
) -> Float32[np.ndarray, "B L"]:
    if cfg.old_logprobs == "engine":
        return concatenate_rows([trajectory.behaviour_logprobs for trajectory in trajectories])
    scored = [s.logprobs for s in scores if s.logprobs is not None]
    if len(scored) != len(scores):
        raise ValueError(
            "algorithm.old_logprobs = 'learner' needs scored log-probabilities, which are missing; use 'engine'."
        )
    return concatenate_rows(scored)


def _values(score: Scores, num_decisions: int) -> np.ndarray:
    return np.zeros(num_decisions, np.float32) if score.values is None else score.values[:-1]


def _common_temperature(trajectories: Sequence[Trajectory]) -> float:
    temperatures = {trajectory.task.temperature for trajectory in trajectories}
    if len(temperatures) != 1:
        raise ValueError(
            f"One update needs one sampling temperature, got {sorted(temperatures)}; "
            "do not mix evaluation and training episodes."
        )
    return temperatures.pop()


def _float_rows(arrays: Sequence[np.ndarray]) -> Float32[np.ndarray, " B"]:
    return concatenate_rows(arrays).astype(np.float32)
