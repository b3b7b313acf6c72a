"""REINFORCE with a leave-one-out baseline under PPO's clipped ratio: the estimator of RIPT-VLA."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vlarl_ray.algorithms.advantages import leave_one_out_advantages
from vlarl_ray.algorithms.group_relative import GroupRelative


class RLOO(GroupRelative):
    """Advantage = return - mean return of the other rollouts; nothing is divided by a spread.

    Source:
        RIPT-VLA (arXiv:2505.17016); Ahmadian et al. 2024 (arXiv:2402.14740).
    """

    def advantages(self, returns: Float[np.ndarray, " G"]) -> Float[np.ndarray, " G"]:
        """Compare each return with the mean of the others."""
        return leave_one_out_advantages(returns)
