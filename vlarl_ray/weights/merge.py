"""From a weight update to the tensors a server holds: merged in fp32, rounded with care, fingerprinted.

pristine weight (bf16 or fp32) ─► + scale * B A, in fp32 ─► dithered rounding to the server's precision ─► checksum
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.weight_files import WeightFiles
from vlarl_ray.weights.update import WeightUpdate, from_named_arrays, named_arrays

_MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)
"""Odd 64-bit factors that spread every input bit, as in splitmix64, below 2^63 where torch's integers end."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that vLLM's Llama keeps in one tensor."""
_PART = 1 << 22
"""Elements merged, rounded or fingerprinted at once: bounds the temporaries."""
_CPU_PART = 1 << 15
"""Elements merged at once on CPUs, whose caches they fit."""


@dataclass
class DeltaMeter:
    """How much of the asked change of the weights is served, summed over tensors."""

    kept: float = 0.0
    """<served - pristine, asked>."""
    asked: float = 0.0
    """<asked, asked>, where asked = scale * B A."""

    @property
    def share(self) -> float:
        """Projection of the served change on the asked one; 1 where nothing was asked."""
        return self.kept / self.asked if self.asked else 1.0


def merge(
    name: str, pristine: Tensor, update: WeightUpdate, *, dtype: torch.dtype, meter: DeltaMeter | None = None
) -> Tensor:
    """Give one tensor as a server should hold it; a copy, on the device of `pristine`.

    Args:
        name: Official name.
        pristine: The tensor of the policy folder; left as it is.
        update: What changes.
        dtype: The server's precision.
        meter: Is told how much of an adapter's change survives.
    """
    if name in update.tensors:
        return as_tensor(update.tensors[name], pristine.device).to(dtype)
    if name not in update.adapters:
        return pristine.to(dtype, copy=True)
    a, b = (as_tensor(part, pristine.device) for part in update.adapters[name])
    served, salt = torch.empty(pristine.shape, dtype=dtype, device=pristine.device), zlib.crc32(name.encode())
    rows, width = pristine.shape
    step = max(1, (_PART if pristine.device.type == "cuda" else _CPU_PART) // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        base = pristine[part].to(dtype).float()  # as the learner's frozen weights are
        target = add_adapter(base, a, b[part], update.lora_scale)
        served[part] = round_dithered(target, dtype, salt=salt, first=start * width)
        if meter is not None:
            delta = (target - base).double()
            meter.kept += float(((served[part].float() - base).double() * delta).sum())
            meter.asked += float((delta * delta).sum())
    return served


def add_adapter(
    base: Float[Tensor, "o i"], a: Float[Tensor, "r i"], b: Float[Tensor, "o r"], scale: float
) -> Float[Tensor, "o i"]:
    """Compute `base + scale * b @ a` in fp32, in operations that IEEE 754 leaves one result: no device may differ.

    A matrix product sums in an order of its own choosing, which differs between devices, their generations and settings
    (TF32): learner and server would not have equal checksums. Here the ranks are added one by one, and each operation
    is a kernel of its own, which no compiler can fuse into one that rounds once. Tried against NumPy's kernels; no GPU
    was at hand.
    """
    delta = torch.zeros_like(base)
    for row, column in zip(a, b.T, strict=True):
        delta += column[:, None] * row
    return base + delta * scale


def round_dithered(target: Float[Tensor, "..."], dtype: torch.dtype, *, salt: int, first: int = 0) -> Tensor:
    """Round fp32 numbers to `dtype`, each up or down with the odds that make the mean right.

    Rounding to nearest swallows changes below half a step of bf16, which after one update is nearly all of them. The
    dither depends on salt and index alone: the same target always rounds alike, and a larger one never to less. A
    number that bf16 can hold stays itself.

    Args:
        target: Finite numbers.
        dtype: float32 (a copy) or bfloat16.
        salt: Of this tensor's dither.
        first: Index of the first of them, where they are part of a tensor.
    """
    if dtype == torch.float32:
        return target.clone()
    flat = target.contiguous().view(torch.int32).flatten()
    rounded = torch.empty(flat.shape, dtype=torch.int32, device=flat.device)
    for start in range(0, len(flat), _PART):
        part = flat[start : start + _PART]
        index = torch.arange(first + start, first + start + len(part), device=flat.device)
        dither = _mixed(index + (salt << 31)) & 0xFFFF
        # bf16 is the upper half of fp32: adding to the lower half carries over with the odds wanted, for either sign
        rounded[start : start + len(part)] = (part + dither.to(torch.int32)) & -0x10000
    return rounded.view(torch.float32).view(target.shape).to(dtype)


def checksum(tensor: Tensor) -> str:
    """Fingerprint shape, type and every bit of a tensor, on its device; order counts.

    A sum of mixed integers, which does not depend on the order of summation: devices and thread counts agree.
    """
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    flat = tensor.detach().contiguous().view(width).flatten()
    total = 0
    for start in range(0, len(flat), _PART):
        part = flat[start : start + _PART].to(torch.int64)
        index = torch.arange(start, start + len(part), device=flat.device)
        total += int(_mixed((index << 32) ^ (part & 0xFFFFFFFF)).sum())
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}:{total & (1 << 64) - 1:016x}"


def names_to_load(update: WeightUpdate, pristine: Iterable[str], groups: Iterable[tuple[str, ...]]) -> list[str]:
    """Say which tensors a server loads: those that the update changes, the rest of their modules and fused groups.

    A server that keeps q, k and v in one tensor gets them all, or the parts that are missing would be garbage. A layer
    that does not get its bias, too, is kept back by vLLM's loader until the end, with all its weights.

    Args:
        update: What changes.
        pristine: Names of all tensors of the policy.
        groups: Last parts of module names that are fused, like `("q_proj", "k_proj", "v_proj")`.

    Raises:
        ValueError: If the update holds a tensor that the policy lacks.
    """
    known = set(pristine)
    wanted = {*update.adapters, *update.tensors}
    if not wanted <= known:
        unknown = ", ".join(sorted(wanted - known))
        raise ValueError(f"weight update names {unknown!r}, which the served model does not have.")
    modules = {name.rpartition(".")[0] for name in wanted}
    for module in list(modules):
        parent, _, last = module.rpartition(".")
        modules |= {f"{parent}.{other}" for group in groups if last in group for other in group}
    return sorted(name for name in known if name.rpartition(".")[0] in modules)


def served_names(update: WeightUpdate, pristine: Iterable[str]) -> list[str]:
    """Names of `names_to_load` for vLLM, without the heads, which only the learner computes."""
    return [name for name in names_to_load(update, pristine, FUSED) if not name.startswith(HEADS)]


def expected_checksums(
    pristine: WeightFiles, update: WeightUpdate, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, str]:
    """Fingerprint what must enter the loader of a vLLM server, by official name; no more than a tensor at a time."""
    names = served_names(update, pristine)
    return {name: checksum(tensor) for name, tensor in merged(pristine, update, names, dtype=dtype, device=device)}


def merged(
    pristine: WeightFiles,
    update: WeightUpdate,
    names: Iterable[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    meter: DeltaMeter | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as a server should hold them, one at a time, from the pristine base each time."""
    for name, tensor in pristine.read_rows(dict.fromkeys(names, slice(None))):
        yield name, merge(name, tensor.to(device), update, dtype=dtype, meter=meter)


def write_update(update: WeightUpdate, path: Path) -> None:
    """Write an update as a safetensors file."""
    arrays = {name: np.ascontiguousarray(value) for name, value in named_arrays(update).items()}
    save_file(arrays, path, metadata={"version": str(update.version), "lora_scale": repr(update.lora_scale)})


def read_update(path: Path) -> WeightUpdate:
    """Read what `write_update` wrote."""
    with safe_open(path, framework="numpy") as file:
        stated, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return from_named_arrays(int(stated["version"]), float(stated["lora_scale"]), arrays)


def as_tensor(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Copy to a tensor: arrays from the object store are read-only, which torch does not support."""
    return torch.tensor(array, dtype=torch.float32, device=device)


def _mixed(values: Tensor) -> Tensor:
    for factor, shift in zip(_MIX, (29, 32, 30), strict=True):
        values = values * factor
        values = values ^ (values >> shift)
    return values
