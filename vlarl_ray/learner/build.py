"""Assemble one learner rank from a config and a policy folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.learner.learner import Learner
from vlarl_ray.learner.loading import load_shards
from vlarl_ray.models.lora import attach_lora
from vlarl_ray.models.policy import empty_model, load_model, policy_weights
from vlarl_ray.registry import ALGORITHMS, resolve


def build_learner(
    cfg: ExperimentConfig,
    policy_dir: str | Path,
    *,
    rank: int,
    world_size: int,
    store_address: tuple[str, int] | None,
    device: str = "cpu",
    evaluates_only: bool = False,
) -> Learner:
    """Load the policy, attach adapters, shard, and join the process group.

    Args:
        cfg: The run.
        policy_dir: Policy folder that the run starts from.
        rank: This rank.
        world_size: Number of ranks.
        store_address: Host and port where ranks meet; None in one process.
        device: Torch device of this rank.
        evaluates_only: Whether it only gives its weights out, as any policy can.

    Raises:
        ValueError: If the policy has no likelihood.
    """
    fill = None
    if store_address is None:
        model = load_model(policy_dir, device=device)
    else:
        model, weights = empty_model(Path(policy_dir))
        fill = partial(load_shards, weights=weights, lora_seed=cfg.seed)
    model.detach_value = cfg.learner.detach_value
    if cfg.learner.train == "lora":
        attach_lora(
            model,
            cfg.learner.lora,
            seed=cfg.seed,
            critic=cfg.learner.critic,
            detach_value=cfg.learner.detach_value,
        )
    if not (model.has_likelihood or evaluates_only):
        raise ValueError(
            f"model.action_head = {model.model_config.action_head!r} has no likelihood, so RL cannot train it; give "
            "the policy a spread with vlarl_ray.models.add_scale_head, and pass the new folder as policy."
        )
    if not cfg.learner.train_scale_head:
        for name, parameter in model.named_parameters():
            if name.startswith("scale_head."):
                parameter.requires_grad_(False)
    algorithm = resolve(ALGORITHMS, cfg.algorithm.name, what="algorithm.name")(cfg.algorithm)
    return Learner(
        cfg.learner,
        algorithm,
        model,
        rank=rank,
        world_size=world_size,
        store_address=store_address,
        seed=cfg.seed,
        device=device,
        fill=fill,
        pristine=policy_weights(Path(policy_dir)),
    )
