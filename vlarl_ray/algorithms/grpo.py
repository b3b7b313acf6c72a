"""Group-relative policy optimisation: returns standardised within the group, as SimpleVLA-RL uses it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vlarl_ray.algorithms.advantages import group_normalized_advantages
from vlarl_ray.algorithms.group_relative import GroupRelative


class GRPO(GroupRelative):
    """Advantage = (return - group mean) / (group standard deviation + 1e-6).

    Source:
        Shao et al. 2024 (arXiv:2402.03300); for VLA policies: SimpleVLA-RL (arXiv:2509.09674).
    """

    def advantages(self, returns: Float[np.ndarray, " G"]) -> Float[np.ndarray, " G"]:
        """Standardise the returns."""
        return group_normalized_advantages(returns)
