"""Particle STAR files of RELION 3.0, 3.1, 4 and 5, and of Warp and M.

| version | positions | shifts | voxel size |
|---|---|---|---|
| 3.0 | rlnCoordinate, voxels | rlnOrigin, voxels | rlnPixelSize, or rlnDetectorPixelSize 10^4 / rlnMagnification |
| 3.1 | rlnCoordinate, voxels | rlnOriginAngst | rlnPixelSize, or the optics table's rlnImagePixelSize |
| 4 | rlnCoordinate, pixels of the tilt series | rlnOriginAngst | rlnTomoTiltSeriesPixelSize |
| 5 | rlnCenteredCoordinateAngst, Å from the tomogram's centre | rlnOriginAngst | rlnTomoTiltSeriesPixelSize |

Warp writes version 4 with coordinates in pixels of the particles' images (rlnImagePixelSize) where these are 2D stacks.
A particle lies at its coordinate minus its origin, the origin turned by the subtomogram's angles where there are any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.euler import to_euler
from cryofleet.formats.frames import Frame, Shape
from cryofleet.formats.particles.files import MAX_TEXT_BYTES, read_file
from cryofleet.formats.particles.table import (
    ParticleTable,
    class_ids,
    distinct_ids,
    halves,
    rotations_of_angles,
)
from cryofleet.formats.rows import Column, encode_rows
from cryofleet.formats.star_tables import StarTable, parse_star

Version = Literal["3.0", "3.1", "4", "5"]
VERSIONS: tuple[Version, ...] = get_args(Version)

_COORDINATES = [f"rlnCoordinate{axis}" for axis in "XYZ"]
_CENTRED = [f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]
_ORIGINS = [f"rlnOrigin{axis}" for axis in "XYZ"]
_ORIGINS_ANGSTROM = [f"rlnOrigin{axis}Angst" for axis in "XYZ"]
_ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
_SUBTOMOGRAM_ANGLES = ["rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi"]
_SCORES = ("rlnAutopickFigureOfMerit", "rlnLCCmax")
_TOMOGRAMS = ("rlnTomoName", "rlnMicrographName")


def frame_of(version: Version) -> Frame:
    """The frame of a version, without what only a file can say."""
    centred = version == "5"
    return Frame(
        unit="angstrom" if centred else "voxel",
        origin="centre" if centred else "first-voxel",
        shift="subtracted",
        shift_unit="voxel" if version == "3.0" else "angstrom",
        rotation="relion",
    )


def version_of(tables: Mapping[str, StarTable]) -> Version | None:
    """The version of a file's particles by its columns; None where it has no particles."""
    table = _particle_table(tables)
    if table is None:
        return None
    if _has(table, _CENTRED):
        return "5"
    if "rlnTomoName" in table:
        return "4"
    return "3.1" if "optics" in tables or _has(table, _ORIGINS_ANGSTROM) else "3.0"


