"""Small tomograms of two shapes whose labels are known."""

from __future__ import annotations

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

BALL, ROD = 1, 2
NAMES = ["ice", "ball", "rod"]


def two_shapes(
    seed: int, side: int = 64, count: int = 14, noise: float = 0.3
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]:
    """A volume, protein positive, of balls and rods by turns in white noise, its labels `[z, y, x]`, and the shapes'
    centres (n, 3) as x, y, z with their labels (n,). No two of them touch.
    """
    random = np.random.default_rng(seed)
    labels = np.zeros((side, side, side), np.uint8)
    z, y, x = np.mgrid[:side, :side, :side]
    centres: list[NDArray[np.float64]] = []
    while len(centres) < count:
        centre = random.uniform(7, side - 7, 3)
        if any(np.linalg.norm(centre - other) < 13 for other in centres):
            continue
        centres.append(centre)
        offsets = (x - centre[0], y - centre[1], z - centre[2])
        squared = sum(offset**2 for offset in offsets)
        if len(centres) % 2:
            labels[squared <= 5**2] = BALL
        else:
            axis = random.normal(size=3)
            axis /= np.linalg.norm(axis)
            along = sum(offset * part for offset, part in zip(offsets, axis, strict=True))
            labels[(squared - along**2 <= 2.6**2) & (np.abs(along) <= 6)] = ROD
    volume = 3 * scipy.ndimage.gaussian_filter((labels > 0).astype(np.float32), 1)
    volume += noise * random.standard_normal(labels.shape).astype(np.float32)
    return volume, labels, np.array(centres), np.arange(count) % 2 + 1
