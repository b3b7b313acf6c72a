"""Blocks of actions to codes and back."""

import numpy as np
import pytest
import torch

from tests.small_quest import random_codes, small_quest
from vlarl_ray.models.quest_autoencoder import AddPositionalCode, PositionalCode, Quantizer


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 6, 5), (4, 3, 2), (7, 5)])
def test_every_code_is_its_own_index_and_the_first_level_varies_fastest(levels):
    vq = Quantizer(len(levels), levels)
    with torch.no_grad():
        vq.project_out.weight.copy_(torch.eye(len(levels)))
        vq.project_out.bias.zero_()
    indices = torch.arange(np.prod(levels))
    codes = vq.codes(indices[None])[0]
    assert len(codes.unique(dim=0)) == len(indices)
    assert codes.abs().max() <= 1
    assert [tuple(row) for row in vq.level_indices(indices)[: levels[0]].tolist()] == [
        (i, *[0] * (len(levels) - 1)) for i in range(levels[0])
    ]


def test_the_outermost_levels_are_reached_and_none_beyond_them():
    vq = Quantizer(2, (8, 5))
    bounded = vq.bound(torch.linspace(-20, 20, 2001)[:, None].expand(-1, 2))
    assert [int(n) for n in bounded.round().amin(0)] == [-4, -2]
    assert [int(n) for n in bounded.round().amax(0)] == [3, 2]
    assert vq.bound(torch.zeros(2)).abs().max() < 1e-6


def test_gradients_pass_the_rounding_as_if_it_were_not_there():
    vq = Quantizer(3, (5, 5))
    z = torch.randn(2, 4, 3, requires_grad=True)
    vq(z)[0].sum().backward()
    bounded = vq.bound(vq.project_in(z))
    (expected,) = torch.autograd.grad(vq.project_out(bounded / 2).sum(), z)
    torch.testing.assert_close(z.grad, expected)


def test_positional_codes_interleave_sine_and_cosine():
    code = PositionalCode(4)(3)
    torch.testing.assert_close(code[0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(code[2, :2], torch.tensor([np.sin(2.0), np.cos(2.0)], dtype=torch.float32))
    add = AddPositionalCode(4)
    torch.testing.assert_close(add(torch.zeros(1, 1, 4), first=2)[0, 0], code[2])


@pytest.mark.parametrize(
    ("kernels", "strides", "block"),
    [((5, 3, 3), (2, 2, 1), 32), ((5, 3), (2, 1), 10), ((3, 2), (1, 1), 6), ((4,), (3,), 9)],
)
def test_a_block_has_its_length_over_the_product_of_strides_codes(kernels, strides, block):
    model = small_quest(conv_kernels=kernels, conv_strides=strides, block_length=block)
    codes = model.encode_actions(torch.randn(2, block, 3))
    assert codes.shape == (2, block // np.prod(strides)) == (2, model.num_action_tokens)
    assert model.decode_actions(codes).shape == (2, 3, 3)


def test_convolutions_see_nothing_later():
    """The norm between them averages over time; without it, an output depends on inputs before its own end only."""
    blocks = small_quest(conv_kernels=(5, 3, 3), conv_strides=(2, 2, 1)).autoencoder.conv_block.blocks
    x = torch.randn(1, 16, 8, requires_grad=True)
    hidden = x
    for block in blocks:
        hidden = block.block[0](hidden)
    assert hidden.shape[-1] == 2
    hidden[..., 0].sum().backward()
    reached = x.grad.abs().sum((0, 1)) > 0
    assert reached.tolist() == [True] + [False] * 7


def test_the_executed_actions_are_the_first_of_the_block():
    model = small_quest()
    codes = random_codes(model)
    with torch.no_grad():
        block = model.autoencoder.decode_indices(codes)
    assert block.shape == (3, 8, 3)
    assert torch.equal(model.decode_actions(codes), block[:, :3])


def test_a_shorter_run_of_actions_is_continued_by_its_last_one():
    model = small_quest()
    actions = torch.randn(4, 3, 3)
    padded = torch.cat([actions, actions[:, -1:].expand(-1, 5, -1)], dim=1)
    assert torch.equal(model.encode_actions(actions), model.encode_actions(padded))
    with pytest.raises(ValueError, match="9 actions don't fit a skill of 8"):
        model.encode_actions(torch.zeros(1, 9, 3))
