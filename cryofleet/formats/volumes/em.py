"""Volumes as EM files, of TOM, PyTom, AV3 and Dynamo.

A header of 512 bytes and the numbers, x fastest: byte 0 is the machine (6 PC, little-endian; 0, 3, 4 and 5 are
big-endian; 1 and 2 too old to be read), byte 3 the type, then three int32 sides, 80 bytes of comment and 40 int32
parameters, the seventh of which is the voxel size: Å x 1000, as TOM and IMP have it.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.volumes.frame import VolumeData, VolumeFrame
from cryofleet.progress import Progress, no_progress

HEADER_BYTES = 512
_BYTE_ORDERS = {0: ">", 3: ">", 4: ">", 5: ">", 6: "<"}
_TYPES = {1: "i1", 2: "i2", 4: "i4", 5: "f4", 9: "f8"}
_COMPLEX = {8: "complex float32", 10: "complex float64"}
_FLOAT32, _PC = 5, 6
_MOTIVE_LIST_FIELDS = 20
_COMMENT = slice(16, 96)
_VOXEL_SIZE_AT = 96 + 4 * 6
_PER_ANGSTROM = 1000
_LARGEST = 2**31 - 1


def is_em(head: bytes, size_bytes: int) -> bool:
    """Whether a file that starts so and is so long is an EM file of numbers, and no motive list, which is particles."""
    if len(head) < HEADER_BYTES or head[0] not in _BYTE_ORDERS or head[3] not in _TYPES:
        return False
    sides = struct.unpack_from(f"{_BYTE_ORDERS[head[0]]}3i", head, 4)
    bytes_each = np.dtype(_TYPES[head[3]]).itemsize
    if sides[0] == _MOTIVE_LIST_FIELDS and sides[2] == 1:
        return False
    return bool(min(sides) >= 1 and size_bytes == HEADER_BYTES + math.prod(sides) * bytes_each)


class EmVolume:
    """One volume in an EM file, read slab by slab.

    Raises on opening:
        InvalidArgument: no EM file, or it is not as long as its header says.
        FailedPrecondition: it holds complex numbers, or a single image.
    """

    layer = 1

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or path.name
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES:
            raise InvalidArgument(f"{self.name}: {len(head)} bytes; an EM file has a header of {HEADER_BYTES}")
        machine, kind = head[0], head[3]
        if machine not in _BYTE_ORDERS or kind not in _TYPES | _COMPLEX:
            raise InvalidArgument(
                f"{self.name}: not an EM file: its machine is {machine} and its type {kind}; "
                f"known are {', '.join(map(str, _BYTE_ORDERS))} and {', '.join(map(str, _TYPES))}"
            )
        if kind in _COMPLEX:
            raise FailedPrecondition(f"{self.name}: EM type {kind} ({_COMPLEX[kind]}) is not a volume of real numbers")
        order = _BYTE_ORDERS[machine]
        x, y, z = struct.unpack_from(f"{order}3i", head, 4)
        if min(x, y, z) < 1:
            raise InvalidArgument(f"{self.name}: the header's size is {x} x {y} x {z} voxels (x, y, z)")
        self._dtype = np.dtype(order + _TYPES[kind])
        needed = HEADER_BYTES + x * y * z * self._dtype.itemsize
        if size_bytes != needed:
            raise InvalidArgument(
                f"{self.name}: {size_bytes} bytes; {x} x {y} x {z} voxels of {self._dtype.name} take {needed}"
            )
        if z == 1:
            raise FailedPrecondition(f"{self.name}: one image of {x} x {y} pixels, not a volume")
        self.shape: tuple[int, int, int] = (z, y, x)
        (size,) = struct.unpack_from(f"{order}i", head, _VOXEL_SIZE_AT)
        self.voxel_size_angstrom = (size / _PER_ANGSTROM,) * 3 if size > 0 else None
        comment = head[_COMMENT].decode("latin-1").rstrip("\0 ")
        self._labels = (comment,) if comment else ()
        self._path = path

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Sections start to stop, float32 [z, y, x]; memory is the slab's, in its stored type and in float32."""
        section = self.shape[1] * self.shape[2]
        offset = HEADER_BYTES + start * section * self._dtype.itemsize
        stored = np.fromfile(self._path, self._dtype, (stop - start) * section, offset=offset)
        return as_float32(stored.reshape(stop - start, *self.shape[1:]))

    def data(self) -> VolumeData:
        frame = VolumeFrame(self.voxel_size_angstrom).with_note(self._labels)
        return VolumeData(self.name, self.shape, self.slab, frame, labels=self._labels, stored_as=self._dtype.name)

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_float32(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """Stored numbers as float32, in C order; what float32 cannot hold becomes infinite, which readers look for."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(stored, dtype=np.float32)


def write(path: Path, volume: VolumeData, progress: Progress = no_progress) -> tuple[str, ...]:
    """Writes little-endian float32, slab by slab; gives warnings.

    Raises InvalidArgument where the voxel size is beyond what the header holds.
    """
    depth, height, width = volume.shape
    header = bytearray(HEADER_BYTES)
    header[0], header[3] = _PC, _FLOAT32
    struct.pack_into("<3i", header, 4, width, height, depth)
    header[_COMMENT] = volume.frame.note().encode().ljust(80, b"\0")
    size = volume.frame.one_voxel_size
    warnings = []
    if size is not None:
        stored = round(size * _PER_ANGSTROM)
        if not 1 <= stored <= _LARGEST:
            raise InvalidArgument(
                f"{volume.name}: a voxel of {size:g} Å has no place in an EM file: 0.001 is the least"
            )
        if abs(stored / _PER_ANGSTROM - size) > 1e-6 * size:
            warnings.append(f"the voxel size {size:.7g} Å is kept as {stored / _PER_ANGSTROM:.7g} Å")
        struct.pack_into("<i", header, _VOXEL_SIZE_AT, stored)
    with path.open("wb") as file:
        file.write(header)
        for slab in volume.slabs(progress, "writing"):
            file.write(slab.astype("<f4", copy=False).data)
    return tuple(warnings)
