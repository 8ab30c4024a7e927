"""Dynamo tables (.tbl): a row of numbers a particle; wiki.dynamo.biozentrum.unibas.ch, "Table convention".

Column numbers below are the wiki's, from 1. Tomograms are numbers; the file NAME.doc beside NAME.tbl says their names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cryofleet.errors import InvalidArgument
from cryofleet.formats.euler import to_euler
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_TEXT_BYTES, number_rows, read_file, text_of
from cryofleet.formats.particles.table import (
    ParticleTable,
    class_ids,
    distinct_ids,
    finite_numbers,
    rotations_of_angles,
    tomogram_numbers,
    whole_numbers,
)
from cryofleet.formats.rows import Column, encode_rows

FRAME = Frame(origin="one", rotation="dynamo")

_NEEDED, _WRITTEN, _LONGEST = 26, 42, 256
# fmt: off
_COLUMNS = [
    "tag", "aligned", "averaged", "dx", "dy", "dz", "tdrot", "tilt", "narot", "cc", "cc2", "cpu", "ftype", "ymintilt",
    "ymaxtilt", "xmintilt", "xmaxtilt", "fs1", "fs2", "tomo", "reg", "class", "annotation", "x", "y", "z", "dshift",
    "daxis", "dnarot", "dcc", "otag", "npar", "column33", "ref", "sref", "apix", "def", "column38", "column39",
    "column40", "eig1", "eig2",
]
# fmt: on
_READ = {"tag", "dx", "dy", "dz", "tdrot", "tilt", "narot", "cc", "tomo", "class", "x", "y", "z", "apix"}
_TAG, _SHIFTS, _ANGLES, _CC, _TOMO, _CLASS, _POSITIONS, _APIX = (
    0,
    slice(3, 6),
    slice(6, 9),
    9,
    19,
    21,
    slice(23, 26),
    35,
)


def read(path: Path, source: str) -> ParticleTable:
    """Raises InvalidArgument for a row that is too short, or holds what is no number."""
    rows = number_rows(read_file(path, source, MAX_TEXT_BYTES), source)
    if not _NEEDED <= rows.shape[1] <= _LONGEST:
        raise InvalidArgument(f"{source}: {rows.shape[1]} columns; a Dynamo table has {_NEEDED} to {_WRITTEN}")
    names = _names(path.with_suffix(".doc"))
    numbers = whole_numbers(rows[:, _TOMO], "column 20 (the tomogram)", source).tolist()
    tomograms = [names.get(number, str(number)) for number in numbers]
    apix = rows[:, _APIX] if rows.shape[1] > _APIX else np.zeros(len(rows))
    same = len(apix) > 0 and bool(np.all(apix == apix[0])) and np.isfinite(apix[0]) and apix[0] > 0
    found = tuple((_COLUMNS + [f"column{i + 1}" for i in range(len(_COLUMNS), rows.shape[1])])[: rows.shape[1]])
    return ParticleTable(
        replace(FRAME, voxel_size_angstrom=float(apix[0]) if same else None),
        finite_numbers(rows[:, _POSITIONS], "a position", source),
        source,
        rotations_of_angles(rows[:, _ANGLES], "dynamo", source),
        finite_numbers(rows[:, _SHIFTS], "a shift", source),
        {
            **distinct_ids(rows[:, _TAG], "column 1 (the tag)", source),
            "score": finite_numbers(rows[:, _CC], "column 10 (cc)", source),
            "class_id": class_ids(rows[:, _CLASS], source),
        },
        tomograms[:1] if len(set(tomograms)) == 1 else tomograms,
        found,
        tuple(name for i, name in enumerate(found) if name not in _READ and rows[:, i].any()),
    )


def _names(path: Path) -> dict[int, str]:
    """The names of tomograms by number, of the table map beside a table where there is one."""
    if not path.is_file():
        return {}
    names = {}
    for line, text in enumerate(text_of(read_file(path, str(path), 1 << 20), str(path)).splitlines(), start=1):
        words = text.split(maxsplit=1)
        if not words:
            continue
        if len(words) != 2 or not (words[0].isascii() and words[0].isdigit() and len(words[0]) < 10):
            raise InvalidArgument(f"{path}, line {line}: expected a number and the name of a tomogram")
        names[int(words[0])] = words[1].strip()
    return names


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes the table, and NAME.doc beside it where tomograms have names."""
    rows = np.zeros((len(table), _WRITTEN))
    numbers, names, warnings = tomogram_numbers(table)
    rows[:, _TAG] = table.columns["id"]
    rows[:, 1] = 1  # aligned
    rows[:, 2] = 1  # averaged
    rows[:, _SHIFTS] = table.shifts_or_zero()
    if table.rotations is not None:
        rows[:, _ANGLES] = to_euler(table.rotations, "dynamo").reshape(-1, 3)
    rows[:, _CC] = table.column("score", 0.0)
    rows[:, _TOMO] = numbers
    rows[:, _CLASS] = table.class_numbers()
    rows[:, _POSITIONS] = table.positions
    rows[:, _APIX] = table.frame.voxel_size_angstrom or 0.0
    whole = {_TAG, 1, 2, _TOMO, _CLASS}
    columns: list[Column] = [
        ("%d" if i in whole else "%.9g" if i == _CC else "%.6f" if rows[:, i].any() else "%d", rows[:, i])
        for i in range(_WRITTEN)
    ]
    columns[_APIX] = ("%.9g", rows[:, _APIX])
    with path.open("wb") as file:
        file.writelines(encode_rows(columns, " "))
    map_path = path.with_suffix(".doc")
    if warnings:
        map_path.write_text(
            "".join(f"{number} {' '.join(name.split())}\n" for number, name in names.items()), encoding="utf-8"
        )
        warnings = (*warnings, f"their names are in {map_path.name}")
    return (*warnings, *table.renumbered())
