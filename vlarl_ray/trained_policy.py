"""Turn what was published last into a policy folder of its own: merged weights that load like any other policy."""

from __future__ import annotations

from pathlib import Path

import torch

from vlarl_ray.models.lora import merged_weight
from vlarl_ray.models.policy import load_model
from vlarl_ray.weights.update import WeightUpdate


def save_trained_policy(policy_dir: Path, update: WeightUpdate, folder: Path) -> Path:
    """Merge an update into the policy that training started from, in fp32, and save the result.

    Args:
        policy_dir: Policy folder of version 0.
        update: Weights of the last version.
        folder: Policy folder to write.
    """
    model = load_model(policy_dir)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in update.adapters.items():
            parameter = parameters[name]
            # torch.tensor copies: arrays from the object store are read-only.
            parameter.copy_(merged_weight(parameter, torch.tensor(a), torch.tensor(b), update.lora_scale))
        for name, value in update.tensors.items():
            parameters[name].copy_(torch.tensor(value))
    model.metadata["policy_version"] = update.version
    model.save(folder)
    return folder
