"""Volumes and subtomograms in the store: MRC2014 files, little-endian float32, that also say contrast and tilt range.

Format: Cheng et al. 2015, J. Struct. Biol. 192, 146; https://www.ccpem.ac.uk/mrc-format/mrc2014/.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from cryofleet.artifacts import BLOCK_BYTES, Blob, Manifest, ResultWriter, contract, expand, manifest_for, open_blob
from cryofleet.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from cryofleet.particles import Particles
from cryofleet.space import claim
from cryofleet.storage import Store

Array = NDArray[np.float32]

HEADER_BYTES = 1024
SHARD_BYTES = 64 * 1024 * 1024
"""Subtomograms are kept in shards of about this size."""
_FLOAT = np.dtype("<f4")
_MAX_SIDE = 65535
_CONTRASTS = ("dark", "light")


@dataclass(frozen=True)
class VolumeInfo:
    """What is known of a volume besides its voxels."""

    shape: tuple[int, int, int]
    """(z, y, x) in voxels; of a stack, that of one box."""
    voxel_size_angstrom: float
    contrast: str
    """The sign of protein: "dark" (negative) or "light"."""
    tilt_min_degrees: float = -90.0
    tilt_max_degrees: float = 90.0
    """The range of the tilt series; -90 to 90 where nothing is missing."""
    count: int | None = None
    """The number of boxes of a stack; None for a single volume."""
    tomogram: str = ""
    """What the tomogram that this is, or was made of in its frame, is called in the store (`tomogram_names`)."""

    def __post_init__(self) -> None:
        shape = tuple(int(side) for side in self.shape)
        object.__setattr__(self, "shape", shape)
        for name in ("voxel_size_angstrom", "tilt_min_degrees", "tilt_max_degrees"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if len(shape) != 3 or not all(1 <= side <= _MAX_SIDE for side in shape):
            raise InvalidArgument(f"volume of shape {shape}: it must be (z, y, x), each 1 to {_MAX_SIDE}")
        if not (math.isfinite(self.voxel_size_angstrom) and self.voxel_size_angstrom > 0):
            raise InvalidArgument(f"volume with voxels of {self.voxel_size_angstrom} Å: the size must be above 0")
        if self.contrast not in _CONTRASTS:
            raise InvalidArgument(f"volume of contrast {self.contrast!r}: it must be dark or light")
        if not -90 <= self.tilt_min_degrees < self.tilt_max_degrees <= 90:
            raise InvalidArgument(
                f"volume with tilts from {self.tilt_min_degrees}° to {self.tilt_max_degrees}°: "
                "they must rise and lie within -90° and 90°"
            )
        if self.tomogram and not _TOMOGRAM_LABEL.fullmatch(f"{_TOMOGRAM}{self.tomogram}"):
            raise InvalidArgument(f"a tomogram called {self.tomogram!r}: a label of MRC can't hold that")
        if self.count is not None:
            object.__setattr__(self, "count", int(self.count))
            if self.count * shape[0] > 2**31 - 1 or self.count < 1:
                raise InvalidArgument(f"stack of {self.count} boxes: MRC has room for 1 to {(2**31 - 1) // shape[0]}")

    @property
    def array_shape(self) -> tuple[int, ...]:
        """(z, y, x), or (count, z, y, x) of a stack."""
        return self.shape if self.count is None else (self.count, *self.shape)

    @property
    def planes(self) -> int:
        """The file's xy planes, those of all boxes of a stack."""
        return self.shape[0] * (self.count or 1)

    @property
    def plane_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * _FLOAT.itemsize

    @property
    def data_bytes(self) -> int:
        return self.planes * self.plane_bytes


# --- The header ----------------------------------------------------------------------------------------------------

