"""convert and inspect: files of the field, without any server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cryofleet.cli.options import json_option
from cryofleet.cli.output import print_json, print_table
from cryofleet.errors import InvalidArgument

if TYPE_CHECKING:
    from cryofleet.formats.frames import Shape

# Named here again so that --help loads no reader; a test holds them to cryofleet.formats.
# fmt: off
FORMATS = (
    "relion-3.0", "relion-3.1", "relion-4", "relion-5", "dynamo", "stopgap", "em", "pytom", "eman", "imod", "copick",
    "portal", "csv", "parquet",
)
VOLUME_FORMATS = ("mrc", "mrc.gz", "tiff", "em-volume", "eman-hdf5", "ome-zarr")
TILT_SERIES_FORMATS = ("tlt", "mdoc", "tilt-series")
# fmt: on
ORIGINS = ("first-voxel", "one", "corner", "imod", "centre")
CENTRES = ("size/2", "floor(size/2)", "size/2-1", "(size-1)/2")
HANDEDNESSES = ("right", "left")
BINNING_RULES = ("index", "edge")
MRC_MODES = ("0", "1", "2", "12")
_ALL_FORMATS = (*FORMATS, *VOLUME_FORMATS, *TILT_SERIES_FORMATS)
# Of convert's options, those that volumes have; the others are of particles.
_OF_VOLUMES = {"source", "target", "source_format", "target_format", "voxel_size", "handedness", "out_handedness",
               "binning", "binning_rule", "byte_order", "mrc_mode", "overwrite", "as_json"}  # fmt: skip
_OF_TILT_SERIES = {"source", "target", "target_format", "binning_rule", "overwrite", "as_json", "mrc_mode"}

_size = click.FloatRange(min=0, min_open=True)


def _shape(text: str | None) -> Shape | None:
    if text is None:
        return None
    try:
        z, y, x = (int(side) for side in text.split(","))
    except ValueError:
        raise click.BadParameter("three whole numbers are needed: Z,Y,X", param_hint="--tomogram-shape") from None
    if min(z, y, x) < 1:
        raise click.BadParameter("each side must be above 0", param_hint="--tomogram-shape")
    return z, y, x


@click.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--from", "source_format", type=click.Choice(_ALL_FORMATS), help="What IN is; found by its content.")
@click.option("--to", "target_format", type=click.Choice(_ALL_FORMATS), help="What OUT is; found by its name's ending.")
@click.option("--voxel-size", type=_size, metavar="Å", help="Of the voxels that IN counts in, or has.")
@click.option("--tomogram", type=click.Path(path_type=Path), help="The tomogram (MRC): its shape and voxel size.")
@click.option("--tomogram-shape", metavar="Z,Y,X", help="The tomogram's, in the voxels that IN counts in.")
@click.option("--tomograms", type=click.Path(path_type=Path), help="RELION's tomograms.star: the shapes of all.")
@click.option("--tomogram-name", help="What to call the only tomogram.")
@click.option("--select-tomogram", help="Convert the rows of this tomogram alone.")
@click.option("--centre", type=click.Choice(CENTRES), help="The tomogram's centre, where IN counts from it.")
@click.option("--origin", type=click.Choice(ORIGINS), help="Where IN counts from.")
@click.option("--handedness", type=click.Choice(HANDEDNESSES), help="left: IN is of the tomogram mirrored along z.")
@click.option("--out-voxel-size", type=_size, metavar="Å", help="Of the voxels that OUT counts in; IN's.")
@click.option("--out-centre", type=click.Choice(CENTRES), help="As --centre, of OUT.")
@click.option("--out-origin", type=click.Choice(ORIGINS), help="As --origin, of OUT.")
@click.option("--out-handedness", type=click.Choice(HANDEDNESSES), help="As --handedness, of OUT.")
@click.option("--out-tomogram-shape", metavar="Z,Y,X", help="In OUT's voxels, where it does not follow from IN's.")
@click.option("--binning", type=_size, help="How many pixels of the tilt series a voxel of OUT spans.")
@click.option(
    "--byte-order", type=click.Choice(("little", "big")), help="Of an MRC file's voxels, if its header is wrong."
)
@click.option(
    "--mrc-mode",
    type=click.Choice(MRC_MODES),
    default="2",
    show_default=True,
    help="Of an MRC file written: 0 int8, 1 int16 (scaled to the range), 2 float32, 12 float16.",
)
@click.option(
    "--binning-rule",
    type=click.Choice(BINNING_RULES),
    default="index",
    show_default=True,
    help="index: voxel i of the coarse array is voxel b*i of the fine one; edge: their corners coincide.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@json_option
def convert(
    source: Path,
    target: Path,
    source_format: str | None,
    target_format: str | None,
    voxel_size: float | None,
    tomogram: Path | None,
    tomogram_shape: str | None,
    tomograms: Path | None,
    tomogram_name: str | None,
    select_tomogram: str | None,
    centre: str | None,
    origin: str | None,
    handedness: str | None,
    out_voxel_size: float | None,
    out_centre: str | None,
    out_origin: str | None,
    out_handedness: str | None,
    out_tomogram_shape: str | None,
    binning: float | None,
    binning_rule: Any,
    byte_order: str | None,
    mrc_mode: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Convert particles, a volume or a tilt series of IN to OUT, in another format or frame.

    docs/formats.md states each as maths.
    """
    _check_target(source, target, overwrite)
    kind = _kind(source, source_format)
    if kind == "volume":
        _only(_OF_VOLUMES, "a volume")
        said = _convert_volume(
            source, target, source_format, target_format, voxel_size, handedness, out_handedness, binning, byte_order,
            int(mrc_mode),
        )  # fmt: skip
        _say(said, as_json)
        return
    if kind == "tilt series":
        _only(_OF_TILT_SERIES, "a tilt series")
        _say(_convert_tilt_series(source, target, target_format), as_json)
        return
    if byte_order is not None or mrc_mode != "2":
        raise click.UsageError(f"--byte-order and --mrc-mode are of volumes; {source} holds particles")
    from cryofleet.formats.inspection import frame_mapping
    from cryofleet.formats.particles import catalogue

    shape: Any = _shape(tomogram_shape)
    if sum(given is not None for given in (tomogram, tomogram_shape, tomograms)) > 1:
        raise click.UsageError("give one of --tomogram, --tomogram-shape and --tomograms")
    size: float | None = None
    if tomogram is not None:
        shape, size = _of_volume(tomogram)
    if tomograms is not None:
        from cryofleet.formats.particles.relion import read_tomograms

        shape, size = read_tomograms(tomograms, str(tomograms))
    which = catalogue.by_name(target_format) if target_format else catalogue.for_writing(target)
    found, table = catalogue.read(
        source,
        str(source),
        source_format,
        voxel_size_angstrom=voxel_size,
        centre=centre,
        origin=origin,
        handedness=handedness,
    )
    if shape is not None:
        table = catalogue.in_tomogram(table, shape, size)
    done = catalogue.convert(
        table,
        found,
        target,
        which,
        select_tomogram=select_tomogram,
        tomogram_name=tomogram_name,
        voxel_size_angstrom=out_voxel_size,
        binning=binning,
        binning_rule=binning_rule,
        tomogram_shape=_shape(out_tomogram_shape),
        centre=out_centre,
        origin=out_origin,
        handedness=out_handedness,
    )
    warnings = [*done.warnings]
    if done.lost:
        warnings.append(f"{which.name} has no place for: {', '.join(done.lost)}")
    if table.not_carried:
        some = ", ".join(table.not_carried[:20])
        warnings.append(f"not carried over: {some}{', ...' if len(table.not_carried) > 20 else ''}")
    _say(
        {
            "file": str(target),
            "format": which.name,
            "count": done.count,
            "frame": frame_mapping(done.frame),
            "from": {"file": str(source), "format": found.name, "frame": frame_mapping(table.frame)},
            "warnings": warnings,
        },
        as_json,
    )


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidArgument(f"{target} is there already: give --overwrite, or another name")


