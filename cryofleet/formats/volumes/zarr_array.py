"""One array of Zarr 2, in a folder or a zip file: chunks of numbers, each an object of its own, mostly compressed.

Specification: zarr-specs.readthedocs.io/en/latest/v2/v2.0.html.

Where a chunk lies follows from its numbers alone, and only chunks that are there are looked at: no key of the file is
ever made a path, links are not followed, and nothing is unpacked past the bytes that a chunk's shape allows.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.volumes.em import as_float32
from cryofleet.formats.volumes.frame import Shape, check_sparse_shape

MAX_CHUNK_BYTES = 256 << 20
_MAX_DOCUMENT_BYTES = 4 << 20
_MAX_CHUNKS = 2_000_000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DTYPE = re.compile(r"[<>|](?:[iu]1|[iu]2|[iu]4|f2|f4|f8)")
_KEY = re.compile(r"\d{1,6}([./]\d{1,6})*")
_LARGEST_FLOAT = float(np.finfo(np.float32).max)


class Store(Protocol):
    """Objects by their keys, below one folder or in one file."""

    name: str

    def read(self, key: str, limit: int) -> bytes | None:
        """An object, or None where there is none; InvalidArgument where it has more than `limit` bytes."""
        ...

    def sizes(self, prefix: str) -> dict[str, int]:
        """Keys below a prefix, without it, and their bytes."""
        ...

    def close(self) -> None: ...


class FolderStore:
    """The files of a folder. Links are refused, wherever they point."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._path = path

    def read(self, key: str, limit: int) -> bytes | None:
        path = self._inside(key)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InvalidArgument(f"{self.name}: {key[:80]} can't be read: {error.strerror}") from None
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise InvalidArgument(f"{self.name}: {key[:80]} is no regular file")
            _check_bytes(found.st_size, limit, key, self.name)
            return file.read(limit)

    def _inside(self, key: str) -> Path:
        path = self._path
        for part in key.split("/")[:-1]:
            path = path / part
            if path.is_symlink():
                raise InvalidArgument(f"{self.name}: {key[:80]} is behind a link, which is not followed")
        return path / key.rpartition("/")[2]

    def sizes(self, prefix: str) -> dict[str, int]:
        found: dict[str, int] = {}
        waiting = [(self._inside(f"{prefix}/x").parent, "")]
        while waiting:
            folder, before = waiting.pop()
            try:
                entries = os.scandir(folder)
            except OSError:
                continue
            with entries:
                for entry in entries:
                    key = before + entry.name
                    if not _KEY.fullmatch(key):
                        continue
                    if entry.is_symlink():
                        raise InvalidArgument(f"{self.name}: {prefix}/{key[:80]} is a link, which is not followed")
                    if entry.is_dir():
                        waiting.append((Path(entry.path), f"{key}/"))
                    else:
                        found[key] = entry.stat(follow_symlinks=False).st_size
                    if len(found) + len(waiting) > _MAX_CHUNKS:
                        raise InvalidArgument(f"{self.name}: more than {_MAX_CHUNKS} chunks")
        return found

    def close(self) -> None: ...


# What a damaged or hostile file makes zipfile raise.
_BROKEN_ZIP = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, NotImplementedError, struct.error,
    IndexError, KeyError, OverflowError, TypeError,
)  # fmt: skip


