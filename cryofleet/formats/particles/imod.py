"""IMOD models (.mod): points in contours in objects; bio3d.colorado.edu/imod/doc/binspec.html.

Everything is big-endian. 3dmod's (0, 0, 0) is the corner of the image in x and y but the centre of the first section in
z, so a voxel's index is the point minus (1/2, 1/2, 0). An object is a class, and its name the class's. A contour is a
filament where an object has several of them. Orientations have no place among a model's points.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_BINARY_BYTES, read_file
from cryofleet.formats.particles.table import ParticleTable, classes_of_names, finite_numbers

FRAME = Frame(origin="imod")
MAGIC = b"IMODV1."

# name, the image's size, ..., pixel size and its unit; the whole header with the magic
_HEADER = struct.Struct(">8s128s4iI4i3f3f3i2ifi" + "i3f")
_OBJECT = struct.Struct(">64s16IiIii3fi8B2i")
_CONTOUR = struct.Struct(">iIii")
_MESH = struct.Struct(">iiIhh")
_CHUNK = struct.Struct(">4si")
_MAX_OBJECTS, _MAX_CONTOURS = 100_000, 20_000_000
_SCATTERED = 1 << 9
_ANGSTROM = {0: None, 3: 1e13, 1: 1e10, -2: 1e8, -3: 1e7, -6: 1e4, -9: 10.0, -10: 1.0, -12: 1e-2}
_NANOMETRES = -9
_COLOURS = ((0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))


def read(path: Path, source: str) -> ParticleTable:
    """Points of all contours. Raises InvalidArgument where a chunk is longer than the file, or not a model's."""
    data = read_file(path, source, MAX_BINARY_BYTES)
    if not data.startswith(MAGIC) or len(data) < _HEADER.size:
        raise InvalidArgument(f"{source}: not an IMOD model: it starts with {data[:8]!r} and has {len(data)} bytes")
    fields = _HEADER.unpack_from(data)
    size_x, size_y, size_z = fields[2:5]
    pixel, unit = fields[-6], fields[-5]
    per_unit = _ANGSTROM.get(unit)
    # as many digits as float32 has
    voxel_size = (
        float(str(np.float32(pixel * per_unit))) if per_unit is not None and np.isfinite(pixel) and pixel > 0 else None
    )
    points: list[NDArray[np.float32]] = []
    owners: list[tuple[int, int]] = []
    objects, position = 0, _HEADER.size
    names: list[str] = []
    chunks: dict[str, None] = {}
    while position + 4 <= len(data):
        tag = data[position : position + 4]
        if tag == b"IEOF":
            break
        if tag == b"OBJT":
            objects += 1
            if objects > _MAX_OBJECTS:
                raise InvalidArgument(f"{source} has more than {_MAX_OBJECTS} objects")
            name_at = position + 4
            position = _end(data, name_at, _OBJECT.size, "an object", source)
            name = data[name_at : name_at + 64].partition(b"\0")[0]
            names.append("".join(filter(str.isprintable, name.decode("utf-8", "replace"))).strip())
        elif tag == b"CONT":
            start = _end(data, position + 4, _CONTOUR.size, "a contour", source)
            count = _CONTOUR.unpack_from(data, position + 4)[0]
            if not objects or count < 0 or len(points) >= _MAX_CONTOURS:
                raise InvalidArgument(f"{source}, byte {position}: a contour of {count} points, of object {objects}")
            position = _end(data, start, 12 * count, f"a contour of {count} points", source)
            points.append(np.frombuffer(data, ">f4", 3 * count, start).reshape(count, 3))
            owners.append((objects, len(points)))
        elif tag == b"MESH":
            start = _end(data, position + 4, _MESH.size, "a mesh", source)
            vertices, indices = _MESH.unpack_from(data, position + 4)[:2]
            if vertices < 0 or indices < 0:
                raise InvalidArgument(f"{source}, byte {position}: a mesh of {vertices} vertices, {indices} indices")
            position = _end(data, start, 12 * vertices + 4 * indices, "a mesh", source)
        else:
            start = _end(data, position, _CHUNK.size, "a chunk", source)
            length = _CHUNK.unpack_from(data, position)[1]
            if length < 0 or not tag.isalnum():
                raise InvalidArgument(f"{source}, byte {position}: {tag!r} of {length} bytes is no chunk of a model")
            chunks[tag.decode("ascii")] = None
            position = _end(data, start, length, f"the chunk {tag.decode('ascii')}", source)
    if objects == 0 and fields[5] > 0:
        raise InvalidArgument(f"{source}: the header speaks of {fields[5]} objects, the file has none")
    with np.errstate(invalid="ignore"):
        rows = np.concatenate(points).astype(np.float64) if points else np.zeros((0, 3))
    lengths = [len(contour) for contour in points]
    object_of = np.repeat([owner for owner, _ in owners], lengths).astype(np.int64)
    contour_of = np.repeat([contour for _, contour in owners], lengths).astype(np.int64)
    columns: dict[str, NDArray[Any]] = {"class_id": object_of - 1}
    if names and all(names):
        # numbers where Cryofleet named the objects by them
        columns |= classes_of_names([names[number - 1] for number in object_of.tolist()])
    if len(points) > len({owner for owner, _ in owners}):
        columns["filament"] = contour_of - 1
    shape = (size_z, size_y, size_x) if min(size_x, size_y, size_z) > 0 else None
    return ParticleTable(
        replace(FRAME, voxel_size_angstrom=voxel_size, tomogram_shape=shape),
        finite_numbers(rows, "a point", source),
        source,
        columns=columns,
        found=("object", "contour", "x", "y", "z", *chunks),
        not_carried=tuple(chunks),
    )


