"""3^3 convolutions from or to a single channel, as matrix products.

The convolutions of CPU libraries work on blocks of channels, of which a first and a last layer have one: as products
with the 27 shifted copies of that channel, a training step takes three quarters of the time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


def convolve_from_one(field: Tensor, convolution: nn.Conv3d) -> Tensor:
    """`convolution(field)` for fields (batch, 1, z, y, x) without gradient; padding 1 with zeros; channels last in
    memory.
    """
    if field.device.type != "cpu":
        result: Tensor = convolution(field)
        return result
    shape = field.shape[2:]
    shifted = neighbours(field[:, 0]).view(27, -1)
    assert convolution.bias is not None
    products = torch.addmm(convolution.bias, shifted.t(), convolution.weight.view(-1, 27).t())
    return products.view(-1, *shape, convolution.out_channels).permute(0, 4, 1, 2, 3)


def convolve_to_one(features: Tensor, convolution: nn.Conv3d) -> Tensor:
    """`convolution(features)` for features (batch, channels, z, y, x) with channels last in memory; padding 1 with
    zeros.
    """
    if features.device.type != "cpu":
        result: Tensor = convolution(features)
        return result
    batch, channels, *shape = features.shape
    pixels = features.permute(0, 2, 3, 4, 1).reshape(-1, channels)
    products = convolution.weight.view(channels, 27).t() @ pixels.t()
    assert convolution.bias is not None
    gathered: Tensor = _GatherNeighbours.apply(products.view(27, batch, *shape))  # type: ignore[no-untyped-call]
    return (gathered + convolution.bias).unsqueeze(1)


def neighbours(fields: Tensor) -> Tensor:
    """The 27 neighbours of each voxel of fields (batch, z, y, x), as (27, batch, z, y, x), in a kernel's order; zeros
    outside.
    """
    z, y, x = fields.shape[1:]
    padded = functional.pad(fields, (1,) * 6)
    return torch.stack(
        [padded[:, i : i + z, j : j + y, k : k + x] for i in range(3) for j in range(3) for k in range(3)]
    )


class _GatherNeighbours(torch.autograd.Function):
    """out[b, r] = sum over the taps t of parts[t, b, r + t - 1]: each voxel sums what its neighbours hold for it."""

    @staticmethod
    def forward(context: Any, parts: Tensor) -> Tensor:
        """(27, batch, z, y, x) to (batch, z, y, x)."""
        batch, z, y, x = parts.shape[1:]
        result = parts.new_zeros(batch, z + 2, y + 2, x + 2)
        taps = ((i, j, k) for i in range(3) for j in range(3) for k in range(3))
        for part, (i, j, k) in zip(parts, taps, strict=True):
            result[:, 2 - i : 2 - i + z, 2 - j : 2 - j + y, 2 - k : 2 - k + x] += part
        return result[:, 1:-1, 1:-1, 1:-1].contiguous()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Its transpose: the same shifts the other way round."""
        return neighbours(gradients[0]).flip(0)
