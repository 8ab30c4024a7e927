"""Comma-separated tables: Cryofleet's own, with nothing left to guess, and others' with columns x, y, z.

Columns are found by their names, whatever their case and order; a file without names is x, y, z. Positions are voxels
from the first voxel's centre unless another frame is named.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.formats.frames import Frame
from cryofleet.formats.particles.files import MAX_TEXT_BYTES, read_file, text_of
from cryofleet.formats.particles.table import (
    ParticleTable,
    class_ids,
    distinct_ids,
    finite_numbers,
    whole_numbers,
)
from cryofleet.particles import COLUMNS, POSITION, QUATERNION, SHIFT, Particles
from cryofleet.tomogram_names import plain_names

FRAME = Frame()

_ROWS_AT_ONCE = 50_000
_MAX_COLUMNS = 1000
_HEAD_CHARACTERS = 1 << 16
_WRITTEN_BESIDE = ("x_angstrom", "y_angstrom", "z_angstrom")


def read(path: Path, source: str) -> ParticleTable:
    """Raises InvalidArgument, with the column and row, for what is no such table."""
    text = text_of(read_file(path, source, MAX_TEXT_BYTES), source)
    try:
        reader = csv.reader(io.StringIO(text[:_HEAD_CHARACTERS]), skipinitialspace=True)
        first = next((row for row in reader if row), [])
    except csv.Error as error:
        raise InvalidArgument(f"{source}: not a comma-separated table: {error}") from None
    names = [word.strip().lower() for word in first]
    if len(names) > _MAX_COLUMNS:
        raise InvalidArgument(f"{source}: {len(names)} columns; at most {_MAX_COLUMNS} are read")
    named = not names or not all(_is_number(word) for word in names)
    if not named:
        if len(names) != len(POSITION):
            raise InvalidArgument(
                f"{source}: {len(names)} columns without names; x, y, z are read so, others need names"
            )
        names = list(POSITION)
    if "\0" in text:
        raise InvalidArgument(f"{source}: not a comma-separated table: holds a zero byte")
    try:
        # one column more than there are names stays empty where no row is too long
        table = pd.read_csv(
            io.StringIO(text), header=None, names=[*range(len(names)), "more"],
            skiprows=reader.line_num if named else 0, dtype=str, keep_default_na=False, na_filter=False,
            index_col=False, on_bad_lines="error", skipinitialspace=True,
        )  # fmt: skip
    except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning, OverflowError) as error:
        raise InvalidArgument(f"{source}: not a comma-separated table: {' '.join(str(error).split())[:120]}") from None
    longer = (table.pop("more") != "").to_numpy()
    if longer.any():
        raise InvalidArgument(
            f"{source}: row {int(np.argmax(longer)) + 1} has more values than the {len(names)} columns"
        )
    if len(set(names)) < len(names):
        raise InvalidArgument(f"{source}: two columns have one name")
    table.columns = pd.Index(names)
    missing = [name for name in POSITION if name not in names]
    if missing:
        some = ", ".join(repr(name[:40]) for name in names[:20])
        raise InvalidArgument(f"{source}: no column {missing[0]!r}; x, y, z are needed, it has {some}")

    def numbers(name: str) -> NDArray[np.float64]:
        try:
            values = table[name].to_numpy(dtype=np.float64, na_value=np.nan)
        except ValueError:
            values = np.array([_number(value) for value in table[name].tolist()])
        return finite_numbers(values, f"column {name!r}", source)

    def vectors(group: tuple[str, ...]) -> NDArray[np.float64] | None:
        present = [name for name in group if name in names]
        if present and len(present) < len(group):
            raise InvalidArgument(f"{source}: columns {', '.join(group)} belong together; it has {', '.join(present)}")
        return np.stack([numbers(name) for name in group], axis=1) if present else None

    positions, quaternions, shifts = vectors(POSITION), vectors(QUATERNION), vectors(SHIFT)
    assert positions is not None
    columns: dict[str, Any] = {}
    for name in ("score", "diameter_angstrom"):
        if name in names:
            columns[name] = numbers(name)
    for name in ("class_id", "half", "filament"):
        if name in names:
            columns[name] = whole_numbers(numbers(name), f"column {name!r}", source)
    if "class_number" in names:
        columns["class_id"] = class_ids(numbers("class_number"), source)
    if "id" in names:
        columns |= distinct_ids(numbers("id"), "column 'id'", source)
    if "class_name" in names:
        columns["class_name"] = table["class_name"].to_numpy(dtype=object)
    tomograms = table["tomogram"].tolist() if "tomogram" in names and len(table) else [""]
    size = None
    if "voxel_size_angstrom" in names and len(table):
        sizes = numbers("voxel_size_angstrom")
        if sizes[0] <= 0 or not np.all(sizes == sizes[0]):
            raise InvalidArgument(f"{source}: voxel_size_angstrom must be one number above 0 in all rows")
        size = float(sizes[0])
    read_names = {*COLUMNS, *_WRITTEN_BESIDE, "class_number", "voxel_size_angstrom"}
    return ParticleTable(
        Frame(voxel_size_angstrom=size),
        positions,
        source,
        None if quaternions is None else _rotations(quaternions, source),
        shifts,
        columns,
        tomograms[:1] if len(set(tomograms)) == 1 else tomograms,
        tuple(names),
        tuple(name for name in names if name not in read_names),
        () if named else ("no names of columns: the three are taken to be x, y, z",),
    )


def _rotations(quaternions: NDArray[np.float64], source: str) -> Rotation:
    with np.errstate(over="ignore"):
        bad = np.abs(np.linalg.norm(quaternions, axis=1) - 1) > 1e-3
    if bad.any():
        raise InvalidArgument(f"{source}: the quaternion in row {int(np.argmax(bad)) + 1} is not of length 1")
    return Rotation.from_quat(quaternions) if len(quaternions) else Rotation.identity(0)


def _is_number(word: str) -> bool:
    return math.isfinite(_number(word))


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return float("nan")


def write(path: Path, table: ParticleTable) -> tuple[str, ...]:
    """Writes Cryofleet's own table."""
    particles = table.particles()
    with path.open("wb") as file:
        file.writelines(encode_csv(particles.table, particles.tomogram, particles.voxel_size_angstrom))
    return ()


