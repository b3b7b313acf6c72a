"""QueST's observation encoders: half a ResNet-18 with a spatial softmax per camera, a layer or MLP per low-dim entry.

Parameters and buffers are named as in the official checkpoints.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

_CHANNELS = 128
"""Of the second stage's feature maps."""


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions; `stride` 2 halves the maps and doubles the channels."""

    def __init__(self, channels_in: int, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        """Transform feature maps."""
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(hidden + (x if self.downsample is None else self.downsample(x)))


class SpatialSoftmax(nn.Module):
    """Turns each feature map into the mean position of its softmax: (first coordinates, second coordinates).

    Where as many points are wanted as there are maps, the original does not run its 1x1 convolution, although its
    checkpoints carry one; so it is at QueST's own size.

    Source:
        Finn et al. 2016 (arXiv:1509.06113).
    """

    pos_x: Tensor
    pos_y: Tensor

    def __init__(self, side: int, num_points: int) -> None:
        super().__init__()
        self.side, self.num_points = side, num_points
        self._spatial_conv = nn.Conv2d(_CHANNELS, num_points, 1)
        self.register_buffer("pos_x", torch.empty(1, side * side))
        self.register_buffer("pos_y", torch.empty(1, side * side))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute the coordinates in [-1, 1]; the original's `pos_x` grows along rows, not along columns."""
        line = torch.linspace(-1, 1, self.side, device=self.pos_x.device)
        self.pos_x.copy_(line.repeat_interleave(self.side)[None])
        self.pos_y.copy_(line.repeat(self.side)[None])

    def forward(self, maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P2"]:
        """Locate each map's mass."""
        if self.num_points != _CHANNELS:
            maps = self._spatial_conv(maps)
        weights = maps.flatten(2).softmax(-1)
        return torch.cat([(weights * self.pos_x).sum(-1), (weights * self.pos_y).sum(-1)], dim=-1)


class SpatialProjection(nn.Module):
    """Spatial softmax and a linear layer."""

    def __init__(self, side: int, size: int) -> None:
        super().__init__()
        self.spatial_softmax = SpatialSoftmax(side, size // 2)
        self.projection = nn.Linear(size, size)

    def forward(self, maps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Turn feature maps into features."""
        return self.projection(self.spatial_softmax(maps))


class ImageEncoder(nn.Module):
    """ResNet-18 up to and including its second stage, spatial softmax, linear layer.

    Args:
        image_size: Side of the images, pixels.
        size: Features.
    """

    def __init__(self, image_size: int, size: int) -> None:
        super().__init__()
        self.resnet18_base = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.block_1 = BasicBlock(64, 64)
        self.block_2 = BasicBlock(64, 64)
        self.block_3 = BasicBlock(64, _CHANNELS, stride=2)
        self.block_4 = BasicBlock(_CHANNELS, _CHANNELS)
        self.projection_layer = SpatialProjection(-(-image_size // 8), size)

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B F"]:
        """Turn images in [0, 1] into features."""
        maps = self.block_2(self.block_1(self.resnet18_base(pixels)))
        return self.projection_layer(self.block_4(self.block_3(maps)))


class LowdimEncoder(nn.Module):
    """Linear layer, or ReLU MLP, on a vector."""

    def __init__(self, size_in: int, hidden_sizes: tuple[int, ...], size: int) -> None:
        super().__init__()
        sizes = [size_in, *hidden_sizes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            # The original's dropout never drops; it stands here for the names of the layers behind it.
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Identity()]
        self.projection = nn.Sequential(*layers, nn.Linear(sizes[-1], size))

    def forward(self, x: Float[Tensor, "B n"]) -> Float[Tensor, "B F"]:
        """Turn vectors into features."""
        return self.projection(x)