def read(path: Path, source: str, version: Version | None = None) -> ParticleTable:
    """Particles of a STAR file; the version is found by its columns unless given.

    Raises:
        InvalidArgument: it is no STAR file, has no particles, or a row holds what cannot be.
    """
    tables = parse_star(read_file(path, source, MAX_TEXT_BYTES), source)
    table = _particle_table(tables)
    found = version_of(tables)
    if table is None or found is None:
        raise InvalidArgument(
            f"{source}: no table has particles: rlnCoordinate[XYZ] or rlnCenteredCoordinate[XYZ]Angst; "
            f"it has {', '.join(repr(name) for name in list(tables)[:10])}"
        )
    version = version or found
    warnings = []
    others = [name for name, other in tables.items() if other is not table and _has_positions(other)]
    if others:
        warnings.append(f"of several tables of particles only {table.name!r} is read, not {', '.join(others[:5])}")
    used: set[str] = set()

    def vectors(names: Sequence[str]) -> NDArray[np.float64] | None:
        if not _has(table, names):
            return None
        used.update(names)
        return np.stack([table.numbers(name) for name in names], axis=1)

    positions = vectors(_CENTRED if version == "5" else _COORDINATES)
    if positions is None:
        named = "rlnCenteredCoordinate[XYZ]Angst" if version == "5" else "rlnCoordinate[XYZ]"
        raise InvalidArgument(f"{source}: table {table.name} has no {named}, which version {version} has")
    sizes, said_by = _voxel_sizes(table, tables, version)
    binning = _binning(tables, sizes) if version in ("4", "5") else None
    used.update(said_by)
    frame = frame_of(version)
    size: float | None = None
    if sizes is not None:
        size = float(sizes[0]) if len(sizes) else None
        if size is not None and not np.allclose(sizes, size, rtol=1e-6):
            warnings.append(f"rows have several voxel sizes; all are given in voxels of the first, {size} Å")
            if frame.unit == "voxel":
                positions = positions * (sizes / size)[:, None]
    origins = vectors(_ORIGINS_ANGSTROM)
    if origins is None:
        origins = vectors(_ORIGINS)
        if origins is not None:
            frame = replace(frame, shift_unit="voxel")
            if sizes is not None and size is not None:
                origins = origins * (sizes / size)[:, None]
    else:
        frame = replace(frame, shift_unit="angstrom")
    outer, inner = vectors(_ANGLES), vectors(_SUBTOMOGRAM_ANGLES)
    turned = None if inner is None else rotations_of_angles(inner, "relion", source)
    rotations = None if outer is None else rotations_of_angles(outer, "relion", source)
    if turned is not None:
        rotations = turned if rotations is None else turned * rotations
        origins = None if origins is None or table.rows == 0 else turned.apply(origins)
    columns, also = _other_columns(table, source)
    used.update(also)
    tomogram = next((name for name in _TOMOGRAMS if name in table), None)
    tomograms: Sequence[str] = ("",)
    if tomogram is not None and table.rows:
        used.add(tomogram)
        tomograms = list(table.texts(tomogram))
        if len(set(tomograms)) == 1:
            tomograms = tomograms[:1]
    return ParticleTable(
        replace(frame, voxel_size_angstrom=size, binning=binning),
        positions,
        source,
        rotations,
        origins,
        columns,
        tomograms,
        tuple(table.columns),
        tuple(name for name in table.columns if name not in used),
        tuple(warnings),
    )


def _has(table: StarTable, names: Iterable[str]) -> bool:
    return all(name in table for name in names)


def _has_positions(table: StarTable) -> bool:
    return _has(table, _CENTRED) or _has(table, _COORDINATES)


def _particle_table(tables: Mapping[str, StarTable]) -> StarTable | None:
    named = tables.get("particles")
    if named is not None and _has_positions(named):
        return named
    return next((table for table in tables.values() if _has_positions(table)), None)


def _positive(table: StarTable, column: str) -> NDArray[np.float64]:
    values = table.numbers(column)
    bad = np.flatnonzero(values <= 0)
    if bad.size:
        raise InvalidArgument(f"{table.where(column, int(bad[0]))}: {values[bad[0]]}, which must be above 0")
    return values


def _voxel_sizes(
    table: StarTable, tables: Mapping[str, StarTable], version: Version
) -> tuple[NDArray[np.float64] | None, set[str]]:
    """The size in Å that coordinates count in, for each row, and the columns of the particles that say it."""
    optics, general = tables.get("optics"), tables.get("general")
    images_are_2d = general is not None and general.rows == 1 and "rlnTomoSubTomosAre2DStacks" in general
    if version in ("3.0", "3.1"):
        if "rlnPixelSize" in table:
            return _positive(table, "rlnPixelSize"), {"rlnPixelSize"}
        if "rlnDetectorPixelSize" in table:
            used = {"rlnDetectorPixelSize"}
            sizes = _positive(table, "rlnDetectorPixelSize")
            if "rlnMagnification" in table:
                used.add("rlnMagnification")
                sizes = sizes * 1e4 / _positive(table, "rlnMagnification")
            return sizes, used
        names = ["rlnMicrographPixelSize", "rlnImagePixelSize", "rlnTomoTiltSeriesPixelSize"]
    elif version == "4" and images_are_2d:
        names = ["rlnImagePixelSize", "rlnTomoTiltSeriesPixelSize"]
    else:
        names = ["rlnTomoTiltSeriesPixelSize", "rlnMicrographOriginalPixelSize"]
    if optics is None or optics.rows == 0:
        return None, set()
    column = next((name for name in names if name in optics), None)
    if column is None:
        return None, set()
    sizes = _positive(optics, column)
    if "rlnOpticsGroup" not in table or "rlnOpticsGroup" not in optics:
        if optics.rows == 1:
            return np.full(table.rows, sizes[0]), set()
        raise InvalidArgument(
            f"{table.file}: table {table.name} does not say by rlnOpticsGroup which of {optics.rows} groups a row is of"
        )
    by_group = dict(zip(optics.texts("rlnOpticsGroup"), sizes.tolist(), strict=True))
    groups = list(table.texts("rlnOpticsGroup"))
    for row, group in enumerate(groups):
        if group not in by_group:
            raise InvalidArgument(
                f"{table.where('rlnOpticsGroup', row)}: {group[:40]!r} is no group of table {optics.name}"
            )
    return np.array([by_group[group] for group in groups], np.float64), {"rlnOpticsGroup"}


