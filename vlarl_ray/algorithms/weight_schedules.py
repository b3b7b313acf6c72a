"""How much the policy gradient and cloning weigh in each update: a function of the update's number and of statistics.

| schedule | policy gradient | cloning |
|---|---|---|
| `tanh_ramp` | tanh(t / T) | bc_weight |
| `linear_decay` | policy_weight | bc_weight * max(0, 1 - t / T) |
| `success_adaptive` | policy_weight | bc_weight * (1 - running success) |
| `kl_target` | policy_weight | * 1.5 where KL > 2 * target, / 1.5 where KL < target / 2 |
| `grad_ratio` | policy_weight | bc_weight * |gradient of all other terms| / |cloning gradient| of the last update |
| `entropy_adaptive` | policy_weight | bc_weight * entropy / entropy of the first update |
| `constant` | policy_weight | bc_weight |

Cloning always stays within [min_bc_weight, max_bc_weight]. The policy gradient's weight is that of the surrogate alone,
not of entropy bonus, KL penalty and value loss, though a shared critic's gradient is among `all other terms`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlarl_ray.config import SelfBCConfig

_KL_FACTOR = 1.5
_MIN_KL_FACTOR = 0.01
"""From here the weight is back in a dozen updates."""


class WeightSchedule:
    """Gives the weights of update t, and is told what each update did.

    Source:
        AC-PPO + self-BC (arXiv:2509.25718) adapts the relative weight online; the tanh ramp is how its summaries put
        it: at first the critic knows nothing and cloning anchors the policy, then the policy gradient takes over.
    """

    def __init__(self, cfg: SelfBCConfig) -> None:
        self._cfg = cfg
        self._success = 0.0
        self._kl_factor = 1.0
        self._grad_ratio = 1.0
        self._entropy: float | None = None
        self._first_entropy: float | None = None

    def weights(self, update: int) -> tuple[float, float]:
        """Weights of policy gradient and cloning in update t, counted from 0."""
        cfg = self._cfg
        ramp = update / cfg.ramp_updates
        policy = math.tanh(ramp) if cfg.schedule == "tanh_ramp" else cfg.policy_weight
        factor = {
            "tanh_ramp": 1.0,
            "linear_decay": max(0.0, 1.0 - ramp),
            "success_adaptive": 1.0 - self._success,
            "kl_target": self._kl_factor,
            "grad_ratio": self._grad_ratio,
            "entropy_adaptive": 1.0 if not self._first_entropy else (self._entropy or 0.0) / self._first_entropy,
            "constant": 1.0,
        }[cfg.schedule]
        return policy, self._bounded(cfg.bc_weight * factor)

    def observe(self, *, success_rate: float, losses: Mapping[str, float]) -> None:
        """Learn from an update.

        Args:
            success_rate: Of all attempted episodes.
            losses: The update's `learn/...` metrics.
        """
        cfg = self._cfg
        self._success += cfg.success_rate * (success_rate - self._success)
        kl = losses.get("learn/approx_kl")
        if kl is not None and not losses.get("learn/critic_warmup"):  # a policy that stands still says nothing
            if kl > 2 * cfg.kl_target:
                self._kl_factor *= _KL_FACTOR
            elif kl < cfg.kl_target / 2:
                self._kl_factor /= _KL_FACTOR
            # Kept within what the bounds can use, or it would take long to come back.
            if cfg.bc_weight > 0:
                bounded = self._bounded(cfg.bc_weight * self._kl_factor) / cfg.bc_weight
                self._kl_factor = max(bounded, _MIN_KL_FACTOR)
        policy, cloning = losses.get("learn/grad_norm_policy"), losses.get("learn/grad_norm_bc")
        if policy is not None and cloning:
            self._grad_ratio = policy / cloning
        entropy = losses.get("learn/entropy")
        if entropy is not None:
            self._entropy = entropy
            self._first_entropy = self._first_entropy or entropy

    def state_dict(self) -> dict[str, Any]:
        """Running estimates (JSON types)."""
        return {
            "success": self._success,
            "kl_factor": self._kl_factor,
            "grad_ratio": self._grad_ratio,
            "entropy": self._entropy,
            "first_entropy": self._first_entropy,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self._success = state["success"]
        self._kl_factor = state["kl_factor"]
        self._grad_ratio = state["grad_ratio"]
        self._entropy = state["entropy"]
        self._first_entropy = state["first_entropy"]

    def _bounded(self, weight: float) -> float:
        return min(max(weight, self._cfg.min_bc_weight), self._cfg.max_bc_weight)
