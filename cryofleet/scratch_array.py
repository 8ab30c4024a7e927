"""Arrays that are larger than memory, in files of the scratch folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import ResourceExhausted
from cryofleet.space import claim

ScalarT = TypeVar("ScalarT", bound=np.generic)
_FLOAT = np.dtype(np.float32).itemsize


def reserved_array(path: Path, shape: tuple[int, ...], dtype: type[ScalarT]) -> np.memmap[Any, np.dtype[ScalarT]]:
    """A new file mapped as an array of zeros, its disk space claimed at once.

    Mapped without that, a file that finds the disk full later kills the process with SIGBUS. The shape must not be
    empty. Raises ResourceExhausted, naming the folder and the bytes.
    """
    _reserve(path, math.prod(shape) * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, "r+", shape=shape)


class ScratchVolume:
    """A float32 array [section, row, column] in a new file, written and read by sections or by rows.

    Unlike a mapped array's, its pages never count as this process's memory. Its disk space is claimed at once; raises
    ResourceExhausted, naming the folder and the bytes. A context manager, at whose end the file is gone.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._path = path
        _reserve(path, math.prod(shape) * _FLOAT)
        self._file = path.open("r+b", buffering=0)

    def write_section(self, section: int, plane: NDArray[np.float32]) -> None:
        """Writes one section [row, column]."""
        self._write(plane, section * self.shape[1] * self.shape[2])

    def sections(self, first: int, last: int) -> NDArray[np.float32]:
        """Sections first to last."""
        count = last - first
        return self._read((count, *self.shape[1:]), first * self.shape[1] * self.shape[2])

    def write_rows(self, first: int, block: NDArray[np.float32]) -> None:
        """Writes rows from `first` on of all sections, [section, row, column]."""
        for section, rows in enumerate(block):
            self._write(rows, (section * self.shape[1] + first) * self.shape[2])

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows first to last of all sections."""
        block = np.empty((self.shape[0], last - first, self.shape[2]), np.float32)
        for section in range(self.shape[0]):
            block[section] = self._read(block.shape[1:], (section * self.shape[1] + first) * self.shape[2])
        return block

    def box(self, sections: slice, rows: slice, columns: slice) -> NDArray[np.float32]:
        """A copy of a box. The file is mapped for it alone, so that no more pages count than the box touches."""
        mapped = np.memmap(self._file, np.float32, "r", shape=self.shape)
        return np.array(mapped[sections, rows, columns])

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, values: NDArray[np.float32], place: int) -> None:
        self._file.seek(place * _FLOAT)
        left = np.ascontiguousarray(values, np.float32).data.cast("B")
        while left:
            left = left[self._file.write(left) :]

    def _read(self, shape: tuple[int, ...], place: int) -> NDArray[np.float32]:
        self._file.seek(place * _FLOAT)
        return np.fromfile(self._file, np.float32, math.prod(shape)).reshape(shape)


def _reserve(path: Path, size_bytes: int) -> None:
    """A new file of so many bytes, whose disk space is claimed."""
    try:
        with path.open("wb") as file:
            claim(file, size_bytes, path.parent)
    except ResourceExhausted:
        path.unlink(missing_ok=True)
        raise
