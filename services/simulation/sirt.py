"""SIRT, the simultaneous iterative reconstruction technique (Gilbert, J. Theor. Biol. 36, 105 (1972)).

    f <- f + lambda C A' R (b - A f),   R = 1 / (A 1),  C = 1 / (A' 1)

A is the projection and A' its exact adjoint. Sums of rows and columns normalise, so that a relaxation lambda below 2
converges, to the solution of least squares that is weighted by R (Gregor & Benson, IEEE Trans. Med. Imaging 27, 918
(2008)). Few iterations leave the fine detail, and the noise, behind: that is what it is used for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress, no_progress
from services.simulation.projection import back_project, checked_images, project

Array = NDArray[np.float32]
#: Pixels and voxels whose sum is below this fraction of the largest are met by hardly any ray: they are left out.
SUM_FLOOR = 0.02


@dataclass(frozen=True)
class SirtReconstruction:
    """volume `[z, y, x]`. residuals: |b - A f| / |b| before each iteration."""

    volume: Array
    residuals: list[float]


def sirt(
    stack: Array,
    tilt_angles_degrees: ArrayLike,
    depth: int,
    width: int,
    iterations: int = 20,
    *,
    non_negative: bool = False,
    relaxation: float = 1.0,
    workers: int = 1,
    progress: Progress = no_progress,
) -> SirtReconstruction:
    """The volume of images `[tilt, y, u]` after some iterations from zero.

    Args:
        stack: projections, sums over voxels along the beam.
        tilt_angles_degrees: of each image.
        depth: voxels along z.
        width: voxels along x.
        iterations: how many; more bring finer detail, and noise.
        non_negative: clip what is below zero after each; for densities above a background of zero.
        relaxation: lambda, above 0 and below 2.
        workers: threads; the result does not depend on them.
        progress: told of each iteration and its residual.

    Raises InvalidArgument for angles, sizes or options that make no sense.
    """
    angles = checked_images(stack, tilt_angles_degrees, depth, width)
    if iterations < 1 or not 0 < relaxation < 2:
        raise InvalidArgument(f"iterations {iterations} must be at least 1, relaxation {relaxation:g} within 0 and 2")
    measured = np.ascontiguousarray(stack, np.float32)
    # the sums are the same in every row
    rows = _inverse(project(np.ones((depth, 1, width), np.float32), angles, stack.shape[2]))
    columns = _inverse(back_project(np.ones((len(angles), 1, stack.shape[2]), np.float32), angles, depth, width))
    columns *= np.float32(relaxation)
    norm = float(np.linalg.norm(measured.astype(np.float64).ravel()))
    volume = np.zeros((depth, stack.shape[1], width), np.float32)
    residuals = []
    for iteration in range(iterations):
        difference = measured - project(volume, angles, stack.shape[2], workers=workers) if iteration else measured
        residual = float(np.linalg.norm(difference.astype(np.float64).ravel())) / norm if norm else 0.0
        residuals.append(residual)
        progress(iteration / iterations, "iterating", residual=residual)
        volume += columns * back_project(difference * rows, angles, depth, width, workers)
        if non_negative:
            np.maximum(volume, 0, out=volume)
    return SirtReconstruction(volume, residuals)


def _inverse(sums: Array) -> Array:
    """1 / sums, 0 where they are next to nothing."""
    inverse = np.zeros_like(sums)
    np.divide(1, sums, out=inverse, where=sums > SUM_FLOOR * sums.max())
    return inverse
