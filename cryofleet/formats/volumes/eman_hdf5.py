"""Volumes as HDF5 the way EMAN2 writes it: /MDF/images/0/image [z, y, x], and attributes EMAN.* of its group.

What EMAN2 stores in fewer bits stands for min + stored (max - min) / (2^bits - 1), of the attributes stored_rendermin,
stored_rendermax and stored_renderbits. The voxel size is apix_x, apix_y, apix_z in Å, the origin origin_x, ... in Å.

Where the voxels lie in the file, `hdf5_layout` finds in a process of its own; they are read here, each place and size
compared with the file before.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.statistics import RunningStatistics
from cryofleet.formats.volumes import hdf5_layout
from cryofleet.formats.volumes.em import as_float32
from cryofleet.formats.volumes.frame import Sizes, VolumeData, VolumeFrame, check_sparse_shape
from cryofleet.progress import Progress, no_progress

MAGIC = b"\x89HDF\r\n\x1a\n"
_DATASET = "/MDF/images/0/image"
_DEFLATE, _SHUFFLE, _CHECKSUM = 1, 2, 3
_FILTERS = {_DEFLATE, _SHUFFLE, _CHECKSUM}
_MAX_CHUNK_BYTES = 256 << 20
_TYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "f2", "f4", "f8")
_LAYOUT_SECONDS = 120
_ROW_BYTES = 6 * 8
_NOTE = "cryofleet_frame"


class EmanVolume:
    """One volume in an HDF5 file of EMAN2, read slab by slab.

    Raises on opening:
        InvalidArgument: the file is damaged, or not of EMAN2.
        FailedPrecondition: it does not hold one volume of real numbers, or is compressed in a way that is not read.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or path.name
        self._path = path
        said, self._chunks = _layout(path, self.name)
        self._size_bytes = path.stat().st_size
        try:
            self._attributes: dict[str, Any] = said["attributes"]
            self._take(said)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidArgument(f"{self.name}: damaged HDF5: {error}") from None

    def _take(self, said: dict[str, Any]) -> None:
        shape, code = said["shape"], str(said["dtype"])
        layout = " x ".join(str(side) for side in reversed(shape))
        if code[1:] not in _TYPES:
            raise FailedPrecondition(f"{self.name}: its voxels are {code[:40]}, not real numbers")
        if said["images"] > 1:
            raise FailedPrecondition(f"{self.name}: a stack of {said['images']} images, not one volume: split it first")
        if len(shape) != 3 or shape[0] == 1:
            raise FailedPrecondition(f"{self.name}: an image of {layout} pixels, not a volume")
        check_sparse_shape(shape, self._size_bytes, self.name)
        self._dtype = np.dtype(code)
        self.shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        self._offset: int | None = said["offset"]
        self._data = bytes.fromhex(said["data"]) if "data" in said else None
        self._filters: list[int] = said["filters"]
        self._fill = float(said["fill"])
        self._chunk: tuple[int, ...] | None = None
        self.layer = 1
        total = math.prod(shape) * self._dtype.itemsize
        if said["chunks"] is not None:
            self._take_chunks(said["chunks"])
        elif self._data is not None:
            if len(self._data) != total:
                raise InvalidArgument(f"{self.name}: {len(self._data)} bytes of voxels; {layout} take {total}")
        elif self._offset is None:
            raise InvalidArgument(f"{self.name}: no voxel was ever written to it")
        elif self._offset < 0 or self._offset + total > self._size_bytes:
            raise InvalidArgument(
                f"{self.name}: truncated: {layout} voxels of {self._dtype.name} take {total} bytes from byte "
                f"{self._offset}; the file has {self._size_bytes}"
            )
        sizes = self._three("apix_x", "apix_y", "apix_z")
        self.voxel_size_angstrom = sizes if sizes is not None and min(sizes) > 0 else None
        self._render = self._scale()

    def _take_chunks(self, chunk: list[int]) -> None:
        if set(self._filters) - _FILTERS or len(set(self._filters)) < len(self._filters):
            raise FailedPrecondition(
                f"{self.name}: compressed by HDF5 filters {self._filters}; those that are read are {sorted(_FILTERS)} "
                "(deflate, shuffle, checksum)"
            )
        size = math.prod(chunk) * self._dtype.itemsize
        if len(chunk) != 3 or min(chunk) < 1 or size > _MAX_CHUNK_BYTES:
            raise InvalidArgument(f"{self.name}: chunks of {chunk} voxels; they have at most {_MAX_CHUNK_BYTES} bytes")
        table = self._chunks
        starts, sizes = table[:, 0], table[:, 1]
        wrong = (starts < 0) | (sizes < 0) | (sizes > self._size_bytes) | (starts > self._size_bytes - sizes)
        wrong |= (table[:, 3:] < 0).any(axis=1) | (table[:, 3:] % np.array(chunk)).any(axis=1)
        if wrong.any():
            raise InvalidArgument(f"{self.name}: damaged HDF5: {int(wrong.sum())} chunks lie outside of the file")
        self._chunks = table[np.argsort(table[:, 3], kind="stable")]
        self._chunk = tuple(chunk)
        self.layer = min(chunk[0], self.shape[0])

    def _three(self, *names: str) -> Sizes | None:
        """Numbers of the attributes, where all are there and finite."""
        found = [self._attributes.get(name) for name in names]
        numbers = [each for each in found if isinstance(each, float) and math.isfinite(each)]
        return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None

    def _scale(self) -> tuple[np.float32, np.float32] | None:
        """What stored numbers are multiplied with, and what is added then."""
        bits = self._attributes.get("stored_renderbits", 0.0)
        if self._dtype.kind == "f" or not isinstance(bits, float) or not 0 < bits <= 32:
            return None
        limits = self._three("stored_rendermin", "stored_rendermax", "stored_renderbits")
        if limits is None or limits[0] == limits[1]:
            return None
        return np.float32((limits[1] - limits[0]) / (2 ** int(bits) - 1)), np.float32(limits[0])

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Sections start to stop, float32 [z, y, x]; memory is the slab's and a chunk's."""
        section = self.shape[1] * self.shape[2]
        shape = (stop - start, *self.shape[1:])
        if self._chunk is not None:
            slab = np.full(shape, self._fill, np.float32)
            for row in self._chunks[slice(*np.searchsorted(self._chunks[:, 3], [start - self._chunk[0] + 1, stop]))]:
                self._place(row, start, slab)
        elif self._data is not None:
            stored = np.frombuffer(self._data, self._dtype, shape[0] * section, start * section * self._dtype.itemsize)
            slab = as_float32(stored.reshape(shape))
        else:
            offset = (self._offset or 0) + start * section * self._dtype.itemsize
            slab = as_float32(np.fromfile(self._path, self._dtype, shape[0] * section, offset=offset).reshape(shape))
        if self._render is not None:
            slab = slab * self._render[0] + self._render[1]
        return slab

    def _place(self, row: NDArray[np.int64], start: int, slab: NDArray[np.float32]) -> None:
        """Puts what a chunk holds of a slab, which begins at section `start`, in its place."""
        z, y, x = (int(each) for each in row[3:])
        assert self._chunk is not None
        low, high = max(z, start), min(z + self._chunk[0], start + len(slab))
        place = slab[low - start : high - start, y : y + self._chunk[1], x : x + self._chunk[2]]
        if place.size:
            chunk = self._decoded(row)[low - z : high - z, : place.shape[1], : place.shape[2]]
            place[...] = as_float32(chunk)

    def _decoded(self, row: NDArray[np.int64]) -> NDArray[Any]:
        assert self._chunk is not None
        size = math.prod(self._chunk) * self._dtype.itemsize
        with self._path.open("rb") as file:
            file.seek(int(row[0]))
            data = file.read(int(row[1]))
        for place in reversed(range(len(self._filters))):
            if int(row[2]) >> place & 1:  # left out for this chunk
                continue
            which = self._filters[place]
            if which == _DEFLATE:
                try:
                    # a checksum of four bytes may stand inside
                    data = zlib.decompressobj().decompress(data, size + 4)
                except zlib.error as error:
                    raise InvalidArgument(f"{self.name}: damaged HDF5: a chunk cannot be unpacked: {error}") from None
            elif which == _SHUFFLE:
                each = self._dtype.itemsize
                whole = len(data) // each * each
                data = np.frombuffer(data[:whole], np.uint8).reshape(each, -1).T.tobytes() + data[whole:]
            else:
                data = data[:-4]
        if len(data) != size:
            raise InvalidArgument(f"{self.name}: damaged HDF5: a chunk of {len(data)} bytes, which should have {size}")
        return np.frombuffer(data, self._dtype).reshape(self._chunk)

    def data(self) -> VolumeData:
        origin = self._three("origin_x", "origin_y", "origin_z")
        note = self._attributes.get(_NOTE)
        frame = VolumeFrame(self.voxel_size_angstrom, origin or (0.0, 0.0, 0.0))
        return VolumeData(
            self.name,
            self.shape,
            self.slab,
            frame.with_note([note] if isinstance(note, str) else []),
            stored_as=self._dtype.name if self._render is None else f"{self._dtype.name}, scaled",
            layer=self.layer,
        )

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _layout(path: Path, name: str) -> tuple[dict[str, Any], NDArray[np.int64]]:
    # -P: beside that file lie modules of ours, which are not to be taken for others
    command = [sys.executable, "-P", hdf5_layout.__file__, str(path.absolute()), _DATASET]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_LAYOUT_SECONDS, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise InvalidArgument(f"{name}: damaged HDF5: it takes more than {_LAYOUT_SECONDS} s to open") from None
    line, _, table = done.stdout.partition(b"\n")
    if done.returncode != 0 or not line or len(table) % _ROW_BYTES:
        raise InvalidArgument(f"{name}: damaged HDF5: the library that reads it fails")
    said = json.loads(line)
    if "refused" in said:
        raise FailedPrecondition(f"{name}: {said['refused']}")
    if "damaged" in said:
        if "No module named 'h5py'" in said["damaged"]:
            raise FailedPrecondition(f"{name}: reading HDF5 needs h5py: install cryofleet[io]")
        raise InvalidArgument(f"{name}: damaged HDF5: {said['damaged'][:120]}")
    return said, np.frombuffer(table, "<i8").reshape(-1, 6).astype(np.int64)


def write(path: Path, volume: VolumeData, progress: Progress = no_progress) -> tuple[str, ...]:
    """Writes float32 as EMAN2 lays it out, slab by slab; gives warnings.

    Raises FailedPrecondition where h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise FailedPrecondition(f"{path}: writing HDF5 needs h5py: install cryofleet[io]") from None
    frame, running = volume.frame, RunningStatistics()
    with h5py.File(path, "w", libver=("earliest", "v108")) as file:
        images = file.create_group("MDF/images")
        images.attrs["imageid_max"] = np.int32(0)
        group = images.create_group("0")
        dataset = group.create_dataset("image", volume.shape, "<f4")
        start = 0
        for slab in volume.slabs(progress, "writing"):
            dataset[start : start + len(slab)] = slab
            start += len(slab)
            running.update(slab[np.isfinite(slab)])
        attributes: dict[str, Any] = {f"n{axis}": np.int32(n) for axis, n in zip("zyx", volume.shape, strict=True)}
        for name, values in (("apix", frame.voxel_size_angstrom), ("origin", frame.origin_angstrom)):
            if values is not None:
                attributes |= {f"{name}_{axis}": np.float32(v) for axis, v in zip("xyz", values, strict=True)}
        if running.count:
            found = running.result()
            attributes |= {
                "minimum": np.float32(found.minimum),
                "maximum": np.float32(found.maximum),
                "mean": np.float32(found.mean),
                "sigma": np.float32(found.standard_deviation),
            }
        if note := frame.note():
            attributes[_NOTE] = note
        for name, value in attributes.items():
            group.attrs[f"EMAN.{name}"] = value
    return ()
