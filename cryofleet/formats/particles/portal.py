"""Point annotations of the CZ CryoET Data Portal: NDJSON, a point a line, in voxels of the tomogram.

``{"type": "orientedPoint", "location": {"x", "y", "z"}, "xyz_rotation_matrix": [[...], ...]}``; the matrix takes the
object onto the particle. Points without it are of type "point"; ``instance_id`` tells instances (filaments) apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cryofleet.errors import InvalidArgument, ResourceExhausted
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_TEXT_BYTES, check_file, number, parse_json, text_of
from cryofleet.formats.particles.table import ParticleTable, finite_numbers, rotations_of_matrices

FRAME = Frame(rotation="matrix")

_MAX_LINE_BYTES, _MAX_POINTS = 1 << 20, 10_000_000
_READ = {"type", "location", "xyz_rotation_matrix", "instance_id"}


def read(path: Path, source: str) -> ParticleTable:
    """Raises InvalidArgument, with the line, for what is no point."""
    positions: list[list[float]] = []
    matrices: list[list[list[float]]] = []
    instances: list[int] = []
    fields: dict[str, None] = {}
    check_file(path, source, MAX_TEXT_BYTES)
    try:
        with path.open("rb") as file:
            line_number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                line_number += 1
                where = f"{source}, line {line_number}"
                if len(line) > _MAX_LINE_BYTES:
                    raise InvalidArgument(f"{where} is longer than {_MAX_LINE_BYTES} bytes")
                if line.strip():
                    _point(parse_json(text_of(line, where), where), where, positions, matrices, instances, fields)
                if len(positions) > _MAX_POINTS:
                    raise ResourceExhausted(f"{source} has more than {_MAX_POINTS} points")
    except OSError as error:
        raise InvalidArgument(f"{source}: can't be read: {error.strerror}") from None
    if matrices and len(matrices) != len(positions):
        raise InvalidArgument(f"{source}: {len(matrices)} of {len(positions)} points are oriented; all or none must be")
    ids = np.array(instances, np.int64)
    return ParticleTable(
        FRAME,
        finite_numbers(np.array(positions, np.float64).reshape(-1, 3), "a location", source),
        source,
        rotations_of_matrices(matrices, source) if matrices else None,
        None,
        {"filament": ids} if (ids >= 0).any() else {},
        found=tuple(fields),
        not_carried=tuple(name for name in fields if name not in _READ),
    )


def _point(
    document: Any,
    where: str,
    positions: list[list[float]],
    matrices: list[list[list[float]]],
    instances: list[int],
    fields: dict[str, None],
) -> None:
    location = document.get("location") if isinstance(document, dict) else None
    if not isinstance(location, dict):
        raise InvalidArgument(f"{where}: not a point: it has no location")
    if len(fields) < 100:
        fields.update(dict.fromkeys(str(name)[:80] for name in document))
    positions.append([number(location.get(axis), axis, where) for axis in "xyz"])
    matrix = document.get("xyz_rotation_matrix")
    if matrix is not None:
        if not (
            isinstance(matrix, list) and len(matrix) == 3 and all(isinstance(r, list) and len(r) == 3 for r in matrix)
        ):
            raise InvalidArgument(f"{where}: xyz_rotation_matrix is no 3 x 3 matrix")
        matrices.append([[number(value, "xyz_rotation_matrix", where) for value in row] for row in matrix])
    instance = document.get("instance_id", -1)
    if isinstance(instance, bool) or not isinstance(instance, int) or not -1 <= instance <= 2**31 - 1:
        raise InvalidArgument(f"{where}: instance_id is {str(instance)[:20]}; it must be a whole number")
    instances.append(instance)


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes the points of one tomogram; positions hold the shifts."""
    table.of_one_tomogram()
    matrices = None if table.rotations is None else table.rotations.as_matrix().reshape(-1, 3, 3)
    filaments = table.columns.get("filament")
    with path.open("w", encoding="utf-8") as file:
        for i, (x, y, z) in enumerate(table.positions.tolist()):
            point: dict[str, Any] = {
                "type": "point" if matrices is None else "orientedPoint",
                "location": {"x": x, "y": y, "z": z},
            }
            if matrices is not None:
                point["xyz_rotation_matrix"] = matrices[i].tolist()
            if filaments is not None and filaments[i] >= 0:
                point["instance_id"] = int(filaments[i])
            file.write(json.dumps(point, allow_nan=False) + "\n")
    return ()
