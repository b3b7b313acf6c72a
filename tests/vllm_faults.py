"""Defects that a server might have, put into vLLM's worker on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vlarl_ray.inference.vllm_worker import UpdateLoading
from vlarl_ray.weights.merge import DeltaMeter
from vlarl_ray.weights.update import WeightUpdate

LAYERS = "language_model.model.layers"
DROPPED = f"{LAYERS}.0.self_attn.k_proj.weight"
SWAPPED = (f"{LAYERS}.0.mlp.down_proj.weight", f"{LAYERS}.1.mlp.down_proj.weight")


class FaultyLoading(UpdateLoading):
    """Loads updates as it should, until told to do it wrong."""

    fault: str | None = None

    def set_fault(self, fault: str | None) -> None:
        self.fault = fault

    def load_update(self, update_path: str, policy_dir: str) -> dict[str, Any]:
        if self.fault != "stale images":
            return super().load_update(update_path, policy_dir)
        keep, self.model_runner.reset_encoder_cache = self.model_runner.reset_encoder_cache, lambda: None
        try:
            return super().load_update(update_path, policy_dir)
        finally:
            self.model_runner.reset_encoder_cache = keep

    def weights_to_load(
        self, update: WeightUpdate, policy_dir: Path, meter: DeltaMeter
    ) -> Iterator[tuple[str, Tensor]]:
        if self.fault == "unscaled":
            update = replace(update, lora_scale=1.0)
        for name, tensor in super().weights_to_load(update, policy_dir, meter):
            if self.fault == "swapped" and name in SWAPPED:
                yield SWAPPED[1 - SWAPPED.index(name)], tensor
            elif not (self.fault == "dropped" and name == DROPPED):
                yield name, tensor
