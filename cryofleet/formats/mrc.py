"""MRC files as other programs write them: every mode, byte order and habit, read without trusting the header.

Layout: Cheng et al., "MRC2014: Extensions to the MRC format header for electron cryo-microscopy and tomography",
J. Struct. Biol. 192 (2015); bytes as IMOD stamps them: bio3d.colorado.edu/imod/doc/mrc_format.txt.

A header is believed only as far as the file's real size bears it out: nothing is allocated by what a header says
before the two were compared.
"""

from __future__ import annotations

import gzip
import math
import re
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from cryofleet.formats.statistics import RunningStatistics, Statistics
from cryofleet.formats.volumes.frame import Sizes, VolumeData, VolumeFrame
from cryofleet.progress import Progress, no_progress, part

HEADER_BYTES = 1024
DEFLATE_LIMIT = 1032
"""Bytes that a byte of gzip can hold: deflate codes a run of at most 258 bytes in two bits."""
_PACKED = 101
"""The mode of 4-bit numbers: two a byte, the lower half first, rows in whole bytes."""
# Types by mode, without byte order; mode 0 is unsigned in IMOD's older files.
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2", _PACKED: "u1"}
_UNREAD_MODES = {3: "complex int16", 4: "complex float32", 16: "RGB"}
_WRITTEN: dict[int, np.dtype[Any]] = {mode: np.dtype("<" + _MODES[mode]) for mode in (0, 1, 2, 12)}
_BYTE_ORDERS: dict[str, Literal["<", ">"]] = {"little": "<", "big": ">"}
IMAGE_STACK_ENDINGS = (".mrcs", ".st", ".rawst", ".ali", ".preali")
_SCALED = re.compile(r"cryofleet scaled: value = stored \* ([-+\d.e]+) \+ ([-+\d.e]+)")
_IMOD_STAMP = 1146047817
_IMOD_SIGNED_BYTES = 1
_IMOD_ORIGIN_AS_MRC = 4
_PROBED_BYTES = 1 << 18
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
    extremes: tuple[float, float]
    """The least and the greatest voxel, as the header has it; the least is above where it does not know."""
    origin: tuple[float, float, float]
    """ORIGIN: (x, y, z) in Å."""
    starts: tuple[int, int, int]
    """NXSTART, NYSTART, NZSTART: the number of the first section, row and column."""

    @property
    def row_bytes(self) -> int:
        return (self.shape[2] + 1) // 2 if self.mode == _PACKED else self.shape[2] * self.dtype.itemsize

    @property
    def section_bytes(self) -> int:
        return self.shape[1] * self.row_bytes

    @property
    def stored_as(self) -> str:
        return "uint4" if self.mode == _PACKED else self.dtype.name

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
    def origin_angstrom(self) -> tuple[float, float, float]:
        """(x, y, z) of the first voxel's centre: ORIGIN or, where that is 0, the starts in voxels of the cell."""
        if any(self.origin) or self.voxel_size_angstrom is None:
            return self.origin
        z, y, x = (self.starts[axis] for axis in self.order)
        sizes = self.voxel_size_angstrom
        return x * sizes[0], y * sizes[1], z * sizes[2]

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
        extremes=(minimum, maximum),
        origin=_origin(head, order),
        starts=struct.unpack_from(f"{order}3i", head, 16)[::-1],
    )


