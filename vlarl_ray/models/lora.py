"""Low-rank adapters in PEFT's parameter names and file format: attach, switch, take out, put in, merge."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlarl_ray.config import LoraConfig
from vlarl_ray.models.base import VLAModel
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.lora_dropout import RowSeeds, drop

POLICY, CRITIC = "default", "critic"
"""Adapter names: the policy's own (PEFT's default), and that of a separate critic."""

_PEFT_PREFIX = "base_model.model."
Adapters = Mapping[str, tuple[Tensor, Tensor]]
"""(A [r, in], B [out, r]) by the official name of the weight they adapt."""


def merged_weight(
    pristine: Float[Tensor, "o i"], a: Float[Tensor, "r i"], b: Float[Tensor, "o r"], scale: float
) -> Float[Tensor, "o i"]:
    """Return `pristine + scale * b @ a`, computed in fp32. Adding to and subtracting from one weight would drift."""
    return (pristine.float() + scale * (b.float() @ a.float())).to(pristine.dtype)


class LoraLinear(nn.Module):
    """A frozen linear layer with named low-rank adapters, at most one of them active.

    Parameters are named like PEFT's (`base_layer.weight`, `lora_A.<adapter>.weight`, `lora_B.<adapter>.weight`).
    Switching does not touch `requires_grad`, where PEFT's `set_adapter` freezes the other adapters. Where the weight is
    fp32 and the rank not small against its size, the pass multiplies by the merged weight: fewer operations, and those
    of a server that merged. Inputs of adapters are dropped within `adapter_dropout` only.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, adapters: Sequence[str], *, name: str = "") -> None:
        super().__init__()
        self.name, self.dropout = name, config.dropout
        self.row_seeds: RowSeeds | None = None
        """Where dropout is on: what the masks of the rows of this pass are drawn from."""
        self.base_layer = base
        self.scale = config.alpha / config.rank
        options = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, config.rank, **options) for name in adapters})
        self.lora_B = nn.ModuleDict({name: nn.Linear(config.rank, base.out_features, **options) for name in adapters})
        self.active: str | None = POLICY
        added = 3 * config.rank * (base.in_features + base.out_features)
        self.merges = added > base.in_features * base.out_features

    def pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return (A, B) of an adapter: the parameters themselves."""
        return cast(Tensor, self.lora_A[adapter].weight), cast(Tensor, self.lora_B[adapter].weight)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Apply the layer with the active adapter, if any."""
        if self.active is None:
            return self.base_layer(x)
        a, b = self.pair(self.active)
        if self.row_seeds is not None:
            layer = f"{self.name}:{self.active}"
            inputs = drop(x.to(a.dtype), self.row_seeds, layer=layer, probability=self.dropout)
            return self.base_layer(x) + (F.linear(F.linear(inputs, a), b) * self.scale).to(x.dtype)
        if self.merges and self.base_layer.weight.dtype == torch.float32:  # bf16 would round a small delta away
            return F.linear(x, merged_weight(self.base_layer.weight, a, b, self.scale), self.base_layer.bias)
        return self.base_layer(x) + (F.linear(F.linear(x.to(a.dtype), a), b) * self.scale).to(x.dtype)


def attach_lora(
    model: VLAModel,
    config: LoraConfig,
    *,
    seed: int,
    critic: Literal["shared", "separate"] = "shared",
    detach_value: bool = False,
) -> None:
    """Freeze a model but for its heads and put adapters on its linear layers, in place.

    A is random from `seed`, B zero, so that nothing changes at first. All else is frozen, learned action queries too,
    so that the model with adapters disabled stays the one before training. The model's `frozen_modules` get none.

    Args:
        model: A VLA model without adapters, before sharding.
        config: Which layers, rank, scale and dropout.
        seed: Of A.
        critic: `separate` gives the value head adapters of its own, on the same frozen base.
        detach_value: Stop value gradients at the backbone.

    Raises:
        ValueError: If adapters are attached already, or no layer matches `config.target_modules`.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; attach them once, to a freshly loaded policy.")
    names = _target_names(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEADS))
    adapters = (POLICY,) if critic == "shared" else (POLICY, CRITIC)
    for name in names:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, child, LoraLinear(getattr(holder, child), config, adapters, name=name))
    model.critic, model.detach_value = critic, detach_value
    with torch.no_grad():
        for parameter, values in initial_adapters(model, seed):
            parameter.copy_(values)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Adapted layers by the official name of their weight."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def official_name(parameter_name: str) -> str:
    """Name of a parameter without adapters, as in a policy folder.

    Example:
        >>> official_name("language_model.lm_head.base_layer.weight")
        'language_model.lm_head.weight'
    """
    return parameter_name.replace(".base_layer.", ".")


def adapter_tensors(model: nn.Module, adapter: str = POLICY) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by official weight name, detached; the tensors are the model's own, not copies."""
    pairs = {name: layer.pair(adapter) for name, layer in lora_layers(model).items()}
    return {name: (a.detach(), b.detach()) for name, (a, b) in pairs.items()}


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters trained whole, by official name, detached: the value head, or everything under full training."""
    named = (
        (n, p) for n, p in model.named_parameters() if p.requires_grad and ".lora_A." not in n and ".lora_B." not in n
    )
    return {official_name(name): parameter.detach() for name, parameter in named}


def load_adapter_tensors(model: nn.Module, adapters: Adapters, adapter: str = POLICY) -> None:
    """Copy (A, B) into the model.

    Raises:
        ValueError: If the names or shapes are not the model's.
    """
    layers = lora_layers(model)
    if layers.keys() != adapters.keys():
        raise ValueError(
            f"adapters fit another model: missing {sorted(layers.keys() - adapters.keys())[:3]}, "
            f"unknown {sorted(adapters.keys() - layers.keys())[:3]}; check learner.lora and model."
        )
    for name, (a, b) in adapters.items():
        for own, new in zip(layers[name].pair(adapter), (a, b), strict=True):
            if own.shape != new.shape:
                raise ValueError(
                    f"adapter of {name}: shape {tuple(new.shape)}, the model has {tuple(own.shape)}; check lora.rank."
                )
            with torch.no_grad():
                own.copy_(new)


@contextmanager
def use_adapter(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Context in which another adapter is active, or none; `requires_grad` and gradients stay as they are."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = adapter
    try:
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer.active = name


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Context in which the model is the one before LoRA."""
    with use_adapter(model, None):
        yield


