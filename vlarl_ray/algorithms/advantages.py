"""Advantages and value targets: pure numpy functions over one episode, one group or one batch."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Num

DiscountMode = Literal["per_chunk", "smdp"]

_STD_EPSILON = 1e-6


def leave_one_out_advantages(returns: Num[np.ndarray, " G"]) -> Float[np.ndarray, " G"]:
    """Score each rollout against the mean return of the others in its group.

    `A_i = R_i - mean(R_j, j != i)`. The baseline is independent of rollout i, so the policy
    gradient stays unbiased. Nothing is divided by the group's spread (that is GRPO).

    Args:
        returns: Undiscounted episode return, in reward units (1.0 = success), of G rollouts that
            share one task and initial state.

    Returns:
        Advantages in reward units; they sum to zero over the group.

    Raises:
        ValueError: If G < 2, where the baseline is undefined.

    Source:
        Ahmadian et al. 2024 (arXiv:2402.14740); baseline from Kool et al. 2019.

    Example:
        >>> leave_one_out_advantages(np.float32([1, 0, 0])).tolist()
        [1.0, -0.5, -0.5]
    """
    returns = _floats(returns)
    num_rollouts = _checked_group_size(returns, "leave-one-out advantages")
    baseline = (returns.sum() - returns) / (num_rollouts - 1)
    return returns - baseline


def group_normalized_advantages(returns: Num[np.ndarray, " G"]) -> Float[np.ndarray, " G"]:
    """Standardise returns within a group, `A_i = (R_i - mean) / (std + 1e-6)` with the sample std (ddof = 1).

    Args:
        returns: Undiscounted episode returns of G rollouts that share one task and initial state.

    Returns:
        Advantages in standard deviations; all zero where all returns are equal.

    Raises:
        ValueError: If G < 2, where the sample std is undefined.

    Source:
        Shao et al. 2024 (GRPO, arXiv:2402.03300).

    Example:
        >>> group_normalized_advantages(np.array([1.0, 0, 0, 0])).round(4).tolist()
        [1.5, -0.5, -0.5, -0.5]
    """
    returns = _floats(returns)
    _checked_group_size(returns, "group-normalised advantages")
    if np.all(returns == returns[0]):
        return np.zeros_like(returns)  # the mean of equal floats can be off by a rounding, which 1/eps would blow up
    return (returns - returns.mean()) / (returns.std(ddof=1) + _STD_EPSILON)


def gae(
    rewards: Num[np.ndarray, " S"],
    values: Num[np.ndarray, " S1"],
    *,
    terminated: bool,
    gamma: float,
    gae_lambda: float,
    num_env_steps: Int[np.ndarray, " S"] | None = None,
    discount_mode: DiscountMode = "per_chunk",
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Compute generalised advantage estimates of one episode of S decisions.

    Args:
        rewards: Chunk rewards (see `chunk_rewards`).
        values: Of the S+1 observations; `values[S]`, of the observation after the last executed env step,
            bootstraps an episode that was truncated.
        terminated: Whether the episode ended for good, so that nothing lies behind it; False for a time limit.
        gamma: Discount per decision, or per env step under `smdp`.
        gae_lambda: Trace decay per decision.
        num_env_steps: Env steps executed of each chunk; needed by `smdp` only.
        discount_mode: `per_chunk` discounts every decision by gamma, `smdp` by gamma^(executed env steps).

    Returns:
        Advantages and value targets (`advantages + values[:S]`).

    Raises:
        ValueError: If lengths disagree, or `smdp` comes without `num_env_steps`.

    Source:
        Schulman et al. 2016 (arXiv:1506.02438).

    Example:
        >>> rewards, values = np.array([0.0, 1]), np.array([0.4, 0.6, 9])
        >>> gae(rewards, values, terminated=True, gamma=0.99, gae_lambda=0.95)[0].round(4).tolist()
        [0.5702, 0.4]
    """
    rewards, values = _floats(rewards), _floats(values)
    num_decisions = len(rewards)
    if len(values) != num_decisions + 1:
        raise ValueError(
            f"gae needs one value more than rewards, got {len(values)} values for {num_decisions} rewards; "
            "append the value of the observation after the last executed env step."
        )
    discounts = _chunk_discounts(num_decisions, num_env_steps, gamma, discount_mode)
    next_values = values[1:].copy()
    if terminated:
        next_values[-1:] = 0.0
    residuals = rewards + discounts * next_values - values[:-1]
    advantages = np.zeros_like(residuals)
    tail = 0.0
    for k in range(num_decisions - 1, -1, -1):
        tail = residuals[k] + discounts[k] * gae_lambda * tail
        advantages[k] = tail
    return advantages, advantages + values[:-1]


