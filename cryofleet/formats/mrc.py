"""MRC files as other programs write them: every mode, byte order and habit, read without trusting the header.

Layout: Cheng et al., "MRC2014: Extensions to the MRC format header for electron cryo-microscopy and tomography",
J. Struct. Biol. 192 (2015); bytes as IMOD stamps them: bio3d.colorado.edu/imod/doc/mrc_format.txt.

A header is believed only as far as the file's real size bears it out: nothing is allocated by what a header says
before the two were compared.
"""

from __future__ import annotations

import gzip
import math
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from cryofleet.formats.statistics import Statistics
from cryofleet.progress import Progress, no_progress

HEADER_BYTES = 1024
DEFLATE_LIMIT = 1032
"""Bytes that a byte of gzip can hold: deflate codes a run of at most 258 bytes in two bits."""
# Types by mode, without byte order; mode 0 is unsigned in IMOD's older files.
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_UNREAD_MODES = {
    3: "complex int16",
    4: "complex float32",
    16: "RGB",
    101: "4-bit packed",
}
_IMAGE_STACK_ENDINGS = (".mrcs", ".st", ".rawst", ".ali", ".preali")
_IMOD_STAMP = 1146047817
_IMOD_SIGNED_BYTES = 1
_FIRST_VOLUME_STACK_GROUP = 401
_COPY_BYTES = 1 << 20
# Read as an MRC header, each of these would be a width of over half a million voxels, or a negative one.
_MAGIC = (
    (b"\x1f\x8b\x08", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"II*\0", "a TIFF file"),
    (b"MM\0*", "a TIFF file"),
    (b"II+\0", "a TIFF file"),
    (b"%PDF", "a PDF file"),
    (b"PAR1", "a Parquet file"),
    (b"\x93NUMPY", "a NumPy file"),
)
_LABELS_AT, _LABELS, _LABEL_BYTES = 224, 10, 80


@dataclass(frozen=True)
class MrcHeader:
    """What an MRC header says, with its plain contradictions resolved."""

    shape: tuple[int, int, int]
    """Sections, rows, columns, as the bytes lie in the file."""
    axes: tuple[int, int, int]
    """Which axis sections, rows and columns run along: 1 is x, 2 is y, 3 is z."""
    mode: int
    dtype: np.dtype[np.generic]
    """Of the stored voxels, with their byte order."""
    data_offset: int
    cell_angstrom: tuple[float, float, float]
    intervals: tuple[int, int, int]
    """Sampling intervals of the cell along x, y and z."""
    cell_angles_degrees: tuple[float, float, float]
    space_group: int
    labels: tuple[str, ...]

    @property
    def section_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.shape[0] * self.section_bytes

    @property
    def order(self) -> tuple[int, int, int]:
        """The transposition that takes the file's axes to (z, y, x)."""
        return self.axes.index(3), self.axes.index(2), self.axes.index(1)

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        """Size along z, y and x."""
        z, y, x = self.order
        return self.shape[z], self.shape[y], self.shape[x]

    @property
    def voxel_size_angstrom(self) -> tuple[float, float, float] | None:
        """Along x, y and z; None where the header has none.

        A cell of as many Å as voxels is what programs write that do not know: it counts as none, whichever of the
        three sizes it stands in.
        """
        sizes = []
        for axis, cell in enumerate(self.cell_angstrom):
            voxels = self.intervals[axis] if self.intervals[axis] > 0 else self.volume_shape[2 - axis]
            size = cell / voxels
            if not math.isfinite(size) or size <= 0:
                return None
            sizes.append(size)
        if all(size == 1.0 for size in sizes):
            return None
        return sizes[0], sizes[1], sizes[2]

    @property
    def pixel_size_angstrom(self) -> tuple[float, float] | None:
        """Along x and y, of a stack of images, whose third size says nothing; None where the header has none."""
        sizes = []
        for axis in (0, 1):
            intervals = self.intervals[axis] if self.intervals[axis] > 0 else self.volume_shape[2 - axis]
            size = self.cell_angstrom[axis] / intervals
            if not math.isfinite(size) or size <= 0:
                return None
            sizes.append(size)
        return None if sizes == [1.0, 1.0] else (sizes[0], sizes[1])


