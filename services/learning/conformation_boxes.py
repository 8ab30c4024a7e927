"""Subtomograms as the conformation network takes them: turned into the average's frame, their average, and the
difference of each to it in the components that were imaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition
from cryofleet.numerics.fourier import apply_transfer, forward, inverse
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.wedge import is_sampled, wedge_mask
from cryofleet.progress import Progress, part
from cryofleet.scratch_array import reserved_array
from services.learning.conformation import band, box_sphere

Array = NDArray[np.float32]


def turned_to_average(box: Array, rotation: Rotation, shift_voxels: NDArray[np.float64]) -> Array:
    """A box `[z, y, x]` in the average's frame.

    The particle is reference(R^-1 (r - c - t) + c), so the reference is particle(R (r - c) + c + t): a rotation by R^-1
    and a shift by -R^-1 t. `shift_voxels` is t, x, y, z, in voxels of the box.
    """
    back = rotation.inv()
    return transform_volume(box, back, -back.apply(shift_voxels))


def observed(box_size: int, rotation: Rotation, tilts: tuple[float, float]) -> NDArray[np.bool_]:
    """Which components `[z, y, x // 2 + 1]` of a box in the average's frame were imaged: k where R k is in the tilt
    range.
    """
    matrix = rotation.as_matrix().astype(np.float32)
    full, half = np.fft.fftfreq(box_size).astype(np.float32), np.fft.rfftfreq(box_size).astype(np.float32)
    kz, ky, kx = full[:, None, None], full[None, :, None], half[None, None, :]
    x, z = (matrix[row, 0] * kx + matrix[row, 1] * ky + matrix[row, 2] * kz for row in (0, 2))
    sampled: NDArray[np.bool_] = is_sampled(x, z, *tilts)
    return sampled


def differences(
    chunks: Iterable[tuple[int, Array]],
    rotations: Rotation,
    shifts_voxels: NDArray[np.float64],
    *,
    box_size: int,
    tilts: tuple[float, float],
    cutoff: float,
    scratch: Path,
    memory_limit_bytes: int,
    progress: Progress,
) -> tuple[Array, Array]:
    """The average `[z, y, x]`, and the difference of each box to it `[i, z, y, x]`, both low-passed as
    `conformation.band` has it.

    Boxes come prepared, in chunks (first, boxes), with a rotation and a shift in voxels of the box (n, 3) each. Each
    component of the average is the mean over the boxes that observed it; a difference is 0 where its own box did not.
    The differences are in memory up to the limit, else in a file of `scratch` that is mapped into memory.

    Raises FailedPrecondition where all boxes are the same, ResourceExhausted where the disk is full.
    """
    count = len(rotations)
    shape = (count, box_size, box_size, box_size)
    size_bytes = 4 * count * box_size**3
    turned: Array
    if size_bytes <= memory_limit_bytes:
        turned = np.empty(shape, np.float32)
    else:
        turned = reserved_array(scratch / "differences.float32", shape, np.float32)
    half = (box_size, box_size, box_size // 2 + 1)
    sums, counts = np.zeros(half, np.complex64), np.zeros(half, np.float32)
    averaging, subtracting = part(progress, 0.0, 0.8), part(progress, 0.8, 1.0)
    wedge = wedge_mask((box_size,) * 3, *tilts, half=True)
    sphere = box_sphere(box_size)
    for first, boxes in chunks:
        for row, box in enumerate(apply_transfer(boxes, wedge), start=first):
            turned[row] = turned_to_average(box, rotations[row], shifts_voxels[row])
            seen = observed(box_size, rotations[row], tilts)
            sums += forward(turned[row] * sphere) * seen
            counts += seen
            averaging((row + 1) / count, "turning subtomograms into the average's frame", subtomograms=row + 1)
    kept = band(box_size, cutoff)
    mean = (sums / np.maximum(counts, 1) * kept).astype(np.complex64)
    total = 0.0
    for row in range(count):
        difference = forward(turned[row]) * kept - mean * observed(box_size, rotations[row], tilts)
        turned[row] = sphere * inverse(difference.astype(np.complex64), shape)
        total += float(np.square(turned[row], dtype=np.float64).sum())
        subtracting((row + 1) / count, "subtracting the average")
    if total <= 1e-12 * size_bytes:
        raise FailedPrecondition("all subtomograms are the same: there are no conformations to tell apart")
    return inverse(mean, shape), turned
