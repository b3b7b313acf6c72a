"""Turn what was published last into a policy folder of its own: merged weights that load like any other policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlarl_ray.models.lora import merged_weight
from vlarl_ray.models.policy import copy_policy, policy_weights
from vlarl_ray.models.weight_files import WeightFiles
from vlarl_ray.weights.update import WeightUpdate


def save_trained_policy(policy_dir: Path, update: WeightUpdate, folder: Path) -> Path:
    """Merge an update into the policy that training started from, in fp32 and tensor by tensor, and save the result.

    Args:
        policy_dir: Policy folder of version 0.
        update: Weights of the last version.
        folder: Policy folder to write.

    Raises:
        ValueError: If the update names a tensor that the policy lacks.
    """
    return copy_policy(
        policy_dir,
        folder,
        merged_tensors(policy_weights(policy_dir), update),
        metadata={"policy_version": update.version},
    )


def merged_tensors(weights: WeightFiles, update: WeightUpdate) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a policy with an update in it, one at a time.

    Those that change are in fp32, as bf16 would round much of a small change away; the others stay as they are stored.

    Raises:
        ValueError: If the update names a tensor that is not among `weights`.
    """
    unknown = sorted((update.adapters.keys() | update.tensors.keys()) - weights.keys())
    if unknown:
        raise ValueError(f"the update holds {', '.join(unknown)}, which the policy lacks; it is of another policy.")
    for name, tensor in weights.read_rows(dict.fromkeys(weights, slice(None))):
        if name in update.adapters:
            # torch.tensor copies: arrays from the object store are read-only.
            a, b = (torch.tensor(part) for part in update.adapters[name])
            yield name, merged_weight(tensor.float(), a, b, update.lora_scale)
        elif name in update.tensors:
            yield name, torch.tensor(update.tensors[name])
        else:
            yield name, tensor
