"""Every particle format by name: what it holds, how it is known, its reader and its writer."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cryofleet.errors import FailedPrecondition, InvalidArgument, NotFound
from cryofleet.formats.frames import BinningRule, Frame, Shape
from cryofleet.formats.particles import copick, csv, dynamo, eman, imod, motive_list, portal, pytom, relion, stopgap
from cryofleet.formats.particles.files import MAX_BINARY_BYTES, MAX_TEXT_BYTES, check_file, read_file
from cryofleet.formats.particles.table import ParticleTable, rescaled, scaled_shape
from cryofleet.formats.star_tables import parse_star
from cryofleet.particles import QUATERNION, Particles
from cryofleet.tomogram_names import plain_names

_HEAD_BYTES = 1 << 16
_SAID = {"rotation": "rotations", "class": "classes", "half": "half sets", "filament": "filaments", "score": "scores"}


@dataclass(frozen=True)
class Format:
    """One format."""

    name: str
    """What --from and --to call it."""
    title: str
    endings: tuple[str, ...]
    frame: Frame
    """What its numbers mean where neither the file nor the user says otherwise."""
    holds: frozenset[str]
    """Of what a table may hold beside positions: rotation, shift, score, class, half, filament, id, tomogram,
    voxel_size, diameter."""
    read: Callable[[Path, str], ParticleTable]
    write: Callable[[Path, ParticleTable], tuple[str, ...]]
    own_frame: bool = False
    """Whether it is Cryofleet's own, which is written in no other frame."""

    def lost(self, particles: Particles) -> list[str]:
        """What of a table the format has no place for."""
        table = particles.table
        there = {
            "rotation": QUATERNION[0] in table,
            "score": "score" in table,
            "class": "class_id" in table or "class_name" in table,
            "half": "half" in table,
            "filament": "filament" in table,
            "diameter": "diameter_angstrom" in table,
        }
        return [_SAID.get(name, f"{name}s") for name, present in there.items() if present and name not in self.holds]


def _read_parquet(path: Path, source: str) -> ParticleTable:
    particles = Particles.from_parquet(read_file(path, source, MAX_BINARY_BYTES), source)
    table = ParticleTable.in_frame(particles, Frame())
    plain = plain_names(table.tomograms)
    return replace(table, tomograms=[plain[name] for name in table.tomograms], found=tuple(particles.table.columns))


def _write_parquet(path: Path, table: ParticleTable) -> tuple[str, ...]:
    path.write_bytes(table.particles().to_parquet())
    return ()


_ALL = frozenset(
    {"rotation", "shift", "score", "class", "half", "filament", "id", "tomogram", "voxel_size", "diameter"}
)
_POSE = frozenset({"rotation", "shift", "score", "class", "id", "tomogram"})


def _relion(version: relion.Version) -> Format:
    holds = {"rotation", "shift", "score", "class", "half", "filament", "tomogram"}
    holds |= {"voxel_size"} if version != "5" else set()
    holds |= {"id"} if version in ("4", "5") else set()
    return Format(
        f"relion-{version}",
        f"RELION {version} particles (STAR)",
        (".star",),
        relion.frame_of(version),
        frozenset(holds),
        functools.partial(relion.read, version=version),
        functools.partial(relion.write, version=version),
    )


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        *(_relion(version) for version in relion.VERSIONS),
        Format("dynamo", "Dynamo table", (".tbl",), dynamo.FRAME, _POSE | {"voxel_size"}, dynamo.read, dynamo.write),
        Format("stopgap", "STOPGAP motive list", (".star",), stopgap.FRAME, _POSE | {"half"}, stopgap.read,
               stopgap.write),
        Format("em", "motive list of TOM, AV3, novaSTA (EM)", (".em",), motive_list.FRAME, _POSE, motive_list.read,
               motive_list.write),
        Format("pytom", "PyTom particle list", (".xml",), pytom.FRAME, _POSE, pytom.read, pytom.write),
        Format("eman", "EMAN2 boxes", (".json",), eman.FRAME, frozenset({"score", "class", "voxel_size"}), eman.read,
               eman.write),
        Format("imod", "IMOD model", (".mod",), imod.FRAME, frozenset({"class", "filament", "voxel_size"}), imod.read,
               imod.write),
        Format("copick", "copick project", (".json", ""), copick.FRAME, _ALL - {"half", "id", "diameter"}, copick.read,
               copick.write),
        Format("portal", "CZ CryoET Data Portal points", (".ndjson",), portal.FRAME,
               frozenset({"rotation", "filament"}), portal.read, portal.write),
        Format("csv", "comma-separated table", (".csv",), csv.FRAME, _ALL, csv.read, csv.write, True),
        Format("parquet", "Cryofleet's particles", (".parquet",), Frame(), _ALL, _read_parquet, _write_parquet, True),
    )
}  # fmt: skip


