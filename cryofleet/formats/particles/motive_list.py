"""Motive lists of TOM, AV3 and novaSTA, as EM files: 20 float32 numbers a particle.

An EM file is a header of 512 bytes and the numbers: byte 0 is the machine (6 PC, little-endian; 0, 3 and 5 are
big-endian), byte 3 the type (5 is float32), then three int32 sides, the fastest first.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from cryofleet.errors import InvalidArgument
from cryofleet.formats.euler import to_euler
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_BINARY_BYTES, read_file
from cryofleet.formats.particles.table import (
    ParticleTable,
    class_ids,
    distinct_ids,
    finite_numbers,
    rotations_of_angles,
    tomogram_numbers,
    whole_numbers,
)

FRAME = Frame(origin="one", rotation="av3")

_HEADER_BYTES, _FLOAT32, _FIELDS = 512, 5, 20
_BYTE_ORDERS = {0: ">", 3: ">", 5: ">", 6: "<"}
# fmt: off
_COLUMNS = [
    "score", "geom1", "geom2", "subtomo_id", "tomo_id", "object_id", "subtomo_mean", "x", "y", "z", "shift_x",
    "shift_y", "shift_z", "geom3", "geom4", "geom5", "phi", "psi", "theta", "class",
]
# fmt: on
_READ = {
    "score",
    "subtomo_id",
    "tomo_id",
    "x",
    "y",
    "z",
    "shift_x",
    "shift_y",
    "shift_z",
    "phi",
    "psi",
    "theta",
    "class",
}
_SCORE, _ID, _TOMOGRAM, _POSITIONS, _SHIFTS, _ANGLES, _CLASS = 0, 3, 4, slice(7, 10), slice(10, 13), [16, 18, 17], 19


def is_motive_list(head: bytes, size_bytes: int) -> bool:
    """Whether a file that starts so and is so long is one."""
    if len(head) < _HEADER_BYTES or head[0] not in _BYTE_ORDERS or head[3] != _FLOAT32:
        return False
    x, y, z = struct.unpack(f"{_BYTE_ORDERS[head[0]]}3i", head[4:16])
    return bool(x == _FIELDS and y >= 0 and z == 1 and size_bytes == _HEADER_BYTES + 4 * x * y)


def read(path: Path, source: str) -> ParticleTable:
    """Raises InvalidArgument where the file is no motive list, or not as long as its header says."""
    data = read_file(path, source, MAX_BINARY_BYTES)
    if len(data) < _HEADER_BYTES:
        raise InvalidArgument(f"{source}: {len(data)} bytes; an EM file has a header of {_HEADER_BYTES}")
    if data[0] not in _BYTE_ORDERS or data[3] != _FLOAT32:
        raise InvalidArgument(
            f"{source}: not an EM file of float32: its machine is {data[0]} and its type {data[3]}; expected 6 and 5"
        )
    order = _BYTE_ORDERS[data[0]]
    x, y, z = struct.unpack(f"{order}3i", data[4:16])
    if x != _FIELDS or y < 0 or z != 1:
        raise InvalidArgument(f"{source}: an EM file of {x} x {y} x {z} numbers; a motive list has 20 x n x 1")
    if len(data) != _HEADER_BYTES + 4 * x * y:
        raise InvalidArgument(f"{source}: {len(data)} bytes; {y} particles take {_HEADER_BYTES + 4 * x * y}")
    # a NaN of the kind that signals warns where it is converted; it is refused below
    with np.errstate(invalid="ignore"):
        rows = np.frombuffer(data, f"{order}f4", offset=_HEADER_BYTES).reshape(y, x).astype(np.float64)
    tomograms = [str(number) for number in whole_numbers(rows[:, _TOMOGRAM], "field 5 (the tomogram)", source).tolist()]
    return ParticleTable(
        FRAME,
        finite_numbers(rows[:, _POSITIONS], "a position", source),
        source,
        rotations_of_angles(rows[:, _ANGLES], "av3", source),
        finite_numbers(rows[:, _SHIFTS], "a shift", source),
        {
            **distinct_ids(rows[:, _ID], "field 4 (the subtomogram)", source),
            "score": finite_numbers(rows[:, _SCORE], "field 1 (the score)", source),
            "class_id": class_ids(rows[:, _CLASS], source),
        },
        tomograms[:1] if len(set(tomograms)) == 1 else tomograms,
        tuple(_COLUMNS),
        tuple(name for i, name in enumerate(_COLUMNS) if name not in _READ and rows[:, i].any()),
    )


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes little-endian float32. Raises InvalidArgument for a number that float32 does not tell from others."""
    rows = np.zeros((len(table), _FIELDS))
    numbers, _, warnings = tomogram_numbers(table)
    ids = np.asarray(table.columns["id"], np.int64)
    if len(ids) and int(np.abs(ids).max()) > 1 << 24:
        raise InvalidArgument(f"{table.source}: ids beyond {1 << 24} are not told apart by a motive list's float32")
    rows[:, _SCORE] = table.column("score", 0.0)
    rows[:, _ID] = ids
    rows[:, _TOMOGRAM] = numbers
    rows[:, _POSITIONS] = table.positions
    rows[:, _SHIFTS] = table.shifts_or_zero()
    if table.rotations is not None:
        rows[:, _ANGLES] = to_euler(table.rotations, "av3").reshape(-1, 3)
    rows[:, _CLASS] = table.class_numbers()
    header = bytearray(_HEADER_BYTES)
    header[0], header[3] = 6, _FLOAT32
    header[4:16] = struct.pack("<3i", _FIELDS, len(table), 1)
    path.write_bytes(bytes(header) + rows.astype("<f4").tobytes())
    return (*warnings, *table.renumbered())
