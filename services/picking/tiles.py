"""Cutting a tomogram into tiles that fit into memory, for correlation with a small box.

A tile is its core, of which every tile has its own, and around it what the box reaches and what filters disturb. Sides
are those that a Fourier transform is fast for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import ResourceExhausted
from services.picking.slabs import READ_BYTES, ReadSlab

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
#: No axis is cut into more tiles.
_MOST_CUTS = 64


@dataclass(frozen=True)
class Tile:
    """Part of a tomogram.

    Attributes:
        start, stop: the core, (z, y, x) voxels of the (binned) tomogram, `stop` not included.
    """

    start: Shape
    stop: Shape

    @property
    def shape(self) -> Shape:
        """Of the core."""
        return (self.stop[0] - self.start[0], self.stop[1] - self.start[1], self.stop[2] - self.start[2])


@dataclass(frozen=True)
class Layout:
    """All tiles of a tomogram, and the one shape that they are read in.

    Attributes:
        tiles: in z, y, x order.
        padded: shape of a tile with its surroundings.
        disturbed: voxels at a tile's faces that are not to be used.
        valid: positions that are looked at in a tile: the core, and the disturbed ones before it.
    """

    tiles: tuple[Tile, ...]
    padded: Shape
    disturbed: int
    valid: Shape


def plan(shape: Shape, box: int, disturbed: int, memory_bytes: Callable[[Shape], int], budget_bytes: int) -> Layout:
    """Cut a tomogram so that the least is transformed within a memory.

    Args:
        shape: of the tomogram, (z, y, x).
        box: side of the box that is correlated with it.
        disturbed: voxels at a tile's faces that are not to be used.
        memory_bytes: what the work on a tile of some padded shape takes.
        budget_bytes: what it may take.

    Raises ResourceExhausted where not even the smallest tiles fit.
    """
    choices = [_cuts(side, box, disturbed) for side in shape]
    best: tuple[float, tuple[tuple[int, int, int], ...]] | None = None
    for cut in product(*choices):
        padded = (cut[0][2], cut[1][2], cut[2][2])
        voxels = math.prod(padded)
        cost = math.prod(count for count, _, _ in cut) * voxels * math.log2(voxels)
        if (best is None or cost < best[0]) and memory_bytes(padded) <= budget_bytes:
            best = cost, cut
    if best is None:
        smallest = tuple(choice[-1][2] for choice in choices)
        needed = memory_bytes((smallest[0], smallest[1], smallest[2]))
        raise ResourceExhausted(
            f"a tile of {smallest} voxels (z, y, x) takes {needed / 2**20:.0f} MiB, and {budget_bytes / 2**20:.0f} MiB "
            "are set aside for it: take a smaller template or more memory"
        )
    cut = best[1]
    tiles = []
    for index in product(*(range(count) for count, _, _ in cut)):
        start = tuple(i * core for i, (_, core, _) in zip(index, cut, strict=True))
        stop = tuple(min(s + core, side) for s, (_, core, _), side in zip(start, cut, shape, strict=True))
        tiles.append(Tile((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    valid = (cut[0][1] + disturbed, cut[1][1] + disturbed, cut[2][1] + disturbed)
    return Layout(tuple(tiles), (cut[0][2], cut[1][2], cut[2][2]), disturbed, valid)


def _cuts(side: int, box: int, disturbed: int) -> list[tuple[int, int, int]]:
    """Ways to cut an axis: number of tiles, side of their cores, and padded side.

    Where one tile is the whole axis, the box hangs over both of the tomogram's faces into the same padding, as the
    transform is periodic.
    """
    reach = box + 2 * disturbed
    ways: list[tuple[int, int, int]] = []
    for count in range(1, min(_MOST_CUTS, side) + 1):
        core = -(-side // count)
        if ways and (core == ways[-1][1] or core < reach // 4):
            continue
        beside = box // 2 + 2 * disturbed if count == 1 else reach - 1
        ways.append((-(-side // core), core, _fast_length(core + beside)))
    return ways


def _fast_length(length: int) -> int:
    """The least side, at least `length`, whose transform is fast: a multiple of 4 with no factor above 5."""
    return 4 * int(scipy.fft.next_fast_len(-(-length // 4), real=True))


def read(
    read_slab: ReadSlab, shape: Shape, first: Sequence[int], padded: Shape, value: float
) -> tuple[Array, tuple[slice, slice, slice]]:
    """A region of a volume that may reach over its faces.

    Args:
        read_slab: reads planes of the volume.
        shape: of the volume.
        first: the region's first voxel (z, y, x), which may be outside.
        padded: the region's shape.
        value: what lies outside the volume.

    Returns:
        The region, float32, and which part of it lies inside the volume.
    """
    region: Array = np.full(padded, value, np.float32)
    inside: list[slice] = []
    source: list[slice] = []
    for begin, length, side in zip(first, padded, shape, strict=True):
        low, high = max(begin, 0), min(begin + length, side)
        inside.append(slice(low - begin, max(high, low) - begin))
        source.append(slice(low, max(high, low)))
    step = max(1, READ_BYTES // (4 * shape[1] * shape[2]))
    for z in range(source[0].start, source[0].stop, step):
        end = min(z + step, source[0].stop)
        to = slice(z - first[0], end - first[0])
        region[to, inside[1], inside[2]] = read_slab(z, end)[:, source[1], source[2]]
    return region, (inside[0], inside[1], inside[2])