def by_name(name: str) -> Format:
    """The format of a name. Raises InvalidArgument for one that there is none of."""
    if name not in FORMATS:
        raise InvalidArgument(f"unknown format {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def for_writing(path: Path) -> Format:
    """The format that a name's ending stands for; InvalidArgument where it stands for several or none."""
    matching = [each for each in FORMATS.values() if path.suffix.lower() in each.endings]
    if len(matching) == 1:
        return matching[0]
    which = ", ".join(each.name for each in (matching or FORMATS.values()))
    raise InvalidArgument(f"{path}: say what to write with --to: {which}")


def detect(path: Path, source: str) -> Format:
    """The format of a file by its content, or by its name where the content could be several.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is no table of particles that can be read.
    """
    found = _detected(path, source)
    if found is None:
        raise InvalidArgument(
            f"{source}: no table of particles that is known; say what it is with --from: {', '.join(FORMATS)}"
        )
    return found


def is_particles(path: Path, source: str) -> bool:
    """Whether a file is a table of particles."""
    return _detected(path, source) is not None


def _detected(path: Path, source: str) -> Format | None:
    if path.is_dir():
        return FORMATS["copick"]
    check_file(path, source, MAX_BINARY_BYTES << 10)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise InvalidArgument(f"{source}: can't be read: {error.strerror}") from None
    if head.startswith(imod.MAGIC):
        return FORMATS["imod"]
    if head.startswith(b"PAR1"):
        return FORMATS["parquet"]
    if motive_list.is_motive_list(head, size) or (path.suffix.lower() == ".em" and head[:1] == b"\x06"):
        return FORMATS["em"]
    name = _detected_text(head.decode("utf-8-sig", "replace"), path) if b"\0" not in head else None
    if name == "star":
        # The columns tell, which mostly stand in the file's first bytes.
        whole = size <= _HEAD_BYTES
        version = relion.version_of(parse_star(head if whole else head[: head.rfind(b"\n") + 1], source))
        if version is None and not whole:
            version = relion.version_of(parse_star(read_file(path, source, MAX_TEXT_BYTES), source))
        return None if version is None else FORMATS[f"relion-{version}"]
    return None if name is None else FORMATS[name]


def _detected_text(text: str, path: Path) -> str | None:
    start = text.lstrip()
    if start.startswith("<"):
        return "pytom" if "<ParticleList" in text or path.suffix.lower() == ".xml" else None
    if start.startswith("{"):
        first = start.partition("\n")[0]
        if '"location"' in first and '"points"' not in first and first.rstrip().endswith("}"):
            return "portal"
        if '"pickable_object' in text:
            return "copick"
        if '"boxes_3d"' in text:
            return "eman"
        if len(text) < _HEAD_BYTES // 2:
            return None
        # where the head of a long document tells nothing, the name does
        return {".ndjson": "portal", ".json": "eman"}.get(path.suffix.lower())
    if f"data_{stopgap.BLOCK}" in text:
        return "stopgap"
    lines = [line for line in text.splitlines() if line.strip()]
    if any(line.startswith("data_") for line in lines):
        return "star"
    if not lines:
        return {".csv": "csv", ".tbl": "dynamo", ".ndjson": "portal"}.get(path.suffix.lower())
    words = lines[0].split(",")
    if len(words) >= 3:
        names = {word.strip().strip('"').lower() for word in words}
        return "csv" if {"x", "y", "z"} <= names or path.suffix.lower() == ".csv" else None
    columns = lines[0].split()
    return "dynamo" if len(columns) >= 26 and _numbers(columns) else None


def _numbers(words: list[str]) -> bool:
    try:
        return all(np.isfinite(float(word)) or True for word in words[:26])
    except ValueError:
        return False


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    count: int
    read: ParticleTable
    source_format: Format
    target_format: Format
    frame: Frame
    """Of what was written."""
    lost: tuple[str, ...]
    """What the format written has no place for."""
    warnings: tuple[str, ...]


def read(path: Path, source: str, format_name: str | None = None, **frame: Any) -> tuple[Format, ParticleTable]:
    """A file's particles in its own frame.

    Args:
        path: the file or, for copick, the folder.
        source: what errors call it.
        format_name: found by its content where left out.
        frame: fields of `Frame` that are known better than the file says them.
    """
    which = by_name(format_name) if format_name else detect(path, source)
    table = which.read(path, source)
    known = {name: value for name, value in frame.items() if value is not None}
    if known.get("voxel_size_angstrom", table.frame.voxel_size_angstrom) != table.frame.voxel_size_angstrom:
        # of what was said of other voxels
        known.setdefault("binning", None if table.frame.voxel_size_angstrom is not None else table.frame.binning)
    return which, table.with_frame(**known) if known else table


def in_tomogram(
    table: ParticleTable, shape: Shape | Mapping[str, Shape], voxel_size_angstrom: float | None
) -> ParticleTable:
    """A table whose tomogram's shape, or those of all, is known in voxels of a size that need not be the table's.

    Where positions are Å, the tomogram's voxels become those of the table. Where they are voxels, the table keeps its
    own, and the shape is counted in them where it comes out whole.
    """
    frame = table.frame
    own = frame.voxel_size_angstrom
    if own is None or voxel_size_angstrom is None or np.isclose(own, voxel_size_angstrom, rtol=1e-4):
        size = own if own is not None else voxel_size_angstrom
        return table.with_frame(tomogram_shape=shape, voxel_size_angstrom=size)
    factor = voxel_size_angstrom / own
    if frame.unit == "angstrom" and (frame.shift_unit == "angstrom" or table.shifts is None):
        binning = None if frame.binning is None else frame.binning * factor
        return table.with_frame(tomogram_shape=shape, voxel_size_angstrom=voxel_size_angstrom, binning=binning)
    scaled: Shape | dict[str, Shape | None] | None
    if isinstance(shape, tuple):
        scaled = scaled_shape(shape, factor)
    else:
        scaled = {name: scaled_shape(each, factor) for name, each in shape.items()}
        scaled = None if None in scaled.values() else scaled
    if scaled is None:
        warning = (
            f"the tomogram has voxels of {voxel_size_angstrom:g} Å and the table counts in {own:g} Å: "
            "its shape is not whole in these and is left out"
        )
        return replace(table, warnings=(*table.warnings, warning))
    return table.with_frame(tomogram_shape=scaled)


def write(
    path: Path,
    particles: Particles,
    target: Format,
    binning: float | None = None,
    **frame: Any,
) -> tuple[Frame, tuple[str, ...]]:
    """Writes Cryofleet's particles; gives the frame written and warnings.

    Args:
        path: the file or, for copick, the folder.
        particles: in the voxels that the file is to count in.
        target: the format.
        binning: how many pixels of the unbinned data a voxel spans; RELION 4 counts in these.
        frame: fields of `Frame` that differ from the format's own.
    """
    known = {name: value for name, value in frame.items() if value is not None}
    if target.own_frame and known:
        raise InvalidArgument(f"{target.name} is Cryofleet's own table and has no other frame: {', '.join(known)}")
    if target.name == "relion-4" and binning not in (None, 1.0):
        particles = rescaled(particles, particles.voxel_size_angstrom / binning)
        binning = 1.0
    table = ParticleTable.in_frame(
        particles, replace(target.frame, binning=binning, **known), holds_shifts="shift" in target.holds
    )
    if not np.isfinite(table.positions).all():
        raise InvalidArgument(f"{particles.source}: a position is beyond all numbers in the frame of {target.name}")
    try:
        if target.name == "copick":
            return table.frame, target.write(path, table)
        # whole or not at all: what was there stays until the new one is complete
        with tempfile.TemporaryDirectory(prefix=".cryofleet-", dir=path.parent) as folder:
            warnings = target.write(Path(folder) / path.name, table)
            for file in Path(folder).iterdir():
                file.replace(path.parent / file.name)
        return table.frame, warnings
    except OSError as error:
        raise FailedPrecondition(f"{path}: can't be written: {error.strerror}") from None


def convert(
    table: ParticleTable,
    source_format: Format,
    path: Path,
    target: Format,
    *,
    select_tomogram: str | None = None,
    tomogram_name: str | None = None,
    voxel_size_angstrom: float | None = None,
    binning: float | None = None,
    binning_rule: BinningRule = "index",
    **frame: Any,
) -> Converted:
    """Writes what was read of one file in another format.

    Args:
        table: what `read` gave.
        source_format: likewise.
        path: the file or folder to be written.
        target: its format.
        select_tomogram: only this tomogram's rows.
        tomogram_name: what to call the only tomogram.
        voxel_size_angstrom: of the voxels that positions are to count in, where not those of the file.
        binning: how many pixels of the unbinned data such a voxel spans.
        binning_rule: how voxels of one size lie on those of another; see `cryofleet.formats.frames.rebinned`.
        frame: fields of `Frame` in which the file is to differ from its format's own.
    """
    particles = table.particles()
    if select_tomogram is not None:
        if select_tomogram not in table.tomogram_names():
            some = ", ".join(table.tomogram_names()[:20])
            raise NotFound(f"{table.source} has no tomogram {select_tomogram!r}; it has {some}")
        chosen = particles.select(table.tomogram_column() == select_tomogram).without_columns("tomogram")
        particles = replace(chosen, tomogram=select_tomogram)
    if tomogram_name is not None:
        if "tomogram" in particles.table:
            raise InvalidArgument(f"{table.source} has several tomograms, which can't have one name")
        particles = replace(particles, tomogram=tomogram_name)
    known_binning = table.frame.binning
    if voxel_size_angstrom is not None and voxel_size_angstrom != particles.voxel_size_angstrom:
        if known_binning is not None:
            known_binning *= voxel_size_angstrom / particles.voxel_size_angstrom
        particles = rescaled(particles, voxel_size_angstrom, binning_rule)
    shapes = table.frame.tomogram_shape
    if (
        shapes is not None
        and not isinstance(shapes, tuple)
        and frame.get("tomogram_shape") is None
        and not target.own_frame
        and particles.voxel_size_angstrom == table.frame.voxel_size_angstrom
    ):
        frame["tomogram_shape"] = shapes
    lost = list(target.lost(particles))
    names = table.tomogram_names() if select_tomogram is None else [select_tomogram]
    if "tomogram" not in target.holds and names != [""]:
        lost.append("tomogram's name")
    written, warnings = write(path, particles, target, binning or known_binning, **frame)
    return Converted(len(particles), table, source_format, target, written, tuple(lost), (*table.warnings, *warnings))