def _binning(tables: Mapping[str, StarTable], sizes: NDArray[np.float64] | None) -> float | None:
    """How many pixels of the tilt series a voxel of coordinates spans."""
    optics = tables.get("optics")
    if sizes is None or len(sizes) == 0 or optics is None or "rlnTomoTiltSeriesPixelSize" not in optics:
        return None
    return float(sizes[0] / _positive(optics, "rlnTomoTiltSeriesPixelSize")[0])


def _other_columns(table: StarTable, source: str) -> tuple[dict[str, NDArray[Any]], set[str]]:
    columns: dict[str, NDArray[Any]] = {}
    used = set()
    if "rlnTomoParticleId" in table:
        used |= {"rlnTomoParticleId", "rlnTomoParticleName"}
        columns.update(distinct_ids(table.numbers("rlnTomoParticleId"), "rlnTomoParticleId", source))
    score = next((name for name in _SCORES if name in table), None)
    if score is not None:
        used.add(score)
        columns["score"] = table.numbers(score)
    if "rlnClassNumber" in table:
        used.add("rlnClassNumber")
        columns["class_id"] = class_ids(table.numbers("rlnClassNumber"), source)
    if "rlnRandomSubset" in table:
        used.add("rlnRandomSubset")
        columns["half"] = halves(table.integers("rlnRandomSubset"), {1: 1, 2: 2}, source)
    if "rlnHelicalTubeID" in table:
        used.add("rlnHelicalTubeID")
        columns["filament"] = table.integers("rlnHelicalTubeID") - 1
    return columns, used


def read_tomograms(path: Path, source: str) -> tuple[dict[str, Shape], float | None]:
    """The shapes (z, y, x) of the tomograms of RELION's tomograms.star, in pixels of the tilt series, and their size.

    Raises InvalidArgument where the file has no rlnTomoName and rlnTomoSize[XYZ].
    """
    tables = parse_star(read_file(path, source, MAX_TEXT_BYTES), source)
    sides = [f"rlnTomoSize{axis}" for axis in "ZYX"]
    table = next((table for table in tables.values() if _has(table, ["rlnTomoName", *sides])), None)
    if table is None:
        raise InvalidArgument(f"{source}: no table has rlnTomoName and rlnTomoSize[XYZ]")
    shapes = np.stack([table.integers(side) for side in sides], axis=1)
    bad = np.flatnonzero((shapes < 1).any(axis=1))
    if bad.size:
        raise InvalidArgument(f"{source}: table {table.name}: the size in row {bad[0] + 1} is not above 0")
    size = None
    if "rlnTomoTiltSeriesPixelSize" in table and table.rows:
        sizes = _positive(table, "rlnTomoTiltSeriesPixelSize")
        size = float(sizes[0]) if np.allclose(sizes, sizes[0], rtol=1e-6) else None
    rows = [(int(z), int(y), int(x)) for z, y, x in shapes.tolist()]
    return dict(zip(table.texts("rlnTomoName"), rows, strict=True)), size


