"""The median of each voxel's surroundings."""

from __future__ import annotations

from collections.abc import Callable

import scipy.ndimage

from cryofleet.progress import Progress, no_progress
from services.io.bricks import Array, ReadSlab, Shape, by_bricks
from services.io.bricks import memory_bytes as brick_bytes

_COPIES = 3


def median(
    read: ReadSlab,
    shape: Shape,
    radius_voxels: int,
    write: Callable[[Array], object],
    progress: Progress = no_progress,
    workers: int = 1,
) -> None:
    """Each voxel becomes the median of the cube of 2 radius + 1 voxels about it; the volume is mirrored at its border.

    Equals `scipy.ndimage.median_filter(volume, 2 * radius + 1)`. Takes out single wild voxels, X-rays above all,
    without blurring steps. Arguments as of `by_bricks`.
    """
    by_bricks(
        read,
        shape,
        radius_voxels,
        lambda brick: scipy.ndimage.median_filter(brick, 2 * radius_voxels + 1, mode="reflect"),
        write,
        progress,
        "taking medians",
        workers,
    )


def memory_bytes(shape: Shape, radius_voxels: int, workers: int = 1) -> int:
    """What `median` needs at most."""
    return brick_bytes(shape, radius_voxels, _COPIES, workers)
