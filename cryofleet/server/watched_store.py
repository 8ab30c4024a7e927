"""The store as a running call sees it: transfers are counted, and end when the call must."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from cryofleet.storage import Data, Stat, Store

OnBytes = Callable[[str, int], None]
"""Told "read" or "written" and a number of bytes, between chunks; what it raises ends the transfer."""


class WatchedStore(Store):
    """Passes everything on to another store.

    Long transfers thus count as progress, and a call that was cancelled ends in the midst of one.
    """

    def __init__(self, store: Store, on_bytes: OnBytes, check_space: Callable[[int], None]) -> None:
        """`check_space` is asked beside the other store."""
        # Not the base class's own: roots and connections are those of the other store.
        self.root = store.root
        self.read_only_roots = store.read_only_roots
        self._watched = store
        self._on_bytes = on_bytes
        self._check_space = check_space

    def for_project(self, project: str) -> Store:
        """The same store, closed to what other projects have."""
        return WatchedStore(self._watched.for_project(project), self._on_bytes, self._check_space)

    def put(self, uri: str, data: Data) -> Stat:
        """Write an object; an iterable is watched piece by piece."""
        if isinstance(data, (bytes, bytearray, memoryview)):
            self._on_bytes("written", len(data))
            return self._watched.put(uri, data)
        return self._watched.put(uri, self._pieces(data, "written"))

    def stream(self, uri: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The object's bytes, watched chunk by chunk."""
        return self._pieces(self._watched.stream(uri, offset, length), "read")

    def free_bytes(self) -> int | None:
        """What can still be written."""
        return self._watched.free_bytes()

    def check_space(self, size_bytes: int) -> None:
        """Whether there is room for what will be written."""
        self._check_space(size_bytes)
        self._watched.check_space(size_bytes)

    def _pieces(self, pieces: Iterable[bytes], direction: str) -> Iterator[bytes]:
        for piece in pieces:
            self._on_bytes(direction, len(piece))
            yield piece

    def get(self, uri: str) -> bytes:
        """A whole object: manifests and other small ones, so that it is not watched."""
        return self._watched.get(uri)

    def get_range(self, uri: str, offset: int, length: int) -> bytes:
        """Part of an object, watched as one."""
        data = self._watched.get_range(uri, offset, length)
        self._on_bytes("read", len(data))
        return data

    def stat(self, uri: str) -> Stat:
        """What is known of an object."""
        return self._watched.stat(uri)

    def exists(self, uri: str) -> bool:
        """Whether there is such an object."""
        return self._watched.exists(uri)

    def list(self, prefix_uri: str) -> Iterator[Stat]:
        """All objects below a folder."""
        return self._watched.list(prefix_uri)

    def delete(self, uri: str) -> None:
        """Remove an object."""
        self._watched.delete(uri)

    def remove_abandoned(self, older_than_seconds: float) -> int:
        """Delete what killed writers left."""
        return self._watched.remove_abandoned(older_than_seconds)
