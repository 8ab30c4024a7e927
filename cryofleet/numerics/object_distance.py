"""Distances of positions to the objects of a segmentation that is larger than memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, generate_binary_structure
from scipy.spatial import KDTree

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import Progress, no_progress

#: Voxels that are read at a time.
READ_VOXELS = 2 << 20
#: What one of them takes: read, compared, eroded, and on a surface with its share of the tree.
VOXEL_BYTES = 12 + 80


def memory_bytes(shape: tuple[int, int, int]) -> int:
    """What `object_distances` takes at most in a volume of that shape, whatever is in it."""
    return VOXEL_BYTES * (_sections(shape) + 2) * shape[1] * shape[2]


def object_distances(
    positions: NDArray[np.float64],
    read: Callable[[int, int], NDArray[np.float32]],
    shape: tuple[int, int, int],
    label: int | None = None,
    limit: float = np.inf,
    progress: Progress = no_progress,
) -> NDArray[np.float64]:
    """The distance (n,) of each position to the nearest voxel of the objects; 0 within them, infinity beyond `limit`.

    The volume is looked at slab by slab. A position outside of an object is nearest to one of the object's surface
    voxels, so only those are searched, and only for positions that may have none as near.

    Args:
        positions: (n, 3) as x, y, z in voxels; may lie outside of the volume.
        read: sections first to last of the volume, `[z, y, x]`.
        shape: of the volume, (z, y, x).
        label: the voxels that count; all that are not 0 where left out.
        limit: how far objects are looked for, in voxels.
        progress: told of each slab.

    Raises FailedPrecondition where no voxel counts.
    """
    step = _sections(shape)
    cross = generate_binary_structure(3, 1)
    found: NDArray[np.float64] = np.full(len(positions), np.inf)
    voxels = np.floor(positions + 0.5).astype(np.int64)
    within = ((voxels >= 0) & (voxels < np.array(shape[::-1]))).all(axis=1)
    height = positions[:, 2]
    seen = False
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        low, high = max(0, first - 1), min(shape[0], last + 1)
        values = read(low, high)
        objects = values != 0 if label is None else values == label
        z, y, x = np.nonzero((objects & ~binary_erosion(objects, cross))[first - low : last - low])
        here = np.flatnonzero(within & (voxels[:, 2] >= first) & (voxels[:, 2] < last))
        found[here[objects[voxels[here, 2] - low, voxels[here, 1], voxels[here, 0]]]] = 0
        away = np.maximum(0, np.maximum(first - height, height - (last - 1)))
        asked = np.flatnonzero(away < np.minimum(found, np.nextafter(limit, np.inf)))
        if len(z) and len(asked):
            surface = KDTree(np.stack([x, y, z + first], axis=1))
            found[asked] = np.minimum(found[asked], surface.query(positions[asked])[0])
        seen = seen or len(z) > 0
        progress(last / shape[0], "reading the segmentation")
    if not seen:
        what = "is not 0" if label is None else f"has the label {label}"
        raise FailedPrecondition(f"no voxel of the segmentation {what}: there is nothing to measure distances to")
    found[found > limit] = np.inf
    return found


def _sections(shape: tuple[int, int, int]) -> int:
    """Sections that are read at a time."""
    return max(1, min(shape[0], READ_VOXELS // (shape[1] * shape[2])))
