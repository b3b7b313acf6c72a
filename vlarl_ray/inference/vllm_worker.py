"""Loads weight updates inside vLLM's workers, where the model is; vLLM mixes the class into its own worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlarl_ray.models.policy import policy_weights
from vlarl_ray.weights.canary import update_digests
from vlarl_ray.weights.merge import DeltaMeter, checksum, merged, read_update, served_names
from vlarl_ray.weights.update import WeightUpdate


class UpdateLoading:
    """Mixed into each worker; called through `collective_rpc`, while generation is paused and caches are empty."""

    model_runner: Any
    device: torch.device

    def load_update(self, update_path: str, policy_dir: str) -> dict[str, Any]:
        """Merge an update into the pristine weights on the worker's device, tensor by tensor, and load the result.

        Args:
            update_path: File of `weights.merge.write_update`.
            policy_dir: Policy folder with the pristine weights.

        Returns:
            `digests` of the update as it arrived, `checksums` of each tensor at the moment it enters vLLM's loader,
            by official name, and `kept` and `asked` of the `DeltaMeter`.
        """
        update, meter = read_update(Path(update_path)), DeltaMeter()
        checksums: dict[str, str] = {}

        def watched() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.weights_to_load(update, Path(policy_dir), meter):
                checksums[name] = checksum(tensor)
                yield name, tensor

        # Layer by layer: a CPU's prepacked weights and a GPU's fused ones cannot be written to from outside.
        self.model_runner.reload_weights(weights_iterator=watched())
        return {
            "digests": update_digests(update),
            "checksums": checksums,
            "kept": meter.kept,
            "asked": meter.asked,
        }

    def wrong_layers(self, update_path: str, policy_dir: str) -> list[str]:
        """Name the layers that do not compute with what `load_update` was to load; none where a layer is split."""
        from vlarl_ray.inference.vllm_diagnosis import wrong_layers

        if self.model_runner.parallel_config.tensor_parallel_size > 1:
            return []
        update, pristine = read_update(Path(update_path)), policy_weights(Path(policy_dir))
        shapes = {name: stored.shape for name, stored in pristine.items()}
        names = served_names(update, pristine)
        dtype = self.model_runner.model_config.dtype
        expected = merged(pristine, update, names, dtype=dtype, device=self.device)
        return wrong_layers(self.model_runner.get_model(), expected, shapes)

    def weights_to_load(
        self, update: WeightUpdate, policy_dir: Path, meter: DeltaMeter
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what goes into the loader."""
        pristine = policy_weights(policy_dir)
        names = served_names(update, pristine)
        dtype = self.model_runner.model_config.dtype
        yield from merged(pristine, update, names, dtype=dtype, device=self.device, meter=meter)