def write(path: Path, table: ParticleTable, version: Version) -> tuple[str, ...]:
    """Writes what is known and leaves out what is not: RELION adds the optics of its own tomograms.star on import.

    Raises:
        InvalidArgument: a tomogram's name cannot stand in a STAR file.
        FailedPrecondition: versions 4 and 5 need the tomogram's name.
    """
    frame = table.frame
    names = table.tomogram_names()
    for name in names:
        if name == "" and version in ("4", "5") and len(table):
            raise FailedPrecondition(f"{table.source} does not name its tomogram: give it with --tomogram-name")
        if any(character.isspace() or character in "\"'#" for character in name):
            raise InvalidArgument(
                f"{table.source}: the tomogram's name {name!r} cannot stand in a STAR file: "
                "give one without spaces, quotes and # with --tomogram-name"
            )
    count, size = len(table), frame.voxel_size_angstrom
    ids = table.columns["id"] if "id" in table.columns else np.arange(count)
    tomograms = table.tomogram_column()
    columns: dict[str, Column] = {}
    if version in ("4", "5"):
        columns["rlnTomoName"] = ("%s", tomograms)
        columns["rlnTomoParticleId"] = ("%d", ids)
        columns["rlnTomoParticleName"] = ("%s", tomograms + "/" + np.asarray(ids).astype(str).astype(object))
    elif names != [""]:
        columns["rlnMicrographName"] = ("%s", np.where(tomograms == "", "none", tomograms))
    for i, label in enumerate(_CENTRED if version == "5" else _COORDINATES):
        columns[label] = ("%.6f", table.positions[:, i])
    if table.rotations is not None:
        angles = to_euler(table.rotations, "relion").reshape(-1, 3)
        columns |= {label: ("%.6f", angles[:, i]) for i, label in enumerate(_ANGLES)}
    if table.shifts is not None or table.rotations is not None:
        shifts = table.shifts_or_zero()
        labels = _ORIGINS if version == "3.0" else _ORIGINS_ANGSTROM
        columns |= {label: ("%.6f", shifts[:, i]) for i, label in enumerate(labels)}
    if "class_id" in table.columns or "class_name" in table.columns:
        # RELION counts classes from 1; what is in none is 0
        columns["rlnClassNumber"] = ("%d", np.maximum(table.class_numbers(), 0))
    if "half" in table.columns:
        columns["rlnRandomSubset"] = ("%d", table.columns["half"])
    if "filament" in table.columns:
        columns["rlnHelicalTubeID"] = ("%d", np.asarray(table.columns["filament"], np.int64) + 1)
    if "score" in table.columns:
        columns["rlnAutopickFigureOfMerit"] = ("%.9g", table.columns["score"])

    optics: dict[str, str] = {}
    if version == "3.0":
        columns["rlnMagnification"] = ("%.1f", np.full(count, 1e4))
        columns["rlnDetectorPixelSize"] = columns["rlnPixelSize"] = ("%.9g", np.full(count, size))
    elif version == "3.1":
        columns["rlnPixelSize"] = ("%.9g", np.full(count, size))
        optics = {"rlnImagePixelSize": f"{size:.9g}", "rlnImageDimensionality": "3"}
    elif version == "4":
        optics = {"rlnTomoTiltSeriesPixelSize": f"{size:.9g}"}
    elif frame.binning is not None:
        assert size is not None
        optics = {"rlnTomoTiltSeriesPixelSize": f"{size / frame.binning:.9g}"}
    if optics:
        optics = {"rlnOpticsGroup": "1", "rlnOpticsGroupName": "opticsGroup1", **optics}
        columns["rlnOpticsGroup"] = ("%d", np.ones(count, np.int64))
    stamp = {"3.0": "30000", "3.1": "30001", "4": "40001", "5": "50001"}[version]
    with path.open("wb") as file:
        if optics:
            file.write(_head(stamp, "optics", list(optics)) + "\t".join(optics.values()).encode() + b"\n\n")
        file.write(_head(stamp, "" if version == "3.0" else "particles", list(columns)))
        file.writelines(encode_rows(list(columns.values()), "\t"))
        file.write(b"\n")
    return table.renumbered()


def _head(stamp: str, name: str, labels: Sequence[str]) -> bytes:
    listed = "".join(f"_{label} #{i}\n" for i, label in enumerate(labels, start=1))
    return f"\n# version {stamp}\n\ndata_{name}\n\nloop_\n{listed}".encode()
