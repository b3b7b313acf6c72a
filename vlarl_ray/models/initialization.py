"""Make policies that nothing has trained yet, and draw the weights that a policy starts from or lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.action_tokens import ActionNormalizer
from vlarl_ray.models.chunk_policy import ChunkPolicyModel
from vlarl_ray.models.heads import ScaleHead, ValueHead
from vlarl_ray.models.proprio import ProprioNormalizer
from vlarl_ray.models.vit import LayerScale
from vlarl_ray.registry import MODELS, resolve


def new_policy(
    config: ModelConfig,
    instructions: Iterable[str],
    seed: int,
    *,
    normalizer: ActionNormalizer | None = None,
    proprio_normalizer: ProprioNormalizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ChunkPolicyModel:
    """Make an untrained model; the same arguments give the same weights, bit for bit.

    Args:
        config: Dimensions.
        instructions: Sentences that the tokenizer should encode in few tokens, others encode in more; or all that the
            model knows, where it has a table of them (quest).
        seed: Of the weights.
        normalizer: Between env units and [-1, 1]; None passes actions through.
        proprio_normalizer: From raw proprioception to [-1, 1]; None passes it through.
        metadata: JSON facts to keep with the weights, such as camera and render profile.

    Raises:
        ValueError: If a prompt of `instructions` is longer than `config.max_prompt_tokens`.
    """
    with torch.device("meta"):
        model = resolve(MODELS, config.architecture, what="model.architecture").for_instructions(
            config,
            list(instructions),
            normalizer=normalizer,
            proprio_normalizer=proprio_normalizer,
            metadata=metadata,
        )
    model.to_empty(device="cpu")
    init_weights(model, seed)
    return model.eval()


def add_scale_head(
    model: ChunkPolicyModel, kind: Literal["gaussian", "laplace"], *, log_scale: float = ScaleHead.INITIAL_LOG_SCALE
) -> ChunkPolicyModel:
    """Give an `l1` policy a likelihood, so that RL can train it: the same locations, with a spread around them.

    Args:
        model: Policy with `model.action_head: l1`, without adapters; it is left as it is.
        kind: Of distribution.
        log_scale: Natural log of the spread, everywhere the same at first.

    Raises:
        ValueError: If the policy has another head.
    """
    if model.model_config.action_head != "l1":
        raise ValueError(
            f"model.action_head = {model.model_config.action_head!r}: a scale head is added to 'l1' policies only."
        )
    config = replace(model.model_config, action_head=kind)  # type: ignore[type-var]
    widened = type(model)(
        config,
        model.tokenizer,
        normalizer=model.normalizer,
        proprio_normalizer=model.proprio_normalizer,
        metadata=model.metadata,
    )
    loaded = widened.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("scale_head.") for name in loaded.missing_keys)
    head = cast(ScaleHead, widened.get_submodule("scale_head"))
    with torch.no_grad():
        _draw_weights(head, torch.Generator().manual_seed(0))  # alike in every process
        head.make_constant(log_scale)
    return widened


def init_weights(model: ChunkPolicyModel, seed: int) -> None:
    """Draw all weights on the CPU, in the order of module names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _draw_weights(model, generator)
        _draw(model.output_layer.weight, 0.02, generator)  # near-uniform actions at first
        for module in model.modules():
            if isinstance(module, ScaleHead):
                module.reset_last_layer(generator)
        nn.init.zeros_(cast(nn.Linear, model.value_head[-1]).weight)  # value 0 at first
        model.reset_special(generator)


def draw_heads(heads: nn.ModuleDict, seed: int) -> None:
    """Draw the heads that a policy lacks: value 0 at first, and a scale that is nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _draw_weights(heads, generator)
        for head in heads.values():
            if isinstance(head, ScaleHead):
                head.reset_last_layer(generator)
            elif isinstance(head, ValueHead):
                nn.init.zeros_(cast(nn.Linear, head[-1]).weight)


def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            _draw(module.weight, module.weight[0].numel() ** -0.5, generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, LayerScale):
            module.scale_factor.fill_(1.0)
        else:
            for parameter in module.parameters(recurse=False):
                _draw(parameter, 0.02, generator)


def _draw(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
