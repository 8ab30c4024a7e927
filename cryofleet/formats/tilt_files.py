"""Tilt series' metadata from one format to another, and the files that lie beside a stack of images."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from cryofleet.errors import FailedPrecondition, InvalidArgument, NotFound
from cryofleet.formats.tilt_series import MAX_BYTES, TiltSeries, read_tilt_series, write_mdoc, write_tlt
from cryofleet.formats.xf import read_xf

FORMATS = {"tlt": (".tlt", ".rawtlt"), "mdoc": (".mdoc",), "tilt-series": (".json",)}
"""Names, and the endings that stand for them; tilt-series is Cryofleet's own JSON."""
METADATA_ENDINGS = (".tlt", ".rawtlt", ".mdoc")
ALIGNMENT_ENDING = ".xf"
_IMAGE_FILE = re.compile(rb"^(\s*ImageFile\s*=\s*).*$", re.MULTILINE)
_NOT_IN_MDOC = (
    "defocus_um",
    "astigmatism_um",
    "astigmatism_angle_degrees",
    "phase_shift_degrees",
    "shifts_angstrom",
    "rotations_degrees",
    "cs_mm",
    "amplitude_contrast",
)


def read(path: Path, source: str) -> bytes:
    """A small file's bytes. Raises NotFound, or InvalidArgument for a folder and for more than any tilt series has."""
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise InvalidArgument(f"{source}: {path.stat().st_size} bytes; such a file has at most {MAX_BYTES}")
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{source}: there is no such file") from None
    except OSError as error:
        raise InvalidArgument(f"{source}: can't be read: {error.strerror}") from None


def format_for(path: Path) -> str:
    """The format that a name's ending stands for. Raises InvalidArgument where it stands for none."""
    for name, endings in FORMATS.items():
        if path.suffix.lower() in endings:
            return name
    raise InvalidArgument(f"{path}: say what to write with --to ({', '.join(FORMATS)})")


def convert(source: Path, target: Path, format_name: str | None = None) -> tuple[str, TiltSeries, list[str]]:
    """Writes what is known of a tilt series in another format, whole or not at all.

    Gives the format, what was read, and what of it the format has no place for.
    """
    series = read_tilt_series(read(source, str(source)), str(source))
    which = format_name or format_for(target)
    known = [name for name in series.to_mapping() if name not in ("format", "angles_degrees")]
    match which:
        case "tlt":
            data, lost = write_tlt(series.angles_degrees), known
        case "mdoc":
            data = write_mdoc(series, target.name.removesuffix(".mdoc"), None, simulated=False)
            lost = [name for name in known if name in _NOT_IN_MDOC]
        case _:
            data, lost = series.to_json(), []
    _write(target, data)
    return which, series, lost


def companions(stack: Path) -> list[Path]:
    """The files beside a stack of images that go with it by their names: angles, metadata and alignment."""
    names = [f"{stack.name}.mdoc", *(f"{stack.stem}{ending}" for ending in (*METADATA_ENDINGS, ALIGNMENT_ENDING))]
    return [path for name in names if (path := stack.with_name(name)).is_file()]


def copy_companions(stack: Path, target: Path) -> list[str]:
    """Copies what lies beside a stack to lie beside another of the same images, and says what was done.

    A .mdoc names the new stack then. What is there already stays, and what can't be read is left out.
    """
    said = []
    for path in companions(stack):
        copy = target.with_name(target.stem + path.name.removeprefix(stack.stem))
        if path.name == f"{stack.name}.mdoc":
            copy = target.with_name(f"{target.name}.mdoc")
        if copy.exists():
            if not copy.samefile(path):
                said.append(f"{path.name} is not copied: {copy.name} is there")
            continue
        try:
            data = read(path, path.name)
            if path.suffix == ALIGNMENT_ENDING:
                read_xf(data, path.name)
            else:
                read_tilt_series(data, path.name)
        except InvalidArgument as failure:
            said.append(f"{path.name} is not copied: {failure.message}")
            continue
        if path.suffix == ".mdoc":
            data = _IMAGE_FILE.sub(lambda match: match[1] + target.name.encode(), data)
        _write(copy, data)
        said.append(f"{path.name} is copied to {copy.name}")
    return said


def _write(path: Path, data: bytes) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix=".cryofleet-", dir=path.absolute().parent) as folder:
            made = Path(folder) / path.name
            made.write_bytes(data)
            made.replace(path)
    except OSError as error:
        raise FailedPrecondition(f"{path}: can't be written: {error.strerror}") from None
