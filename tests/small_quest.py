"""A QueST of some hundred thousand parameters (half a ResNet is that much), observations and noise for it."""

import torch

from tests.small_openvla import INSTRUCTIONS
from vlarl_ray.config import ModelConfig, QuestConfig
from vlarl_ray.models import PolicyInputs, new_policy

QUEST = {
    "lowdim": (("joints", 3), ("gripper", 1)),
    "task_size": 6,
    "image_embed_dim": 8,
    "lowdim_embed_dim": 4,
    "block_length": 8,
    "fsq_levels": (4, 3, 2),
    "autoencoder_dim": 16,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "prior_dim": 16,
    "prior_layers": 2,
    "prior_heads": 2,
    "conv_strides": (2, 1, 1),
    "dropout": 0.0,
}
"""4 codes of 24 values stand for 8 actions, 3 of which are executed: L is no multiple of K."""


def quest_config(*, chunk_length=3, action_dim=3, value_hidden_sizes=(8,), **changes):
    quest = QuestConfig(**{**QUEST, **changes})
    return ModelConfig(
        architecture="quest",
        image_size=32,
        action_dim=action_dim,
        chunk_length=chunk_length,
        proprio_dim=sum(size for _, size in quest.lowdim),
        value_hidden_sizes=value_hidden_sizes,
        quest=quest,
    )


def official_size():
    """The sizes of the published policy for LIBERO-90."""
    return ModelConfig(
        architecture="quest",
        image_size=128,
        action_dim=7,
        chunk_length=8,
        proprio_dim=12,
        quest=QuestConfig(
            cameras=("agentview_rgb", "eye_in_hand_rgb"),
            lowdim=(("joint_states", 7), ("ee_pos", 3), ("gripper_states", 2)),
            task_size=512,
            image_embed_dim=256,
            lowdim_embed_dim=128,
            block_length=32,
            autoencoder_dim=256,
            decoder_layers=4,
            prior_dim=384,
            prior_layers=6,
            prior_heads=6,
        ),
    )


def small_quest(seed=0, instructions=INSTRUCTIONS, **changes):
    """A model whose logits and values depend on all it sees, by much more than rounding."""
    model = new_policy(quest_config(**changes), instructions, seed)
    with torch.no_grad():
        for encoder in model.image_encoders.values():
            encoder.projection_layer.spatial_softmax._spatial_conv.weight.mul_(20)
            encoder.projection_layer.projection.weight.mul_(5)
        model.output_layer.weight.mul_(15)
        model.value_head[-1].weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def quest_observations(model, batch=3, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cameras = len(model.model_config.quest.cameras)
    images = torch.randint(0, 256, (batch, cameras, 32, 32, 3), dtype=torch.uint8, generator=generator)
    known = model.metadata["instructions"]
    ids, lengths = model.encode_prompts([known[i % len(known)] for i in range(batch)])
    return PolicyInputs(images, ids, lengths, torch.randn(batch, model.model_config.proprio_dim, generator=generator))


def random_codes(model, batch=3, *, seed=0):
    shape = (batch, model.num_action_tokens)
    return torch.randint(model.model_config.quest.codebook_size, shape, generator=torch.Generator().manual_seed(seed))
