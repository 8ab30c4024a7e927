"""What a file is: particles, a volume, a stack of images, a tilt series or its alignment, or another STAR file."""

from __future__ import annotations

import gzip
import math
import re
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import Failure, InvalidArgument
from cryofleet.formats import mrc
from cryofleet.formats.statistics import RunningStatistics
from cryofleet.formats.tilt_files import ALIGNMENT_ENDING, METADATA_ENDINGS, companions
from cryofleet.formats.tilt_series import FORMAT as TILT_SERIES_FORMAT
from cryofleet.formats.tilt_series import read_tilt_series
from cryofleet.formats.volumes import catalogue as volumes
from cryofleet.formats.volumes.frame import VolumeData, VolumeFrame, slab_thickness
from cryofleet.formats.xf import read_xf

if TYPE_CHECKING:
    from cryofleet.formats.frames import Frame
    from cryofleet.formats.particles.catalogue import Format
    from cryofleet.formats.particles.table import ParticleTable

# SerialEM's label of a tilt series
_TILT_LABEL = re.compile(r"tilt axis angle|tilt series", re.IGNORECASE)
_TOMOGRAMS_SHOWN = 20
_SAMPLED_SECTIONS = 16
_SAMPLED_BYTES = 256 << 20
Kind = Literal["volume", "particles", "tilt series", "alignment", "other"]


def kind_of(path: Path, source: str) -> Kind:
    """What a file or folder is; "other" is a text that is none of these.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it can't be read.
    """
    if volumes.detect(path) is not None:
        return "volume"
    ending = path.suffix.lower()
    if path.is_file() and ending in (*METADATA_ENDINGS, ALIGNMENT_ENDING):
        return "alignment" if ending == ALIGNMENT_ENDING else "tilt series"
    # a second to load, which who looks at a volume need not wait for
    from cryofleet.formats.particles import catalogue

    if catalogue.is_particles(path, source):
        return "particles"
    with path.open("rb") as file:
        head = file.read(mrc.HEADER_BYTES)
    if b"\0" in head or not head:
        return "volume"
    return "tilt series" if head.lstrip().startswith(b"{") and TILT_SERIES_FORMAT.encode() in head else "other"


def inspect(
    path: Path, source: str, format_name: str | None = None, full: bool = False, byte_order: str | None = None
) -> dict[str, Any]:
    """What a file is, how much it holds and in what frame, as JSON has it.

    Args:
        path: the file, or the folder of an OME-Zarr or a copick project.
        source: what errors call it.
        format_name: of a table of particles or a volume, found by its content where left out.
        full: statistics of all voxels of a volume, not of sections spread over it.
        byte_order: "little" or "big", of an MRC file's voxels, where its header is wrong.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is damaged, or of no known format.
    """
    if format_name is not None and format_name not in volumes.FORMATS:
        from cryofleet.formats.particles import catalogue

        return particle_table(*catalogue.read(path, source, format_name))
    kind = "volume" if format_name is not None else kind_of(path, source)
    if kind == "volume":
        return _volume(path, source, full, format_name, byte_order)
    if byte_order is not None:
        raise InvalidArgument(f"{source}: a byte order is given for MRC alone")
    if kind == "particles":
        from cryofleet.formats.particles import catalogue

        return particle_table(*catalogue.read(path, source))
    if kind == "tilt series":
        return _tilt_series(path, source)
    return _alignment(path, source) if kind == "alignment" else _text(path, source)


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
    series = read_tilt_series(_bytes(path, source), source)
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


def _alignment(path: Path, source: str) -> dict[str, Any]:
    transforms = read_xf(_bytes(path, source), source)
    turned = np.unwrap(np.deg2rad(transforms.rotations_degrees()))
    return {
        "file": source,
        "kind": "alignment",
        "format": "xf",
        "title": "IMOD transforms",
        "count": len(transforms),
        "mean_rotation_degrees": float(np.rad2deg(turned.mean())),
        "largest_shift_pixels": float(np.linalg.norm(transforms.shifts_pixels, axis=1).max()),
        "warnings": [],
    }


def _text(path: Path, source: str) -> dict[str, Any]:
    from cryofleet.formats.star_tables import parse_star

    with path.open("rb") as file:
        head = file.read(mrc.HEADER_BYTES)
    if any(line.startswith(b"data_") for line in head.splitlines()):
        tables = parse_star(_bytes(path, source), source)
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


def _bytes(path: Path, source: str) -> bytes:
    from cryofleet.formats.particles.files import MAX_TEXT_BYTES, read_file

    return read_file(path, source, MAX_TEXT_BYTES)


