"""Adapters as a server holds them that applies them itself, beside base weights that no publication touches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vlarl_ray.models.heads import HEADS
from vlarl_ray.weights.merge import as_tensor, checksum, names_to_load
from vlarl_ray.weights.update import WeightUpdate


def check_adapters_only(update: WeightUpdate, pristine: Iterable[str]) -> None:
    """Refuse an update that adapters cannot serve; heads, which only the learner computes, do not count.

    Raises:
        ValueError: If it replaces weights of the model, or names a tensor that the model lacks.
    """
    names_to_load(update, pristine, ())
    whole = sorted(name for name in update.tensors if not name.startswith(HEADS))
    if whole:
        raise ValueError(
            f"weight update replaces {whole[0]!r}, but inference.vllm.lora = native serves adapters only; set merged."
        )


def scaled_adapter(update: WeightUpdate, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and `lora_scale * B` of a weight, scaled in fp32 and rounded once."""
    a, b = update.adapters[name]
    return as_tensor(a).to(dtype), (as_tensor(b) * update.lora_scale).to(dtype)


def adapter_checksums(adapters: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, str]:
    """Fingerprint A and scaled B by `<base weight>:A` and `<base weight>:B`, but for zeros, which change nothing."""
    sides = ((f"{name}:{side}", part) for name, *pair in adapters for side, part in zip("AB", pair, strict=True))
    return {key: checksum(part) for key, part in sides if part.any()}


def expected_adapters(update: WeightUpdate, *, dtype: torch.dtype) -> dict[str, str]:
    """Fingerprint what must be in a server's layers."""
    return adapter_checksums((name, *scaled_adapter(update, name, dtype)) for name in update.adapters)
