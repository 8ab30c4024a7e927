"""Turning a volume about its centre, and what becomes of its missing wedge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.progress import Progress, no_progress, part
from cryofleet.scratch_array import ScratchVolume

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
Order = Literal[0, 1, 3]

#: Side of the bricks of the result, each of which needs a box of the volume up to 1.8 times as long.
SIDE = 96
CHUNK_BYTES = 64 << 20
#: Voxels about a point that a cubic spline looks at, and one for rounding.
_REACH = 3


def rotate(
    read: Callable[[int, int], Array],
    shape: Shape,
    rotation: Rotation,
    order: Order,
    write: Callable[[Array], object],
    scratch: Path,
    progress: Progress = no_progress,
) -> None:
    """Turns a volume about its centre c, voxel n // 2: result(r) = volume(R^-1 (r - c) + c).

    As `scipy.ndimage.affine_transform` in its mode "constant" has it, with the volume's mean for what comes from
    outside. The spline coefficients lie in a file of the scratch folder, as large as the volume, of which each brick of
    the result maps the box it needs.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x) of the volume, and of the result.
        rotation: active, of (x, y, z).
        order: of the splines: 3 cubic, 1 linear, 0 the nearest voxel.
        write: takes the slabs in order.
        scratch: folder for the file.
        progress: called after each piece.

    Raises ResourceExhausted where the scratch folder is full.
    """
    with ScratchVolume(scratch / "coefficients.float32", shape) as coefficients:
        mean = _fill(coefficients, read, order, part(progress, 0.0, 0.3))
        inverse = rotation.inv().as_matrix()[::-1, ::-1]
        centre = np.array([side // 2 for side in shape])
        for start in range(0, shape[0], SIDE):
            stop = min(start + SIDE, shape[0])
            slab = np.empty((stop - start, *shape[1:]), np.float32)
            for y, x in itertools.product(range(0, shape[1], SIDE), range(0, shape[2], SIDE)):
                target = slab[:, y : y + SIDE, x : x + SIDE]
                offset = centre + inverse @ (np.array([start, y, x]) - centre)
                target[...] = _brick(coefficients, inverse, offset, target.shape, order, mean)
                progress(0.3 + 0.7 * (start + (stop - start) * y / shape[1]) / shape[0], "turning")
            write(slab)


def memory_bytes(shape: Shape) -> int:
    """What `rotate` needs at most: chunks while coefficients are made; then a slab of the result and a brick's box."""
    section = 4 * shape[1] * shape[2]
    lines = 4 * shape[0] * shape[2]
    making = 6 * max(CHUNK_BYTES, section, lines)
    # A mapped page holds 1024 voxels of a row, more than a box does.
    rows = math.ceil(SIDE * math.sqrt(3) + 2 * _REACH) ** 2
    turning = 2 * min(SIDE, shape[0]) * section + rows * (4096 + 4 * 2 * SIDE) + 16 * SIDE**3
    return max(making, turning)


def rotated_tilt_range(
    tilt_min_degrees: float, tilt_max_degrees: float, rotation: Rotation
) -> tuple[float, float] | None:
    """The tilt range of a volume after a rotation, None where the missing wedge is no longer about the y axis.

    A slice's direction (cos tilt, 0, sin tilt) turns with the volume; both ends are folded into -90 to 90 degrees.
    Where the turned range passes +-90 degrees no lowest and highest tilt describe it.
    """
    if tilt_min_degrees <= -90 and tilt_max_degrees >= 90:
        return -90.0, 90.0
    if abs(abs(rotation.apply([0.0, 1.0, 0.0])[1]) - 1) > 1e-9:
        return None
    turned = []
    for tilt in (tilt_min_degrees, (tilt_min_degrees + tilt_max_degrees) / 2, tilt_max_degrees):
        x, _, z = rotation.apply([math.cos(math.radians(tilt)), 0.0, math.sin(math.radians(tilt))])
        if x < 0:
            x, z = -x, -z
        turned.append(math.degrees(math.atan2(z, x)))
    low, middle, high = turned
    if high < low:
        low, high = high, low
    return (round(low, 9), round(high, 9)) if low < middle < high else None


def _fill(coefficients: ScratchVolume, read: Callable[[int, int], Array], order: Order, progress: Progress) -> float:
    """Writes the volume's spline coefficients; its mean."""
    depth, height, width = coefficients.shape
    total = 0.0
    step = max(1, CHUNK_BYTES // (4 * height * width))
    for z in range(0, depth, step):
        slab = read(z, min(z + step, depth))
        total += float(slab.sum(dtype=np.float64))
        for section, plane in enumerate(_prefiltered(_prefiltered(slab, 2, order), 1, order), start=z):
            coefficients.write_section(section, plane)
        progress(0.5 * min(z + step, depth) / depth, "preparing splines")
    if order > 1:
        rows = max(1, CHUNK_BYTES // (4 * depth * width))
        for y in range(0, height, rows):
            coefficients.write_rows(y, _prefiltered(coefficients.rows(y, min(y + rows, height)), 0, order))
            progress(0.5 + 0.5 * min(y + rows, height) / height, "preparing splines")
    return total / (depth * height * width)


def _prefiltered(values: Array, axis: int, order: Order) -> Array:
    if order < 2 or values.shape[axis] < 2:
        return values
    return np.asarray(scipy.ndimage.spline_filter1d(values, order, axis, np.float32, "mirror"), np.float32)


def _brick(
    coefficients: ScratchVolume,
    matrix: NDArray[np.float64],
    offset: NDArray[np.float64],
    shape: tuple[int, ...],
    order: Order,
    outside: float,
) -> Array:
    """The brick whose voxel i comes from `matrix` i + `offset` of the volume."""
    corners = np.array(list(itertools.product(*[(0, side - 1) for side in shape]))) @ matrix.T + offset
    limits = np.array(coefficients.shape)
    low = np.clip(np.floor(corners.min(axis=0)).astype(int) - _REACH, 0, limits)
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + _REACH + 1, 0, limits)
    if (low >= high).any():
        return np.full(shape, outside, np.float32)
    box = coefficients.box(*[slice(int(a), int(b)) for a, b in zip(low, high, strict=True)])
    turned = np.empty(shape, np.float32)
    scipy.ndimage.affine_transform(
        box, matrix, offset - low, output=turned, order=order, mode="constant", cval=outside, prefilter=False
    )
    return turned