class ZipStore:
    """The members of a zip file, which may all lie in one folder. Nothing is unpacked onto the disk."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        try:
            self._zip = zipfile.ZipFile(path)
        except _BROKEN_ZIP as error:
            raise InvalidArgument(f"{name}: damaged zip file: {str(error)[:120]}") from None
        self._members = {info.filename: info for info in self._zip.infolist() if not info.filename.endswith("/")}
        firsts = {key.partition("/")[0] for key in self._members}
        self._root = "" if len(firsts) != 1 or ".zattrs" in firsts else f"{firsts.pop()}/"

    def read(self, key: str, limit: int) -> bytes | None:
        info = self._members.get(self._root + key)
        if info is None:
            return None
        _check_bytes(info.file_size, limit, key, self.name)
        try:
            with self._zip.open(info) as file:
                data = file.read(limit + 1)
        except _BROKEN_ZIP as error:
            raise InvalidArgument(f"{self.name}: damaged zip file: {key[:80]}: {str(error)[:120]}") from None
        _check_bytes(len(data), limit, key, self.name)
        return data

    def sizes(self, prefix: str) -> dict[str, int]:
        start = f"{self._root}{prefix}/"
        return {key.removeprefix(start): info.compress_size for key, info in self._members.items()
                if key.startswith(start) and _KEY.fullmatch(key.removeprefix(start))}  # fmt: skip

    def close(self) -> None:
        self._zip.close()


def _check_bytes(size: int, limit: int, key: str, name: str) -> None:
    if size > limit:
        raise InvalidArgument(f"{name}: {key[:80]} has more than the {limit} bytes that it can need")


def document(store: Store, key: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is none. Raises InvalidArgument for anything else."""
    data = store.read(key, _MAX_DOCUMENT_BYTES)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{store.name}: {key[:80]} is not JSON: {str(error)[:80]}") from None
    if not isinstance(found, dict):
        raise InvalidArgument(f"{store.name}: {key[:80]} is no JSON object")
    return found


def is_path(path: Any) -> bool:
    """Whether it names an array below the store's root, and nothing else."""
    return isinstance(path, str) and len(path) < 200 and all(_NAME.fullmatch(part) for part in path.split("/"))


