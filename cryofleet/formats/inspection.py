"""What a file is: a table of particles, a volume, a stack of images, a tilt series, or another STAR file."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryofleet.errors import FailedPrecondition, Failure, InvalidArgument
from cryofleet.formats import mrc
from cryofleet.formats.statistics import RunningStatistics
from cryofleet.formats.tilt_series import read_tilt_series

if TYPE_CHECKING:
    from cryofleet.formats.frames import Frame
    from cryofleet.formats.particles.catalogue import Format
    from cryofleet.formats.particles.table import ParticleTable

_TOMOGRAMS_SHOWN = 20
_SAMPLED_SECTIONS = 16
_SLAB_BYTES = 16 << 20
_TILT_SERIES_ENDINGS = (".tlt", ".rawtlt", ".mdoc")
_MAP_AT, _MAP = 208, b"MAP"


def inspect(path: Path, source: str, format_name: str | None = None, full: bool = False) -> dict[str, Any]:
    """What a file is, how much it holds and in what frame, as JSON has it.

    Args:
        path: the file, or a copick project's folder.
        source: what errors call it.
        format_name: of a table of particles, found by its content where left out.
        full: statistics of all voxels of a volume, not of sections spread over it.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is damaged, or of no known format.
    """
    if format_name is None and path.is_file() and _is_volume(path):
        return _volume(path, source, full)
    # a second to load, which who looks at a volume need not wait for
    from cryofleet.formats.particles import catalogue

    if format_name is not None:
        return particle_table(*catalogue.read(path, source, format_name))
    if path.suffix.lower() in _TILT_SERIES_ENDINGS:
        return _tilt_series(path, source)
    if catalogue.is_particles(path, source):
        return particle_table(*catalogue.read(path, source))
    with path.open("rb") as file:
        head = file.read(mrc.HEADER_BYTES)
    if b"\0" not in head and not mrc.is_gzip(head):
        return _text(head, path, source)
    return _volume(path, source, full)


def _is_volume(path: Path) -> bool:
    """Whether a file is one by its first bytes; older MRC files do not say it there."""
    from cryofleet.formats import tiff

    try:
        with path.open("rb") as file:
            head = file.read(mrc.HEADER_BYTES)
    except OSError:
        return False
    return mrc.is_gzip(head) or tiff.is_tiff(head) or head[_MAP_AT : _MAP_AT + len(_MAP)] == _MAP


def particle_table(which: Format, table: ParticleTable) -> dict[str, Any]:
    """What a table of particles is, in its own frame."""
    names = table.tomogram_column().tolist()
    counts = {name: names.count(name) for name in table.tomogram_names()[:_TOMOGRAMS_SHOWN]} if len(table) else {}
    there = {"rotations": table.rotations is not None, "shifts": table.shifts is not None}
    return {
        "file": table.source,
        "kind": "particles",
        "format": which.name,
        "title": which.title,
        "count": len(table),
        "frame": frame_mapping(table.frame),
        "carried": ["positions", *(name for name, present in there.items() if present), *sorted(table.columns)],
        "columns": list(table.found),
        "not_carried": list(table.not_carried),
        "tomograms": counts,
        "tomogram_count": len(table.tomogram_names()) if len(table) else 0,
        "least_position": table.positions.min(axis=0).tolist() if len(table) else None,
        "greatest_position": table.positions.max(axis=0).tolist() if len(table) else None,
        "warnings": list(table.warnings),
    }


def frame_mapping(frame: Frame) -> dict[str, Any]:
    """A frame as JSON has it; the centre's rule only where positions count from the centre."""
    fields = asdict(frame)
    if frame.origin != "centre":
        fields.pop("centre")
    return fields


def _tilt_series(path: Path, source: str) -> dict[str, Any]:
    from cryofleet.formats.particles.files import MAX_TEXT_BYTES, read_file

    series = read_tilt_series(read_file(path, source, MAX_TEXT_BYTES), source)
    said = series.to_mapping()
    return {
        "file": source,
        "kind": "tilt series",
        "format": path.suffix.lower().lstrip("."),
        "title": "tilt angles" if path.suffix.lower() != ".mdoc" else "SerialEM metadata",
        "count": len(series),
        "tilt_min_degrees": float(series.angles_degrees.min()),
        "tilt_max_degrees": float(series.angles_degrees.max()),
        "columns": sorted(said),
        "pixel_size_angstrom": series.pixel_size_angstrom,
        "tilt_axis_degrees": series.tilt_axis_degrees,
        "warnings": [],
    }


