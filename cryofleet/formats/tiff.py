"""TIFF stacks as volumes: plain, BigTIFF, ImageJ and OME, read plane by plane.

tifffile does the decoding; what a file says of its size is compared with its real size before anything is decoded,
and an OME file's references to other files are not followed.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.volumes.em import as_float32
from cryofleet.formats.volumes.frame import VolumeData, VolumeFrame
from cryofleet.progress import Progress, no_progress

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What a hostile or truncated file makes a TIFF decoder raise.
_BROKEN = (
    tifffile.TiffFileError,
    struct.error,
    zlib.error,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
    AttributeError,
)
# Bytes that one stored byte can stand for, over the compressions that tifffile reads.
_COMPRESSION_LIMIT = 4096
_LARGEST_PLANE_BYTES = 1 << 30
_CLASSIC_BYTES = (1 << 32) - (1 << 25)
_ANGSTROM = {
    "a": 1.0,
    "å": 1.0,
    "ångström": 1.0,
    "angstrom": 1.0,
    "angstroms": 1.0,
    "nm": 10.0,
    "nanometer": 10.0,
    "nanometers": 10.0,
    "µm": 1e4,
    "μm": 1e4,
    "um": 1e4,
    "micron": 1e4,
    "microns": 1e4,
    "micrometer": 1e4,
    "mm": 1e7,
    "cm": 1e8,
    "m": 1e10,
    "pm": 0.01,
}


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins so is a TIFF."""
    return head.startswith(_MAGIC)


