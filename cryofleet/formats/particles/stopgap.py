"""STOPGAP motive lists: a STAR file with the block data_stopgap_motivelist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.formats.euler import to_euler
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_TEXT_BYTES, read_file
from cryofleet.formats.particles.table import (
    ParticleTable,
    class_ids,
    distinct_ids,
    halves,
    rotations_of_angles,
    tomogram_numbers,
)
from cryofleet.formats.rows import Column, encode_rows
from cryofleet.formats.star_tables import parse_star

FRAME = Frame(origin="one", rotation="av3")
BLOCK = "stopgap_motivelist"

_POSITIONS = ["orig_x", "orig_y", "orig_z"]
_SHIFTS = ["x_shift", "y_shift", "z_shift"]
_ANGLES = ["phi", "the", "psi"]
_HALVES = {"A": 1, "B": 2}


def read(path: Path, source: str) -> ParticleTable:
    """Raises InvalidArgument where there is no such block, a column is missing or a row holds no number."""
    tables = parse_star(read_file(path, source, MAX_TEXT_BYTES), source)
    if BLOCK not in tables:
        raise InvalidArgument(f"{source}: no block data_{BLOCK}; it has {', '.join(map(repr, list(tables)[:10]))}")
    rows = tables[BLOCK]

    def vectors(names: list[str]) -> NDArray[np.float64]:
        return np.stack([rows.numbers(name) for name in names], axis=1)

    columns: dict[str, NDArray[Any]] = {}
    if "subtomo_num" in rows:
        columns |= distinct_ids(rows.numbers("subtomo_num"), "subtomo_num", source)
    if "score" in rows:
        columns["score"] = rows.numbers("score")
    if "class" in rows:
        columns["class_id"] = class_ids(rows.numbers("class"), source)
    if "halfset" in rows and set(rows.texts("halfset")) - {"none", "None", "0"}:
        columns["half"] = halves(np.array(rows.texts("halfset"), object), _HALVES, source)
    tomograms = [str(number) for number in rows.integers("tomo_num").tolist()] if "tomo_num" in rows else [""]
    read = {*_POSITIONS, *_SHIFTS, *_ANGLES, "subtomo_num", "score", "class", "halfset", "tomo_num", "motl_idx"}
    return ParticleTable(
        FRAME,
        vectors(_POSITIONS),
        source,
        rotations_of_angles(vectors(_ANGLES), "av3", source),
        vectors(_SHIFTS),
        columns,
        tomograms[:1] if len(set(tomograms)) == 1 else tomograms or [""],
        tuple(rows.columns),
        tuple(name for name in rows.columns if name not in read),
    )


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes all columns that STOPGAP has; half sets that are not known by the particles' parity, as STOPGAP does."""
    count = len(table)
    numbers, _, warnings = tomogram_numbers(table)
    index = np.arange(1, count + 1)
    half = table.columns["half"] if "half" in table.columns else 1 + (index + 1) % 2
    angles = np.zeros((count, 3)) if table.rotations is None else to_euler(table.rotations, "av3").reshape(-1, 3)
    shifts = table.shifts_or_zero()
    columns: dict[str, Column] = {
        "motl_idx": ("%d", index),
        "tomo_num": ("%d", numbers),
        "object": ("%d", np.ones(count, np.int64)),
        "subtomo_num": ("%d", table.columns["id"]),
        "halfset": ("%s", np.array(["", "A", "B"])[np.asarray(half, np.int64)]),
    }
    columns |= {name: ("%.6f", table.positions[:, i]) for i, name in enumerate(_POSITIONS)}
    columns["score"] = ("%.9g", table.column("score", 0.0))
    columns |= {name: ("%.6f", shifts[:, i]) for i, name in enumerate(_SHIFTS)}
    columns |= {name: ("%.6f", angles[:, i]) for name, i in (("phi", 0), ("psi", 2), ("the", 1))}
    columns["class"] = ("%d", table.class_numbers())
    labels = "".join(f"_{name}\n" for name in columns)
    with path.open("wb") as file:
        file.write(f"\ndata_{BLOCK}\n\nloop_\n{labels}".encode())
        file.writelines(encode_rows(list(columns.values()), "\t"))
        file.write(b"\n")
    return (*warnings, *table.renumbered())