def _kind(source: Path, source_format: str | None) -> str:
    """What IN is: "volume", "tilt series" or "particles"."""
    from cryofleet.formats.inspection import kind_of

    if source_format is not None:
        kinds = {**dict.fromkeys(VOLUME_FORMATS, "volume"), **dict.fromkeys(TILT_SERIES_FORMATS, "tilt series")}
        return kinds.get(source_format, "particles")
    kind = kind_of(source, str(source))
    # what is none of these, the readers of particles say best
    return kind if kind in ("volume", "tilt series") else "particles"


def _only(known: set[str], what: str) -> None:
    """Refuses options that were given and mean nothing for what IN is."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in known and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} has no meaning for {what}, which IN is")


def _say(done: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    for warning in done["warnings"]:
        click.echo(f"warning: {_text(warning)}", err=True)
    what = {"particles": "particles", "volume": "sections", "stack": "images", "tilt series": "images"}
    origin = done["from"]
    click.echo(
        f"{done['count']} {what[done.get('kind', 'particles')]} from {origin['file']} ({origin['format']}) "
        f"to {done['file']} ({done['format']})"
    )


def _convert_volume(
    source: Path,
    target: Path,
    source_format: str | None,
    target_format: str | None,
    voxel_size: float | None,
    handedness: Any,
    out_handedness: str | None,
    binning: float | None,
    byte_order: str | None,
    mrc_mode: int,
) -> dict[str, Any]:
    import tempfile
    from dataclasses import asdict, replace

    from cryofleet.formats.tilt_files import copy_companions
    from cryofleet.formats.volumes import catalogue

    which = catalogue.by_name(target_format) if target_format else catalogue.for_writing(target)
    if not target.absolute().parent.is_dir():
        raise InvalidArgument(f"{target}: there is no folder {target.absolute().parent}")
    with tempfile.TemporaryDirectory(prefix=".cryofleet-", dir=target.absolute().parent) as scratch:
        found, reader = catalogue.open_volume(
            source, str(source), Path(scratch), format_name=source_format, byte_order=byte_order, images=True
        )
        with reader:
            volume = reader.data()
            frame = volume.frame
            if voxel_size is not None:
                frame = replace(frame, voxel_size_angstrom=(voxel_size,) * 3)
            frame = replace(frame, binning=binning or frame.binning, handedness=handedness or frame.handedness)
            volume = replace(volume, frame=frame)
            warnings = list(volume.warnings)
            if frame.voxel_size_angstrom is None:
                warnings.append("the voxel size is not known, and OUT has none: give it with --voxel-size")
            if out_handedness not in (None, frame.handedness):
                volume = volume.mirrored()
            warnings += catalogue.write(target, volume, which, mrc_mode)
    if volume.kind == "stack":
        warnings += copy_companions(source, target)
    return {
        "file": str(target),
        "kind": volume.kind,
        "format": which.name,
        "count": volume.shape[0],
        "shape_zyx": list(volume.shape),
        "frame": asdict(volume.frame),
        "from": {"file": str(source), "format": found.name, "frame": asdict(frame)},
        "warnings": warnings,
    }


def _convert_tilt_series(source: Path, target: Path, target_format: str | None) -> dict[str, Any]:
    from cryofleet.formats import tilt_files

    which, series, lost = tilt_files.convert(source, target, target_format)
    return {
        "file": str(target),
        "kind": "tilt series",
        "format": which,
        "count": len(series),
        "from": {"file": str(source), "format": source.suffix.lower().lstrip(".")},
        "warnings": [f"{which} has no place for: {', '.join(lost)}"] if lost else [],
    }


def _of_volume(path: Path) -> tuple[Shape, float | None]:
    from cryofleet.formats.inspection import inspect as look

    seen = look(path, str(path))
    if seen["kind"] != "volume":
        raise InvalidArgument(f"{path} is no tomogram but a {seen['kind']}")
    z, y, x = seen["shape_zyx"]
    sizes = seen["voxel_size_angstrom_xyz"]
    # headers hold the cell in float32: its seventh digit is noise
    return (z, y, x), None if sizes is None else round(sum(sizes) / 3, 5)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--from", "format_name", type=click.Choice((*FORMATS, *VOLUME_FORMATS)), help="What FILE is; found by content."
)
@click.option(
    "--byte-order", type=click.Choice(("little", "big")), help="Of an MRC file's voxels, if its header is wrong."
)
@click.option("--full", is_flag=True, help="Statistics of all voxels of a volume, not of a sample.")
@json_option
def inspect(file: Path, format_name: str | None, byte_order: str | None, full: bool, as_json: bool) -> None:
    """Say what FILE is: particles, a volume, a stack or a tilt series; how much it holds, in what frame."""
    from cryofleet.formats.inspection import inspect as look

    seen = look(file, str(file), format_name, full, byte_order)
    if as_json:
        print_json(seen)
        return
    warnings = seen.pop("warnings")
    print_table(("", ""), list(_lines(seen)))
    for warning in warnings:
        click.echo(f"warning: {_text(warning)}", err=True)


def _lines(seen: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, value in seen.items():
        if value is None or value in ([], {}):
            continue
        what = name.replace("_", " ")
        if isinstance(value, dict):
            parts = [f"{_text(key)}={_text(part)}" for key, part in value.items() if part is not None]
            lines.append((what, ", ".join(parts)))
        else:
            lines.append((what, _text(value)))
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(part) for part in value)
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_text(part)}" for key, part in value.items())
    # names come from files: what would move a terminal's cursor is not shown
    return "".join(character if character.isprintable() else "?" for character in str(value))


COMMANDS = (convert, inspect)
