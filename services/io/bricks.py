"""Filters that look only at a voxel's surroundings: brick by brick, so that memory is bounded whatever the volume."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cryofleet.progress import Progress, no_progress

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
ReadSlab = Callable[[int, int], Array]

#: Side of a brick in y and x without its halo, and in z where the slab allows it.
SIDE = 128
#: A slab of the volume, which bricks are cut from, with its halo.
SLAB_BYTES = 256 << 20
_LEAST_THICKNESS = 16


def by_bricks(
    read: ReadSlab,
    shape: Shape,
    halo: int,
    function: Callable[[Array], Array],
    write: Callable[[Array], object],
    progress: Progress = no_progress,
    phase: str = "filtering",
    workers: int = 1,
) -> None:
    """Applies a local filter to a volume.

    Each brick is given with `halo` voxels around it, fewer only where the volume ends, so that the result is that of
    the whole volume where no voxel of it depends on one further away. Bricks begin at multiples of 16 voxels.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x) of the volume.
        halo: voxels around a brick; a multiple of the grid's step for filters that have a grid.
        function: from a brick with its halo to one of the same shape. Must not change what it gets.
        write: takes the filtered slabs in order.
        progress: called after each brick.
        phase: what progress calls the work.
        workers: bricks filtered at once.
    """
    depth, height, width = shape
    thickness = _thickness(shape, halo)
    corners = list(itertools.product(range(0, height, SIDE), range(0, width, SIDE)))
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, depth, thickness):
            stop = min(start + thickness, depth)
            first = max(0, start - halo)
            slab = read(first, min(stop + halo, depth))
            result = np.empty((stop - start, height, width), np.float32)

            def run(
                corner: tuple[int, int], slab: Array = slab, result: Array = result, skipped: int = start - first
            ) -> None:
                (y, y_kept), (x, x_kept) = (_window(at, side, halo) for at, side in zip(corner, shape[1:], strict=True))
                filtered = function(slab[:, y, x])
                target = result[:, corner[0] : corner[0] + SIDE, corner[1] : corner[1] + SIDE]
                target[...] = filtered[skipped : skipped + len(result), y_kept, x_kept]

            for done, _ in enumerate(pool.map(run, corners), start=1):
                share = done / len(corners)
                progress((start + (stop - start) * share) / depth, phase, sections=float(start))
            write(result)
            # before the next is read
            del slab, result, run


def memory_bytes(shape: Shape, halo: int, copies: int, workers: int = 1) -> int:
    """What `by_bricks` needs at most, of a filter that holds so many arrays of a brick's size."""
    thickness = _thickness(shape, halo)
    section = 4 * shape[1] * shape[2]
    brick = 4 * (thickness + 2 * halo) * min(SIDE + 2 * halo, shape[1]) * min(SIDE + 2 * halo, shape[2])
    # A slab, what becomes of it, and the writer's own copy.
    return (3 * thickness + 2 * halo) * section + workers * copies * brick


def _thickness(shape: Shape, halo: int) -> int:
    sections = SLAB_BYTES // (4 * shape[1] * shape[2]) - 2 * halo
    return min(SIDE, max(_LEAST_THICKNESS, sections // _LEAST_THICKNESS * _LEAST_THICKNESS))


def _window(start: int, side: int, halo: int) -> tuple[slice, slice]:
    """What is given of an axis for the brick that begins at `start`, and what of the result is kept."""
    stop = min(start + SIDE, side)
    first = max(0, start - halo)
    return slice(first, min(stop + halo, side)), slice(start - first, stop - first)
