"""Outcome reward: 1 at the first success, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def sparse_rewards(successes: Sequence[Sequence[bool]], chunk_length: int) -> Float32[np.ndarray, "S K"]:
    """Pay 1 at the first successful env step of an episode, and 0 everywhere else (F46).

    Success is not sticky: an episode that runs on after it may lose it and gain it again, and is still paid once.

    Args:
        successes: For each of S decisions, whether each *executed* env step reached success (1..K entries).
        chunk_length: K.

    Returns:
        Reward of every env step; zero where a step of the chunk was not executed.

    Raises:
        ValueError: If a decision has more entries than `chunk_length`.

    Example:
        >>> sparse_rewards([[False, False], [True, True]], 2).tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    rewards = np.zeros((len(successes), chunk_length), dtype=np.float32)
    for decision, steps in enumerate(successes):
        if len(steps) > chunk_length:
            raise ValueError(
                f"decision {decision} has {len(steps)} executed env steps, but chunk_length = {chunk_length}; "
                "record at most one entry per step of the chunk."
            )
    for decision, steps in enumerate(successes):
        for step, success in enumerate(steps):
            if success:
                rewards[decision, step] = 1.0
                return rewards
    return rewards
