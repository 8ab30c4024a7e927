"""Every volume format by name: what it holds, how it is known, its reader and its writer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument, NotFound
from cryofleet.formats import mrc
from cryofleet.formats.volumes import em, eman_hdf5
from cryofleet.formats.volumes.frame import Shape, Sizes, VolumeData
from cryofleet.progress import Progress, no_progress, part

# What float32 holds every number of.
_EXACT = ("uint4", "int8", "uint8", "int16", "uint16", "float16", "float32", "")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ZIP_MAGIC = b"PK\x03\x04"
_MAP_AT, _MAP = 208, b"MAP"


class VolumeReader(AbstractContextManager["VolumeReader"], Protocol):
    """An open file that holds one volume, or a stack of images."""

    name: str
    shape: Shape
    layer: int

    @property
    def voxel_size_angstrom(self) -> Sizes | None: ...

    def slab(self, start: int, stop: int) -> NDArray[np.float32]: ...

    def data(self) -> VolumeData: ...

    def close(self) -> None: ...


Write = Callable[[Path, VolumeData, Progress], tuple[str, ...]]


@dataclass(frozen=True)
class VolumeFormat:
    """A format of volumes."""

    name: str
    title: str
    endings: tuple[str, ...]
    """The first is the one that it is mostly called by."""
    holds: frozenset[str]
    """Beside voxels and one voxel size: origin, sides, labels, images."""
    write: Write
    """Writes float32; gives warnings."""


def _write_mrc(path: Path, volume: VolumeData, progress: Progress) -> tuple[str, ...]:
    return mrc.write(path, volume, progress=progress)


def _write_packed_mrc(path: Path, volume: VolumeData, progress: Progress) -> tuple[str, ...]:
    plain = path.with_name(f"{path.name}.plain")
    try:
        warnings = mrc.write(plain, volume, progress=part(progress, 0.0, 0.5))
        mrc.pack_gzip(plain, path, part(progress, 0.5, 1.0))
    finally:
        plain.unlink(missing_ok=True)
    return warnings


def _write_tiff(path: Path, volume: VolumeData, progress: Progress) -> tuple[str, ...]:
    warnings: tuple[str, ...] = _tiff(volume.name).write(path, volume, progress)
    return warnings


def _tiff(name: str) -> ModuleType:
    """What reads and writes TIFF, which takes a quarter of a second to load."""
    try:
        from cryofleet.formats import tiff
    except ImportError:
        raise FailedPrecondition(f"{name}: TIFF needs tifffile: install cryofleet[io]") from None
    return tiff


def _write_ome_zarr(path: Path, volume: VolumeData, progress: Progress) -> tuple[str, ...]:
    from cryofleet.formats.volumes import ome_zarr

    return ome_zarr.write(path, volume, progress)


_MRC = frozenset({"origin", "sides", "labels", "images"})
FORMATS: dict[str, VolumeFormat] = {
    each.name: each
    for each in (
        VolumeFormat("mrc", "MRC file", (".mrc", ".map", ".rec", ".ccp4", *mrc.IMAGE_STACK_ENDINGS), _MRC, _write_mrc),
        VolumeFormat("mrc.gz", "gzipped MRC file", (".gz",), _MRC, _write_packed_mrc),
        VolumeFormat("tiff", "TIFF stack", (".tif", ".tiff"), frozenset({"sides", "images"}), _write_tiff),
        VolumeFormat("em-volume", "EM file", (".em",), frozenset(), em.write),
        VolumeFormat("eman-hdf5", "HDF5 of EMAN2", (".hdf", ".hdf5", ".h5"), frozenset({"origin", "sides"}),
                     eman_hdf5.write),
        VolumeFormat("ome-zarr", "OME-Zarr 0.4", (".zarr", ".ozx", ".zip"), frozenset({"origin", "sides"}),
                     _write_ome_zarr),
    )
}  # fmt: skip


def by_name(name: str) -> VolumeFormat:
    """The format of a name. Raises InvalidArgument for one that there is none of."""
    if name not in FORMATS:
        raise InvalidArgument(f"unknown format of volumes {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def for_writing(path: Path) -> VolumeFormat:
    """The format that a name's ending stands for; InvalidArgument where it stands for none."""
    for each in FORMATS.values():
        if path.suffix.lower() in each.endings:
            return each
    endings = ", ".join(each.endings[0] for each in FORMATS.values())
    raise InvalidArgument(f"{path}: say what to write with --to ({', '.join(FORMATS)}), or by the ending: {endings}")


def detect(path: Path) -> VolumeFormat | None:
    """The format of a file or folder by its first bytes, where they tell; older MRC files do not."""
    if path.is_dir():
        is_zarr = any((path / name).is_file() for name in (".zattrs", ".zgroup", ".zarray", "zarr.json"))
        return FORMATS["ome-zarr"] if is_zarr or path.suffix.lower() == ".zarr" else None
    try:
        with path.open("rb") as file:
            head = file.read(mrc.HEADER_BYTES)
        size = path.stat().st_size
    except OSError:
        return None
    for magic, name in ((eman_hdf5.MAGIC, "eman-hdf5"), (_ZIP_MAGIC, "ome-zarr"), *((m, "tiff") for m in _TIFF_MAGIC)):
        if head.startswith(magic):
            return FORMATS[name]
    if mrc.is_gzip(head):
        return FORMATS["mrc.gz"]
    if head[_MAP_AT : _MAP_AT + len(_MAP)] == _MAP:
        return FORMATS["mrc"]
    return FORMATS["em-volume"] if em.is_em(head, size) else None


