"""A 3D U-Net (Ronneberger et al. 2015; Çiçek et al. 2016) without normalisation, for volumes of any size.

    level:  conv 3^3, leaky ReLU, conv 3^3, leaky ReLU
    down:   max-pool 2^3 and twice the channels, `depth` times
    up:     upsample 2^3 to nearest neighbours, conv 3^3 to half the channels, leaky ReLU, joined with the level of that
            size from the way down, then a level
    output: conv 3^3 of the finest level, joined with the input itself

There is no normalisation, for its statistics would be those of a tile and leave seams: what comes out at a voxel
follows from the voxels within `reach` alone. Weights are orthogonal (Saxe et al. 2014), biases zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from services.learning.autoencoder import kernel_spread, max_pool, memory_order, upsample_and_convolve

SLOPE = 0.2
"""Of leaky ReLU below zero."""


class UNet(nn.Module):
    """The network from `inputs` to `outputs` channels, with `channels` at the full size and `depth` poolings.

    Sides of what it takes are multiples of 2^depth.
    """

    spread: Tensor

    def __init__(
        self,
        channels: int,
        depth: int = 2,
        inputs: int = 1,
        outputs: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(depth + 1)]
        self.depth = depth
        self.down = nn.ModuleList(
            _level(before, width) for before, width in zip([inputs, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(nn.Conv3d(2 * width, width, 3, padding=1) for width in widths[:-1])
        self.joined = nn.ModuleList(_level(2 * width, width) for width in widths[:-1])
        self.output = nn.Conv3d(channels + inputs, outputs, 3, padding=1)
        orthogonal(self, generator)
        self.register_buffer("spread", kernel_spread(), persistent=False)

    def forward(self, volumes: Tensor) -> Tensor:
        """(batch, outputs, z, y, x) of volumes (batch, inputs, z, y, x)."""
        return self._expanded(volumes, self._contracted(volumes))

    def _contracted(self, volumes: Tensor) -> list[Tensor]:
        """The features of each size on the way down."""
        features = memory_order(volumes)
        levels: list[Tensor] = []
        for number, level in enumerate(self.down):
            features = level(max_pool(features) if number else features)
            levels.append(features)
        return levels

    def _expanded(self, volumes: Tensor, levels: list[Tensor]) -> Tensor:
        """The way up, and the output."""
        features = levels[-1]
        for number in reversed(range(self.depth)):
            up, joined = self.up[number], self.joined[number]
            assert isinstance(up, nn.Conv3d)
            features = activate(upsample_and_convolve(features, up, self.spread))
            features = joined(torch.cat([features, levels[number]], dim=1))
        result: Tensor = self.output(torch.cat([features, volumes], dim=1))
        return result


def reach(depth: int) -> int:
    """How far away, in voxels along an axis, a voxel of the input can be that an output voxel depends on."""
    furthest = 0
    for place in range(1 << depth):  # in a cell of the coarsest grid
        # Backwards: the output's convolution; at each size a level, and the convolution behind an upsampling; the
        # coarsest level; at each size a pooling and a level.
        low, high = place - 1, place + 1
        for _ in range(depth):
            low, high = (low - 3) // 2, (high + 3) // 2
        low, high = low - 2, high + 2
        for _ in range(depth):
            low, high = 2 * low - 2, 2 * high + 3
        furthest = max(furthest, place - low, high - place)
    return furthest


def margin(depth: int) -> int:
    """The first multiple of 2^depth at or above the reach: tiles with so much around them leave no seams."""
    step = 1 << depth
    return -(-reach(depth) // step) * step


def activate(features: Tensor) -> Tensor:
    """Leaky ReLU."""
    return functional.leaky_relu(features, SLOPE, inplace=True)


def orthogonal(network: nn.Module, generator: torch.Generator | None) -> None:
    """First weights of all convolutions and dense layers: orthogonal, with the gain of leaky ReLU; biases zero."""
    gain = nn.init.calculate_gain("leaky_relu", SLOPE)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            nn.init.orthogonal_(module.weight, gain, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            module.weight.data = memory_order(module.weight.data)


def _level(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1),
        nn.LeakyReLU(SLOPE, inplace=True),
        nn.Conv3d(outputs, outputs, 3, padding=1),
        nn.LeakyReLU(SLOPE, inplace=True),
    )