# Words 1 to 24, EXTRA with EXTTYP and NVERSION in it, ORIGIN, MAP, MACHST, RMS, NLABL.
_HEADER = struct.Struct("<10i6f3i3f2i8x4si84x3f4s4Bfi")
_LABEL_BYTES = 80
_LABELS = 10
_LABEL = re.compile(r"cryofleet contrast=(\w+) tilt=([-+.e\d]+?)\.\.([-+.e\d]+) voxel=([-+.e\d]+)")
_TOMOGRAM = "cryofleet tomogram="
_TOMOGRAM_LABEL = re.compile(rf"{_TOMOGRAM}[!-~]{{1,60}}")


def _number(value: float) -> str:
    """The shortest text that reads back as the same number; -60, not -60.0."""
    return repr(value).removesuffix(".0")


@dataclass
class _Statistics:
    """Minimum, maximum, mean and standard deviation of voxels that pass by in pieces.

    Sums of squares of the pieces are joined after Chan, Golub and LeVeque 1983, Am. Stat. 37, 242, eq. 2.1.
    """

    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    mean: float = 0.0
    squares: float = 0.0

    def add(self, voxels: Array) -> None:
        """Take further voxels. Raises InvalidArgument where some are NaN or infinite."""
        flat = voxels.reshape(-1)
        step = 1 << 20  # float64 copies of this many at a time
        for start in range(0, flat.size, step):
            piece = flat[start : start + step].astype(np.float64)
            low, high = float(piece.min()), float(piece.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                bad = int(np.count_nonzero(~np.isfinite(flat)))
                raise InvalidArgument(f"{bad} voxels of a volume are NaN or infinite; all must be finite")
            mean = float(piece.mean())
            piece -= mean
            squares = float(np.dot(piece, piece))
            difference, total = mean - self.mean, self.count + piece.size
            self.mean += difference * piece.size / total
            self.squares += squares + difference**2 * self.count * piece.size / total
            self.count = total
            self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count)


def _encode_header(info: VolumeInfo, statistics: _Statistics) -> bytes:
    depth, height, width = info.shape
    size = info.voxel_size_angstrom
    fixed = _HEADER.pack(
        width,
        height,
        info.planes,
        2,  # MODE: float32
        *(0, 0, 0),  # NXSTART, NYSTART, NZSTART
        *(width, height, depth),  # MX, MY, MZ: the cell is one box
        *(width * size, height * size, depth * size),  # CELLA in Å
        *(90.0, 90.0, 90.0),  # CELLB in degrees
        *(1, 2, 3),  # MAPC, MAPR, MAPS: columns are x, sections z
        statistics.minimum,
        statistics.maximum,
        statistics.mean,
        1 if info.count is None else 401,  # ISPG: a volume, or a stack of volumes
        0,  # NSYMBT
        b"\0\0\0\0",  # EXTTYP
        20141,  # NVERSION
        *(0.0, 0.0, 0.0),  # ORIGIN
        b"MAP ",
        *(0x44, 0x44, 0, 0),  # MACHST: little-endian
        statistics.deviation,
        2 if info.tomogram else 1,  # NLABL
    )
    tilt = f"{_number(info.tilt_min_degrees)}..{_number(info.tilt_max_degrees)}"
    label = f"cryofleet contrast={info.contrast} tilt={tilt} voxel={_number(size)}"
    if len(label) > _LABEL_BYTES:
        raise InvalidArgument(f"{label!r} does not fit into a label of MRC; give fewer digits")
    labels = [label, f"{_TOMOGRAM}{info.tomogram}"] if info.tomogram else [label]
    return (fixed + b"".join(each.encode().ljust(_LABEL_BYTES) for each in labels)).ljust(HEADER_BYTES, b"\0")