def _end(data: bytes, start: int, length: int, what: str, source: str) -> int:
    if start + length > len(data):
        raise InvalidArgument(
            f"{source}: {what} at byte {start} ends {start + length - len(data)} bytes after the file"
        )
    return start + length


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes an object for each class, with scattered points, or a contour for each filament; positions hold shifts."""
    table.of_one_tomogram()
    frame = table.frame
    z, y, x = frame.tomogram_shape if isinstance(frame.tomogram_shape, tuple) else (0, 0, 0)
    filaments = table.columns.get("filament")
    names = np.array(table.class_names("particles"), object)
    # in the order of their numbers, those that have only names as they come
    numbers = table.class_numbers()
    first_rows = np.unique(numbers, return_index=True)[1]
    objects = list(dict.fromkeys([*names[first_rows].tolist(), *names.tolist()])) or ["particles"]
    if len(objects) > _MAX_OBJECTS:
        raise InvalidArgument(f"{table.source}: {len(objects)} classes; a model is written with {_MAX_OBJECTS} objects")
    pixel = (frame.voxel_size_angstrom or 0.0) / 10
    header = _HEADER.pack(
        b"IMODV1.2", b"cryofleet", x, y, z, len(objects), 0xF000, 1, 0, 0, 255, 0, 0, 0, 1, 1, 1, 0, 0, 0, 3, 128,
        pixel, _NANOMETRES, 0, 0, 0, 0,
    )  # fmt: skip
    with path.open("wb") as file:
        file.write(header)
        for number, name in enumerate(objects):
            rows = np.flatnonzero(names == name)
            contours = [rows]
            if filaments is not None:
                contours = [rows[filaments[rows] == filament] for filament in np.unique(filaments[rows])]
            flags = _SCATTERED if filaments is None else 1 << 3
            colour = _COLOURS[number % len(_COLOURS)]
            file.write(b"OBJT")
            file.write(
                _OBJECT.pack(
                    name.encode()[:63], *[0] * 16, len(contours), flags, 0, 1, *colour, 4, 1, 3, 1, 1, 0, 0, 0, 0, 0, 0
                )
            )  # fmt: skip
            for contour in contours:
                file.write(b"CONT" + _CONTOUR.pack(len(contour), 0, 0, 0))
                file.write(table.positions[contour].astype(">f4").tobytes())
        file.write(b"IEOF")
    return ()
