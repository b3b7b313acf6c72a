"""Native LoRA: vLLM applies the adapters itself, and a publication replaces them in its layers.

The engine's requests name the adapter; the worker puts it into place, and reads back what the layers hold then. vLLM
passes over adapters of layers that it does not know, in silence: they are missing from what is read back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vlarl_ray.config import LoraConfig, ModelConfig
from vlarl_ray.vllm_sizes import adapted_linears, lora_slot_rank
from vlarl_ray.weights.adapters import adapter_checksums, expected_adapters, scaled_adapter
from vlarl_ray.weights.canary import update_digests
from vlarl_ray.weights.merge import read_update
from vlarl_ray.weights.update import WeightUpdate

_ID, _SLOT = 1, 0
"""Of the one adapter: its number, and where layers keep it."""


def adapter_room(lora: LoraConfig, model: ModelConfig) -> dict[str, Any]:
    """Engine arguments with which vLLM applies one adapter at a time."""
    # by the ends of their names; for other layers, embeddings among them, it would multiply with zeros
    layers = {name.rpartition(".")[2] for name in adapted_linears(lora, model)}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": lora_slot_rank(lora.rank),
        "lora_target_modules": sorted(layers),
    }


def lora_request(update: WeightUpdate) -> Any:
    """What each request is to name; None if the update holds no adapters."""
    from vllm.lora.request import LoRARequest

    if not update.adapters:
        return None
    # The name is part of the prefix cache's keys. The path is not read, as the workers hold the adapter already.
    return LoRARequest(f"version-{update.version}", _ID, "/adapters/are/loaded/by/load_update")


class AdapterLoading:
    """Mixed into each worker in place of `UpdateLoading`, whose methods it has."""

    model_runner: Any

    def load_update(self, update_path: str, policy_dir: str) -> dict[str, Any]:
        """Replace the adapters in vLLM's layers.

        Args:
            update_path: File of `weights.merge.write_update`.
            policy_dir: Not read: the base weights stay.

        Returns:
            `digests` of the update as it arrived, `checksums` of what the layers hold afterwards, see
            `adapter_checksums`, and `kept` and `asked`, 0 as nothing is rounded into a weight.
        """
        del policy_dir
        update = read_update(Path(update_path))
        manager = self._manager()
        manager.remove_all_adapters()
        if update.adapters:
            manager.add_adapter(self.lora_model(update))
            manager.activate_adapter(_ID)
        else:
            for layer in manager.modules.values():  # without an adapter, CPUs would apply to logits what is left here
                layer.reset_lora(_SLOT)
        held = adapter_checksums(self._held(update))
        return {"digests": update_digests(update), "checksums": held, "kept": 0.0, "asked": 0.0}

    def wrong_layers(self, update_path: str, policy_dir: str) -> list[str]:
        """Name the layers that do not hold the adapters of the update."""
        del policy_dir
        update = read_update(Path(update_path))
        held = adapter_checksums(self._held(update))
        expected = expected_adapters(update, dtype=self.model_runner.model_config.dtype)
        return sorted({name.rpartition(":")[0] for name, _ in held.items() ^ expected.items()})

    def lora_model(self, update: WeightUpdate) -> Any:
        """Put adapters into vLLM's form."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        layers, rank = {}, _rank(update)
        for name in update.adapters:
            a, b = scaled_adapter(update, name, self.model_runner.model_config.dtype)
            module = name.removesuffix(".weight")
            layers[module] = LoRALayerWeights(module, rank, rank, a, b, scaling=1.0)
        return LoRAModel(_ID, rank, layers)

    def _held(self, update: WeightUpdate) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield what vLLM's layers multiply with: (official name of the base weight, A, scaled B)."""
        manager, rank = self._manager(), _rank(update)
        for module, layer in manager.modules.items():
            a, b = layer.lora_a_stacked, layer.lora_b_stacked
            if isinstance(a, Tensor):  # of the output head
                a, b = (a,), (b,)
            for name, room_a, room_b in zip(manager.packed_modules.get(module, [module]), a, b, strict=True):
                own_a, own_b = room_a[_SLOT, 0], room_b[_SLOT, 0]
                if not (own_a[rank:].any() or own_b[:, rank:].any()):  # padding; anything else there is to be noticed
                    own_a, own_b = own_a[:rank], own_b[:, :rank]
                yield f"{name}.weight", own_a, own_b

    def _manager(self) -> Any:
        # vLLM's public way in reads adapters from files of PEFT's
        return self.model_runner.lora_manager._adapter_manager


def _rank(update: WeightUpdate) -> int:
    return max((len(a) for a, _ in update.adapters.values()), default=0)
