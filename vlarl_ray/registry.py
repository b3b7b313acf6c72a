"""Look up plug-ins by name in explicit tables of `"module:Class"` strings; outsiders pass such a string themselves."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

SUITES: Mapping[str, str] = {
    "libero_10": "vlarl_ray.envs.libero:Libero10",
    "libero_90": "vlarl_ray.envs.libero:Libero90",
    "libero_goal": "vlarl_ray.envs.libero:LiberoGoal",
    "libero_object": "vlarl_ray.envs.libero:LiberoObject",
    "libero_spatial": "vlarl_ray.envs.libero:LiberoSpatial",
    "metaworld": "vlarl_ray.envs.metaworld:MetaWorldSuite",
    "toy": "vlarl_ray.envs.toy:ToySuite",
}
ALGORITHMS: Mapping[str, str] = {
    "ppo": "vlarl_ray.algorithms.ppo:PPO",
    "rloo": "vlarl_ray.algorithms.rloo:RLOO",
    "grpo": "vlarl_ray.algorithms.grpo:GRPO",
    "chunk_ppo": "vlarl_ray.algorithms.chunk_ppo:ChunkPPO",
}
MODELS: Mapping[str, str] = {
    "openvla": "vlarl_ray.models.openvla:OpenVLA",
    "openvla_oft": "vlarl_ray.models.openvla_oft:OpenVLAOFT",
    "pixel_mlp": "vlarl_ray.models.pixel_mlp:PixelMLP",
    "quest": "vlarl_ray.models.quest:QueST",
}
ENGINES: Mapping[str, str] = {
    "torch": "vlarl_ray.inference.torch_server:TorchEngine",
    "vllm": "vlarl_ray.inference.vllm_engine:VllmEngine",
}
WEIGHT_TRANSPORTS = ("object_store", "gloo", "nccl")
"""Values of `inference.weight_transport`."""


def resolve(table: Mapping[str, str], name: str, *, what: str) -> Any:
    """Import what `name` stands for.

    Args:
        table: Known names and their `"module:Class"` strings.
        name: A key of `table`, or a `"module:Class"` string of the caller's own.
        what: The config field the name comes from, for the message.

    Raises:
        ValueError: If the name is unknown or its module cannot be imported.
    """
    target = table.get(name, name)
    if ":" not in target:
        raise ValueError(f"{what} = {name!r} is unknown; {suggest(name, table)}, or give 'my_package.module:MyClass'.")
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{what} = {name!r}: cannot import {attribute!r} from {module_name!r} ({error}); "
            "the module must be installed on every node, or lie on the Python path."
        ) from error


def suggest(name: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """Phrase the nearest known names, for error messages.

    Example:
        >>> suggest("pop", ["ppo", "rloo"])
        "did you mean 'ppo'? Known: ppo, rloo"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names) if len(names) <= 12 else ", ".join(names[:12]) + f", ... ({len(names)} in all)"
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {listed}"
