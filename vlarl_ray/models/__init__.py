"""Policies: OpenVLA-shaped models, their action tokens, heads and adapters."""

from vlarl_ray.models.action_tokens import (
    ActionNormalizer,
    ActionTokenizer,
    action_entropy,
    action_logprobs,
    gumbel_noise,
)
from vlarl_ray.models.base import PolicyInputs, PolicyOutput, VLAModel
from vlarl_ray.models.policy import Policy, load_model, load_policy, new_policy

__all__ = [
    "ActionNormalizer",
    "ActionTokenizer",
    "Policy",
    "PolicyInputs",
    "PolicyOutput",
    "VLAModel",
    "action_entropy",
    "action_logprobs",
    "gumbel_noise",
    "load_model",
    "load_policy",
    "new_policy",
]
