"""Says which layers of vLLM's model compute with other weights than they should. Imported in vLLM's processes only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase

from vlarl_ray.weights.merge import FUSED

_FUSED_NAMES = dict(zip(FUSED, ("qkv_proj", "gate_up_proj"), strict=True))
_ROWS = 4
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of a layer's output, relative to its norm: what rounding does."""


@torch.inference_mode()
def wrong_layers(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Name the linear layers whose output for random inputs is not that of the weights they should have.

    A CPU's prepacked weights cannot be read back, but what they compute can be compared. Tensors that are not the
    weight of a linear layer are left out.

    Args:
        model: vLLM's, on one worker.
        weights: What was to be loaded, by official name.
        shapes: Of all tensors of the policy, by official name.
    """
    modules, wrong = dict(model.named_modules()), []
    for name, weight in weights:
        module, rows = _find(modules, name, shapes)
        if module is None or weight.ndim != 2:
            continue
        inputs = torch.randn((_ROWS, weight.shape[1]), generator=torch.Generator().manual_seed(0))
        inputs = inputs.to(weight.device, weight.dtype)
        output = module(inputs)
        output = output[0] if isinstance(output, tuple) else output
        bias = getattr(module, "bias", None)
        expected = nn.functional.linear(inputs.float(), weight.float(), None if bias is None else bias[rows].float())
        error = (output[:, rows].float() - expected).norm() / expected.norm()
        if not error <= _TOLERANCE[weight.dtype]:
            wrong.append(name)
    return wrong


def _find(
    modules: Mapping[str, nn.Module], name: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[nn.Module | None, slice]:
    """Return the linear layer that holds a weight, and which of its outputs are that weight's."""
    path, _, kind = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    rows = slice(None)
    for group, fused in _FUSED_NAMES.items():
        if last in group and f"{parent}.{fused}" in modules:
            before = [shapes[f"{parent}.{other}.{kind}"][0] for other in group[: group.index(last)]]
            rows = slice(sum(before), sum(before) + shapes[name][0])
            path = f"{parent}.{fused}"
    module = modules.get(path)
    return (module if kind == "weight" and isinstance(module, nn.Linear | LinearBase) else None), rows
