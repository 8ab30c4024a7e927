"""Subtomograms for tests of conformations: a body with a domain that swings, in all orientations, behind a wedge."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.fourier import apply_transfer
from cryofleet.numerics.rotations import uniform_random
from cryofleet.numerics.wedge import wedge_mask
from tests.unit.learning.shapes import blobs

BODY = ((0, 0, 0, 1.6, 1.0), (-2.8, 0, 1, 1.2, 1.0), (1, -2, -2.4, 1.2, 0.9))
RADIUS = 3.6
SWING_DEGREES = 50.0
TILTS = (-60.0, 60.0)


def domain_centre(motion: float) -> NDArray[np.float64]:
    """x, y, z in voxels from the box's centre, for a motion of -1 to 1."""
    angle = np.radians(SWING_DEGREES * motion)
    return np.array([RADIUS * np.sin(angle), RADIUS * np.cos(angle), 0.0])


def structure(
    motion: float, side: int, rotation: Rotation | None = None, shift: tuple[float, ...] = (0, 0, 0)
) -> NDArray[np.float32]:
    return blobs((*BODY, (*domain_centre(motion), 1.3, 2.0)), side, rotation, shift)


def subtomograms(
    count: int, side: int, seed: int, noise: float
) -> tuple[NDArray[np.float32], NDArray[np.float64], Rotation, NDArray[np.float64]]:
    """Boxes with protein positive behind a wedge of -60° to 60°, their motions, rotations and shifts (n, 3) in voxels.

    `noise`: standard deviation, before the wedge; the structure's own is about 0.25.
    """
    random = np.random.default_rng(seed)
    motions = random.uniform(-1, 1, count)
    rotations = uniform_random(count, random)
    shifts = random.uniform(-1, 1, (count, 3))
    wedge = wedge_mask((side,) * 3, *TILTS, half=True)
    boxes = np.stack([structure(motions[i], side, rotations[i], tuple(shifts[i])) for i in range(count)])
    boxes = apply_transfer(boxes + noise * random.standard_normal(boxes.shape).astype(np.float32), wedge)
    return boxes, motions, rotations, shifts
