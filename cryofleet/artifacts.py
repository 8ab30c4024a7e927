"""Results in the store: their identity, their manifests, and reads that notice every changed byte.

A result's objects lie at ROOT/PROJECT/KEY/NAME, KEY being the result's identity; ROOT/PROJECT/KEY/manifest.json,
written last, lists them with their digests. A result without manifest does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypedDict

from cryofleet.errors import DataLoss, Failure, InvalidArgument, NotFound, Unavailable
from cryofleet.settings import PROJECT_PATTERN
from cryofleet.storage import Data, Stat, Store, checked_uri

BLOCK_BYTES = 8 * 1024 * 1024
"""What is hashed, and verified on reading, as one."""

_BLOCKS_IN_FLIGHT = 3  # that wait for their digests while the next is read; bounds the memory

MANIFEST = "manifest.json"
_REFERENCE = "store:/"
_KEY = re.compile(r"[0-9a-f]{64}")
_DIGEST = _KEY


# --- Digests -------------------------------------------------------------------------------------------------------


def block_digest(block: bytes | memoryview) -> bytes:
    """SHA-256 of one block."""
    return hashlib.sha256(block).digest()


def combined_digest(blocks: Iterable[bytes]) -> str:
    """An object's content digest from its blocks' digests: SHA-256 over them, one after another, as hex."""
    return hashlib.sha256(b"".join(blocks)).hexdigest()


class Hasher:
    """Digests of an object that passes by in pieces of any size."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._current = hashlib.sha256()
        self._filled = 0
        self.size_bytes = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the object's next bytes."""
        view = memoryview(data).cast("B")
        self.size_bytes += len(view)
        while len(view):
            taken = view[: BLOCK_BYTES - self._filled]
            self._current.update(taken)
            self._filled += len(taken)
            view = view[len(taken) :]
            if self._filled == BLOCK_BYTES:
                self._blocks.append(self._current.digest())
                self._current, self._filled = hashlib.sha256(), 0

    @property
    def blocks(self) -> list[str]:
        """Digests of the blocks so far, the last one perhaps not full, as hex."""
        return [digest.hex() for digest in self._all()]

    def digest(self) -> str:
        """The content digest of the bytes so far."""
        return combined_digest(self._all())

    def _all(self) -> list[bytes]:
        return [*self._blocks, self._current.digest()] if self._filled else list(self._blocks)


def digest_file(path: str | os.PathLike[str]) -> str:
    """The content digest of a local file. Raises OSError."""
    hasher = Hasher()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(BLOCK_BYTES):
            hasher.update(chunk)
    return hasher.digest()


def _blocks_of(data: Data) -> Iterator[bytes]:
    """The data in whole blocks, the last one perhaps shorter; copied only where it does not come so."""
    if isinstance(data, bytes) and len(data) <= BLOCK_BYTES:
        if data:
            yield data
        return
    pieces: Iterable[bytes | bytearray | memoryview]
    pieces = [data] if isinstance(data, (bytes, bytearray, memoryview)) else data
    gathered = bytearray()
    for piece in pieces:
        if not gathered and isinstance(piece, bytes) and len(piece) == BLOCK_BYTES:
            yield piece
            continue
        view = memoryview(piece).cast("B")
        while len(view):
            if not gathered and len(view) >= BLOCK_BYTES:
                yield bytes(view[:BLOCK_BYTES])
                view = view[BLOCK_BYTES:]
                continue
            taken = view[: BLOCK_BYTES - len(gathered)]
            gathered += taken
            view = view[len(taken) :]
            if len(gathered) == BLOCK_BYTES:
                yield bytes(gathered)
                gathered = bytearray()
    if gathered:
        yield bytes(gathered)


def _hashed(data: Data, digests: list[bytes]) -> Generator[bytes, None, None]:
    """The data in blocks, each hashed beside the reading and writing of the next; `digests` is whole at the end."""
    blocks = _blocks_of(data)
    first = next(blocks, None)
    if first is None:
        return
    second = next(blocks, None)
    if second is None:
        digests.append(block_digest(first))
        yield first
        return
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        for block in _chain(first, second, blocks):
            waiting.append(pool.submit(block_digest, block))
            yield block
            if len(waiting) == _BLOCKS_IN_FLIGHT:
                digests.append(waiting.popleft().result())
        digests.extend(future.result() for future in waiting)


