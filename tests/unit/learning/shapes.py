"""Structures for tests: boxes [i, z, y, x] with protein positive."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

#: Gaussian blobs (x, y, z, sigma, weight) in voxels from the centre: three different axes and no mirror symmetry.
CHIRAL = ((0, 0, 0, 2.2, 1.0), (5.5, 0, 0, 1.6, 0.9), (-2.5, 3.6, 0, 1.5, 0.8), (-1, -1, 2.6, 1.3, 0.9))


def blobs(
    parts: tuple[tuple[float, ...], ...],
    side: int,
    rotation: Rotation | None = None,
    shift: tuple[float, ...] = (0, 0, 0),
) -> NDArray[np.float32]:
    """A sum of Gaussians, turned about the box centre and then shifted by (x, y, z) voxels."""
    turn = rotation or Rotation.identity()
    z, y, x = np.mgrid[:side, :side, :side] - side // 2
    box = np.zeros((side, side, side))
    for px, py, pz, sigma, weight in parts:
        cx, cy, cz = turn.apply([px, py, pz]) + np.array(shift)
        box += weight * np.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / (2 * sigma**2))
    return box.astype(np.float32)


def correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def two_kinds(count: int, side: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Small balls and hollow shells in weak noise, by turns; and which is which."""
    random = np.random.default_rng(seed)
    offset = np.arange(side) - side // 2
    radius = np.sqrt(offset[:, None, None] ** 2 + offset[None, :, None] ** 2 + offset[None, None, :] ** 2)
    ball = np.exp(-(radius**2) / (2 * (side / 10) ** 2))
    shell = np.exp(-((radius - side / 3.2) ** 2) / (2 * (side / 16) ** 2))
    kinds = np.arange(count) % 2
    boxes = np.where(kinds[:, None, None, None] == 0, ball, shell) + 0.15 * random.standard_normal((count, *ball.shape))
    return boxes.astype(np.float32), kinds