def parse_header(head: bytes, name: str) -> MrcHeader:
    """Reads the first 1024 bytes of a file; `name` is what errors call the file.

    Raises:
        InvalidArgument: the bytes are no MRC header, or sizes, mode or axes make no sense.
    """
    if len(head) < HEADER_BYTES:
        raise InvalidArgument(
            f"{name}: {describe(head)} of {len(head)} bytes, not an MRC file: its header alone has {HEADER_BYTES}"
        )
    order = _byte_order(head)
    if order is None:
        raise InvalidArgument(f"{name}: {describe(head)}, not an MRC file")
    columns, rows, sections, mode = struct.unpack_from(f"{order}4i", head, 0)
    intervals = struct.unpack_from(f"{order}3i", head, 28)
    cell = struct.unpack_from(f"{order}6f", head, 40)
    map_columns, map_rows, map_sections = struct.unpack_from(f"{order}3i", head, 64)
    minimum, maximum = struct.unpack_from(f"{order}2f", head, 76)
    space_group, extended_bytes = struct.unpack_from(f"{order}2i", head, 88)
    label_count = struct.unpack_from(f"{order}i", head, 220)[0]

    if min(columns, rows, sections) < 1:
        raise InvalidArgument(f"{name}: the header's size is {columns} x {rows} x {sections} voxels (x, y, z)")
    if mode not in _MODES:
        what = _UNREAD_MODES.get(mode, "unknown")
        raise InvalidArgument(f"{name}: MRC mode {mode} ({what}) is not a volume of numbers: convert it to mode 2")
    if extended_bytes < 0:
        raise InvalidArgument(f"{name}: the header says that its extension has {extended_bytes} bytes")
    axes = (map_sections, map_rows, map_columns)
    if axes == (0, 0, 0):
        axes = (3, 2, 1)
    if sorted(axes) != [1, 2, 3]:
        raise InvalidArgument(
            f"{name}: the header's axes (MAPC, MAPR, MAPS) are {map_columns}, {map_rows}, {map_sections}, "
            "not an order of 1, 2 and 3"
        )
    kind = _MODES[mode]
    if mode == 0 and _bytes_are_unsigned(head, order, minimum, maximum):
        kind = "u1"
    return MrcHeader(
        shape=(sections, rows, columns),
        axes=axes,
        mode=mode,
        dtype=np.dtype(order + kind),
        data_offset=HEADER_BYTES + extended_bytes,
        cell_angstrom=cell[:3],
        intervals=intervals,
        cell_angles_degrees=cell[3:],
        space_group=space_group,
        labels=tuple(
            head[start : start + _LABEL_BYTES].decode("latin-1").rstrip("\0 ")
            for start in range(_LABELS_AT, _LABELS_AT + _LABEL_BYTES * min(max(label_count, 0), _LABELS), _LABEL_BYTES)
        ),
    )


def _byte_order(head: bytes) -> str | None:
    """ "<" or ">"; None where the bytes are no MRC header in either order.

    The machine stamp is asked first, but there are files that have another program's, or none.
    """
    if any(head.startswith(magic) for magic, _ in _MAGIC):
        return None
    stamped = ">" if head[212:214] == b"\x11\x11" else "<"
    for order in (stamped, "<" if stamped == ">" else ">"):
        mode = struct.unpack_from(f"{order}i", head, 12)[0]
        axes = sorted(struct.unpack_from(f"{order}3i", head, 64))
        if mode in (_MODES | _UNREAD_MODES) and axes in ([1, 2, 3], [0, 0, 0]) and any(head[:12]):
            return order
    # The identifier without a sensible mode or axes: an MRC file whose header is wrong, and worth saying how.
    return stamped if head[208:211] == b"MAP" else None


def _bytes_are_unsigned(head: bytes, order: str, minimum: float, maximum: float) -> bool:
    """Mode 0 is signed in MRC2014; IMOD wrote unsigned bytes until it marked signed ones by a flag."""
    stamp, flags = struct.unpack_from(f"{order}2i", head, 152)
    if stamp == _IMOD_STAMP:
        return not flags & _IMOD_SIGNED_BYTES
    return bool(minimum >= 0 and maximum > 127)