def decode_header(header: bytes, size_bytes: int, uri: str) -> tuple[VolumeInfo, int]:
    """What a header says and where the voxels begin. Nothing in it is trusted before it fits the object's size."""
    if len(header) < HEADER_BYTES:
        raise DataLoss(f"{uri} has {size_bytes} bytes; an MRC file has at least {HEADER_BYTES}")
    words = _HEADER.unpack_from(header)
    width, height, planes, mode = words[:4]
    mx, my, mz = words[7:10]
    cell = words[10:13]
    axes, space_group, extended = words[16:19], words[22], words[23]
    stamp, machine, labels = words[29], words[30:32], words[35]
    if stamp[:3] != b"MAP":
        raise FailedPrecondition(f"{uri} is no MRC file: it has no MAP stamp")
    if machine not in ((0x44, 0x44), (0x44, 0x41)) or mode != 2:
        raise FailedPrecondition(f"{uri} is MRC of mode {mode}; little-endian mode 2 is needed: ingest the file first")
    if axes != (1, 2, 3):
        raise FailedPrecondition(f"{uri} has its axes in order {axes}; x, y, z is needed: ingest the file first")
    if not all(1 <= side <= _MAX_SIDE for side in (width, height)) or planes < 1 or extended < 0:
        raise DataLoss(f"{uri} has a damaged header: {width} by {height} by {planes} voxels")
    needed = HEADER_BYTES + extended + planes * height * width * _FLOAT.itemsize
    if needed > size_bytes:
        raise DataLoss(f"{uri} is cut short: it has {size_bytes} bytes, and its header asks for {needed}")
    if needed < size_bytes:
        raise FailedPrecondition(f"{uri} has {size_bytes} bytes, and its header asks for {needed}")
    stack = 401 <= space_group <= 630
    depth, count = (mz, planes // mz if mz > 0 else 0) if stack else (planes, None)
    if not 1 <= depth <= _MAX_SIDE or (count is not None and count * depth != planes):
        raise DataLoss(f"{uri} has a damaged header: {planes} planes in boxes of {depth}")
    match = None
    texts = []
    for index in range(min(max(labels, 0), _LABELS)):
        start = 224 + index * _LABEL_BYTES
        text = header[start : start + _LABEL_BYTES].decode("ascii", "replace").rstrip("\0 ")
        match = match or _LABEL.fullmatch(text)
        texts.append(text)
    if match is None:
        raise FailedPrecondition(f"{uri} does not say its contrast and tilt range: ingest the file first")
    sizes = [side / count_ if count_ > 0 else math.nan for side, count_ in zip(cell, (mx, my, mz), strict=True)]
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        raise FailedPrecondition(f"{uri} has no voxel size")
    if max(sizes) - min(sizes) > 1e-3 * max(sizes):
        raise FailedPrecondition(f"{uri} has voxels of {sizes} Å along x, y, z; they must be cubes")
    try:
        low, high, exact = (float(match[group]) for group in (2, 3, 4))
        # The cell is rounded to float32 and may have been corrected by another program; then the cell is right.
        size = exact if math.isclose(exact, sizes[0], rel_tol=1e-5) else sizes[0]
        info = VolumeInfo((depth, height, width), size, match[1], low, high, count, tomogram_of(texts))
    except (ValueError, InvalidArgument) as error:
        raise DataLoss(f"{uri} has a damaged label: {error}") from None
    return info, HEADER_BYTES + extended


def tomogram_of(labels: Iterable[str]) -> str:
    """What the tomogram of a file with these labels of MRC is called in the store; empty where none says it."""
    found = (label for label in labels if _TOMOGRAM_LABEL.fullmatch(label))
    return next(found, "").removeprefix(_TOMOGRAM)


def _contiguous(array: NDArray[Any]) -> Array:
    return np.ascontiguousarray(array, dtype=_FLOAT)


def encode_volume(array: NDArray[Any], info: VolumeInfo) -> bytes:
    """A volume (z, y, x) or stack (count, z, y, x) as an MRC file. The same voxels and info give the same bytes.

    Raises InvalidArgument where the shapes differ or voxels are not finite.
    """
    return b"".join(encoded_volume(array, info))


def encoded_volume(array: NDArray[Any], info: VolumeInfo) -> Iterator[bytes]:
    """As `encode_volume`, in pieces, without a second copy of the voxels."""
    if array.shape != info.array_shape:
        raise InvalidArgument(f"voxels of shape {array.shape} for a volume of shape {info.array_shape}")
    voxels = _contiguous(array)
    statistics = _Statistics()
    statistics.add(voxels)
    yield _encode_header(info, statistics)
    data = voxels.data.cast("B")
    for start in range(0, len(data), BLOCK_BYTES):
        yield bytes(data[start : start + BLOCK_BYTES])


class VolumeWriter:
    """Writes a volume slab by slab, in order of z, in bounded memory.

    A context manager; the object is in the result, and `uri` set, once the block has ended without an error. The
    header stands first and holds the statistics, so the voxels wait in a temporary file.
    """

    def __init__(self, writer: ResultWriter, name: str, info: VolumeInfo, scratch: Path | None = None) -> None:
        """`scratch` is the folder for the temporary file; the system's where left out."""
        self.info = info
        self.uri = ""
        self._writer = writer
        self._name = name
        self._planes = 0
        self._statistics = _Statistics()
        self._file: IO[bytes]
        if info.data_bytes <= 2 * BLOCK_BYTES:
            self._file = BytesIO()
        else:
            self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
            try:
                claim(self._file, info.data_bytes, Path(scratch or tempfile.gettempdir()))
            except ResourceExhausted:
                self._file.close()
                raise

    def write(self, slab: NDArray[Any]) -> None:
        """The next planes, (n, y, x); of a stack also boxes, (n, z, y, x). Raises InvalidArgument."""
        voxels = slab.reshape(-1, *slab.shape[-2:]) if slab.ndim == 4 and slab.shape[1:] == self.info.shape else slab
        if voxels.ndim != 3 or voxels.shape[1:] != self.info.shape[1:]:
            raise InvalidArgument(f"{self._name}: a slab of shape {slab.shape} for a volume {self.info.array_shape}")
        if self._planes + len(voxels) > self.info.planes:
            raise InvalidArgument(f"{self._name}: more than {self.info.planes} planes were written")
        if not len(voxels):
            return
        self._planes += len(voxels)
        voxels = _contiguous(voxels)
        self._statistics.add(voxels)
        self._file.write(voxels.data.cast("B"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            if self._planes != self.info.planes:
                raise InvalidArgument(f"{self._name}: {self._planes} planes were written of {self.info.planes}")
            self._file.seek(0)
            self.uri = self._writer.put(self._name, self._encoded())

    def _encoded(self) -> Iterator[bytes]:
        yield _encode_header(self.info, self._statistics)
        while chunk := self._file.read(BLOCK_BYTES):
            yield chunk


# --- Reading -------------------------------------------------------------------------------------------------------


class Volume:
    """A volume in the store. Slabs are read when asked for, each one verified byte range."""

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.info, self._start = decode_header(blob.read(0, HEADER_BYTES), blob.size_bytes, blob.uri)

    @property
    def uri(self) -> str:
        return self.blob.uri

    def slab(self, first: int, last: int) -> Array:
        """Planes first <= z < last as (n, y, x); of a stack, boxes as (n, z, y, x). Raises DataLoss."""
        info = self.info
        length = info.shape[0] if info.count is None else info.count
        if not 0 <= first <= last <= length:
            what = "planes" if info.count is None else "boxes"
            raise InvalidArgument(f"{self.uri} has {length} {what}; {first} to {last} were asked for")
        each = info.array_shape[1:]
        target = np.empty((last - first, *each), dtype=_FLOAT)
        if target.size:
            self.blob.read_into(self._start + first * math.prod(each) * _FLOAT.itemsize, target.data.cast("B"))
        return target

    def boxes(self, first: int, last: int) -> Array:
        """Boxes first <= i < last of a stack as (n, z, y, x)."""
        if self.info.count is None:
            raise FailedPrecondition(f"{self.uri} is one volume; a stack is needed")
        return self.slab(first, last)

    def read(self) -> Array:
        """All of it, (z, y, x) or (count, z, y, x)."""
        return self.slab(0, self.info.array_shape[0])


def open_volume(store: Store, uri: str, manifest: Manifest | None = None) -> Volume:
    """A volume or stack. Raises NotFound, FailedPrecondition for files that have to be ingested, DataLoss."""
    return Volume(open_blob(store, uri, manifest))


# --- Subtomograms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One stack of a set of subtomograms."""

    uri: str
    digest: str
    count: int


class Subtomograms:
    """A set of subtomograms: box i is that of row i of its particles."""

    def __init__(
        self, store: Store, uri: str, info: VolumeInfo, particles: tuple[str, str], shards: list[Shard]
    ) -> None:
        """`particles` is URI and digest of their table."""
        self.uri = uri
        self.box_size = info.shape[0]
        self.info = info
        """Of one box."""
        self.count = sum(shard.count for shard in shards)
        self.shards = shards
        self.particles_uri, self._particles_digest = particles
        self._store = store
        self._firsts = np.concatenate([[0], np.cumsum([shard.count for shard in shards], dtype=np.int64)])
        self._manifests: dict[str, Manifest | None] = {}
        self._opened: tuple[int, Volume] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.count

    def particles(self) -> Particles:
        """Their table. Raises DataLoss where it is not the one that the set was made with."""
        blob = self._blob(self.particles_uri, self._particles_digest)
        particles = Particles.from_parquet(blob.read(), self.particles_uri)
        if len(particles) != self.count:
            raise DataLoss(
                f"{self.uri} has {self.count} boxes, its particles {self.particles_uri} {len(particles)} rows"
            )
        return particles

    def read(self, first: int, count: int) -> Array:
        """Boxes first to first + count as (count, b, b, b), from as many shards as they lie in."""
        if first < 0 or count < 0 or first + count > self.count:
            raise InvalidArgument(f"{self.uri} has {self.count} boxes; {first} to {first + count} were asked for")
        target = np.empty((count, *self.info.shape), dtype=_FLOAT)
        done = 0
        while done < count:
            index = int(np.searchsorted(self._firsts, first + done, side="right")) - 1
            begin = first + done - int(self._firsts[index])
            taken = min(count - done, self.shards[index].count - begin)
            target[done : done + taken] = self._shard(index).boxes(begin, begin + taken)
            done += taken
        return target

    def _shard(self, index: int) -> Volume:
        with self._lock:
            opened = self._opened
        if opened is not None and opened[0] == index:
            return opened[1]
        shard = self.shards[index]
        volume = Volume(self._blob(shard.uri, shard.digest))
        if volume.info.count != shard.count or volume.info.shape != self.info.shape:
            raise DataLoss(
                f"{shard.uri} holds {volume.info.count} boxes of {volume.info.shape}; {self.uri} says otherwise"
            )
        with self._lock:
            self._opened = (index, volume)
        return volume

    def _blob(self, uri: str, digest: str) -> Blob:
        """An object that the index names, which must have the digest that the index says."""
        folder = uri.rpartition("/")[0]
        with self._lock:
            known = folder in self._manifests
        if not known:
            manifest = manifest_for(self._store, uri)
            with self._lock:
                self._manifests[folder] = manifest
        try:
            blob = open_blob(self._store, uri, self._manifests[folder])
        except NotFound as error:
            raise NotFound(f"{error}; {self.uri} needs it") from None
        if blob.digest != digest:
            raise DataLoss(f"{uri} is not what {self.uri} was made with")
        return blob


def open_subtomograms(store: Store, uri: str) -> Subtomograms:
    """A set of subtomograms by the URI of its index. Raises NotFound, DataLoss, InvalidArgument for no index."""
    text = open_blob(store, uri).read()
    wrong = f"{uri} is no index of subtomograms"
    try:
        content = json.loads(text)
        size = content["box_size"]
        info = VolumeInfo(
            (size, size, size),
            content["voxel_size_angstrom"],
            content["contrast"],
            content["tilt_min_degrees"],
            content["tilt_max_degrees"],
        )
        particles = (expand(store, str(content["particles"]["ref"]), uri), str(content["particles"]["digest"]))
        shards = [
            Shard(expand(store, each["ref"], uri), str(each["digest"]), each["count"]) for each in content["shards"]
        ]
        if not all(type(shard.count) is int and shard.count > 0 for shard in shards):
            raise InvalidArgument("a shard's count must be a whole number above 0")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"{wrong}: {type(error).__name__} {error}") from None
    except InvalidArgument as error:
        raise InvalidArgument(f"{wrong}: {error}") from None
    return Subtomograms(store, uri, info, particles, shards)


def write_subtomograms_index(
    writer: ResultWriter,
    name: str,
    store: Store,
    info: VolumeInfo,
    particles: Mapping[str, str],
    shards: Sequence[Shard],
) -> str:
    """Write the index of a set; its URI.

    `info` is of one box, `particles` holds uri and digest of the table. Shards may be of other results.
    """
    if len(set(info.shape)) != 1:
        raise InvalidArgument(f"{name}: boxes of shape {info.shape}; they must be cubes")
    content = {
        "box_size": info.shape[0],
        "voxel_size_angstrom": info.voxel_size_angstrom,
        "contrast": info.contrast,
        "tilt_min_degrees": info.tilt_min_degrees,
        "tilt_max_degrees": info.tilt_max_degrees,
        "particles": {"ref": contract(store, particles["uri"]), "digest": particles["digest"]},
        "shards": [
            {"ref": contract(store, shard.uri), "digest": shard.digest, "count": shard.count} for shard in shards
        ],
    }
    return writer.put(name, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def write_subtomograms(
    writer: ResultWriter,
    store: Store,
    prefix: str,
    boxes: Iterable[NDArray[Any]],
    info: VolumeInfo,
    particles: Particles,
) -> str:
    """Write a set of subtomograms in shards; the URI of its index, PREFIX.json.

    `boxes` gives, in the order of the particles' rows, boxes (b, b, b) or batches of them (n, b, b, b); an array
    (n, b, b, b) will do. No more than a shard of them is held. Raises InvalidArgument where boxes and rows differ
    in number.
    """
    info = replace(info, count=None, tomogram="")
    per_shard = max(1, SHARD_BYTES // info.data_bytes)
    gathered: list[Array] = []
    shards: list[Shard] = []

    def finish_shard() -> None:
        stack = np.stack(gathered)
        gathered.clear()
        name = f"{prefix}-{len(shards):05d}.mrc"
        uri = writer.put(name, encoded_volume(stack, replace(info, count=len(stack))))
        shards.append(Shard(uri, writer.entry(name)["digest"], len(stack)))

    for batch in boxes:
        for box in batch if batch.ndim == 4 else batch[np.newaxis]:
            if box.shape != info.shape:
                raise InvalidArgument(f"{prefix}: a box of shape {box.shape}; all must be {info.shape}")
            gathered.append(np.array(box, dtype=_FLOAT))
            if len(gathered) == per_shard:
                finish_shard()
    if gathered:
        finish_shard()
    count = sum(shard.count for shard in shards)
    if count != len(particles):
        raise InvalidArgument(f"{prefix}: {count} boxes for {len(particles)} particles")
    table = f"{prefix}-particles.parquet"
    uri = writer.put(table, particles.to_parquet())
    return write_subtomograms_index(
        writer, f"{prefix}.json", store, info, {"uri": uri, "digest": writer.entry(table)["digest"]}, shards
    )