def open_volume(
    path: Path,
    name: str,
    scratch: Path,
    progress: Progress = no_progress,
    format_name: str | None = None,
    byte_order: str | None = None,
    images: bool = False,
    any_cell: bool = False,
) -> tuple[VolumeFormat, VolumeReader]:
    """Opens a volume of any format; the content says which.

    Args:
        path: the file or, for OME-Zarr, the folder.
        name: the user's name for it, which errors and some of MRC's conventions go by.
        scratch: a folder for the unpacked content of a gzipped file.
        progress: of the unpacking.
        format_name: what it is, where the user knows better.
        byte_order: "little" or "big", of an MRC file's voxels, where the user knows better.
        images: take an MRC file that holds a stack of images too.
        any_cell: and one of several volumes or on axes that are not orthogonal, section by section; it says so.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is damaged, truncated, or of no known format; the message says what was found.
        FailedPrecondition: it is readable but does not hold one volume.
    """
    if not path.exists():
        raise NotFound(f"{name}: there is no such file")
    if not path.is_dir() and not path.is_file():
        raise InvalidArgument(f"{name} is no regular file")
    found = by_name(format_name) if format_name is not None else detect(path) or FORMATS["mrc"]
    if path.is_dir() and found.name != "ome-zarr":
        raise InvalidArgument(f"{name}: a folder, and no OME-Zarr")
    if byte_order is not None and not found.name.startswith("mrc"):
        raise InvalidArgument(f"{name}: the byte order of {found.title} is never in doubt; it is given for MRC alone")
    match found.name:
        case "tiff":
            return found, _tiff(name).TiffVolume(path, name)
        case "em-volume":
            return found, em.EmVolume(path, name)
        case "eman-hdf5":
            return found, eman_hdf5.EmanVolume(path, name)
        case "ome-zarr":
            from cryofleet.formats.volumes import ome_zarr

            return found, ome_zarr.OmeZarrVolume(path, name)
        case "mrc.gz":
            unpacked = scratch / "unpacked.mrc"
            mrc.unpack_gzip(path, unpacked, name, progress)
            path = unpacked
    if path.stat().st_size == 0:
        raise InvalidArgument(f"{name}: {mrc.describe(b'')}")
    if images:
        with path.open("rb") as file:
            header = mrc.parse_header(file.read(mrc.HEADER_BYTES), name)
        if mrc.is_image_stack(header, name):
            return found, mrc.MrcImages(path, name, byte_order)
    if any_cell:
        return found, mrc.MrcAnything(path, name, byte_order)
    return found, mrc.MrcVolume(path, name, byte_order)


def write(
    path: Path,
    volume: VolumeData,
    target: VolumeFormat,
    mrc_mode: int = 2,
    progress: Progress = no_progress,
) -> tuple[str, ...]:
    """Writes a volume, whole or not at all; gives warnings of what is not kept as it was.

    Args:
        path: the file or folder; what is there is replaced, a folder only by OME-Zarr and where it is one.
        volume: in the frame that it is to have.
        target: the format.
        mrc_mode: of an MRC file: 0 int8, 1 int16 (both scaled to the range), 2 float32, 12 float16.
        progress: of the whole.

    Raises:
        InvalidArgument: the format has no place for the voxel size, or no such mode; or a folder is in the way.
        FailedPrecondition: it has none for a stack of images, or the file can't be written.
    """
    if mrc_mode != 2 and target.name != "mrc":
        raise InvalidArgument(f"{path}: modes are of MRC; {target.title} is written as float32")
    is_zarr = target.name == "ome-zarr" and (path / ".zattrs").is_file()
    if path.is_dir() and not is_zarr and any(path.iterdir()):
        raise InvalidArgument(f"{path} is a folder of other things: give another name")
    if volume.kind == "stack" and "images" not in target.holds:
        raise FailedPrecondition(f"{volume.name}: a stack of images; {target.title} holds volumes: write MRC or TIFF")
    if target.name == "mrc" and path.suffix.lower() in mrc.IMAGE_STACK_ENDINGS:
        volume = replace(volume, kind="stack")
    try:
        with tempfile.TemporaryDirectory(prefix=".cryofleet-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            if mrc_mode != 2:
                warnings = mrc.write(made, volume, mrc_mode, progress)
            else:
                warnings = target.write(made, volume, progress)
            if path.is_dir():
                path.replace(Path(folder) / "replaced")
            made.replace(path)
    except OSError as error:
        raise FailedPrecondition(f"{path}: can't be written: {error.strerror}") from None
    return (*lost(volume, target), *warnings)


def lost(volume: VolumeData, target: VolumeFormat) -> list[str]:
    """What a format has no place for, as sentences."""
    frame = volume.frame
    said = []
    if volume.stored_as.partition(",")[0] not in _EXACT:
        said.append(f"{volume.stored_as} is written as float32: digits beyond the seventh are lost")
    if "origin" not in target.holds and frame.origin_angstrom not in (None, (0.0, 0.0, 0.0)):
        said.append(f"{target.name} has no place for the origin, {_numbers(frame.origin_angstrom)} Å (x, y, z)")
    if "sides" not in target.holds and frame.voxel_size_angstrom is not None:
        sizes = frame.voxel_size_angstrom
        if max(sizes) > min(sizes) * (1 + 1e-5):
            said.append(f"{target.name} has one voxel size: the mean of {_numbers(sizes)} Å (x, y, z)")
    if "labels" not in target.holds and volume.labels:
        said.append(f"{target.name} has no place for {len(volume.labels)} labels")
    return said


def _numbers(values: Sizes | None) -> str:
    return ", ".join(f"{value:.7g}" for value in values or ())
