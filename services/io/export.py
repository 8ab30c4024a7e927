"""Volumes and particles for other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.formats import mrc
from cryofleet.formats.statistics import RunningStatistics
from cryofleet.progress import Progress, no_progress, part

ReadSlab = Callable[[int, int], NDArray[np.float32]]

_SLAB_BYTES = 16 << 20
_STORED: dict[int, np.dtype[Any]] = {0: np.dtype("<i1"), 1: np.dtype("<i2"), 2: np.dtype("<f4"), 12: np.dtype("<f2")}


def write_mrc(
    path: Path,
    read: ReadSlab,
    shape: tuple[int, int, int],
    voxel_size_angstrom: float,
    mode: int,
    labels: tuple[str, ...] = (),
    progress: Progress = no_progress,
) -> None:
    """Writes a volume as an MRC file of mode 0 (int8), 1 (int16), 2 (float32) or 12 (float16), slab by slab.

    Integers span the volume's whole range: value = stored * scale + offset, both of which a label of the file states.
    The header's statistics are those of the stored numbers, as MRC has it.

    Args:
        path: the file to be written.
        read: sections start to stop of the volume, float32 [z, y, x].
        shape: (z, y, x).
        voxel_size_angstrom: of the volume.
        mode: 0, 1, 2 or 12.
        labels: further labels, put first.
        progress: of the whole.

    Raises:
        FailedPrecondition: a voxel is beyond what float16 holds.
    """
    dtype = _STORED[mode]
    scale, offset = 1.0, 0.0
    writing = progress
    if dtype.kind == "i":
        running = RunningStatistics()
        for slab in _slabs(read, shape, part(progress, 0.0, 0.4), "finding the range"):
            running.update(slab)
        writing = part(progress, 0.4, 1.0)
        found = running.result()
        limits = np.iinfo(dtype)
        if found.maximum > found.minimum:
            scale = (found.maximum - found.minimum) / (limits.max - limits.min)
        offset = found.minimum - limits.min * scale
        labels = (*labels, f"cryofleet scaled: value = stored * {scale:.9g} + {offset:.9g}")

    running = RunningStatistics()
    with path.open("wb") as file:
        file.write(bytes(mrc.HEADER_BYTES))
        for slab in _slabs(read, shape, writing, "writing"):
            if dtype.kind == "i":
                scaled = np.rint((slab.astype(np.float64) - offset) / scale)
                stored = np.clip(scaled, limits.min, limits.max).astype(dtype)
            else:
                largest, end = float(np.abs(slab).max()), float(np.finfo(dtype).max)
                if largest > end:
                    raise FailedPrecondition(
                        f"the volume holds {largest:g}; float16 (mrc_mode 12) ends at {end:g}: take mrc_mode 1 or 2"
                    )
                stored = slab.astype(dtype)
            running.update(stored)
            file.write(np.ascontiguousarray(stored).data)
        file.seek(0)
        file.write(mrc.encode_header(shape, voxel_size_angstrom, mode, running.result(), labels))


def _slabs(
    read: ReadSlab, shape: tuple[int, int, int], progress: Progress, phase: str
) -> Iterator[NDArray[np.float32]]:
    depth, height, width = shape
    thickness = max(1, _SLAB_BYTES // (4 * height * width))
    for start in range(0, depth, thickness):
        progress(start / depth, phase)
        yield read(start, min(start + thickness, depth))
    progress(1.0, phase)