def _volume(path: Path, source: str, full: bool, format_name: str | None, byte_order: str | None) -> dict[str, Any]:
    which = volumes.by_name(format_name) if format_name is not None else volumes.detect(path)
    if which is not None and which.name == "mrc.gz" and not full:
        return _described(*_packed_mrc(path, source), None, None)
    levels = None
    with tempfile.TemporaryDirectory() as scratch:
        which, reader = volumes.open_volume(
            path, source, Path(scratch), format_name=format_name, byte_order=byte_order, images=True, any_cell=True
        )
        with reader:
            data = reader.data()
            in_order = reader.stored if isinstance(reader, mrc.MrcSections) else data.read
            depth = reader.header.shape[0] if isinstance(reader, mrc.MrcSections) else data.shape[0]
            statistics = _statistics(in_order, depth, math.prod(data.shape) // depth, data.layer, full)
            if which.name == "ome-zarr":
                levels = [asdict(level) for level in reader.levels]  # type: ignore[attr-defined]
    return _described(which, data, statistics, levels)


def _packed_mrc(path: Path, source: str) -> tuple[volumes.VolumeFormat, VolumeData]:
    """What the header of a gzipped MRC file says; its voxels are not unpacked."""
    try:
        with gzip.open(path) as stream:
            head = stream.read(mrc.HEADER_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidArgument(f"{source}: damaged gzip: {error}") from None
    header = mrc.parse_header(head, source)
    is_stack = mrc.is_image_stack(header, source)
    pixel = header.pixel_size_angstrom if is_stack else None
    sizes = header.voxel_size_angstrom if pixel is None else (pixel[0], pixel[1], pixel[0])

    def unread(start: int, stop: int) -> NDArray[np.float32]:
        raise AssertionError("the voxels of a header")

    data = VolumeData(
        source,
        header.volume_shape,
        unread,
        VolumeFrame(sizes, header.origin_angstrom).with_note(header.labels),
        kind="stack" if is_stack else "volume",
        labels=header.labels,
        stored_as=header.stored_as,
        warnings=("gzipped: statistics with --full alone",),
    )
    return volumes.FORMATS["mrc.gz"], data


def _described(
    which: volumes.VolumeFormat, data: VolumeData, statistics: dict[str, Any] | None, levels: Any
) -> dict[str, Any]:
    warnings = list(data.warnings)
    sizes = data.frame.voxel_size_angstrom
    if data.kind == "stack":
        count, y, x = data.shape
        what = "one image" if count == 1 else f"a stack of {count} images"
        warnings.insert(0, f"{what} of {x} x {y} pixels, not a volume")
    if sizes is None:
        warnings.append("the file does not say its voxel size")
    elif max(sizes) / min(sizes) > 1.01:
        warnings.append("the voxel's sides differ")
    if which.name == "em-volume" and sizes is not None:
        warnings.append("the voxel size is taken to be Å, as TOM writes it; some programs write nm")
    if statistics is not None and statistics["not_finite"]:
        warnings.append("holds values that are not finite numbers")
    beside, missing, tilts = _companions(Path(data.name), data.shape[0])
    kind: str = data.kind
    if tilts or (kind == "stack" and any(_TILT_LABEL.search(label) for label in data.labels)):
        kind = "tilt series"
    elif kind == "volume":
        # what lies beside a reconstruction is of its tilt series
        beside, missing = {}, []
    return {
        "file": data.name,
        "kind": kind,
        "format": which.name,
        "title": which.title,
        "count": data.shape[0],
        **tilts,
        "shape_zyx": list(data.shape),
        "voxel_size_angstrom_xyz": None if sizes is None else list(sizes),
        "frame": asdict(data.frame),
        "stored_as": data.stored_as,
        "levels": levels,
        "beside": beside,
        "labels": list(data.labels),
        "statistics": statistics,
        "warnings": [*warnings, *missing],
    }


def _companions(stack: Path, images: int) -> tuple[dict[str, str], list[str], dict[str, float]]:
    """What lies beside a stack, warnings of it, and the tilt range of metadata that are of as many images."""
    said, warnings, tilts = {}, [], {}
    for path in companions(stack):
        try:
            found = (_alignment if path.suffix.lower() == ALIGNMENT_ENDING else _tilt_series)(path, path.name)
        except Failure as failure:
            warnings.append(failure.message)
            continue
        said[path.name] = f"{found['title']}, {found['count']} images"
        if found["count"] != images:
            warnings.append(f"{path.name} is of {found['count']} images, the stack has {images}")
        elif "tilt_min_degrees" in found:
            tilts = {name: found[name] for name in ("tilt_min_degrees", "tilt_max_degrees")}
    return said, warnings, tilts


def _statistics(
    read: Callable[[int, int], NDArray[Any]], depth: int, section: int, layer: int, full: bool
) -> dict[str, Any]:
    """Of sections spread evenly over a volume, or of all."""
    if full:
        thickness = slab_thickness((depth, 1, section), layer)
        slabs = [(start, min(start + thickness, depth)) for start in range(0, depth, thickness)]
    else:
        # whole layers, for they are decoded whole
        layers = -(-depth // layer)
        count = max(1, min(layers, _SAMPLED_SECTIONS, _SAMPLED_BYTES // (4 * section * layer)))
        chosen = np.unique(np.linspace(0, layers - 1, count + 2)[1:-1].round() if count < layers else np.arange(layers))
        most = min(layer, max(1, _SAMPLED_BYTES // (4 * section)))
        slabs = [(int(each) * layer, min(int(each) * layer + most, depth)) for each in chosen]
    running, missing = RunningStatistics(), 0
    for start, stop in slabs:
        values = read(start, stop)
        finite = np.isfinite(values)
        if not finite.all():
            missing += int(values.size - finite.sum())
            values = values[finite]
        if values.size:
            running.update(values)
    found = running.result() if running.count else None
    return {
        "of": "all voxels" if full else f"{sum(stop - start for start, stop in slabs)} of {depth} sections",
        "not_finite": missing,
        **(asdict(found) if found is not None else {}),
    }