def chunk_rewards(
    rewards: Num[np.ndarray, "S K"],
    num_env_steps: Int[np.ndarray, " S"],
    gamma: float,
    mode: DiscountMode,
) -> Float[np.ndarray, " S"]:
    """Pool env-step rewards into one reward per decision.

    Args:
        rewards: Per env step of each chunk.
        num_env_steps: Env steps executed of each chunk; rewards behind them are left out.
        gamma: Discount per env step inside the chunk (`smdp` only).
        mode: `per_chunk` is the plain sum, `smdp` discounts inside the chunk.

    Example:
        >>> chunk_rewards(np.array([[0, 0], [0, 1.0]]), np.array([2, 2]), 0.9, "smdp").tolist()
        [0.0, 0.9]
    """
    rewards = _floats(rewards)
    chunk_length = rewards.shape[1]
    executed = np.arange(chunk_length)[None, :] < np.asarray(num_env_steps)[:, None]
    weights = gamma ** np.arange(chunk_length) if _checked_mode(mode) == "smdp" else np.ones(chunk_length)
    return np.where(executed, rewards, 0.0) @ weights.astype(rewards.dtype)


def explained_variance(values: Num[np.ndarray, " B"], returns: Num[np.ndarray, " B"]) -> float:
    """Measure how much of the targets' variance the critic explains: 1 is perfect, 0 as good as a constant.

    Returns:
        `1 - Var(returns - values) / Var(returns)`; 0 where the targets do not vary, as there is nothing to explain.

    Example:
        >>> explained_variance(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]))
        1.0
    """
    returns, values = np.asarray(returns, np.float64), np.asarray(values, np.float64)
    variance = returns.var()
    return 0.0 if variance == 0 else float(1.0 - (returns - values).var() / variance)


def normalize_advantages(advantages: Num[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """Standardise advantages over a whole batch, on the driver, so that the number of ranks does not matter.

    Returns:
        Zero mean and unit (population) std; all zero where all advantages are equal.
    """
    advantages = _floats(advantages)
    wide = advantages.astype(np.float64)
    centred = wide - wide.mean() if len(wide) else wide
    std = wide.std() if len(wide) else 0.0
    if std <= _STD_EPSILON * max(1.0, float(np.abs(wide).max(initial=0.0))):
        return np.zeros_like(advantages)
    return (centred / (std + _STD_EPSILON)).astype(advantages.dtype)


def _chunk_discounts(
    num_decisions: int, num_env_steps: np.ndarray | None, gamma: float, mode: DiscountMode
) -> Float[np.ndarray, " S"]:
    if _checked_mode(mode) == "per_chunk":
        return np.full(num_decisions, gamma)
    if num_env_steps is None or len(num_env_steps) != num_decisions:
        got = "none" if num_env_steps is None else f"{len(num_env_steps)} of them"
        raise ValueError(
            f"discount_mode = 'smdp' needs num_env_steps for each of the {num_decisions} decisions, got {got}; "
            "pass Trajectory.num_env_steps or use 'per_chunk'."
        )
    return gamma ** np.asarray(num_env_steps, np.float64)


def _checked_mode(mode: str) -> str:
    if mode not in ("per_chunk", "smdp"):
        raise ValueError(f"discount mode = {mode!r} is unknown; set algorithm.discount_mode to 'per_chunk' or 'smdp'.")
    return mode


def _checked_group_size(returns: np.ndarray, what: str) -> int:
    if len(returns) < 2:
        raise ValueError(f"{what} need >= 2 rollouts per group, got {len(returns)}; set rollout.group_size >= 2.")
    return len(returns)


def _floats(array: np.ndarray) -> np.ndarray:
    """Keep the caller's float precision; anything else becomes float64."""
    array = np.asarray(array)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