def _chain(first: bytes, second: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    del first
    yield second
    del second
    yield from rest


# --- Identity ------------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no white space and floats by repr. Raises InvalidArgument for NaN and non-JSON."""
    _check_json(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _check_json(value: Any, where: str) -> None:
    if value is None or isinstance(value, (bool, int, str)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidArgument(f"{where} is {value}; it must be a finite number")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise InvalidArgument(f"{where} has the key {name!r}; keys must be strings")
            _check_json(item, f"{where}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    else:
        raise InvalidArgument(f"{where} is of type {type(value).__name__}, which JSON does not have")


def identity(operation: str, version: int, parameters: Mapping[str, Any], inputs: Mapping[str, Sequence[str]]) -> str:
    """A result's key: SHA-256, as hex, over what its content follows from.

    `parameters` are the resolved ones, without URIs; `inputs` the content digests of each input field.
    """
    what = {
        "operation": operation,
        "version": version,
        "parameters": dict(parameters),
        "inputs": {name: list(digests) for name, digests in inputs.items()},
    }
    return hashlib.sha256(canonical_json(what)).hexdigest()


# --- References that outlive a move of the store -------------------------------------------------------------------


def contract(store: Store, uri: str) -> str:
    """A URI under the store's root as store:/PROJECT/KEY/NAME; others as they are."""
    return _REFERENCE + uri[len(store.root) + 1 :] if uri.startswith(store.root + "/") else uri


def expand(store: Store, reference: str) -> str:
    """The URI of a store:/ reference; others as they are."""
    return f"{store.root}/{reference[len(_REFERENCE) :]}" if reference.startswith(_REFERENCE) else reference


def contract_all(store: Store, value: Any) -> Any:
    """`contract` for every string in a JSON value."""
    return _map_strings(value, lambda text: contract(store, text))


def expand_all(store: Store, value: Any) -> Any:
    """`expand` for every string in a JSON value."""
    return _map_strings(value, lambda text: expand(store, text))


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _map_strings(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value


# --- Manifests -----------------------------------------------------------------------------------------------------


class InputEntry(TypedDict):
    """One input of a result."""

    uri: str
    digest: str


class BlobEntry(TypedDict):
    """One object of a result: its name below the result's folder, and the digests of it and of its blocks."""

    name: str
    size_bytes: int
    digest: str
    blocks: list[str]


@dataclass(frozen=True)
class Manifest:
    """What a result is, where it came from and what it took."""

    key: str
    operation: str
    version: int
    parameters: dict[str, Any]
    inputs: dict[str, list[InputEntry]]
    blobs: list[BlobEntry]
    result: dict[str, Any]
    """The result message as JSON."""
    created_at: str
    """ISO 8601, UTC."""
    seconds: float
    device: str
    software: str
    host: str
    uri: str = field(default="", compare=False)
    """The result's folder; not kept in the file."""

    @property
    def manifest_uri(self) -> str:
        return f"{self.uri}/{MANIFEST}"

    def blob(self, name: str) -> BlobEntry | None:
        """The entry of one object."""
        return next((entry for entry in self.blobs if entry["name"] == name), None)

    def to_json(self) -> str:
        """As kept in the store; the URIs should be references by then."""
        content = {name: getattr(self, name) for name in _MANIFEST_FIELDS}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "manifest") -> Manifest:
        """Raises DataLoss naming `source` where the text is no manifest."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataLoss(f"{source} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise DataLoss(f"{source} is no manifest: it must be a JSON object")
        for name, kind in _MANIFEST_FIELDS.items():
            if name not in content or not isinstance(content[name], kind) or isinstance(content[name], bool):
                raise DataLoss(f"{source} is no manifest: {name} is missing or of a wrong type")
        for entry in content["blobs"]:
            _check_blob_entry(entry, source)
        for entries in content["inputs"].values():
            for entry in entries if isinstance(entries, list) else [None]:
                if not (isinstance(entry, dict) and {type(entry.get("uri")), type(entry.get("digest"))} == {str}):
                    raise DataLoss(f"{source} is no manifest: its inputs need uri and digest")
        return cls(**{name: content[name] for name in _MANIFEST_FIELDS})


_MANIFEST_FIELDS: dict[str, type | tuple[type, ...]] = {
    "key": str,
    "operation": str,
    "version": int,
    "parameters": dict,
    "inputs": dict,
    "blobs": list,
    "result": dict,
    "created_at": str,
    "seconds": (int, float),
    "device": str,
    "software": str,
    "host": str,
}


def _check_blob_entry(entry: Any, source: str) -> None:
    if not isinstance(entry, dict):
        raise DataLoss(f"{source} is no manifest: a blob must be a JSON object")
    name, size, digest, blocks = (entry.get(field_name) for field_name in ("name", "size_bytes", "digest", "blocks"))
    if not isinstance(name, str) or not _is_name(name):
        raise DataLoss(f"{source} is no manifest: {name!r} is no name of a blob")
    if not isinstance(size, int) or size < 0 or not isinstance(blocks, list):
        raise DataLoss(f"{source} is no manifest: {name} needs size_bytes and blocks")
    if not all(isinstance(block, str) and _DIGEST.fullmatch(block) for block in [*blocks, digest]):
        raise DataLoss(f"{source} is no manifest: {name} has a digest that is not 64 hexadecimal digits")
    if len(blocks) != -(-size // BLOCK_BYTES) or combined_digest(map(bytes.fromhex, blocks)) != digest:
        raise DataLoss(f"{source}: size, digest and blocks of {name} contradict each other")


def _is_name(name: str) -> bool:
    """Whether an object of a result may be called so: one or more names with slashes between them."""
    if name in ("", MANIFEST) or name.endswith("/") or len(name) > 512:
        return False
    try:
        return checked_uri(f"file:///{name}") == f"file:///{name}"
    except Failure:
        return False


def result_uri(store: Store, project: str, key: str) -> str:
    """The folder of a result. Raises InvalidArgument for what is no project or key."""
    if not PROJECT_PATTERN.fullmatch(project):
        raise InvalidArgument(f"project {project!r} must match {PROJECT_PATTERN.pattern}")
    if not _KEY.fullmatch(key):
        raise InvalidArgument(f"key {key!r} must be 64 hexadecimal digits")
    return f"{store.root}/{project}/{key}"


def find(store: Store, project: str, key: str) -> Manifest | None:
    """The manifest of a result, its URIs expanded; None where there is none.

    Raises DataLoss where it can't be read. Whether its objects are all there, `complete` says.
    """
    return _load(store, result_uri(store, project, key))


def manifest_for(store: Store, uri: str) -> Manifest | None:
    """The manifest of the result that an object or folder belongs to; None for what is no result's."""
    place = _place(store, uri)
    return _load(store, place[0]) if place else None


def complete(store: Store, manifest: Manifest) -> bool:
    """Whether every object of a result is there in its size; one listing, nothing is read."""
    sizes = {found.uri: found.size_bytes for found in store.list(manifest.uri)}
    return all(sizes.get(f"{manifest.uri}/{entry['name']}") == entry["size_bytes"] for entry in manifest.blobs)


def verify(store: Store, manifest: Manifest) -> list[str]:
    """Read all of a result; what is wrong with it, a line for each object."""
    wrong = []
    for entry in manifest.blobs:
        try:
            for _ in Blob(store, f"{manifest.uri}/{entry['name']}", entry).stream():
                pass
        except (DataLoss, NotFound) as error:
            wrong.append(str(error))
    return wrong


def remove(store: Store, project: str, key: str) -> None:
    """Delete a result, its manifest first, so that it is computed again when it is asked for."""
    folder = result_uri(store, project, key)
    store.delete(f"{folder}/{MANIFEST}")
    for found in list(store.list(folder)):
        store.delete(found.uri)


def _load(store: Store, folder: str) -> Manifest | None:
    uri = f"{folder}/{MANIFEST}"
    try:
        text = store.get(uri)
    except NotFound:
        return None
    manifest = Manifest.from_json(text, uri)
    if manifest.key != folder.rpartition("/")[2]:
        raise DataLoss(f"{uri} is the manifest of another result, {manifest.key}")
    return replace(
        manifest, inputs=expand_all(store, manifest.inputs), result=expand_all(store, manifest.result), uri=folder
    )


def _place(store: Store, uri: str) -> tuple[str, str] | None:
    """The result's folder and the name below it, for a URI under a result."""
    uri = checked_uri(uri)
    if not uri.startswith(store.root + "/"):
        return None
    project, _, rest = uri[len(store.root) + 1 :].partition("/")
    key, _, name = rest.partition("/")
    if not PROJECT_PATTERN.fullmatch(project) or not _KEY.fullmatch(key):
        return None
    return f"{store.root}/{project}/{key}", name


def content_digest(store: Store, uri: str) -> str:
    """The digest of an artifact's content.

    That of an object of a result is read from the manifest; a file outside of results is hashed. A folder's (a
    model's) is SHA-256 over the canonical JSON of [name, digest] of its objects. Raises NotFound.
    """
    uri = checked_uri(uri)
    place = _place(store, uri)
    if place is not None:
        manifest = _load(store, place[0])
        if manifest is None:
            raise NotFound(f"{uri} does not exist: there is no finished result {place[0]}")
        entry = manifest.blob(place[1])
        if entry is not None:
            return entry["digest"]
        folder = place[1] + "/" if place[1] else ""
        members = [
            [entry["name"].removeprefix(folder), entry["digest"]]
            for entry in manifest.blobs
            if entry["name"].startswith(folder)
        ]
    else:
        found = list(store.list(uri))
        if [each.uri for each in found] == [uri]:
            return _hash_object(store, uri)
        members = [[each.uri[len(uri) + 1 :], _hash_object(store, each.uri)] for each in found if each.uri != uri]
    if not members:
        raise NotFound(f"{uri} does not exist")
    return hashlib.sha256(canonical_json(sorted(members))).hexdigest()


def _hash_object(store: Store, uri: str) -> str:
    digests: list[bytes] = []
    for _ in _hashed(store.stream(uri), digests):
        pass
    return combined_digest(digests)


# --- Verified reads ------------------------------------------------------------------------------------------------


class Blob:
    """One object, every block of it verified as it is read. Any number of threads may read."""

    def __init__(self, store: Store, uri: str, entry: BlobEntry | None) -> None:
        """`entry` is what the manifest says of it; without one, a file of the user's, nothing can be verified."""
        self.uri = uri
        self.entry = entry
        self.size_bytes = store.stat(uri).size_bytes
        self._store = store
        self._last: tuple[int, bytes] = (-1, b"")  # small reads one after another mostly fall into one block
        self._lock = threading.Lock()
        self._digests = entry["blocks"] if entry is not None else []
        if entry is not None and self.size_bytes != entry["size_bytes"]:
            raise DataLoss(f"{uri} has {self.size_bytes} bytes; its manifest says {entry['size_bytes']}")

    @property
    def digest(self) -> str | None:
        """The content digest; None for a file without manifest."""
        return self.entry["digest"] if self.entry else None

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes from `offset`, all that follow where `length` is None, fewer than `length` where the object ends.

        Raises DataLoss naming the object and the block.
        """
        pieces = list(self._pieces(*self._bounds(offset, length)))
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill a buffer with the bytes from `offset`. Raises DataLoss where the object ends before."""
        view = target.cast("B")
        start, stop = self._bounds(offset, len(view))
        if stop - start != len(view):
            raise DataLoss(
                f"{self.uri} ends at byte {self.size_bytes}; bytes {offset} to {offset + len(view)} are needed"
            )
        position = 0
        for piece in self._pieces(start, stop):
            view[position : position + len(piece)] = piece
            position += len(piece)

    def stream(self, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The same bytes as `read`, in pieces of at most a block, each given out once it is verified."""
        for piece in self._pieces(*self._bounds(offset, length)):
            yield bytes(piece)

    def _bounds(self, offset: int, length: int | None) -> tuple[int, int]:
        if offset < 0 or (length is not None and length < 0):
            raise InvalidArgument(f"{self.uri}: offset {offset} and length {length} must not be negative")
        stop = self.size_bytes if length is None else min(self.size_bytes, offset + length)
        return min(offset, stop), stop

    def _pieces(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        if start >= stop:
            return
        if self.entry is None:
            got = 0
            for chunk in self._store.stream(self.uri, start, stop - start):
                got += len(chunk)
                yield chunk
            if got != stop - start:
                raise DataLoss(f"{self.uri} became shorter while it was read")
            return
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        for index, block in self._verified(first, last):
            low, high = max(0, start - index * BLOCK_BYTES), min(len(block), stop - index * BLOCK_BYTES)
            yield block if high - low == len(block) else memoryview(block)[low:high]

    def _verified(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Blocks `first` to `last`, each hashed while the next one is read."""
        with self._lock:
            held, block = self._last
        if held == first:
            yield held, block
            first += 1
        if first > last:
            return
        # A read to the end asks for no range: servers are slower at those.
        length = None if last == len(self._digests) - 1 else (last + 1 - first) * BLOCK_BYTES
        blocks = _blocks_of(self._store.stream(self.uri, first * BLOCK_BYTES, length))
        index = first
        if first == last:
            for block in blocks:
                self._check(index, block, block_digest(block))
                with self._lock:
                    self._last = (index, block)
                yield index, block
                index += 1
        else:
            with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
                waiting: deque[tuple[bytes, Future[bytes]]] = deque()
                for block in blocks:
                    waiting.append((block, pool.submit(block_digest, block)))
                    if len(waiting) == _BLOCKS_IN_FLIGHT:
                        yield index, self._checked(index, *waiting.popleft())
                        index += 1
                while waiting:
                    block = self._checked(index, *waiting.popleft())
                    if not waiting:
                        with self._lock:
                            self._last = (index, block)
                    yield index, block
                    index += 1
        if index != last + 1:
            raise DataLoss(f"{self.uri} ends within block {index}")

    def _checked(self, index: int, block: bytes, digest: Future[bytes]) -> bytes:
        self._check(index, block, digest.result())
        return block

    def _check(self, index: int, block: bytes, digest: bytes) -> None:
        if index >= len(self._digests) or digest.hex() != self._digests[index]:
            start = index * BLOCK_BYTES
            raise DataLoss(f"{self.uri}: block {index} (bytes {start} to {start + len(block)}) is not what was written")


def open_blob(store: Store, uri: str, manifest: Manifest | None = None) -> Blob:
    """One object for reading, verified where it is a result's.

    `manifest` saves looking for it again. Raises NotFound, also for an object of a result that was never finished.
    """
    uri = checked_uri(uri)
    place = _place(store, uri)
    if place is None:
        return Blob(store, uri, None)
    folder, name = place
    if manifest is None or manifest.uri != folder:
        manifest = _load(store, folder)
    if manifest is None:
        raise NotFound(f"{uri} does not exist: there is no finished result {folder}")
    if name == MANIFEST:
        return Blob(store, uri, None)
    entry = manifest.blob(name)
    if entry is None:
        raise NotFound(f"{uri} does not exist: its result has no such object")
    try:
        return Blob(store, uri, entry)
    except NotFound:
        raise DataLoss(f"{uri} is missing, though the manifest of its result names it") from None


# --- Writing results -----------------------------------------------------------------------------------------------


class ResultWriter:
    """Writes one result. Its objects are seen by nobody until `commit`, which publishes them with one atomic put.

    Where several write one result, the first to commit wins: the others then keep their hands off its objects, and
    their `commit` gives the manifest that is there.
    """

    def __init__(self, store: Store, project: str, key: str) -> None:
        """A manifest of that key whose objects are not all there is taken back."""
        self.uri = result_uri(store, project, key)
        self.key = key
        self._store = store
        self._entries: dict[str, BlobEntry] = {}
        self._versions: dict[str, str] = {}
        self._lock = threading.Lock()
        if store.exists(f"{self.uri}/{MANIFEST}"):
            self._published()

    def put(self, name: str, data: Data) -> str:
        """Store one object, hashing it on the way; its URI. Any number of threads may put different names."""
        if not _is_name(name):
            raise InvalidArgument(f"{name!r} is no name for an object of a result")
        with self._lock:
            if name in self._entries:
                raise InvalidArgument(f"{self.uri}: {name} is written twice")
            self._entries[name] = {"name": name, "size_bytes": 0, "digest": "", "blocks": []}
        uri = f"{self.uri}/{name}"
        digests: list[bytes] = []
        try:
            with contextlib.closing(_hashed(data, digests)) as blocks:
                size, version = self._store_blocks(uri, blocks)
        except BaseException:
            with self._lock:
                del self._entries[name]
            raise
        entry = BlobEntry(
            name=name, size_bytes=size, digest=combined_digest(digests), blocks=[digest.hex() for digest in digests]
        )
        with self._lock:
            self._entries[name] = entry
            self._versions[uri] = version
        return uri

    def _store_blocks(self, uri: str, blocks: Iterator[bytes]) -> tuple[int, str]:
        """The object's size and version; of a result that somebody committed, nothing is written over."""
        if self._store.exists(f"{self.uri}/{MANIFEST}"):
            return sum(len(block) for block in blocks), ""
        stored = self._store.put(uri, blocks)
        return stored.size_bytes, stored.version

    def entry(self, name: str) -> BlobEntry:
        """Size and digests of an object that was put."""
        with self._lock:
            return self._entries[name]

    def commit(
        self,
        *,
        operation: str,
        version: int,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, Sequence[InputEntry]],
        result: Mapping[str, Any],
        seconds: float,
        device: str = "",
        software: str = "",
        host: str = "",
    ) -> Manifest:
        """Publish the result.

        `result` is its message as JSON, URIs in full. Raises Unavailable where another writer of the same
        result, whose bytes differ, came in between: trying again finds or makes a whole result.
        """
        existing = self._published()
        if existing is not None:
            return existing
        with self._lock:
            entries = [self._entries[name] for name in sorted(self._entries)]
        self._check_untouched(entries)
        manifest = Manifest(
            key=self.key,
            operation=operation,
            version=version,
            parameters=dict(parameters),
            inputs={
                name: [InputEntry(uri=each["uri"], digest=each["digest"]) for each in inputs[name]] for name in inputs
            },
            blobs=entries,
            result=dict(result),
            created_at=datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
            seconds=seconds,
            device=device,
            software=software,
            host=host,
            uri=self.uri,
        )
        kept = replace(
            manifest,
            inputs=contract_all(self._store, manifest.inputs),
            result=contract_all(self._store, manifest.result),
        )
        canonical_json(kept.result)
        canonical_json(kept.parameters)
        self._store.put(manifest.manifest_uri, kept.to_json().encode())
        return manifest

    def discard(self) -> None:
        """Delete what was put, unless somebody committed the result."""
        if self._published() is not None:
            return
        with self._lock:
            names, self._entries, self._versions = list(self._entries), {}, {}
        for name in names:
            self._store.delete(f"{self.uri}/{name}")

    def _published(self) -> Manifest | None:
        """The result as somebody else committed it; a damaged one is taken back."""
        try:
            manifest = _load(self._store, self.uri)
        except DataLoss:
            manifest = None
            self._store.delete(f"{self.uri}/{MANIFEST}")
        if manifest is not None and not complete(self._store, manifest):
            self._store.delete(manifest.manifest_uri)
            return None
        return manifest

    def _check_untouched(self, entries: list[BlobEntry]) -> None:
        """The objects are still the ones that were put here, or have the same content."""
        found: dict[str, Stat] = {each.uri: each for each in self._store.list(self.uri)}
        for entry in entries:
            uri = f"{self.uri}/{entry['name']}"
            if uri in found and found[uri].version == self._versions[uri]:
                continue
            if uri not in found or _hash_object(self._store, uri) != entry["digest"]:
                raise Unavailable(f"{uri} was changed by another writer of the same result; try again")
