"""What QueST sees: cameras, proprioception, and what they become."""

import dataclasses

import pytest
import torch

from tests.small_quest import quest_observations, small_quest
from vlarl_ray.models.quest_encoders import SpatialSoftmax


def test_every_camera_and_number_is_read_from_its_place():
    model = small_quest(cameras=("front", "wrist"))
    inputs = quest_observations(model)
    context = model.context(inputs)
    swapped = model.context(dataclasses.replace(inputs, images=inputs.images.flip(1)))
    assert torch.equal(context[:, 0], swapped[:, 0])  # the task's token
    assert (context[:, 1] - swapped[:, 1]).abs().max() > 1e-3
    for index in range(4):
        proprio = inputs.proprio.clone()
        proprio[:, index] += 1
        moved = model.context(dataclasses.replace(inputs, proprio=proprio))
        assert (moved[:, 1] - context[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{"cameras": ()}, {"lowdim": ()}, {"lowdim_hidden_sizes": (5, 7)}])
def test_observations_may_lack_cameras_or_numbers(changes):
    model = small_quest(**changes)
    assert model.context(quest_observations(model)).shape == (3, 2, 16)


def test_frames_of_another_size_are_resized():
    model = small_quest()
    inputs = quest_observations(model)
    larger = inputs.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        ours = model.context(dataclasses.replace(inputs, images=larger))
        torch.testing.assert_close(ours, model.context(inputs), rtol=0, atol=1e-4)


def test_what_the_model_does_not_take_is_refused():
    model = small_quest()
    inputs = quest_observations(model)
    with pytest.raises(ValueError, match="2 cameras per observation; this model takes 1: image"):
        model.context(dataclasses.replace(inputs, images=inputs.images.repeat(1, 2, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"5 numbers per observation; this model takes 4: joints \(3\), gripper \(1\)"):
        model.context(dataclasses.replace(inputs, proprio=torch.zeros(3, 5)))


def test_a_rows_context_does_not_depend_on_its_neighbours():
    """Batch norm uses its running statistics."""
    model = small_quest()
    inputs = quest_observations(model)
    with torch.no_grad():
        torch.testing.assert_close(model.context(inputs)[:1], model.context(inputs.rows(slice(0, 1))))


def test_at_the_official_size_the_spatial_softmax_has_no_convolution_of_its_own():
    """As many points as maps: the published code then leaves out the layer that its checkpoints carry."""
    layer = SpatialSoftmax(4, 128)
    maps = torch.randn(2, 128, 4, 4)
    before = layer(maps)
    with torch.no_grad():
        layer._spatial_conv.weight.add_(1)
    assert torch.equal(layer(maps), before)
    peak = torch.zeros(1, 128, 4, 4)
    peak[:, :, 3, 0] = 100.0  # last row, first column: the original's x grows along rows
    assert torch.allclose(layer(peak)[0, [0, 128]], torch.tensor([1.0, -1.0]))
