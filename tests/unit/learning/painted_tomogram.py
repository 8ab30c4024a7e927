"""A tomogram for tests of annotation: globules and membranes of the same density in noise, and which voxel is which."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GLOBULE, MEMBRANE = 1, 2


def tomogram(
    shape: tuple[int, int, int], seed: int, noise: float = 1.0, pitch: int = 32
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Density `[z, y, x]`, protein negative, and the kind of each voxel.

    On a lattice lie balls of radius 6 and, by turns, hollow shells of radius 10 and thickness 3, all of density 1.
    """
    random = np.random.default_rng(seed)
    kinds = np.zeros(shape, np.uint8)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    number = 0
    for cz in range(pitch // 2, shape[0], pitch):
        for cy in range(pitch // 2, shape[1], pitch):
            for cx in range(pitch // 2, shape[2], pitch):
                dz, dy, dx = random.uniform(-4, 4, 3)
                radius = np.sqrt((z - cz - dz) ** 2 + (y - cy - dy) ** 2 + (x - cx - dx) ** 2)
                if number % 2:
                    kinds[np.abs(radius - 10) <= 1.5] = MEMBRANE
                else:
                    kinds[radius <= 6] = GLOBULE
                number += 1
    density = -(kinds > 0).astype(np.float32) + noise * random.standard_normal(shape).astype(np.float32)
    return density.astype(np.float32), kinds


def painted_patches(
    kinds: NDArray[np.uint8], feature: int, places: list[tuple[int, int, int]], size: int
) -> NDArray[np.uint8]:
    """A mask in which squares of `size` voxels from each (z, y, x) on are painted."""
    mask = np.zeros(kinds.shape, np.uint8)
    for z, y, x in places:
        square = kinds[z, y : y + size, x : x + size]
        mask[z, y : y + size, x : x + size] = np.where(square == feature, 1, 2)
    return mask


def dice(found: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))
