"""A network that makes a volume of a volume, applied to one of any size, in bounded memory and without seams.

Each tile is seen with a margin of at least the network's reach around it, and what it makes of the tile itself is kept
(`overlap_tile`): so each voxel gets the very sums that it would get from the whole volume at once, but for rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryofleet.progress import Progress
from services.learning.overlap_tile import Span, Tiling

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
Translate = Callable[[Array], Array]
"""What is made of a region `[z, y, x]`: (..., z, y, x), one or several of the same shape."""

LAYERS = 9
"""Outputs of a U-Net's largest layer that it keeps at a time: 7.4 to 8.1 were measured at 96^3 and 112^3."""


def tiling(tile: int, margin: int, multiple: int) -> Tiling:
    """Tiles of at least that side, for a network whose poolings divide `multiple`; values in the network's scale."""
    return Tiling(-(-tile // multiple) * multiple, margin, 0, multiple)


def translate(
    make: Translate, read: Callable[[int, int], Array], shape: Shape, tiles: Tiling, progress: Progress
) -> Iterator[tuple[int, Array]]:
    """What a network makes of a volume (z, y, x), of which `read(z0, z1)` gives sections: slabs (..., z, y, x) with
    their first section, in order of z, each one tile deep.
    """
    depth, height, width = shape
    plan = list(itertools.product(range(0, height, tiles.tile), range(0, width, tiles.tile)))
    layers = -(-depth // tiles.tile)
    for layer, z in enumerate(range(0, depth, tiles.tile)):
        z_axis = Span.of(z, depth, tiles)
        sections = read(z_axis.source.start, z_axis.source.stop)
        made = np.empty(0, np.float32)
        for number, (y, x) in enumerate(plan, start=1):
            y_axis, x_axis = Span.of(y, height, tiles), Span.of(x, width, tiles)
            padding = [(0, axis.padding) for axis in (z_axis, y_axis, x_axis)]
            region = np.pad(sections[:, y_axis.source, x_axis.source], padding)
            found = make(region)[..., z_axis.kept, y_axis.kept, x_axis.kept]
            if number == 1:
                made = np.empty((*found.shape[:-2], height, width), np.float32)
            made[..., y : y + y_axis.length, x : x + x_axis.length] = found
            progress((layer + number / len(plan)) / layers, "applying the network", sections=z)
        yield z, made


def on_device(network: Callable[[Tensor], Tensor], device: torch.device) -> Translate:
    """A network of volumes (1, 1, z, y, x) on a device, as a function of arrays."""

    def make(region: Array) -> Array:
        with torch.inference_mode():
            made: Array = network(torch.from_numpy(region)[None, None].to(device))[0, 0].float().cpu().numpy()
        return made

    return make


def fitting_tile(tile: int, margin: int, multiple: int, channels: int, memory_bytes: int) -> int:
    """The largest side, `tile` at most, of tiles that a network of so many channels can take with so much memory;
    `multiple` at least.
    """
    side = math.floor(math.cbrt(memory_bytes / (LAYERS * 4 * channels)))
    return max(multiple, min(tile, (side - 2 * margin) // multiple * multiple))


def memory_bytes(shape: Shape, tiles: Tiling, channels: int) -> int:
    """Memory of `translate`: sections as read and scaled, what is made of them, and the network's outputs."""
    sections = 4 * shape[1] * shape[2] * (3 * tiles.slab_planes(shape[0]) + 3 * min(tiles.tile, shape[0]))
    regions = [min(tiles.region, -(-side // tiles.multiple) * tiles.multiple) for side in shape]
    return sections + LAYERS * 4 * channels * math.prod(regions)
