"""A copy of a volume in small cubes on a local disk, from which planes along any axis are read quickly.

In a volume's own file a plane perpendicular to x lies scattered over all of it: reading one reads the whole. In cubes
it is the cubes that it passes through.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import DataLoss
from cryofleet.progress import Progress, no_progress
from cryofleet.space import claim

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
ReadSlab = Callable[[int, int], Array]

SIDE = 16
_SLAB_BYTES = 128 << 20
_ITEM = 4
_COLUMNS = threading.Lock()
"""Perpendicular to x a plane is thousands of short reads. Threads that do so at the same time mostly hand the
interpreter to each other: four of them took four times the CPU that they take in turn.
"""


class Cubes:
    """A volume in cubes; any number of threads may read."""

    def __init__(self, path: Path, shape: Shape) -> None:
        """`path` is what `make` wrote of a volume of shape (z, y, x)."""
        self.shape = shape
        self._depth = _cube_depth(shape)
        self._counts = _counts(shape, self._depth)
        self._cube_bytes = self._depth * SIDE * SIDE * _ITEM
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # When the last reader has let it go, also after the file was removed.
        weakref.finalize(self, os.close, self._descriptor)

    def plane(self, axis: Literal["x", "y"], position: int) -> Array:
        """The plane at a voxel: [z, x] perpendicular to y, [z, y] perpendicular to x. Raises DataLoss."""
        depth, height, width = self.shape
        layers, rows, columns = self._counts
        number, inside = divmod(position, SIDE)
        cut = np.empty((layers, self._depth, (columns if axis == "y" else rows) * SIDE), np.float32)
        if axis == "y":
            for layer in range(layers):
                cubes = self._read((layer * rows + number) * columns, columns)
                cut[layer] = cubes[:, :, inside].transpose(1, 0, 2).reshape(self._depth, -1)
        else:
            with _COLUMNS:
                for layer, row in np.ndindex(layers, rows):
                    cube = self._read((layer * rows + row) * columns + number, 1)[0]
                    cut[layer, :, row * SIDE : (row + 1) * SIDE] = cube[:, :, inside]
        return cut.reshape(layers * self._depth, -1)[:depth, : width if axis == "y" else height]

    def _read(self, first: int, count: int) -> Array:
        wanted = count * self._cube_bytes
        data = os.pread(self._descriptor, wanted, first * self._cube_bytes)
        if len(data) != wanted:
            raise DataLoss(f"{self._path} has become shorter")
        return np.frombuffer(data, np.float32).reshape(count, self._depth, SIDE, SIDE)


def file_bytes(shape: Shape) -> int:
    """What the copy of a volume takes."""
    depth = _cube_depth(shape)
    return math.prod(_counts(shape, depth)) * depth * SIDE * SIDE * _ITEM


def make(read: ReadSlab, shape: Shape, path: Path, progress: Progress = no_progress) -> None:
    """Copy a volume into cubes; what is beyond its sides is not set.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x).
        path: of the new file.
        progress: called after each layer of cubes.

    Raises ResourceExhausted where the disk has no room.
    """
    depth = _cube_depth(shape)
    layers, rows, columns = _counts(shape, depth)
    with path.open("xb") as file:
        claim(file, file_bytes(shape), path.parent)
        # One row of cubes at a time: beside the sections only so much is held.
        padded = np.zeros((depth, SIDE, columns * SIDE), np.float32)
        for layer in range(layers):
            sections = read(layer * depth, min((layer + 1) * depth, shape[0]))
            for row in range(rows):
                part = sections[:, row * SIDE : (row + 1) * SIDE]
                padded[: len(part), : part.shape[1], : shape[2]] = part
                cubes = padded.reshape(depth, SIDE, columns, SIDE).transpose(2, 0, 1, 3)
                file.write(np.ascontiguousarray(cubes).data.cast("B"))
            progress((layer + 1) / layers, "arranging the volume")


def _cube_depth(shape: Shape) -> int:
    """Of planes so large that sixteen of them are too many to hold, cubes are flat."""
    return max(1, min(SIDE, _SLAB_BYTES // (_ITEM * shape[1] * shape[2])))


def _counts(shape: Shape, depth: int) -> tuple[int, int, int]:
    return math.ceil(shape[0] / depth), math.ceil(shape[1] / SIDE), math.ceil(shape[2] / SIDE)
