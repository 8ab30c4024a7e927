"""Peaks of a map of scores, read slab by slab."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.progress import Progress, no_progress
from services.picking.difference_of_gaussians import suppress
from services.picking.slabs import READ_BYTES, ReadSlab, Shape

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Peaks:
    """Peaks, highest first.

    Attributes:
        positions: int64 `[n, 3]`, (x, y, z) voxels.
        heights: float64 `[n]`: what they were ranked by.
        scores: float64 `[n]`, the map's values.
    """

    positions: NDArray[np.int64]
    heights: NDArray[np.float64]
    scores: NDArray[np.float64]


def memory_bytes(shape: Shape, min_distance_voxels: float, top_hat_radius_voxels: float = 0.0) -> int:
    """What `peaks` takes at most: a slab with its surroundings and the filters' copies of it, and the peaks."""
    reach = _reach(min_distance_voxels)
    halo = reach + 2 * int(np.ceil(top_hat_radius_voxels))
    slab = (_depth(shape) + 2 * halo) * shape[1] * shape[2]
    most = int(np.prod([side / (reach + 1) + 1 for side in shape]))
    return 6 * 4 * slab + 200 * most


def peaks(
    read_slab: ReadSlab,
    shape: Shape,
    min_distance_voxels: float,
    *,
    least: float = 0.0,
    top_hat_radius_voxels: float = 0.0,
    progress: Progress = no_progress,
) -> Peaks:
    """All peaks above `least` that are at least so far apart: of two nearer ones the higher stays.

    Args:
        read_slab, shape: the map.
        min_distance_voxels: least distance of two peaks.
        least: heights above this count.
        top_hat_radius_voxels: with a radius above 0 peaks are ranked by the map's white top-hat with a ball of that
            radius: how far they stand out of their surroundings, which a broad background does not.
        progress: told how far the work is.
    """
    reach = _reach(min_distance_voxels)
    halo = reach + 2 * int(np.ceil(top_hat_radius_voxels))
    depth = _depth(shape)
    places: list[NDArray[np.int64]] = []
    heights: list[Array] = []
    scores: list[Array] = []
    for z0 in range(0, shape[0], depth):
        z1 = min(z0 + depth, shape[0])
        low, high = max(0, z0 - halo), min(shape[0], z1 + halo)
        slab = np.asarray(read_slab(low, high), np.float32)
        ranked = slab
        if top_hat_radius_voxels > 0:
            ranked = scipy.ndimage.white_tophat(slab, footprint=_ball(top_hat_radius_voxels))
        # a peak is the largest in a cube somewhat smaller than the distance; what is left is settled one by one
        largest = scipy.ndimage.maximum_filter(ranked, size=2 * reach + 1, mode="constant", cval=-np.inf)
        own = slice(z0 - low, z1 - low)
        found = np.nonzero((ranked[own] == largest[own]) & (ranked[own] > least))
        places.append(np.stack([found[2], found[1], found[0] + z0], axis=1).astype(np.int64))
        heights.append(ranked[own][found])
        scores.append(slab[own][found])
        progress(z1 / shape[0], "finding peaks", peaks=sum(map(len, heights)))
    position, height = np.concatenate(places), np.concatenate(heights).astype(np.float64)
    kept = suppress(position, height, min_distance_voxels)
    return Peaks(position[kept], height[kept], np.concatenate(scores)[kept].astype(np.float64))


def _reach(min_distance_voxels: float) -> int:
    """Half the side of the cube in which a peak is the largest: it lies within the ball of the least distance."""
    return max(1, int(min_distance_voxels / np.sqrt(3)))


def _depth(shape: Shape) -> int:
    return max(1, READ_BYTES // (4 * shape[1] * shape[2]))


def _ball(radius: float) -> NDArray[np.bool_]:
    axis = np.arange(-int(np.ceil(radius)), int(np.ceil(radius)) + 1)
    return np.asarray(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 <= radius**2)
