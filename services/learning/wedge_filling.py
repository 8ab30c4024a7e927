"""The missing wedge of a tomogram, filled from another volume of the same sample.

What was measured stays: inside of the wedge mask the result has the tomogram's Fourier components, outside of it those
of the other volume. The mask does not depend on the frequency along the tilt axis, y, so sections along x and z are
filled one by one, and a tomogram need not fit into memory.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.numerics.wedge import wedge_mask
from cryofleet.progress import Progress
from cryofleet.scratch_array import ScratchVolume

Array = NDArray[np.float32]
Shape = tuple[int, int, int]

CHUNK_BYTES = 32 << 20
"""Rows are filled in chunks of about this size."""


def on_its_side(volumes: Array) -> Array:
    """Volumes (..., z, y, x) turned by 90 degrees about the tilt axis, so that the beam ran along x; a view.

    Zeng et al. 2024 exchange x and z, which would mirror what is in them.
    """
    turned: Array = np.rot90(volumes, axes=(-3, -1))
    return turned


def fill(measured: Array, other: Array, tilt_min_degrees: float, tilt_max_degrees: float) -> Array:
    """Rows (z, y, x), any number along y, of the measured volume with those of the other in its missing wedge."""
    depth, _, width = measured.shape
    mask = wedge_mask((depth, 1, width), tilt_min_degrees, tilt_max_degrees, half=True)
    inside, outside = (scipy.fft.rfftn(each, axes=(0, 2)) for each in (measured, other))
    chosen = np.where(mask > 0, inside, outside)
    # SciPy's types know of double precision alone; single stays single.
    return cast(Array, scipy.fft.irfftn(chosen, (depth, width), axes=(0, 2), overwrite_x=True))


def fill_volume(
    measured: ScratchVolume,
    other: ScratchVolume,
    tilt_min_degrees: float,
    tilt_max_degrees: float,
    progress: Progress,
) -> None:
    """`fill` all rows of volumes [z, y, x]; the result takes the place of the other volume."""
    height = measured.shape[1]
    step = _rows(measured.shape)
    for y in range(0, height, step):
        last = min(y + step, height)
        rows = fill(measured.rows(y, last), other.rows(y, last), tilt_min_degrees, tilt_max_degrees)
        other.write_rows(y, rows)
        progress(last / height, "filling the missing wedge", rows=last)


def memory_bytes(shape: Shape) -> int:
    """What `fill_volume` takes: rows of both volumes, their spectra and what becomes of them."""
    return 6 * 4 * _rows(shape) * shape[0] * (shape[2] + 2)


def _rows(shape: Shape) -> int:
    return max(1, CHUNK_BYTES // (4 * shape[0] * shape[2]))
