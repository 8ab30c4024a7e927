"""Packing shapes into a volume without overlap.

The volume is a grid of flags that say why a voxel is not free. A shape may go where none of its voxels has a flag that
is forbidden to it; then its own voxels, grown by the least gap to a ball's radius, are flagged. So two shapes are never
nearer to each other than the gap, voxel centre to voxel centre, and none overlap.

Places are tried in a random order that comes to every one of them once, so that "no place left" is a fact for the
orientations that were tried, and not a matter of luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cryofleet.numerics.compiled import compiled

#: Why a voxel is not free: it is within the gap of something placed, it lies in a membrane, beyond the ice or in gold
#: or carbon, or not inside a vesicle.
OCCUPIED, MEMBRANE, OUTSIDE, NOT_IN_VESICLE = 1, 2, 4, 8
#: Places tried between two looks at whether to stop.
PLACES_PER_CALL = 2_000_000

Voxels = NDArray[np.int32]


def mask_voxels(mask: NDArray[np.bool_]) -> Voxels:
    """The voxels of a mask as offsets (n, 3) z, y, x from its box's middle voxel."""
    return np.asarray(np.argwhere(mask) - np.array(mask.shape) // 2, np.int32)


def ball(radius_voxels: float) -> Voxels:
    """Offsets (n, 3) of the voxels within a radius."""
    reach = math.floor(radius_voxels)
    grid = np.indices((2 * reach + 1,) * 3).reshape(3, -1).T - reach
    return np.asarray(grid[(grid**2).sum(axis=1) <= radius_voxels**2], np.int32)


def find_place(
    flags: NDArray[np.uint8],
    forbidden: int,
    voxels: Voxels,
    rng: np.random.Generator,
    keep_going: Callable[[], None],
) -> tuple[int, int, int] | None:
    """A random voxel (z, y, x) on which a shape's middle may be put, or None where there is none.

    `keep_going` is called now and then, and may raise to stop the search.
    """
    first, last = voxels.min(axis=0), voxels.max(axis=0)
    low = np.maximum(0, -first).astype(np.int64)
    extent = np.array(flags.shape) - np.maximum(0, last) - low
    if (extent <= 0).any():
        return None
    count = int(extent.prod())
    # in random order a collision is met after a few looks
    shuffled = voxels[rng.permutation(len(voxels))]
    # start + i * stride modulo count comes to every place once if the two have no common factor
    stride = int(rng.integers(count // 3, 2 * count // 3 + 1)) or 1
    while math.gcd(stride, count) != 1:
        stride += 1
    place = int(rng.integers(count))
    for start in range(0, count, PLACES_PER_CALL):
        if start:
            keep_going()
        tries = min(PLACES_PER_CALL, count - start)
        found, place = _first_free(flags, forbidden, shuffled, low, extent, place, stride, tries)
        if found >= 0:
            z, rest = divmod(found, int(extent[1] * extent[2]))
            y, x = divmod(rest, int(extent[2]))
            return z + int(low[0]), y + int(low[1]), x + int(low[2])
    return None


def is_free(flags: NDArray[np.uint8], forbidden: int, voxels: Voxels, place: tuple[int, int, int]) -> bool:
    """Whether a shape may go to one place; it must lie inside the volume as a whole."""
    there = voxels + np.array(place, np.int32)
    if (there < 0).any() or (there >= np.array(flags.shape)).any():
        return False
    return not (flags[tuple(there.T)] & forbidden).any()


def occupy(flags: NDArray[np.uint8], voxels: Voxels, place: tuple[int, int, int], gap: Voxels) -> None:
    """Flag a shape's voxels and all within the gap, whose offsets `ball` gives, as occupied."""
    _mark(flags, voxels, np.array(place, np.int64), gap)


@compiled
def _first_free(
    flags: NDArray[np.uint8],
    forbidden: int,
    voxels: NDArray[np.int32],
    low: NDArray[np.int64],
    extent: NDArray[np.int64],
    place: int,
    stride: int,
    tries: int,
) -> tuple[int, int]:  # pragma: no cover - compiled
    """The first free place of the next `tries` ones, or -1; and where to go on from."""
    count = extent[0] * extent[1] * extent[2]
    for _ in range(tries):
        z = low[0] + place // (extent[1] * extent[2])
        y = low[1] + place // extent[2] % extent[1]
        x = low[2] + place % extent[2]
        free = True
        for n in range(len(voxels)):
            if flags[z + voxels[n, 0], y + voxels[n, 1], x + voxels[n, 2]] & forbidden:
                free = False
                break
        if free:
            return place, place
        place = (place + stride) % count
    return -1, place


@compiled
def _mark(
    flags: NDArray[np.uint8], voxels: NDArray[np.int32], place: NDArray[np.int64], gap: NDArray[np.int32]
) -> None:  # pragma: no cover - compiled
    depth, height, width = flags.shape
    for n in range(len(voxels)):
        for m in range(len(gap)):
            z = place[0] + voxels[n, 0] + gap[m, 0]
            y = place[1] + voxels[n, 1] + gap[m, 1]
            x = place[2] + voxels[n, 2] + gap[m, 2]
            if 0 <= z < depth and 0 <= y < height and 0 <= x < width:
                flags[z, y, x] |= OCCUPIED
