"""Fill a sharded model: each rank reads its own rows of each tensor, so that no process ever holds the whole model."""

from __future__ import annotations

import torch
from torch import nn

from vlarl_ray.learner.fsdp import Ranks, local_shard
from vlarl_ray.models.lora import initial_adapters, official_name
from vlarl_ray.models.weight_files import WeightFiles


def load_shards(model: nn.Module, ranks: Ranks, weights: WeightFiles, *, lora_seed: int) -> None:
    """Give every parameter and buffer of a model without values (`to_empty`) its own; no communication.

    Args:
        model: Sharded by rows of dimension 0, adapters attached; what is not sharded is read whole.
        ranks: The group.
        weights: A tensor for each parameter that is no adapter's, and for each buffer.
        lora_seed: Of the adapters, see `initial_adapters`.
    """
    targets = {official_name(n): p for n, p in model.named_parameters() if ".lora_A." not in n and ".lora_B." not in n}
    targets |= dict(model.named_buffers())
    rows = {name: _own_rows(ranks, target) for name, target in targets.items()}
    with torch.no_grad():
        for name, tensor in weights.read_rows(rows):
            local_shard(targets[name]).copy_(tensor)
        for parameter, values in initial_adapters(model, lora_seed):
            local_shard(parameter).copy_(values[_own_rows(ranks, parameter)])


def _own_rows(ranks: Ranks, tensor: torch.Tensor) -> slice:
    is_sharded = local_shard(tensor) is not tensor
    return ranks.rows(tensor.shape[0]) if is_sharded else slice(None)