def _text(head: bytes, path: Path, source: str) -> dict[str, Any]:
    from cryofleet.formats.particles.files import MAX_TEXT_BYTES, read_file
    from cryofleet.formats.star_tables import parse_star

    if any(line.startswith(b"data_") for line in head.splitlines()):
        tables = parse_star(read_file(path, source, MAX_TEXT_BYTES), source)
        return {
            "file": source,
            "kind": "star",
            "format": "star",
            "title": "STAR file without particles",
            "count": sum(table.rows for table in tables.values()),
            "tables": {
                name: {"rows": table.rows, "columns": list(table.columns)} for name, table in list(tables.items())[:100]
            },
            "warnings": [],
        }
    try:
        return _tilt_series(path, source)
    except Failure:
        raise InvalidArgument(f"{source}: of no known format: {mrc.describe(head)}") from None


def _volume(path: Path, source: str, full: bool) -> dict[str, Any]:
    from cryofleet.formats import tiff

    with path.open("rb") as file:
        head = file.read(mrc.HEADER_BYTES)
    warnings: list[str] = []
    statistics: dict[str, Any] | None = None
    labels: list[str] = []
    sizes: tuple[float, float, float] | None
    kind = "volume"
    if tiff.is_tiff(head):
        with tiff.TiffVolume(path, source) as volume:
            shape, sizes, stored, name = volume.shape, volume.voxel_size_angstrom, None, "tiff"
            statistics = _statistics(volume, full)
    else:
        packed = mrc.is_gzip(head)
        header = mrc.parse_header(_unpacked_head(path, source) if packed else head, source)
        shape, sizes, stored = header.volume_shape, header.voxel_size_angstrom, header.dtype.name
        labels, name = list(header.labels), "mrc.gz" if packed else "mrc"
        if not packed:
            mrc.check_size(header, path.stat().st_size, source)
        try:
            mrc.check_is_volume(header, source)
        except FailedPrecondition as failure:
            # readable all the same: a stack of images or volumes, a single image
            kind = "stack"
            warnings.append(failure.message.removeprefix(f"{source}: "))
        if packed:
            warnings.append("gzipped: no statistics")
        else:
            with mrc.MrcSections(path, source) as sections:
                statistics = _statistics(sections, full)
    if sizes is None:
        warnings.append("the file does not say its voxel size")
    elif max(sizes) / min(sizes) > 1.01:
        warnings.append("the voxel's sides differ")
    if statistics is not None and statistics["not_finite"]:
        warnings.append("holds values that are not finite numbers")
    return {
        "file": source,
        "kind": kind,
        "format": name,
        "title": {"tiff": "TIFF stack"}.get(name, "MRC file"),
        "count": shape[0],
        "shape_zyx": list(shape),
        "voxel_size_angstrom_xyz": None if sizes is None else list(sizes),
        "stored_as": stored,
        "labels": labels,
        "statistics": statistics,
        "warnings": warnings,
    }


def _unpacked_head(path: Path, source: str) -> bytes:
    try:
        with gzip.open(path) as stream:
            return stream.read(mrc.HEADER_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidArgument(f"{source}: damaged gzip: {error}") from None


def _statistics(volume: Any, full: bool) -> dict[str, Any]:
    """Of sections spread evenly over a volume, or of all."""
    depth, height, width = volume.shape
    if full:
        thickness = max(1, _SLAB_BYTES // max(1, 4 * height * width))
        slabs = [(start, min(start + thickness, depth)) for start in range(0, depth, thickness)]
    else:
        chosen = np.unique(np.linspace(0, depth - 1, min(depth, _SAMPLED_SECTIONS)).astype(int)).tolist()
        slabs = [(section, section + 1) for section in chosen]
    running, missing = RunningStatistics(), 0
    for start, stop in slabs:
        values = volume.slab(start, stop)
        finite = np.isfinite(values)
        if not finite.all():
            missing += int(values.size - finite.sum())
            values = values[finite]
        if values.size:
            running.update(values)
    found = running.result() if running.count else None
    return {
        "of": "all voxels" if full else f"{len(slabs)} of {depth} sections",
        "not_finite": missing,
        **(asdict(found) if found is not None else {}),
    }
