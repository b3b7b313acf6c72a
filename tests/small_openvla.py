"""An OpenVLA and an OpenVLA-OFT of some ten thousand parameters, observations and noise for them."""

import dataclasses

import torch

from vlarl_ray.config import ModelConfig, OFTConfig, TowerConfig
from vlarl_ray.models import PolicyInputs, ProprioNormalizer, new_policy

INSTRUCTIONS = ["close the drawer", "open the window", "press the button from the top"]
TOWER = TowerConfig(dim=16, depth=2, num_heads=2, mlp_dim=32)
TINY = ModelConfig(
    image_size=32, patch_size=8, dino=TOWER, siglip=TOWER, hidden_size=32, intermediate_size=48, num_layers=2,
    num_heads=4, num_kv_heads=2, action_dim=3, chunk_length=2, max_prompt_tokens=12, value_hidden_sizes=(8,),
)  # fmt: skip


def tiny(seed=0, **changes):
    """A model whose logits and values differ from zero by much more than rounding."""
    model = new_policy(dataclasses.replace(TINY, **changes), INSTRUCTIONS, seed)
    with torch.no_grad():
        model.language_model.lm_head.weight.mul_(40)
        model.value_head[-1].weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def tiny_oft(seed=0, *, passes="one", num_cameras=2, detach_prompt=False, **changes):
    """An OpenVLA-OFT of the same size that reads two cameras and four numbers of proprioception."""
    oft = OFTConfig(passes=passes, num_cameras=num_cameras, detach_prompt=detach_prompt)
    settings = {"architecture": "openvla_oft", "action_head": "laplace", "proprio_dim": 4, "oft": oft, **changes}
    normalizer = ProprioNormalizer((-2.0,) * 4, (2.0,) * 4, (True,) * 4) if settings["proprio_dim"] else None
    model = new_policy(dataclasses.replace(TINY, **settings), INSTRUCTIONS, seed, proprio_normalizer=normalizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.output_layer.weight.mul_(40)
        model.value_head[-1].weight.normal_(generator=generator)
        if model.model_config.action_head in ("laplace", "gaussian"):
            model.scale_head.last_layer.weight.normal_(std=0.1, generator=generator)
    return model


def observations(model, batch=3, *, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cameras = model.model_config.oft.num_cameras
    images = torch.randint(0, 256, (batch, cameras, size, size, 3), dtype=torch.uint8, generator=generator)
    ids, lengths = model.encode_prompts([INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(batch)])
    proprio = torch.randn(batch, 4, generator=generator) if model.model_config.proprio_dim else torch.zeros(batch, 4)
    return PolicyInputs(images, ids, lengths, proprio)


def noise(model, batch=3, seed=1):
    uniform = torch.rand(batch, model.num_action_tokens, 256, generator=torch.Generator().manual_seed(seed))
    return -torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6)))