def _origin(head: bytes, order: str) -> tuple[float, float, float]:
    """ORIGIN in Å; (0, 0, 0) where it is no number. IMOD's own sign is the opposite, unless a flag says otherwise."""
    origin = struct.unpack_from(f"{order}3f", head, 196)
    stamp, flags = struct.unpack_from(f"{order}2i", head, 152)
    sign = -1.0 if stamp == _IMOD_STAMP and not flags & _IMOD_ORIGIN_AS_MRC else 1.0
    if not all(math.isfinite(each) for each in origin):
        return 0.0, 0.0, 0.0
    return sign * origin[0] + 0.0, sign * origin[1] + 0.0, sign * origin[2] + 0.0


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

    `byte_order` is that of the voxels, "little" or "big", where the user knows it better than the header. Left out, it
    is the header's, or the other one where only that gives numbers between the header's extremes.

    Raises InvalidArgument on opening: no MRC file, or its size is not what its header says.
    """

    layer = 1

    def __init__(self, path: Path, name: str | None = None, byte_order: str | None = None) -> None:
        self.name = name or path.name
        self.warnings: tuple[str, ...] = ()
        if byte_order is not None and byte_order not in _BYTE_ORDERS:
            raise InvalidArgument(f"unknown byte order {byte_order!r}; known are {', '.join(_BYTE_ORDERS)}")
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
        self._dtype = self.header.dtype
        self._scale, self._offset = _scaled_by(self.header)
        if byte_order is not None:
            self._dtype = self._dtype.newbyteorder(_BYTE_ORDERS[byte_order])
        elif self._other_byte_order():
            self._dtype = self._dtype.newbyteorder()
            self.warnings += (
                "its voxels have the other byte order than its header: only so they lie between the header's extremes",
            )

    def _other_byte_order(self) -> bool:
        """Whether voxels of the middle make sense in the other byte order alone."""
        header, (least, greatest) = self.header, self.header.extremes
        if self._dtype.itemsize == 1 or not (math.isfinite(least) and math.isfinite(greatest) and least < greatest):
            return False
        count = min(_PROBED_BYTES // self._dtype.itemsize, math.prod(header.shape))
        start = (math.prod(header.shape) - count) // 2
        self._file.seek(header.data_offset + start * self._dtype.itemsize)
        stored = np.fromfile(self._file, self._dtype, count)
        margin = 1e-3 * (greatest - least)
        shares = []
        for values in (stored, stored.view(self._dtype.newbyteorder())):
            with np.errstate(invalid="ignore", over="ignore"):
                wide = values.astype(np.float64)
                shares.append(float(np.mean((wide >= least - margin) & (wide <= greatest + margin))))
        # half of all numbers in the wrong order are tiny, and so lie between the extremes too
        return shares[0] < 0.9 and shares[1] > 0.999

    def _check(self) -> None:
        """Raises FailedPrecondition where the file holds something else than is wanted."""

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Sections start to stop along z, as float32 [z, y, x]; integers that `write` scaled, as the values they were.

        Memory is the slab's, in its stored type and in float32. Where the file's sections do not run along z, each
        slab takes a pass over the file.
        """
        values = self._unscaled(start, stop)
        if (self._scale, self._offset) != (1.0, 0.0):
            values *= np.float32(self._scale)
            values += np.float32(self._offset)
        return values

    def _unscaled(self, start: int, stop: int) -> NDArray[np.float32]:
        header = self.header
        if header.order[0] == 0:
            return _float32(self.stored(start, stop).transpose(header.order))
        if header.mode == _PACKED:
            # rows of half bytes can't be mapped: the file's sections one by one
            slab = np.empty((stop - start, *self.shape[1:]), np.float32)
            along = header.order.index(0)
            for section in range(header.shape[0]):
                # the volume's axis that the file's sections run along
                place = [slice(None)] * 3
                place[along] = slice(section, section + 1)
                slab[tuple(place)] = self.stored(section, section + 1).transpose(header.order)[start:stop]
            return slab
        mapped = np.memmap(self._path, self._dtype, "r", header.data_offset, header.shape)
        return _float32(mapped.transpose(header.order)[start:stop])

    def stored(self, start: int, stop: int) -> NDArray[Any]:
        """The file's own sections start to stop, [section, row, column], in their stored type."""
        header = self.header
        self._file.seek(header.data_offset + start * header.section_bytes)
        rows = (stop - start) * header.shape[1]
        if header.mode != _PACKED:
            values = np.fromfile(self._file, self._dtype, rows * header.shape[2])
            return values.reshape(stop - start, *header.shape[1:])
        packed = np.fromfile(self._file, np.uint8, rows * header.row_bytes).reshape(rows, header.row_bytes)
        halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)[:, : header.shape[2]]
        return halves.reshape(stop - start, *header.shape[1:])

    def _frame(self, sizes: Sizes | None) -> VolumeFrame:
        return VolumeFrame(sizes, self.header.origin_angstrom).with_note(self.header.labels)

    def _data(self, sizes: Sizes | None, kind: Literal["volume", "stack"]) -> VolumeData:
        return VolumeData(
            self.name,
            self.shape,
            self.slab,
            self._frame(sizes),
            kind,
            self.header.labels,
            self.header.stored_as,
            warnings=self.warnings,
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MrcVolume(MrcSections):
    """One volume. Raises FailedPrecondition too, where a readable file does not hold one on orthogonal axes."""

    def __init__(self, path: Path, name: str | None = None, byte_order: str | None = None) -> None:
        super().__init__(path, name, byte_order)
        self.voxel_size_angstrom = self._frame(self.header.voxel_size_angstrom).voxel_size_angstrom

    def data(self) -> VolumeData:
        return self._data(self.header.voxel_size_angstrom, "volume")

    def _check(self) -> None:
        check_is_volume(self.header, self.name)


class MrcAnything(MrcVolume):
    """What an MRC file holds, were it several volumes or on axes that are not orthogonal: a warning says so."""

    def _check(self) -> None:
        try:
            super()._check()
        except FailedPrecondition as failure:
            self.warnings = (failure.message.removeprefix(f"{self.name}: "),)


class MrcImages(MrcSections):
    """A stack of images, a tilt series say: one section an image, a single image included.

    Raises FailedPrecondition too, where the sections of a readable file are no images.
    """

    def __init__(self, path: Path, name: str | None = None, byte_order: str | None = None) -> None:
        super().__init__(path, name, byte_order)
        self.pixel_size_angstrom = pixel = self.header.pixel_size_angstrom
        # sections have no distance: that of x stands for it
        self.voxel_size_angstrom = None if pixel is None else (pixel[0], pixel[1], pixel[0])

    def data(self) -> VolumeData:
        return self._data(self.voxel_size_angstrom, "stack")

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
    if is_image_stack(header, name):
        raise FailedPrecondition(
            f"{name}: a stack of {sections} images of {columns} x {rows} pixels (a tilt series, say), "
            "not a volume: reconstruct it first"
        )
    if any(abs(angle - 90) > 0.01 for angle in header.cell_angles_degrees if angle != 0):
        angles = ", ".join(f"{angle:g}" for angle in header.cell_angles_degrees)
        raise FailedPrecondition(f"{name}: the cell's angles are {angles} degrees: the axes must be orthogonal")


def is_image_stack(header: MrcHeader, name: str) -> bool:
    """Whether the sections are images of their own, by the header or by the name."""
    named = name.lower().removesuffix(".gz").endswith(IMAGE_STACK_ENDINGS)
    return header.shape[0] == 1 or named or (header.space_group == 0 and header.intervals[2] == 1)


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


def _scaled_by(header: MrcHeader) -> tuple[float, float]:
    """The scale and offset that `write` stated of integers; 1 and 0 where it did not."""
    if header.dtype.kind not in "iu":
        return 1.0, 0.0
    for label in header.labels:
        match = _SCALED.fullmatch(label.strip())
        if match is not None:
            scale, offset = float(match[1]), float(match[2])
            if math.isfinite(scale) and math.isfinite(offset) and scale > 0:
                return scale, offset
    return 1.0, 0.0


def _float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(invalid="ignore"):  # a NaN of the kind that signals
        return np.ascontiguousarray(stored, dtype=np.float32)


def encode_header(
    shape: Sequence[int],
    frame: VolumeFrame,
    mode: int,
    statistics: Statistics,
    labels: Sequence[str] = (),
    is_stack: bool = False,
) -> bytes:
    """The 1024 bytes before the little-endian voxels of one volume, or of a stack of images.

    `shape` is (z, y, x) and the statistics are those of the stored voxels. A voxel size that is not known is a cell of
    0 Å. The same arguments give the same bytes: no label holds a time. At most ten labels of 80 characters are kept.
    """
    sections, rows, columns = shape
    header = bytearray(HEADER_BYTES)
    struct.pack_into("<4i", header, 0, columns, rows, sections, mode)
    intervals = (columns, rows, 1 if is_stack else sections)
    struct.pack_into("<3i", header, 28, *intervals)
    sizes = frame.voxel_size_angstrom or (0.0, 0.0, 0.0)
    cell = [count * size for count, size in zip(intervals, sizes, strict=True)]
    struct.pack_into("<6f", header, 40, *cell, 90.0, 90.0, 90.0)
    struct.pack_into("<3i", header, 64, 1, 2, 3)
    struct.pack_into("<3f", header, 76, statistics.minimum, statistics.maximum, statistics.mean)
    struct.pack_into("<2i", header, 88, 0 if is_stack else 1, 0)
    struct.pack_into("<i", header, 108, 20141)
    struct.pack_into("<3f", header, 196, *(frame.origin_angstrom or (0.0, 0.0, 0.0)))
    header[208:212] = b"MAP "
    header[212:216] = b"\x44\x44\x00\x00"
    struct.pack_into("<f", header, 216, statistics.standard_deviation)
    kept = [label.encode("ascii", errors="replace")[:_LABEL_BYTES].ljust(_LABEL_BYTES) for label in labels[:_LABELS]]
    struct.pack_into("<i", header, 220, len(kept))
    header[_LABELS_AT : _LABELS_AT + _LABEL_BYTES * len(kept)] = b"".join(kept)
    return bytes(header)


def write(path: Path, volume: VolumeData, mode: int = 2, progress: Progress = no_progress) -> tuple[str, ...]:
    """Writes an MRC file of mode 0 (int8), 1 (int16), 2 (float32) or 12 (float16), slab by slab; gives warnings.

    Integers span the volume's whole range: value = stored * scale + offset, both of which a label of the file states.
    The header's statistics are those of the stored numbers, as MRC has it.

    Raises:
        InvalidArgument: another mode.
        FailedPrecondition: a voxel is beyond what float16 holds, or, of an integer mode, no finite number.
    """
    if mode not in _WRITTEN:
        raise InvalidArgument(f"MRC mode {mode} is not written; known are {', '.join(map(str, _WRITTEN))}")
    dtype = _WRITTEN[mode]
    note = volume.frame.note()
    labels = [label for label in volume.labels if not label.startswith(("cryofleet frame ", "cryofleet scaled"))]
    labels = [note, *labels] if note else labels
    warnings: list[str] = []
    scale, offset, writing = 1.0, 0.0, progress
    if dtype.kind == "i":
        scale, offset = _integer_scale(volume, np.iinfo(dtype), part(progress, 0.0, 0.4))
        labels.insert(min(len(labels), _LABELS - 1), f"cryofleet scaled: value = stored * {scale:.9g} + {offset:.9g}")
        warnings.append(f"rounded to {dtype.name}, in steps of {scale:.3g}; a label says how")
        writing = part(progress, 0.4, 1.0)
    elif mode == 12 and volume.stored_as != "float16":
        warnings.append("rounded to float16: three digits")
    if len(labels) > _LABELS:
        warnings.append(f"{len(labels) - _LABELS} of {len(labels)} labels are left out: MRC has room for {_LABELS}")

    running = RunningStatistics()
    with path.open("wb") as file:
        file.write(bytes(HEADER_BYTES))
        for slab in volume.slabs(writing, "writing"):
            if dtype.kind == "i":
                limits = np.iinfo(dtype)
                scaled = np.rint((slab.astype(np.float64) - offset) / scale)
                stored = np.clip(scaled, limits.min, limits.max).astype(dtype)
            else:
                if mode == 12:
                    _check_float16(slab)
                stored = slab.astype(dtype, copy=False)
            if dtype.kind == "f" and not np.isfinite(stored).all():
                running.update(stored[np.isfinite(stored)])
            else:
                running.update(stored)
            file.write(np.ascontiguousarray(stored).data)
        statistics = running.result() if running.count else Statistics(0.0, -1.0, -2.0, -1.0)
        file.seek(0)
        file.write(encode_header(volume.shape, volume.frame, mode, statistics, labels, volume.kind == "stack"))
    return tuple(warnings)


def _integer_scale(volume: VolumeData, limits: Any, progress: Progress) -> tuple[float, float]:
    running = RunningStatistics()
    for slab in volume.slabs(progress, "finding the range"):
        if not np.isfinite(slab).all():
            raise FailedPrecondition(f"{volume.name}: holds values that are not finite, which integers cannot be")
        running.update(slab)
    found = running.result()
    span = found.maximum - found.minimum
    scale = span / (limits.max - limits.min) if span > 0 else 1.0
    return scale, found.minimum - limits.min * scale


def _check_float16(slab: NDArray[np.float32]) -> None:
    end = float(np.finfo(np.float16).max)
    beyond = np.abs(slab[np.isfinite(slab)]).max(initial=0.0)
    if beyond > end:
        raise FailedPrecondition(
            f"the volume holds {beyond:g}; float16 (mrc_mode 12) ends at {end:g}: take mrc_mode 1 or 2"
        )


def pack_gzip(source: Path, target: Path, progress: Progress = no_progress) -> None:
    """Compresses a file, in constant memory; the same bytes give the same bytes."""
    size = source.stat().st_size
    # without its name and time
    with source.open("rb") as file, target.open("wb") as out, gzip.GzipFile("", "wb", 1, out, mtime=0) as packed:
        while chunk := file.read(_COPY_BYTES):
            progress(file.tell() / size, "packing")
            packed.write(chunk)
