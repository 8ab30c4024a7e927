"""Distances of particles to a segmented object, from a volume that is larger than memory.

The nearest voxel of an object to a point outside of it lies on the object's surface; only these voxels are kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, generate_binary_structure
from scipy.spatial import KDTree

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import Progress, no_progress
from services.picking.slabs import READ_BYTES, ReadSlab, Shape

#: A surface voxel with its share of the tree.
SURFACE_BYTES = 80


def memory_bytes(shape: Shape) -> int:
    """What `distances` takes at most, for a surface of up to six times the largest face."""
    z, y, x = shape
    slab = (max(1, READ_BYTES // (4 * y * x)) + 2) * y * x
    return 12 * slab + SURFACE_BYTES * 6 * max(z * y, z * x, y * x)


def distances(
    positions: NDArray[np.float64], read_slab: ReadSlab, shape: Shape, progress: Progress = no_progress
) -> NDArray[np.float64]:
    """The distance in voxels of each position to the nearest voxel that is not 0; 0 for positions in such a voxel.

    Args:
        positions: float64 `[n, 3]`, (x, y, z) voxels; may lie outside.
        read_slab, shape: the segmentation.
        progress: told how far the work is.

    Raises FailedPrecondition for a segmentation without any object.
    """
    step = max(1, READ_BYTES // (4 * shape[1] * shape[2]))
    cross = generate_binary_structure(3, 1)
    surface: list[NDArray[np.float64]] = []
    found: NDArray[np.float64] = np.full(len(positions), np.inf)
    voxels = np.rint(positions).astype(np.int64)
    within = ((voxels >= 0) & (voxels < np.array(shape[::-1]))).all(axis=1)
    for z0 in range(0, shape[0], step):
        z1 = min(z0 + step, shape[0])
        low, high = max(0, z0 - 1), min(shape[0], z1 + 1)
        objects = read_slab(low, high) != 0
        edge = objects & ~binary_erosion(objects, cross)
        z, y, x = np.nonzero(edge[z0 - low : z1 - low])
        surface.append(np.stack([x, y, z + z0], axis=1).astype(np.float64))
        here = np.flatnonzero(within & (voxels[:, 2] >= z0) & (voxels[:, 2] < z1))
        inside = objects[voxels[here, 2] - low, voxels[here, 1], voxels[here, 0]]
        found[here[inside]] = 0
        progress(0.8 * z1 / shape[0], "reading the segmentation")
    points = np.concatenate(surface)
    if len(points) == 0:
        raise FailedPrecondition("the segmentation is 0 everywhere: there is nothing to measure distances to")
    outside = np.flatnonzero(np.isinf(found))
    if len(outside):
        found[outside] = KDTree(points).query(positions[outside])[0]
    return found
