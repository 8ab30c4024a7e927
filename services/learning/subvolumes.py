"""A volume cut into cubic subvolumes at regular places."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Shape = tuple[int, int, int]


def starts(side: int, box: int, spacing: int) -> range:
    """The first voxels of the subvolumes along an axis: whole ones alone, what is left over on both ends."""
    return range((side - box) % spacing // 2, side - box + 1, spacing)


def subvolume_count(shape: Shape, box: int, spacing: int) -> int:
    """How many subvolumes of that side a volume (z, y, x) has, so many voxels apart along each axis."""
    z, y, x = (len(starts(side, box, spacing)) for side in shape)
    return z * y * x


def subvolumes(read: Callable[[int, int], Array], shape: Shape, box: int, spacing: int) -> Iterator[Array]:
    """The subvolumes (n, z, y, x) of each row of a volume (z, y, x), of which `read(z0, z1)` gives sections."""
    layers, rows, columns = (starts(side, box, spacing) for side in shape)
    if not rows or not columns:
        return
    for z in layers:
        sections = read(z, z + box)
        for y in rows:
            yield np.stack([sections[:, y : y + box, x : x + box] for x in columns])