@contextmanager
def adapter_dropout(model: nn.Module, seeds: RowSeeds | None) -> Iterator[None]:
    """Context in which the adapters' inputs are dropped, where `LoraConfig.dropout` says so; outside they never are.

    A backward pass belongs inside too, as it may compute layers again.

    Args:
        model: With adapters attached, or without.
        seeds: One for each row of the passes inside; None drops nothing.
    """
    layers = []
    if seeds is not None:
        layers = [module for module in model.modules() if isinstance(module, LoraLinear) and module.dropout > 0]
    for layer in layers:
        layer.row_seeds = seeds
    try:
        yield
    finally:
        for layer in layers:
            layer.row_seeds = None


def save_adapter(
    folder: Path, adapters: Adapters, heads: Mapping[str, Tensor], config: LoraConfig, *, base: str | None = None
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` reads, with the heads (which PEFT would drop) beside it.

    Args:
        folder: Gets `adapter_config.json`, `adapter_model.safetensors` and, if there are heads, `heads.safetensors`.
        adapters: See `adapter_tensors`; full tensors.
        heads: See `head_tensors`; full tensors.
        config: The adapters' configuration.
        base: Where the model is that they adapt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in adapters.items():
        module = _PEFT_PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    description = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(name.removesuffix(".weight") for name in adapters),
        "task_type": None,
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    if heads:
        save_file({name: h.detach().cpu().contiguous() for name, h in heads.items()}, folder / "heads.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")


def load_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], float]:
    """Read what `save_adapter` wrote: adapters, heads and the scale alpha / rank.

    Raises:
        ValueError: If a tensor's name is not that of an adapter, or its partner is missing.
    """
    description = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in tensors}
    adapters = {}
    for module in sorted(modules):
        try:
            pair = (tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"])
        except KeyError as error:
            raise ValueError(
                f"{folder}: adapter tensor {error} is missing; the folder is damaged or no plain LoRA."
            ) from error
        adapters[module.removeprefix(_PEFT_PREFIX) + ".weight"] = pair
    heads = folder / "heads.safetensors"
    scale = description["lora_alpha"] / description["r"]
    return adapters, load_file(heads) if heads.exists() else {}, scale


def _target_names(model: VLAModel, config: LoraConfig) -> list[str]:
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(HEADS)]
    unused = (*model.unused_modules, *model.frozen_modules)
    linear = [name for name in linear if not f"{name}.weight".startswith(unused)]
    lm_head = [name for name in linear if name.endswith("lm_head")]
    if config.target_modules == "all-linear":
        names = [name for name in linear if name not in lm_head]
    else:
        names = [name for name in linear if re.fullmatch(config.target_modules, name) and name not in lm_head]
    if not names:
        raise ValueError(
            f"learner.lora.target_modules = {config.target_modules!r} matches no linear layer; allowed are "
            f"'all-linear' and regular expressions for whole names such as {linear[0]!r}."
        )
    return names + (lm_head if config.include_lm_head else [])


def initial_adapters(model: nn.Module, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every adapter parameter with the values it starts from: A random, B zero, so that nothing changes at first.

    Drawn on the CPU in the order of names, so that every rank and device gets the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, layer in sorted(lora_layers(model).items()):
        for name in layer.lora_A:
            a, b = layer.pair(name)
            bound = a.shape[1] ** -0.5  # PEFT's default: Kaiming uniform with a = sqrt(5)
            yield a, torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            yield b, torch.zeros(b.shape, dtype=torch.float32)
