"""Defects that a server might have, put into vLLM's worker on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from vlarl_ray.inference.vllm_lora import AdapterLoading
from vlarl_ray.inference.vllm_worker import UpdateLoading
from vlarl_ray.weights.merge import DeltaMeter
from vlarl_ray.weights.update import WeightUpdate

LAYERS = "language_model.model.layers"
CHANGED = f"{LAYERS}.1.self_attn.o_proj.weight"
DROPPED = f"{LAYERS}.0.self_attn.k_proj.weight"
SWAPPED = (f"{LAYERS}.0.mlp.down_proj.weight", f"{LAYERS}.1.mlp.down_proj.weight")


class FaultyLoading(UpdateLoading):
    """Loads updates as it should, until told to do it wrong."""

    fault: str | None = None

    def set_fault(self, fault: str | None) -> None:
        self.fault = fault

    def load_update(self, update_path: str, policy_dir: str) -> dict[str, Any]:
        model, runner = self.model_runner.get_model(), self.model_runner
        with pytest.MonkeyPatch.context() as patch:
            if self.fault == "stale images":
                patch.setattr(runner, "reset_encoder_cache", lambda: None)
            if self.fault == "swapped in the loader":
                load = model.load_weights
                patch.setattr(model, "load_weights", lambda weights: load(swapped(weights)))
            return super().load_update(update_path, policy_dir)

    def weights_to_load(
        self, update: WeightUpdate, policy_dir: Path, meter: DeltaMeter
    ) -> Iterator[tuple[str, Tensor]]:
        if self.fault == "unscaled":
            update = replace(update, lora_scale=1.0)
        weights = super().weights_to_load(update, policy_dir, meter)
        for name, tensor in swapped(weights) if self.fault == "swapped" else weights:
            if not (self.fault == "dropped" and name == DROPPED):
                yield name, tensor


class FaultyAdapters(AdapterLoading):
    """Replaces adapters as it should, until told to do it wrong."""

    fault: str | None = None

    def set_fault(self, fault: str | None) -> None:
        self.fault = fault

    def load_update(self, update_path: str, policy_dir: str) -> dict[str, Any]:
        report = super().load_update(update_path, policy_dir)
        if self.fault == "changed afterwards":
            self._manager().modules[CHANGED.removesuffix(".weight")].reset_lora(0)
        return report

    def lora_model(self, update: WeightUpdate) -> Any:
        if self.fault == "unscaled":
            update = replace(update, lora_scale=1.0)
        adapters = dict(update.adapters)
        if self.fault in ("dropped", "misnamed"):
            dropped = adapters.pop(DROPPED)
            if self.fault == "misnamed":
                adapters[DROPPED.removeprefix("language_model.")] = dropped
        if self.fault == "swapped":
            adapters |= {SWAPPED[0]: adapters[SWAPPED[1]], SWAPPED[1]: adapters[SWAPPED[0]]}
        return super().lora_model(replace(update, adapters=adapters))


def swapped(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Give each of two layers the other's weight."""
    for name, tensor in weights:
        yield (SWAPPED[1 - SWAPPED.index(name)] if name in SWAPPED else name), tensor