def describe(head: bytes) -> str:
    """What a file seems to be by its first bytes, for messages."""
    if not head:
        return "an empty file"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < HEADER_BYTES else "ignore")
    except UnicodeDecodeError:
        return "binary data"
    if sum(character.isprintable() or character in "\r\n\t" for character in text) < 0.95 * len(head):
        return "binary data"
    lines = text.split()
    return f"text that begins {' '.join(lines)[:40]!r}" if lines else "white space"


def check_size(header: MrcHeader, size_bytes: int, name: str) -> None:
    """Compares a header with the real size of its file.

    Raises:
        InvalidArgument: the file is shorter than its header says, or longer by a section or more. Less than a
            section more is padding, which some programs leave.
    """
    sections, rows, columns = header.shape
    promised = (
        f"{columns} x {rows} x {sections} voxels of mode {header.mode} with {header.data_offset} bytes before them, "
        f"{header.file_bytes} bytes in all"
    )
    if size_bytes < header.file_bytes:
        raise InvalidArgument(f"{name}: truncated: the header says {promised}; the file has {size_bytes}")
    if size_bytes >= header.file_bytes + header.section_bytes:
        raise InvalidArgument(f"{name}: the header's size is wrong: it says {promised}; the file has {size_bytes}")


class MrcSections:
    """The sections of an uncompressed MRC file, read slab by slab along z.

    Raises InvalidArgument on opening: no MRC file, or its size is not what its header says.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or path.name
        self._file = path.open("rb")
        try:
            self.header = parse_header(self._file.read(HEADER_BYTES), self.name)
            check_size(self.header, path.stat().st_size, self.name)
            self._check()
        except BaseException:
            self._file.close()
            raise
        self.shape = self.header.volume_shape
        self._path = path

    def _check(self) -> None:
        """Raises FailedPrecondition where the file holds something else than is wanted."""

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Sections start to stop along z, as float32 [z, y, x].

        Memory is the slab's, in its stored type and in float32. Where the file's sections do not run along z, each
        slab takes a pass over the file.
        """
        header = self.header
        if header.order[0] == 0:
            self._file.seek(header.data_offset + start * header.section_bytes)
            count = (stop - start) * header.shape[1] * header.shape[2]
            stored = np.fromfile(self._file, dtype=header.dtype, count=count)
            stored = stored.reshape(stop - start, *header.shape[1:]).transpose(header.order)
        else:
            mapped = np.memmap(self._path, header.dtype, "r", header.data_offset, header.shape)
            stored = mapped.transpose(header.order)[start:stop]
        return np.ascontiguousarray(stored, dtype=np.float32)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MrcVolume(MrcSections):
    """One volume. Raises FailedPrecondition too, where a readable file does not hold one on orthogonal axes."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(path, name)
        self.voxel_size_angstrom = self.header.voxel_size_angstrom

    def _check(self) -> None:
        check_is_volume(self.header, self.name)


class MrcImages(MrcSections):
    """A stack of images, a tilt series say: one section an image, a single image included.

    Raises FailedPrecondition too, where the sections of a readable file are no images.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        super().__init__(path, name)
        self.pixel_size_angstrom = self.header.pixel_size_angstrom

    def _check(self) -> None:
        if self.header.axes != (3, 2, 1):
            raise FailedPrecondition(
                f"{self.name}: its sections run along axis {'xyz'[self.header.axes[0] - 1]}; those of an image stack "
                "run along z, its rows along y"
            )


