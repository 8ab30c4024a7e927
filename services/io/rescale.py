"""Binning and rescaling in Fourier space, of volumes larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryofleet.numerics.resampling import resampled_length, resampling_matrix
from cryofleet.progress import Progress, no_progress
from cryofleet.scratch_array import ScratchVolume

Array = NDArray[np.float32]
Shape = tuple[int, int, int]

CHUNK_BYTES = 64 << 20
_COPIES = 4


def rescaled_shape(shape: Shape, factor: float) -> Shape:
    """(z, y, x) after rescaling. Raises InvalidArgument where a side is shorter than the factor."""
    depth, height, width = (resampled_length(side, factor) for side in shape)
    return depth, height, width


def rescale(
    read: Callable[[int, int], Array],
    shape: Shape,
    factor: float,
    write: Callable[[Array], object],
    scratch: Path,
    progress: Progress = no_progress,
) -> None:
    """Voxel i of the result lies at i times the factor of the volume, which is taken as periodic.

    Frequencies above the new Nyquist are left out, so that nothing is aliased; the mean is kept. Each axis is one
    matrix product: sections first, which then wait in a file until the lines along z can follow.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x) of the volume.
        factor: the new voxel size over the old.
        write: takes the rescaled slabs in order.
        scratch: folder for two files, of the volume's size over factor squared and cubed.
        progress: called after each chunk.

    Raises InvalidArgument where a side is shorter than the factor, ResourceExhausted where the scratch folder is full.
    """
    depth, height, width = rescaled_shape(shape, factor)
    along_z, along_y, along_x = (resampling_matrix(side, factor) for side in shape)
    with (
        ScratchVolume(scratch / "rescaled-sections.float32", (shape[0], height, width)) as sections,
        ScratchVolume(scratch / "rescaled.float32", (depth, height, width)) as result,
    ):
        step = max(1, CHUNK_BYTES // (4 * shape[1] * max(shape[2], width)))
        for z in range(0, shape[0], step):
            slab = read(z, min(z + step, shape[0])) @ along_x.T
            for section, plane in enumerate(np.matmul(along_y, slab), start=z):
                sections.write_section(section, plane)
            progress(0.8 * min(z + step, shape[0]) / shape[0], "rescaling sections", sections=float(z))
        rows = max(1, CHUNK_BYTES // (4 * max(shape[0], depth) * width))
        for y in range(0, height, rows):
            result.write_rows(y, np.tensordot(along_z, sections.rows(y, min(y + rows, height)), 1))
            progress(0.8 + 0.15 * min(y + rows, height) / height, "rescaling lines", rows=float(y))
        step = max(1, CHUNK_BYTES // (4 * height * width))
        for z in range(0, depth, step):
            write(result.sections(z, min(z + step, depth)))
            progress(0.95 + 0.05 * min(z + step, depth) / depth, "writing")


def memory_bytes(shape: Shape, factor: float) -> int:
    """What `rescale` needs at most: chunks and what becomes of them, and the matrices while they are made."""
    depth, height, width = rescaled_shape(shape, factor)
    section = 4 * max(shape[1] * max(shape[2], width), height * width)
    lines = 4 * max(shape[0], depth) * width
    matrices = sum(4 * side * new for side, new in zip(shape, (depth, height, width), strict=True))
    largest = max(48 * side * new for side, new in zip(shape, (depth, height, width), strict=True))
    return _COPIES * max(CHUNK_BYTES, section, lines) + matrices + largest
