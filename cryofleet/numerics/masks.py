"""Real-space masks with soft edges."""

from typing import Any

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument


def centred_coordinates(box_size: int) -> NDArray[np.float32]:
    """Distance of every index of one axis from the box's centre, voxel n//2."""
    return np.arange(box_size, dtype=np.float32) - box_size // 2


def radius_grid(box_size: int) -> NDArray[np.float32]:
    """Distance of every voxel `[z, y, x]` of a cubic box from its centre, in voxels."""
    r = centred_coordinates(box_size)
    radius: NDArray[np.float32] = np.sqrt(r[:, None, None] ** 2 + r[None, :, None] ** 2 + r[None, None, :] ** 2)
    return radius


def cosine_edge(distance: NDArray[np.floating[Any]], edge_voxels: float) -> NDArray[np.float32]:
    """1 where `distance` is at most 0, falling to 0 at `edge_voxels` as half a cosine; a step for an edge of 0."""
    if edge_voxels <= 0:
        return np.asarray(distance <= 0, dtype=np.float32)
    ramp = np.clip(distance / edge_voxels, 0.0, 1.0)
    return np.asarray(0.5 + 0.5 * np.cos(np.pi * ramp), dtype=np.float32)


def usual_edge_voxels(box_size: int) -> float:
    """Width of the soft edge of what masks a particle in a box, unless something asks for another."""
    return max(2.0, box_size / 16)


def soft_sphere(box_size: int, radius_voxels: float, edge_voxels: float) -> NDArray[np.float32]:
    """1 inside `radius_voxels` of the centre, falling to 0 over `edge_voxels` beyond it as half a cosine."""
    return cosine_edge(radius_grid(box_size) - radius_voxels, edge_voxels)


def soft_cylinder(
    box_size: int, radius_voxels: float, half_height_voxels: float, edge_voxels: float
) -> NDArray[np.float32]:
    """A cylinder along z about the box's centre: 1 inside, falling to 0 over `edge_voxels` beyond its surface.

    Distances beyond the rim are to the rim itself, so that the edge is as wide there as elsewhere.
    """
    r = centred_coordinates(box_size)
    beside = np.maximum(np.hypot(r[:, None], r[None, :]) - radius_voxels, 0)
    above = np.maximum(np.abs(r) - half_height_voxels, 0)
    return cosine_edge(np.hypot(above[:, None, None], beside[None]), edge_voxels)


def soft_ellipsoid(
    box_size: int, semi_axes_voxels: tuple[float, float, float], edge_voxels: float
) -> NDArray[np.float32]:
    """An ellipsoid of semi-axes (x, y, z) about the box's centre: 1 inside, falling to 0 over `edge_voxels` beyond it.

    The distance from its surface is taken to first order, q (q - 1) / |grad q^2 / 2| with q^2 = (x/a)^2 + (y/b)^2 +
    (z/c)^2: exact on the axes and near the surface.

    Raises InvalidArgument where a semi-axis is not positive.
    """
    if min(semi_axes_voxels) <= 0:
        raise InvalidArgument(f"semi-axes of {semi_axes_voxels} voxels: all must be positive")
    r = centred_coordinates(box_size)
    a, b, c = semi_axes_voxels
    grids = [(r[:, None, None], c), (r[None, :, None], b), (r[None, None, :], a)]
    scaled = np.sqrt(sum((x / s) ** 2 for x, s in grids))
    slope = np.sqrt(sum((x / s**2) ** 2 for x, s in grids))
    return cosine_edge(scaled * (scaled - 1) / np.maximum(slope, 1e-12), edge_voxels)


def soft_dilation(inside: NDArray[np.bool_], dilation_voxels: float, edge_voxels: float) -> NDArray[np.float32]:
    """A binary mask grown by `dilation_voxels`, then falling to 0 over `edge_voxels` as half a cosine.

    Distances are Euclidean, between the centres of voxels; `inside` is of any shape.

    Raises InvalidArgument where nothing is inside, or a width is negative.
    """
    if dilation_voxels < 0 or edge_voxels < 0:
        raise InvalidArgument(
            f"dilation of {dilation_voxels:g} and edge of {edge_voxels:g} voxels: neither may be negative"
        )
    if not inside.any():
        raise InvalidArgument("the mask to grow is empty")
    distance = np.asarray(scipy.ndimage.distance_transform_edt(~inside), dtype=np.float32)
    return cosine_edge(distance - np.float32(dilation_voxels), edge_voxels)
