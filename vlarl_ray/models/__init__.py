"""Policies: OpenVLA-shaped models, their action tokens, heads and adapters."""

from vlarl_ray.models.action_tokens import (
    ActionNormalizer,
    ActionTokenizer,
    action_entropy,
    action_logprobs,
    gumbel_noise,
)
from vlarl_ray.models.base import PolicyInputs, PolicyOutput, VLAModel
from vlarl_ray.models.distributions import ActionDistribution, Gaussian, Laplace, TokenDistribution
from vlarl_ray.models.initialization import add_scale_head, new_policy
from vlarl_ray.models.policy import Policy, load_model, load_policy
from vlarl_ray.models.proprio import ProprioNormalizer
from vlarl_ray.models.quest_official import load_quest_official

__all__ = [
    "ActionDistribution",
    "ActionNormalizer",
    "ActionTokenizer",
    "Gaussian",
    "Laplace",
    "Policy",
    "PolicyInputs",
    "PolicyOutput",
    "ProprioNormalizer",
    "TokenDistribution",
    "VLAModel",
    "action_entropy",
    "action_logprobs",
    "add_scale_head",
    "gumbel_noise",
    "load_model",
    "load_policy",
    "load_quest_official",
    "new_policy",
]
