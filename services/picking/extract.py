"""Cutting cubic subtomograms out of a tomogram.

A box of side n is cut so that its centre, voxel n // 2 on each axis, lies on the voxel nearest to the particle; what
is left of the particle's position, at most half a voxel, is reported with the box and never lost by rounding.

A binned box is made of n * binning voxels by removing the frequencies above its Nyquist. That keeps voxel 0 in place,
so box voxel j is tomogram voxel corner + j * binning exactly, and the centre rule holds for binned boxes too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.fourier import fourier_crop
from cryofleet.progress import Progress, no_progress
from services.picking.slabs import Array, ReadSlab, RollingWindow, Shape, read_memory_bytes

NORMALISATIONS = ("none", "box", "background")
EDGE_POLICIES = ("skip", "fill_mean")
#: Memory that the window over the tomogram is laid out for.
WINDOW_BYTES = 256 << 20
#: Planes read ahead of the box that is cut, so that a read is worth its request.
AHEAD = 16


@dataclass(frozen=True)
class Placement:
    """Where the boxes lie.

    Attributes:
        rows: int64 `[m]`, which of the particles have a box, rising.
        centres: int64 `[m, 3]`, (x, y, z) of the tomogram voxel that is each box's centre.
        offsets: float64 `[m, 3]`, the particle's position relative to it, in tomogram voxels, within -1/2 (included)
            and 1/2.
        corners: int64 `[m, 3]`, (x, y, z) of each box's first voxel.
        box_size: side of a box after binning, voxels.
        binning: tomogram voxels to a box voxel.
        skipped: how many particles have no box.
    """

    rows: NDArray[np.int64]
    centres: NDArray[np.int64]
    offsets: NDArray[np.float64]
    corners: NDArray[np.int64]
    box_size: int
    binning: int
    skipped: int

    @property
    def side(self) -> int:
        """Side of the boxes in tomogram voxels."""
        return self.box_size * self.binning


def check_box(shape: Shape, box_size: int, binning: int, edges: str) -> None:
    """Raises InvalidArgument for a box that no place in the tomogram has room for, where it must be inside."""
    side = box_size * binning
    if edges == "skip" and side > min(shape):
        binned = f" ({box_size} binned by {binning})" if binning > 1 else ""
        raise InvalidArgument(
            f"a box of {side} voxels{binned} is larger than the tomogram of "
            f"{shape[2]} x {shape[1]} x {shape[0]} voxels (x, y, z)"
        )


def place_boxes(
    positions: NDArray[np.float64], shape: Shape, box_size: int, binning: int = 1, edges: str = "skip"
) -> Placement:
    """Lay a box around every particle.

    Args:
        positions: float64 `[n, 3]`, (x, y, z) in voxels of the tomogram.
        shape: of the tomogram, (z, y, x).
        box_size: side of the boxes after binning.
        binning: tomogram voxels to a box voxel.
        edges: "skip" leaves out particles whose box leaves the tomogram, "fill_mean" only those whose box lies wholly
            outside.

    Raises:
        InvalidArgument: with "skip", a box that no place in the tomogram has room for.
        FailedPrecondition: positions that are not finite.
    """
    if edges not in EDGE_POLICIES:
        raise InvalidArgument(f"edges is {edges!r}, it must be one of {', '.join(EDGE_POLICIES)}")
    check_box(shape, box_size, binning, edges)
    side = box_size * binning
    sides = np.array(shape[::-1])
    wrong = ~(np.abs(positions) < 1e9).all(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise FailedPrecondition(
            f"row {row} of the particles has the position {tuple(positions[row].tolist())}, not one in the tomogram"
        )
    centres = np.floor(positions + 0.5).astype(np.int64)
    corners = centres - box_size // 2 * binning
    if edges == "skip":
        inside = ((corners >= 0) & (corners + side <= sides)).all(axis=1)
    else:
        inside = ((corners < sides) & (corners + side > 0)).all(axis=1)
    rows = np.flatnonzero(inside)
    offsets = positions[rows] - centres[rows]
    return Placement(rows, centres[rows], offsets, corners[rows], box_size, binning, len(positions) - len(rows))


def cut_boxes(
    read_slab: ReadSlab,
    shape: Shape,
    placement: Placement,
    out: Array,
    *,
    normalisation: str = "box",
    progress: Progress = no_progress,
    window_bytes: int = WINDOW_BYTES,
) -> None:
    """Cut the boxes, in the order of `placement.rows`, into `out`, float32 `[m, z, y, x]` (a memory map serves).

    The tomogram is read in z order and every plane at most once, or once for each part along y where the planes that
    a box spans would take more than `window_bytes`. What lies outside of the tomogram gets the mean of the box's part
    inside.

    Args:
        read_slab: reads planes of the tomogram.
        shape: of the tomogram.
        placement: from `place_boxes`.
        out: where the boxes go.
        normalisation: see `normalise`; done after binning.
        progress: told how far the work is.
        window_bytes: memory the window is laid out for.
    """
    background = outside_sphere(placement.box_size)
    depth, tile = _plan(shape, placement.side, window_bytes)
    starts = np.clip(placement.corners[:, 1], 0, shape[1] - 1)
    done = 0
    for first in range(0, shape[1], tile):
        members = np.flatnonzero((starts >= first) & (starts < first + tile))
        rows = (first, min(shape[1], first + tile + placement.side))
        for member, region in _regions(read_slab, shape, placement, members, depth, rows):
            box = fourier_crop(region, placement.binning) if placement.binning > 1 else region
            out[member] = normalise(box, normalisation, background)
            done += 1
            progress(done / len(placement.rows), "cutting boxes", particles=done)


def _regions(
    read_slab: ReadSlab,
    shape: Shape,
    placement: Placement,
    members: NDArray[np.int64],
    depth: int,
    rows: tuple[int, int],
) -> Iterator[tuple[int, Array]]:
    """Boxes that lie in some rows of the tomogram, in the order of their first planes, not binned yet: which, and its
    voxels.
    """
    if len(members) == 0:
        return
    members = members[np.argsort(placement.corners[members, 2], kind="stable")]
    begin = np.maximum(placement.corners[members, 2], 0)
    end = np.minimum(placement.corners[members, 2] + placement.side, shape[0])
    limits = _ends_of_runs(begin, end)
    window = RollingWindow(read_slab, shape, depth, rows)
    for member, z0, z1, limit in zip(members.tolist(), begin.tolist(), end.tolist(), limits.tolist(), strict=True):
        if z1 > window.stop:
            window.advance(z0, min(limit, z0 + depth))
        yield member, _cut(window, shape, placement.corners[member], placement.side, rows[0])


def normalise(box: Array, how: str, background: NDArray[np.bool_]) -> Array:
    """Shift and scale one box, in place: "none" leaves it, "box" gives it mean 0 and standard deviation 1, "background"
    does so over the voxels where `background` holds. A box without contrast there becomes mean 0 and is not scaled.
    """
    if how == "none":
        return box
    if how not in NORMALISATIONS:
        raise InvalidArgument(f"normalisation is {how!r}, it must be one of {', '.join(NORMALISATIONS)}")
    sample = box if how == "box" else box[background]
    mean = sample.mean(dtype=np.float64)
    deviation = sample.std(dtype=np.float64)
    box -= np.float32(mean)
    # of a constant box only rounding is left, which is not to be blown up
    if deviation > 1e-6 * abs(mean):
        box /= np.float32(deviation)
    return box


def outside_sphere(box_size: int) -> NDArray[np.bool_]:
    """Where a cubic box lies outside its inscribed sphere: farther than half a side from the centre voxel."""
    along = np.arange(box_size) - box_size // 2
    squares: NDArray[np.int64] = along**2
    return 4 * (squares[:, None, None] + squares[:, None] + squares) > box_size**2


def memory_bytes(shape: Shape, box_size: int, binning: int = 1, edges: str = "skip") -> int:
    """What `cut_boxes` takes at most, the boxes themselves not counted. Raises as `check_box`."""
    check_box(shape, box_size, binning, edges)
    side = box_size * binning
    depth, tile = _plan(shape, side, WINDOW_BYTES)
    window = 4 * depth * min(shape[1], tile + side) * shape[2]
    # a region, its float64 sums, and one side of it halved by the first of three transforms
    return window + read_memory_bytes(shape) + 16 * side**3 + (64 << 20)


def _plan(shape: Shape, side: int, window_bytes: int) -> tuple[int, int]:
    """How many planes the window holds and how many rows boxes begin in."""
    depth, tile = min(shape[0], side + AHEAD), shape[1]
    while 4 * depth * min(shape[1], tile + side) * shape[2] > window_bytes and tile > side // 2:
        tile = math.ceil(tile / 2)
    return depth, tile


def _ends_of_runs(begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """For spans of planes in the order of their begin, where the run of touching spans ends that each belongs to.

    Reading ahead stops there: planes between runs are not needed.
    """
    reached = np.maximum.accumulate(end)
    starts = np.flatnonzero(np.append(True, begin[1:] > reached[:-1]))
    last = np.append(starts[1:], len(begin)) - 1
    return np.repeat(reached[last], last - starts + 1)


def _cut(window: RollingWindow, shape: Shape, corner: NDArray[np.int64], side: int, first_row: int) -> Array:
    x, y, z = corner.tolist()
    (z0, z1), (y0, y1), (x0, x1) = (
        (max(0, start), min(length, start + side)) for start, length in zip((z, y, x), shape, strict=True)
    )
    inside = window.planes[:, y0 - first_row : y1 - first_row, x0:x1][window.slots(z0, z1)]
    if inside.shape == (side, side, side):
        return inside
    region = np.full((side, side, side), inside.mean(dtype=np.float64), np.float32)
    region[z0 - z : z1 - z, y0 - y : y1 - y, x0 - x : x1 - x] = inside
    return region
