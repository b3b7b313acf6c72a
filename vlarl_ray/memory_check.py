"""The memory plan against what the learner holds, once in a run: after the first update that trains everything."""

from __future__ import annotations

import logging
from dataclasses import replace

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.learner.group import LearnerGroup
from vlarl_ray.learner.memory import MeasuredMemory
from vlarl_ray.memory_plan import MemoryPlan, plan_learner
from vlarl_ray.registry import MODELS

_LOG = logging.getLogger(__name__)

TOLERANCE = 0.15
"""Share of the measured bytes that a plan may be off by."""
_SMALL_BYTES = 2**20
"""What is less than this off is nobody's concern: in so small a model, what is largest when is a matter of chance."""

PHASES = {
    "weights": ("frozen weights", "trained weights"),
    "optimizer": ("optimizer",),
    "passes": ("gradients", "gathered", "activations"),
}
"""Parts of the plan by what is measured; those of a pass are at their largest at the same time."""


class MemoryCheck:
    """Called after every update; says something once.

    Args:
        cfg: The run. A model architecture of the user's own has no plan, and is not checked.
        learner: Measures itself.
        num_ranks: Learner ranks that there are.
        proprio_dim: Of the simulator's observations.
    """

    def __init__(self, cfg: ExperimentConfig, learner: LearnerGroup, *, num_ranks: int, proprio_dim: int) -> None:
        self._cfg = replace(cfg, learner=replace(cfg.learner, num_ranks=num_ranks))
        self._learner = learner
        self._proprio_dim = proprio_dim
        self._is_due = cfg.model.architecture in MODELS

    def __call__(self) -> dict[str, float]:
        """Compare, if the learner has measured an update since the start.

        Returns:
            `memory/planned_bytes` and `memory/measured_bytes` of a learner rank; empty before and after.
        """
        measured = self._learner.measured_memory() if self._is_due else None
        if measured is None:
            return {}
        self._is_due = False
        # The plan is for full passes; what was measured may have had fewer rows.
        learner = replace(self._cfg.learner, micro_batch_size=measured.pass_rows)
        plan = plan_learner(replace(self._cfg, learner=learner), proprio_dim=self._proprio_dim)
        report(plan, measured)
        return {
            "memory/planned_bytes": float(plan.total("learner rank")),
            "memory/measured_bytes": float(measured.total),
        }


def report(plan: MemoryPlan, measured: MeasuredMemory) -> None:
    """Log a line with all phases, and a warning for each that is further off than `TOLERANCE` (and by 1 MiB)."""
    planned = {phase: sum(part.num_bytes for part in plan.parts if part.name in PHASES[phase]) for phase in PHASES}
    found = {phase: getattr(measured, phase) for phase in PHASES}
    listed = ", ".join(f"{phase} {_mib(planned[phase])} / {_mib(found[phase])}" for phase in PHASES)
    _LOG.info("memory of a learner rank, planned / measured with %d rows a pass: %s", measured.pass_rows, listed)
    for phase in PHASES:
        if abs(planned[phase] - found[phase]) > max(TOLERANCE * found[phase], _SMALL_BYTES):
            _LOG.warning(
                "memory: %s of a learner rank were planned to take %s and take %s; what `vlarl doctor` says of this "
                "job is off by as much.",
                phase,
                _mib(planned[phase]),
                _mib(found[phase]),
            )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
