"""Slices of a volume along an axis, each the mean over a slab, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cryofleet.progress import Progress, no_progress

Axis = Literal["x", "y", "z"]
Picture = NDArray[np.float32]
ReadSlab = Callable[[int, int], NDArray[np.float32]]
Shape = tuple[int, int, int]

_SLAB_BYTES = 16 << 20


@dataclass(frozen=True)
class Slab:
    """Sections first <= i < last along an axis."""

    axis: Axis
    first: int
    last: int

    def name(self) -> str:
        """As it is written on a picture: z 120, or z 118-122."""
        return f"{self.axis} {self.first}" + (f"-{self.last - 1}" if self.last - self.first > 1 else "")


def side(shape: Shape, axis: Axis) -> int:
    """Voxels of a volume of shape (z, y, x) along an axis."""
    return shape["zyx".index(axis)]


def picture_shape(shape: Shape, axis: Axis) -> tuple[int, int]:
    """Rows and columns of a slice perpendicular to an axis."""
    rows, columns = (length for name, length in zip("zyx", shape, strict=True) if name != axis)
    return rows, columns


def slab_at(shape: Shape, axis: Axis, position: int, thickness_voxels: float) -> Slab:
    """The slab around a voxel: an odd number of sections, the nearest to the thickness, as far as the volume goes."""
    half = max(0, round((thickness_voxels - 1) / 2))
    return Slab(axis, max(0, position - half), min(side(shape, axis), position + half + 1))


def mean_slices(
    read: ReadSlab, shape: Shape, slabs: Sequence[Slab], progress: Progress = no_progress, phase: str = "reading"
) -> list[Picture]:
    """The mean of each slab: [y, x] along z, [z, x] along y and [z, y] along x.

    The volume is read once, and only those of its sections that some slab needs.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x).
        slabs: any number, none of them empty.
        progress: called after each piece that is read.
        phase: what progress calls it.
    """
    depth, height, width = shape
    distinct = list(dict.fromkeys(slabs))
    flat = [slab for slab in distinct if slab.axis == "z"]
    steep = [slab for slab in distinct if slab.axis != "z"]
    sums = {slab: np.zeros((height, width), np.float64) for slab in flat}
    means = {slab: np.empty((depth, width if slab.axis == "y" else height), np.float32) for slab in steep}
    step = max(1, _SLAB_BYTES // (4 * height * width))
    for begin in range(0, depth, step):
        end = min(begin + step, depth)
        needed = [slab for slab in flat if slab.first < end and slab.last > begin]
        if steep:
            start, stop = begin, end
        elif needed:
            start = max(begin, min(slab.first for slab in needed))
            stop = min(end, max(slab.last for slab in needed))
        else:
            continue
        sections = read(start, stop)
        for slab in steep:
            part = slice(slab.first, slab.last)
            means[slab][start:stop] = (
                sections[:, part].mean(axis=1) if slab.axis == "y" else sections[:, :, part].mean(axis=2)
            )
        for slab in needed:
            first, last = max(start, slab.first), min(stop, slab.last)
            sums[slab] += sections[first - start : last - start].sum(axis=0, dtype=np.float64)
        progress(end / depth, phase)
    for slab, total in sums.items():
        means[slab] = (total / (slab.last - slab.first)).astype(np.float32)
    return [means[slab] for slab in slabs]


def memory_bytes(shape: Shape, axis: Axis, count: int) -> int:
    """What `mean_slices` of so many slabs along an axis needs: the pieces it reads, and the sums."""
    piece = max(_SLAB_BYTES, 4 * shape[1] * shape[2])
    rows, columns = picture_shape(shape, axis)
    # Sums of float64 become means; then they are sorted for percentiles.
    return 2 * piece + 16 * count * rows * columns
