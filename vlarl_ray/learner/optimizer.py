"""AdamW on this rank's shards: plain local tensors, as dispatch through DTensor would cost more than the math."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from vlarl_ray.config import LearnerConfig
from vlarl_ray.learner.fsdp import Ranks, local_shard

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardOptimizer:
    """One group of parameters with its learning rate and gradient clipping.

    Args:
        parameters: By name, sharded or not; at least one. They must not be re-created (moved, re-sharded) afterwards.
        learning_rate: Of AdamW.
        cfg: Everything else of AdamW, and the clipping.
        ranks: The group.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], *, learning_rate: float, cfg: LearnerConfig, ranks: Ranks
    ) -> None:
        self._parameters = dict(parameters)
        self._ranks = ranks
        self._max_grad_norm = cfg.max_grad_norm
        self.num_steps = 0
        self.shards = {name: local_shard(p) for name, p in self._parameters.items()}
        self.shapes = {name: p.shape for name, p in self._parameters.items()}
        self._learning_rate = learning_rate
        self._adamw = torch.optim.AdamW(
            list(self.shards.values()),
            lr=learning_rate,
            betas=cfg.adam_betas,
            eps=cfg.adam_eps,
            weight_decay=cfg.weight_decay,
            fused=True,
        )

    def scale_learning_rate(self, factor: float) -> None:
        """Set the learning rate to `factor` times the configured one."""
        self._adamw.param_groups[0]["lr"] = factor * self._learning_rate

    def require_grad(self, required: bool) -> None:
        """Freeze or unfreeze the parameters."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(required)

    def squared_grad_norm(self) -> Float64[Tensor, ""]:
        """Sum of squared gradients of this rank's shards; to be summed over ranks."""
        gradients = self._gradients()
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=next(iter(self.shards.values())).device)
        return torch.nn.utils.get_total_norm(gradients).double().square()

    def take_gradients(self) -> list[Tensor | None]:
        """Set the gradients aside: the next backward pass starts from none."""
        taken = [p.grad for p in self._parameters.values()]
        for parameter in self._parameters.values():
            parameter.grad = None
        return taken

    def add_gradients(self, taken: Sequence[Tensor | None], *, scale: float) -> None:
        """Make the gradients `taken + scale * current`."""
        for parameter, first in zip(self._parameters.values(), taken, strict=True):
            if parameter.grad is None:
                parameter.grad = first
                continue
            local_shard(parameter.grad).mul_(scale)
            if first is not None:
                local_shard(parameter.grad).add_(local_shard(first))

    def step(self, grad_norm: float) -> None:
        """Clip to `max_grad_norm`, step and drop the gradients.

        Args:
            grad_norm: Over all ranks.
        """
        gradients = self._gradients()
        if gradients and grad_norm > self._max_grad_norm:
            scale = self._max_grad_norm / (grad_norm + 1e-6)
            for gradient in gradients:
                gradient.mul_(scale)
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            self.shards[name].grad = None if gradient is None else local_shard(gradient)
        self._adamw.step()
        self.num_steps += 1
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget gradients, of the parameters and of their shards."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self.shards[name].grad = None

    def nonfinite_gradients(self) -> list[str]:
        """Name the parameters with an infinite or NaN gradient on any rank. Collective."""
        flags = []
        for parameter in self._parameters.values():
            gradient = parameter.grad
            bad = gradient is not None and not bool(torch.isfinite(local_shard(gradient)).all())
            flags.append(float(bad))
        device = next(iter(self.shards.values())).device
        found = self._ranks.max(torch.tensor(flags, device=device)).tolist()
        return [name for name, flag in zip(self._parameters, found, strict=True) if flag]

    def moment_shards(self) -> dict[str, Tensor]:
        """This rank's rows of AdamW's moments as `<parameter>/<moment>`; zero before the first step."""
        moments = {}
        for name, shard in self.shards.items():
            state = self._adamw.state.get(shard, {})
            for moment in _MOMENTS:
                moments[f"{name}/{moment}"] = state[moment] if moment in state else torch.zeros_like(shard)
        return moments

    def moment_shapes(self) -> dict[str, torch.Size]:
        """Full shapes of `moment_shards`."""
        return {f"{name}/{moment}": shape for name, shape in self.shapes.items() for moment in _MOMENTS}

    def load(self, parameters: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray], num_steps: int) -> None:
        """Restore this rank's rows of full parameters and moments, saved by any number of ranks."""
        self.num_steps = num_steps
        self._adamw.state.clear()
        for name, shard in self.shards.items():
            with torch.no_grad():
                shard.copy_(self._own(parameters[name], shard))
            if num_steps:
                state = {moment: self._own(moments[f"{name}/{moment}"], shard) for moment in _MOMENTS}
                step = torch.tensor(float(num_steps), dtype=torch.float32, device=shard.device)
                self._adamw.state[shard] = {"step": step, **state}

    def _own(self, full: np.ndarray, shard: Tensor) -> Tensor:
        rows = full[self._ranks.rows(full.shape[0])]
        return torch.from_numpy(np.array(rows, dtype=np.float32)).to(shard.device)  # a copy: `full` may be read-only

    def _gradients(self) -> list[Tensor]:
        return [local_shard(p.grad) for p in self._parameters.values() if p.grad is not None]