def plainly_named(particles: Particles) -> tuple[pd.DataFrame, str]:
    """A table and its tomogram's name as other programs are told them (`tomogram_names.plain_names`)."""
    table, tomogram = particles.table, particles.tomogram
    if "tomogram" in table:
        table = table.assign(tomogram=table["tomogram"].map(plain_names(table["tomogram"])))
    return table, plain_names([tomogram])[tomogram]


def encode_csv(table: pd.DataFrame, tomogram: str, voxel_size_angstrom: float) -> Iterator[bytes]:
    """The text of a particle table as CSV, in pieces, with nothing left to guess.

    To the table's own columns (x, y, z in voxels from the first voxel's centre, the quaternion that takes the reference
    onto the particle, shifts in voxels) come `x_angstrom`, `y_angstrom`, `z_angstrom` (shift included, from the same
    origin), the tomogram's name and its voxel size. Numbers keep all their digits. For `class_id` stands
    `class_number`, from 1 with 0 for none, as other programs count.
    """
    if "class_id" in table:
        table = table.assign(class_id=table["class_id"] + 1).rename(columns={"class_id": "class_number"})
    placed = table[["x", "y", "z"]].to_numpy(np.float64)
    if "shift_x" in table:
        placed = placed + table[["shift_x", "shift_y", "shift_z"]].to_numpy(np.float64)
    whole = table.assign(
        **{f"{axis}_angstrom": placed[:, i] * voxel_size_angstrom for i, axis in enumerate("xyz")},
        # a table of several tomograms has this column
        tomogram=table.get("tomogram", tomogram),
        voxel_size_angstrom=voxel_size_angstrom,
    )
    for start in range(0, max(len(whole), 1), _ROWS_AT_ONCE):
        rows = whole.iloc[start : start + _ROWS_AT_ONCE]
        yield rows.to_csv(None, index=False, header=start == 0, lineterminator="\n").encode()