class TiffVolume:
    """One volume in a TIFF file, a plane a section, read slab by slab along z.

    Raises on opening:
        InvalidArgument: the file is damaged, or smaller than its tags say.
        FailedPrecondition: a readable TIFF that does not hold one greyscale volume, or is compressed in a way that
            this installation does not read.
    """

    layer = 1

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or path.name
        self._path = path
        try:
            # is_ome: the OME reader opens whatever files the metadata names; the planes are the same without it.
            self._tiff: Any = tifffile.TiffFile(path, is_ome=False)
        except _BROKEN as error:
            raise InvalidArgument(f"{self.name}: damaged TIFF: {_line(error)}") from error
        try:
            self._open()
        except _BROKEN as error:
            self._tiff.close()
            raise InvalidArgument(f"{self.name}: damaged TIFF: {_line(error)}") from error
        except BaseException:
            self._tiff.close()
            raise

    def _open(self) -> None:
        tiff = self._tiff
        if not tiff.series:
            raise InvalidArgument(f"{self.name}: a TIFF file without images")
        series = tiff.series[0]
        page = tiff.pages[0]
        axes, sizes = series.get_axes(squeeze=True), series.get_shape(squeeze=True)
        if len(sizes) == 2:
            raise FailedPrecondition(f"{self.name}: one image of {sizes[1]} x {sizes[0]} pixels, not a volume")
        layout = ", ".join(f"{axis} {size}" for axis, size in zip(axes, sizes, strict=True))
        if len(sizes) != 3 or axes[1:] != "YX" or axes[0] in "CS":
            raise FailedPrecondition(
                f"{self.name}: the TIFF's axes are {layout}: one greyscale volume of axes Z, Y, X is needed"
            )
        if series.dtype is None or series.dtype.kind not in "iuf":
            raise FailedPrecondition(f"{self.name}: the TIFF's pixels are {series.dtype}, not real numbers")
        self.shape: tuple[int, int, int] = (int(sizes[0]), int(sizes[1]), int(sizes[2]))
        if min(self.shape) < 1:
            raise InvalidArgument(f"{self.name}: the TIFF's size is {layout}")
        self._series: Any = series
        self._dtype = np.dtype(tiff.byteorder + series.dtype.char)
        plane_bytes = self.shape[1] * self.shape[2] * self._dtype.itemsize
        file_bytes = self._path.stat().st_size
        total = self.shape[0] * plane_bytes
        self._offset: int | None = series.dataoffset if page.compression == 1 else None
        limit = file_bytes - self._offset if self._offset is not None else file_bytes * _COMPRESSION_LIMIT
        if page.compression == 1:
            limit = min(limit, file_bytes)
        if total > limit or (self._offset is None and plane_bytes > _LARGEST_PLANE_BYTES):
            raise InvalidArgument(
                f"{self.name}: truncated: the TIFF's tags say {layout} of {self._dtype.name}, {total} bytes; "
                f"the file has {file_bytes}"
            )
        self.voxel_size_angstrom = self._voxel_size()

    def _voxel_size(self) -> tuple[float, float, float] | None:
        """Along x, y and z; None where the metadata do not say all three in a unit of length."""
        description = str(self._tiff.pages[0].description)
        sizes = _ome_voxel_size(description, self.name) if "<OME" in description[:2000] else self._imagej_voxel_size()
        if sizes is None or not all(math.isfinite(size) and size > 0 for size in sizes):
            return None
        return sizes

    def _imagej_voxel_size(self) -> tuple[float, float, float] | None:
        metadata = self._tiff.imagej_metadata
        if not metadata:
            return None
        unit = _ANGSTROM.get(str(metadata.get("unit", "")).replace("\\u00B5", "µ").replace("\\u00C5", "å").lower())
        tags = self._tiff.pages[0].tags
        spacing = metadata.get("spacing")
        if unit is None or spacing is None or "XResolution" not in tags or "YResolution" not in tags:
            return None
        # Pixels per unit, as a fraction.
        sizes = [
            denominator / numerator if numerator else math.inf
            for numerator, denominator in (tags["XResolution"].value, tags["YResolution"].value)
        ]
        return sizes[0] * unit, sizes[1] * unit, float(spacing) * unit

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Planes start to stop, as float32 [z, y, x]; memory is the slab's and, of a compressed file, one plane's."""
        planes = (stop - start, *self.shape[1:])
        try:
            if self._offset is not None:
                offset = self._offset + start * self.shape[1] * self.shape[2] * self._dtype.itemsize
                stored = np.fromfile(self._path, self._dtype, math.prod(planes), offset=offset).reshape(planes)
                return as_float32(stored)
            slab = np.empty(planes, dtype=np.float32)
            for i in range(start, stop):
                slab[i - start] = as_float32(self._series.pages[i].asarray().reshape(planes[1:]))
            return slab
        except _BROKEN as error:
            if "imagecodecs" in str(error):
                compression = getattr(self._tiff.pages[0].compression, "name", "unknown")
                raise FailedPrecondition(
                    f"{self.name}: the TIFF is compressed with {compression}: save it uncompressed or with deflate"
                ) from error
            raise InvalidArgument(
                f"{self.name}: damaged TIFF: planes {start} to {stop - 1} cannot be read: {_line(error)}"
            ) from error

    def data(self) -> VolumeData:
        frame = VolumeFrame(self.voxel_size_angstrom).with_note([str(self._tiff.pages[0].description)])
        return VolumeData(self.name, self.shape, self.slab, frame, stored_as=self._dtype.name)

    def close(self) -> None:
        self._tiff.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ome_voxel_size(description: str, name: str) -> tuple[float, float, float] | None:
    # A document type can define entities that expand without end; OME-XML has none.
    if re.search(r"<!(DOCTYPE|ENTITY)", description, re.IGNORECASE):
        raise InvalidArgument(f"{name}: the OME metadata hold a document type declaration, which OME-XML does not have")
    try:
        pixels = ElementTree.fromstring(description).find("{*}Image/{*}Pixels")
    except ElementTree.ParseError as error:
        raise InvalidArgument(f"{name}: the OME metadata are not XML: {_line(error)}") from error
    if pixels is None:
        return None
    for axis, what in (("SizeC", "channels"), ("SizeT", "time points")):
        if pixels.get(axis, "1") != "1":
            raise FailedPrecondition(f"{name}: an OME-TIFF of {pixels.get(axis)} {what}: one volume is needed")
    sizes = []
    for axis in "XYZ":
        size = pixels.get(f"PhysicalSize{axis}")
        unit = _ANGSTROM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").lower())
        if size is None or unit is None:
            return None
        sizes.append(float(size) * unit)
    return sizes[0], sizes[1], sizes[2]


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


def write(path: Path, volume: VolumeData, progress: Progress = no_progress) -> tuple[str, ...]:
    """Writes an uncompressed OME-TIFF of float32, a page a section, slab by slab; gives warnings.

    OME-TIFF, for it alone says the voxel size in Å along all three axes. Above 4 GiB it is a BigTIFF.
    """
    sizes = volume.frame.voxel_size_angstrom
    metadata: dict[str, Any] = {"axes": "ZYX", "Name": Path(volume.name).name}
    for axis, size in zip("XYZ", sizes or (), strict=False):
        metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "Å"}
    if note := volume.frame.note():
        metadata["Description"] = note
    bytes_needed = 4 * math.prod(volume.shape)
    with tifffile.TiffWriter(path, bigtiff=bytes_needed > _CLASSIC_BYTES, ome=True) as file:
        file.write(
            (page for slab in volume.slabs(progress, "writing") for page in slab),
            shape=volume.shape,
            dtype=np.float32,
            photometric="minisblack",
            metadata=metadata,
            software="cryofleet",
        )
    return ()
