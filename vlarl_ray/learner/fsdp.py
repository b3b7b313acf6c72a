"""Process group, FSDP2 sharding, and moving full tensors in and out of row shards.

`fully_shard` gives rank r of R the rows `[r*c, (r+1)*c)` of dimension 0, `c = ceil(n / R)`; the last are shorter or
empty. One rank without a store needs no process group: its parameters stay plain, and all of this still works.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore  # its public alias is not typed as exported
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

from vlarl_ray.models.base import VLAModel
from vlarl_ray.models.heads import HEADS


@dataclass(frozen=True)
class Ranks:
    """This process among R learner processes."""

    rank: int
    world_size: int
    has_process_group: bool
    """False for the one rank that works without torch.distributed."""

    @classmethod
    def join(
        cls,
        *,
        rank: int,
        world_size: int,
        store_address: tuple[str, int] | None,
        device: torch.device,
        timeout_s: float,
    ) -> Ranks:
        """Meet the other ranks: NCCL on GPUs, gloo on CPUs. Rank 0 serves the store.

        Raises:
            ValueError: If several ranks come without a store.
        """
        if store_address is None:
            if world_size != 1:
                raise ValueError(f"{world_size} learner ranks need a store_address where they can meet, got None.")
            return cls(rank, world_size, has_process_group=False)
        host, port = store_address
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        return cls(rank, world_size, has_process_group=True)

    def leave(self) -> None:
        """Wait for the others, then tear down: without the barrier a rank may die under a connection still in use."""
        if self.has_process_group and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def sum(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.SUM)
        return x

    def max(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Maximum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def rows(self, num_rows: int, rank: int | None = None) -> slice:
        """Rows of dimension 0 that a rank (this one) holds of a tensor with `num_rows`."""
        size = -(-num_rows // self.world_size)
        start = (self.rank if rank is None else rank) * size
        return slice(min(start, num_rows), min(start + size, num_rows))


def shard(
    model: VLAModel, ranks: Ranks, *, device: torch.device, compute_dtype: torch.dtype | None, min_params: int
) -> None:
    """Shard each unit of the model, then the root, but for `frozen_modules`. Heads compute in fp32 always.

    Args:
        model: On its device already, or on the meta device; adapters attached.
        ranks: With a process group.
        device: Where it is or will be.
        compute_dtype: Precision of forward and backward; master weights and gradient sums stay fp32. None: fp32.
        min_params: See `large_units`.
    """
    # Nobody changes a model's outputs in place, which is what FSDP2 warns of when they are views.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    exact = MixedPrecisionPolicy()
    policy = exact if compute_dtype is None else MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32)
    heads = _heads(model)
    for unit in large_units(model, min_params):
        fully_shard(unit, mesh=mesh, mp_policy=exact if unit in heads else policy)
    # Whole on every rank: they may be used outside of the model's pass, to encode actions.
    frozen = {p for name, p in model.named_parameters() if name.startswith(model.frozen_modules)}
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen)


def large_units(model: VLAModel, min_params: int) -> list[nn.Module]:
    """Choose the units of a model that are gathered one by one: heads always, as they have a precision of their own.

    Args:
        model: Adapters attached.
        min_params: What has fewer parameters is gathered with the root, once for the whole pass: it takes little
            memory, and a unit of its own would cost as many collectives as a large one.
    """
    heads = _heads(model)
    return [
        unit for unit in model.fsdp_units() if unit in heads or sum(p.numel() for p in unit.parameters()) >= min_params
    ]


def _heads(model: VLAModel) -> list[nn.Module]:
    return [module for name, module in model.named_children() if f"{name}." in HEADS]


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward left gathered: the root keeps its parameters otherwise."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's rows (shared storage), or the tensor itself where nothing is sharded."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def gather_full(ranks: Ranks, shapes: Mapping[str, torch.Size], shards: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Assemble full tensors on rank 0 with one flat gather. Collective.

    Args:
        ranks: The group.
        shapes: Full shape of every tensor.
        shards: This rank's rows of every tensor, fp32.

    Returns:
        Copies of the full tensors (fp32) by name on rank 0, an empty dict elsewhere.
    """
    if not shapes:
        return {}
    flat = torch.cat([shards[name].detach().reshape(-1) for name in shapes])
    parts: list[Tensor] | None = [flat]
    if ranks.world_size > 1:
        size = max(sum(_count(ranks, shape, r) for shape in shapes.values()) for r in range(ranks.world_size))
        flat = functional.pad(flat, (0, size - flat.numel()))
        parts = [torch.empty_like(flat) for _ in range(ranks.world_size)] if ranks.rank == 0 else None
        dist.gather(flat, parts, dst=0)
    if parts is None:
        return {}
    columns = [part.cpu().numpy() for part in parts]
    offsets = [0] * len(columns)
    full: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        pieces = []
        for r, column in enumerate(columns):
            count = _count(ranks, shape, r)
            pieces.append(column[offsets[r] : offsets[r] + count])
            offsets[r] += count
        full[name] = np.concatenate(pieces).reshape(shape)
    return full


def _count(ranks: Ranks, shape: torch.Size, rank: int) -> int:
    rows = ranks.rows(shape[0], rank)
    return (rows.stop - rows.start) * (shape.numel() // shape[0])
