"""Reads that notice every changed byte."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from cryofleet.artifacts.digests import BLOCK_BYTES, digested_blocks
from cryofleet.artifacts.manifests import MANIFEST, BlobEntry, Manifest
from cryofleet.artifacts.results import load, place_of
from cryofleet.errors import DataLoss, NotFound
from cryofleet.storage import Store, checked_uri
from cryofleet.storage.object_store import checked_range


class Blob:
    """One object, every block of it verified as it is read. Any number of threads may read."""

    def __init__(self, store: Store, uri: str, entry: BlobEntry | None) -> None:
        """`entry` is what the manifest says of it; without one, a file of the user's, nothing can be verified."""
        self.uri = uri
        self._entry = entry
        self.size_bytes = store.stat(uri).size_bytes
        self._store = store
        self._last: tuple[int, bytes] = (-1, b"")  # small reads one after another mostly fall into one block
        self._lock = threading.Lock()
        self._known: set[int] | None = None
        self._digests = entry["blocks"] if entry is not None else []
        if entry is not None and self.size_bytes != entry["size_bytes"]:
            raise DataLoss(f"{uri} has {self.size_bytes} bytes; its manifest says {entry['size_bytes']}")

    @property
    def digest(self) -> str | None:
        """The content digest; None for a file without manifest."""
        return self._entry["digest"] if self._entry else None

    def verify_once(self) -> None:
        """Read blocks that this blob has verified before without hashing them again: for looking at an object of which
        the caller knows that it is still the same.
        """
        self._known = set()

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
        checked_range(self.uri, offset, length)
        stop = self.size_bytes if length is None else min(self.size_bytes, offset + length)
        return min(offset, stop), stop

    def _pieces(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        if start >= stop:
            return
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        known = self._known is not None and self._known.issuperset(range(first, last + 1))
        if self._entry is None or known:
            got = 0
            for chunk in self._store.stream(self.uri, start, stop - start):
                got += len(chunk)
                yield chunk
            if got != stop - start:
                raise DataLoss(f"{self.uri} became shorter while it was read")
            return
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
        index = first
        for block, digest in digested_blocks(self._store.stream(self.uri, first * BLOCK_BYTES, length)):
            if index >= len(self._digests) or digest.hex() != self._digests[index]:
                start, stop = index * BLOCK_BYTES, index * BLOCK_BYTES + len(block)
                raise DataLoss(f"{self.uri}: block {index} (bytes {start} to {stop}) is not what was written")
            if self._known is not None:
                self._known.add(index)
            if index == last:
                with self._lock:
                    self._last = (index, block)
            yield index, block
            index += 1
        if index != last + 1:
            raise DataLoss(f"{self.uri} ends within block {index}")


def open_blob(store: Store, uri: str, manifest: Manifest | None = None) -> Blob:
    """One object for reading, verified where it is a result's.

    `manifest` saves looking for it again. Raises NotFound, also for an object of a result that was never finished.
    """
    uri = checked_uri(uri)
    place = place_of(store, uri)
    if place is None:
        return Blob(store, uri, None)
    folder, name = place
    if manifest is None or manifest.uri != folder:
        manifest = load(store, folder)
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


def verify(store: Store, manifest: Manifest) -> list[str]:
    """The names of a result's objects that are damaged or missing; everything is read."""
    damaged = []
    for entry in manifest.blobs:
        try:
            for _ in open_blob(store, f"{manifest.uri}/{entry['name']}", manifest).stream():
                pass
        except DataLoss:
            damaged.append(entry["name"])
    return damaged