class ZarrArray:
    """One array of three dimensions, and others before them of one element, read section by section.

    Raises on opening:
        InvalidArgument: what describes it makes no sense.
        FailedPrecondition: it is of another kind, or compressed in a way that is not read.
    """

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path, self.name = store, path, store.name
        said = document(store, f"{path}/.zarray")
        if said is None:
            raise InvalidArgument(f"{store.name}: {path} is no array of Zarr 2: it has no .zarray")
        try:
            self._take(said)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidArgument(f"{store.name}: {path}/.zarray: {type(error).__name__} {str(error)[:80]}") from None

    def _take(self, said: dict[str, Any]) -> None:
        where = f"{self.name}: {self._path}/.zarray"
        if said.get("zarr_format") != 2:
            raise FailedPrecondition(f"{where}: Zarr format {str(said.get('zarr_format'))[:20]}; format 2 is read")
        if not isinstance(said["dtype"], str) or not _DTYPE.fullmatch(said["dtype"]):
            raise FailedPrecondition(f"{where}: its numbers are {str(said['dtype'])[:40]}, which are no real numbers")
        if said.get("filters"):
            raise FailedPrecondition(f"{where}: it has filters, which are not read")
        shape, chunks = _whole(said["shape"]), _whole(said["chunks"])
        if not 3 <= len(shape) <= 5 or len(chunks) != len(shape) or min(chunks) < 1:
            raise InvalidArgument(f"{where}: shape {said['shape']} in chunks of {said['chunks']}"[:200])
        if any(side != 1 for side in shape[:-3]):
            raise FailedPrecondition(f"{where}: of shape {shape}, several volumes; one is needed")
        self.dtype = np.dtype(said["dtype"])
        self._chunk: Shape = (chunks[-3], chunks[-2], chunks[-1])
        self._chunk_bytes = math.prod(chunks) * self.dtype.itemsize
        if self._chunk_bytes > MAX_CHUNK_BYTES or math.prod(chunks[:-3]) != 1:
            raise InvalidArgument(f"{where}: chunks of {chunks}; they take at most {MAX_CHUNK_BYTES} bytes")
        self._order: Any = said.get("order", "C")
        separator = said.get("dimension_separator", ".")
        if self._order not in ("C", "F") or separator not in (".", "/"):
            raise InvalidArgument(f"{where}: order {str(self._order)[:20]!r}, separator {str(separator)[:20]!r}")
        self._compressor = said.get("compressor")
        codec = None if self._compressor is None else self._compressor.get("id")
        if self._compressor is not None and codec not in ("zlib", "gzip", "blosc", "zstd", "lz4"):
            raise FailedPrecondition(
                f"{where}: compressed with {str(codec)[:40]}; read are blosc, zstd, lz4, gzip and zlib"
            )
        self._codec: str | None = codec
        self._fill = _fill(said.get("fill_value"))
        self._index(shape, separator)
        self.shape: Shape = (shape[-3], shape[-2], shape[-1])
        self.layer = min(self._chunk[0], self.shape[0])

    def _index(self, shape: list[int], separator: str) -> None:
        """Which chunks there are: those of each layer, by their first z, y and x."""
        sizes = self._store.sizes(self._path)
        check_sparse_shape(shape[-3:], sum(sizes.values()), self.name)
        self._layers: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for key in sizes:
            numbers = [int(part) for part in key.split(separator)] if _KEY.fullmatch(key) and (
                "/" not in key or separator == "/") and ("." not in key or separator == ".") else []  # fmt: skip
            if len(numbers) != len(shape) or any(numbers[:-3]):
                continue
            first = [number * side for number, side in zip(numbers[-3:], self._chunk, strict=True)]
            if all(at < side for at, side in zip(first, shape[-3:], strict=True)):
                self._layers[numbers[-3]].append((first[1], first[2], key))

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Sections start to stop, float32 [z, y, x]; memory is the slab's and a chunk's."""
        slab = np.full((stop - start, *self.shape[1:]), self._fill, np.float32)
        depth = self._chunk[0]
        for layer in range(start // depth, (stop - 1) // depth + 1):
            z = layer * depth
            low, high = max(z, start), min(z + depth, stop)
            for y, x, key in self._layers.get(layer, ()):
                place = slab[low - start : high - start, y : y + self._chunk[1], x : x + self._chunk[2]]
                chunk = self._decoded(key)[low - z : high - z, : place.shape[1], : place.shape[2]]
                place[...] = as_float32(chunk)
        return slab

    def _decoded(self, key: str) -> NDArray[Any]:
        where, size = f"{self._path}/{key}", self._chunk_bytes
        # what can't be compressed grows a little
        packed = self._store.read(where, size + size // 8 + 4096)
        if packed is None:
            raise InvalidArgument(f"{self.name}: {where} is gone")
        try:
            data = unpack(packed, self._codec, size)
        except (zlib.error, ValueError, RuntimeError, struct.error, TypeError, EOFError) as error:
            raise InvalidArgument(f"{self.name}: {where} is damaged: {str(error)[:100]}") from None
        if len(data) != size:
            raise InvalidArgument(f"{self.name}: {where} is damaged: it has {len(data)} bytes, and should have {size}")
        return np.frombuffer(data, self.dtype).reshape(self._chunk, order=self._order)


def unpack(packed: bytes, codec: str | None, size: int) -> bytes:
    """Decompresses what must come to `size` bytes, and takes no more memory than these."""
    if codec is None:
        return packed
    if codec in ("zlib", "gzip"):
        return zlib.decompressobj(zlib.MAX_WBITS | (16 if codec == "gzip" else 0)).decompress(packed, size + 1)
    try:
        # each loads a compiled library
        from numcodecs import blosc, lz4, zstd
    except ImportError:
        raise FailedPrecondition(
            f"reading Zarr compressed with {codec} needs numcodecs: install cryofleet[io]"
        ) from None
    target = bytearray(size)
    if codec == "blosc":
        # version, version of the codec, flags, bytes a number, then bytes unpacked, of a block, and packed
        if len(packed) < 16 or struct.unpack_from("<I", packed, 4)[0] != size or (
            struct.unpack_from("<I", packed, 12)[0] != len(packed)
        ):  # fmt: skip
            raise ValueError("its header does not state the chunk's size")
        blosc.decompress(packed, target)
    elif codec == "zstd":
        zstd.decompress(packed, target)
    else:
        if len(packed) < 4 or struct.unpack_from("<I", packed)[0] != size:
            raise ValueError("its header does not state the chunk's size")
        lz4.decompress(packed, target)
    return bytes(target)


def _whole(values: Any) -> list[int]:
    if not isinstance(values, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in values):
        raise TypeError("shape and chunks must be lists of whole numbers")
    return values


def _fill(value: Any) -> float:
    if value is None:
        return 0.0
    number = float(value) if not isinstance(value, bool) else math.nan
    return min(max(number, -_LARGEST_FLOAT), _LARGEST_FLOAT) if math.isfinite(number) else number
