"""A tomogram binned by cropping in Fourier space, as boxes are, though it may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.progress import Progress
from cryofleet.scratch_array import ScratchVolume

Array = NDArray[np.float32]
Shape = tuple[int, int, int]

CHUNK_BYTES = 32 * 2**20


def binned_shape(shape: Shape, factor: int) -> Shape:
    """(z, y, x) after binning; voxels that the factor does not divide are lost at the end."""
    return shape[0] // factor, shape[1] // factor, shape[2] // factor


def bin_volume(
    read: Callable[[int, int], Array], shape: Shape, factor: int, scratch: Path, progress: Progress
) -> ScratchVolume:
    """The volume of that shape, of which `read(z0, z1)` gives planes, binned as `fourier_crop` does it; in a file.

    The planes are binned first, and wait in another file until the lines along z can be. Close it in the end. Raises
    ResourceExhausted where the disk is full.
    """
    depth, height, width = binned_shape(shape, factor)
    used = depth * factor
    result = ScratchVolume(scratch / "binned.float32", (depth, height, width))
    with ScratchVolume(scratch / "binned-planes.float32", (used, height, width)) as half:
        step = max(1, CHUNK_BYTES // (4 * shape[1] * shape[2]))
        for z in range(0, used, step):
            slab = read(z, min(z + step, used))[:, : height * factor, : width * factor]
            slab = _bin_axis(_bin_axis(slab, -1, factor), -2, factor)
            for section, plane in enumerate(slab, start=z):
                half.write_section(section, plane)
            progress(0.5 * min(z + step, used) / used, "binning")
        rows = max(1, CHUNK_BYTES // (4 * used * width))
        for y in range(0, height, rows):
            result.write_rows(y, _bin_axis(half.rows(y, min(y + rows, height)), 0, factor))
            progress(0.5 + 0.5 * min(y + rows, height) / height, "binning")
    return result


def nearest_voxels(side: int, binned_side: int, factor: int) -> NDArray[np.int64]:
    """(side,): for each voxel of an axis the binned voxel that is nearest; binned voxel i lies on voxel i * factor."""
    # In the middle between two the first one.
    return np.minimum((np.arange(side) + (factor - 1) // 2) // factor, binned_side - 1)


def memory_bytes(shape: Shape, factor: int) -> int:
    """Memory of `bin_volume`: a chunk, its spectrum and what becomes of it."""
    rows = 4 * shape[0] * (shape[2] // factor)
    return 6 * max(CHUNK_BYTES, 4 * shape[1] * shape[2], rows)


def _bin_axis(values: Array, axis: int, factor: int) -> Array:
    """One axis, whose length is a multiple of the factor, without the frequencies above the new Nyquist."""
    length = values.shape[axis] // factor
    spectrum = scipy.fft.rfft(values, axis=axis)
    kept = np.take(spectrum, np.arange(length // 2 + 1), axis=axis)
    binned: Array = (scipy.fft.irfft(kept, length, axis=axis) / np.float32(factor)).astype(np.float32, copy=False)
    return binned
