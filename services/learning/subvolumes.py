"""A volume cut into cubic subvolumes that lie side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Shape = tuple[int, int, int]


def starts(side: int, box: int) -> range:
    """The first voxels of the subvolumes along an axis: whole ones alone, what is left over on both ends."""
    return range(side % box // 2, side - box + 1, box)


def subvolume_count(shape: Shape, box: int) -> int:
    """How many subvolumes of that side a volume (z, y, x) has."""
    return (shape[0] // box) * (shape[1] // box) * (shape[2] // box)


def subvolumes(read: Callable[[int, int], Array], shape: Shape, box: int) -> Iterator[Array]:
    """The subvolumes (n, z, y, x) of each layer of a volume (z, y, x), of which `read(z0, z1)` gives sections."""
    rows, columns = (starts(side, box) for side in shape[1:])
    for z in starts(shape[0], box):
        sections = read(z, z + box)[:, rows.start : rows.start + box * len(rows)]
        sections = sections[:, :, columns.start : columns.start + box * len(columns)]
        cut = sections.reshape(box, len(rows), box, len(columns), box)
        yield cut.transpose(1, 3, 0, 2, 4).reshape(-1, box, box, box)
