"""The interface that both kinds of storage have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cryofleet.errors import InvalidArgument, NotFound

CHUNK_BYTES = 8 * 1024 * 1024
"""What streams are read and written by."""

Data = bytes | bytearray | memoryview | Iterable[bytes]


@dataclass(frozen=True)
class Stat:
    """What a store knows of an object without reading it."""

    uri: str
    size_bytes: int
    modified: float
    """Unix time."""
    version: str = ""
    """Differs after every change of the object's bytes: S3's ETag, a file's inode and time."""


class ObjectStore(ABC):
    """Whole objects under URIs. Every method may raise PermissionDenied and Unavailable."""

    @abstractmethod
    def put(self, uri: str, data: Data) -> Stat:
        """Write an object, replacing one of that URI. All or nothing: until it is whole nobody sees it.

        Raises ResourceExhausted where there is no space, and whatever the iterable raises.
        """

    @abstractmethod
    def stream(self, uri: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The object's bytes from `offset`, in chunks of at most CHUNK_BYTES, fewer than `length` where it ends before.

        Raises NotFound at the first chunk.
        """

    @abstractmethod
    def stat(self, uri: str) -> Stat:
        """Raises NotFound."""

    @abstractmethod
    def list(self, prefix_uri: str) -> Iterator[Stat]:
        """All objects below a folder, and one of exactly that URI, in byte order of their URIs."""

    @abstractmethod
    def delete(self, uri: str) -> None:
        """Remove an object; no error where there is none."""

    def listen(self, prefix_uri: str) -> Iterator[tuple[str, ...]] | None:
        """URIs of objects below a folder as they are made, and now and then none; None where nobody tells.

        What was made before is not told, and nothing more comes once the iterator has ended or raised Unavailable: who
        must not miss anything lists as well.
        """
        return None

    def remove_abandoned(self, older_than_seconds: float) -> int:
        """Delete what killed writers left unfinished that long ago; how many there were.

        For stores that leave such things about; here nothing is done.
        """
        return 0

    def free_bytes(self) -> int | None:
        """What can still be written; None where the store doesn't say."""
        return None

    def check_space(self, size_bytes: int) -> None:  # noqa: B027  (most stores can't say)
        """Raises ResourceExhausted where so many bytes find no room; nothing where the store doesn't say.

        For what will be written, before it is begun.
        """

    def get(self, uri: str) -> bytes:
        """A whole object. Raises NotFound."""
        return b"".join(self.stream(uri))

    def get_range(self, uri: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer where the object ends before. Raises NotFound."""
        return b"".join(self.stream(uri, offset, length))

    def exists(self, uri: str) -> bool:
        """Whether there is such an object."""
        try:
            self.stat(uri)
        except NotFound:
            return False
        return True


def checked_range(uri: str, offset: int, length: int | None) -> None:
    """Raises InvalidArgument for what is no range of an object."""
    if offset < 0 or (length is not None and length < 0):
        raise InvalidArgument(f"{uri}: offset {offset} and length {length} must not be negative")


def pieces_of(data: Data) -> Iterable[bytes | bytearray | memoryview]:
    """The data's pieces: one where it is not an iterable of several."""
    return [data] if isinstance(data, (bytes, bytearray, memoryview)) else data


def in_blocks(data: Data, block_bytes: int) -> Iterator[bytes]:
    """The data in blocks of one size, the last one perhaps shorter; copied only where it does not come so."""
    if isinstance(data, bytes) and len(data) <= block_bytes:
        if data:
            yield data
        return
    gathered = bytearray()
    for piece in pieces_of(data):
        if not gathered and isinstance(piece, bytes) and len(piece) == block_bytes:
            yield piece
            continue
        view = memoryview(piece).cast("B")
        while len(view):
            if not gathered and len(view) >= block_bytes:
                yield bytes(view[:block_bytes])
                view = view[block_bytes:]
                continue
            taken = view[: block_bytes - len(gathered)]
            gathered += taken
            view = view[len(taken) :]
            if len(gathered) == block_bytes:
                yield bytes(gathered)
                gathered = bytearray()
    if gathered:
        yield bytes(gathered)
