"""Real-space masks with soft edges."""

import numpy as np
from numpy.typing import NDArray


def centred_coordinates(box_size: int) -> NDArray[np.float32]:
    """Distance of every index of one axis from the box's centre, voxel n//2."""
    return np.arange(box_size, dtype=np.float32) - box_size // 2


def radius_grid(box_size: int) -> NDArray[np.float32]:
    """Distance of every voxel `[z, y, x]` of a cubic box from its centre, in voxels."""
    r = centred_coordinates(box_size)
    radius: NDArray[np.float32] = np.sqrt(r[:, None, None] ** 2 + r[None, :, None] ** 2 + r[None, None, :] ** 2)
    return radius


def soft_sphere(box_size: int, radius_voxels: float, edge_voxels: float) -> NDArray[np.float32]:
    """1 inside `radius_voxels` of the centre, falling to 0 over `edge_voxels` beyond it as half a cosine."""
    distance = radius_grid(box_size) - radius_voxels
    if edge_voxels <= 0:
        return np.asarray(distance <= 0, dtype=np.float32)
    ramp = np.clip(distance / edge_voxels, 0.0, 1.0)
    return np.asarray(0.5 + 0.5 * np.cos(np.pi * ramp), dtype=np.float32)
