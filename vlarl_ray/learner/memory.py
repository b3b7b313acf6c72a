"""What the tensors of a learner rank take while it updates, measured in one minibatch, to be held against the plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vlarl_ray.learner.fsdp import local_shard
from vlarl_ray.live_bytes import LiveBytes


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes of one rank's tensors in an update that trains everything."""

    weights: int
    """Its shards of all weights."""
    optimizer: int
    """Moments, after the update."""
    passes: int
    """Peak of what the passes of a minibatch take beyond these: activations, gradients, gathered weights."""
    pass_rows: int
    """Rows of the largest of these passes."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.optimizer + self.passes


class PassMeter:
    """Context that measures what the passes inside take at their peak. Collective where the model is sharded.

    On a GPU its allocator is asked, which costs nothing. On a CPU every operation is followed, which makes it slower by
    some tens of microseconds.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.peak = 0
        """Bytes, once the context is left."""
        self._model, self._device = model, device
        self._before = 0
        self._live: LiveBytes | None = None

    def __enter__(self) -> PassMeter:
        """Start."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            resized = _gathered(self._model)
            self._live = LiveBytes(known=shards(self._model), resized=resized)
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """End, and keep the peak."""
        if self._live is None:
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._live.__exit__(*error)
            self.peak = self._live.peak


def shards(model: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter and buffer."""
    return [local_shard(tensor) for tensor in (*model.parameters(), *model.buffers())]


def _gathered(model: nn.Module) -> list[Tensor]:
    """The tensors that FSDP gathers weights into: it makes them once, and resizes their storage from then on."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            sharded = {id(parameter) for parameter in module.parameters()}
            module.unshard()
            found += [parameter.detach() for parameter in module.parameters() if id(parameter) not in sharded]
            module.reshard()
    return found