def check_is_volume(header: MrcHeader, name: str) -> None:
    """Raises FailedPrecondition where a readable file does not hold one volume on orthogonal axes, with what it is."""
    sections, rows, columns = header.shape
    if sections == 1:
        raise FailedPrecondition(f"{name}: one image of {columns} x {rows} pixels, not a volume")
    if header.space_group >= _FIRST_VOLUME_STACK_GROUP:
        depth = header.intervals[2]
        raise FailedPrecondition(
            f"{name}: a stack of {sections // depth if depth > 0 else 'several'} volumes, not one: split it first"
        )
    if name.lower().removesuffix(".gz").endswith(_IMAGE_STACK_ENDINGS) or (
        header.space_group == 0 and header.intervals[2] == 1
    ):
        raise FailedPrecondition(
            f"{name}: a stack of {sections} images of {columns} x {rows} pixels (a tilt series, say), "
            "not a volume: reconstruct it first"
        )
    if any(abs(angle - 90) > 0.01 for angle in header.cell_angles_degrees if angle != 0):
        angles = ", ".join(f"{angle:g}" for angle in header.cell_angles_degrees)
        raise FailedPrecondition(f"{name}: the cell's angles are {angles} degrees: the axes must be orthogonal")


def is_gzip(head: bytes) -> bool:
    """Whether a file that begins so is gzipped."""
    return head.startswith(b"\x1f\x8b\x08")


def unpack_gzip(source: Path, target: Path, name: str, progress: Progress = no_progress) -> None:
    """Decompresses a gzipped MRC file to `target`, in constant memory and never past the size its header says.

    Raises:
        InvalidArgument: the stream is damaged, is no MRC file inside, or cannot hold what its header says.
        ResourceExhausted: the disk has no room for it.
    """
    packed_bytes = source.stat().st_size
    written = 0
    try:
        with gzip.open(source) as stream, target.open("wb") as out:
            head = stream.read(HEADER_BYTES)
            header = parse_header(head, name)
            if header.file_bytes > packed_bytes * DEFLATE_LIMIT:
                raise InvalidArgument(
                    f"{name}: the header says {header.file_bytes} bytes; {packed_bytes} bytes of gzip cannot hold them"
                )
            free = shutil.disk_usage(target.parent).free
            if header.file_bytes > free:
                raise ResourceExhausted(
                    f"{name}: unpacking takes {header.file_bytes} bytes of scratch space; {free} are free"
                )
            chunk = head
            while chunk:
                out.write(chunk)
                written += len(chunk)
                progress(min(1.0, written / header.file_bytes), "unpacking", bytes=float(written))
                # Up to a section of padding is read too, so that the stream's own checksum is verified at its end.
                left = header.file_bytes + header.section_bytes - written
                chunk = stream.read(min(_COPY_BYTES, left)) if left > 0 else b""
    except EOFError as error:
        raise InvalidArgument(f"{name}: truncated: the gzip stream ends after {written} unpacked bytes") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InvalidArgument(f"{name}: damaged: the gzip stream breaks after {written} unpacked bytes") from error


def encode_header(
    shape: Sequence[int],
    voxel_size_angstrom: float,
    mode: int,
    statistics: Statistics,
    labels: Sequence[str] = (),
) -> bytes:
    """The 1024 bytes before the little-endian voxels of one volume.

    `shape` is (z, y, x) and the statistics are those of the stored voxels.
    The same arguments give the same bytes: no label holds a time. At most ten labels of 80 characters are kept.
    """
    sections, rows, columns = shape
    header = bytearray(HEADER_BYTES)
    struct.pack_into("<4i", header, 0, columns, rows, sections, mode)
    struct.pack_into("<3i", header, 28, columns, rows, sections)
    cell = [size * voxel_size_angstrom for size in (columns, rows, sections)]
    struct.pack_into("<6f", header, 40, *cell, 90.0, 90.0, 90.0)
    struct.pack_into("<3i", header, 64, 1, 2, 3)
    struct.pack_into("<3f", header, 76, statistics.minimum, statistics.maximum, statistics.mean)
    struct.pack_into("<2i", header, 88, 1, 0)
    struct.pack_into("<i", header, 108, 20141)
    header[208:212] = b"MAP "
    header[212:216] = b"\x44\x44\x00\x00"
    struct.pack_into("<f", header, 216, statistics.standard_deviation)
    kept = [label.encode("ascii", errors="replace")[:_LABEL_BYTES].ljust(_LABEL_BYTES) for label in labels[:_LABELS]]
    struct.pack_into("<i", header, 220, len(kept))
    header[_LABELS_AT : _LABELS_AT + _LABEL_BYTES * len(kept)] = b"".join(kept)
    return bytes(header)
