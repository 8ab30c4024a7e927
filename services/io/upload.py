"""What an upload needs besides the store: a safe name, and a way for its bytes from the event loop to a thread."""

from __future__ import annotations

import asyncio
import queue
import re
import unicodedata
from collections.abc import Iterator

from cryofleet.errors import DeadlineExceeded, Failure, InvalidArgument

_LONGEST_NAME_BYTES = 200
_PIECES_WAITING = 4
_RESERVED = ("manifest.json",)


def safe_name(name: str) -> str:
    """A file's name as an object of the store may be called: its letters and digits kept, all else that is odd a "_".

    The ending stays, so that formats are still told by it; what is too long is cut before it.
    """
    plain = re.sub(r"[^\w .+()\[\],=@-]", "_", unicodedata.normalize("NFC", name)).strip(" ").lstrip(".")
    stem, dot, ending = plain.rpartition(".")
    if not stem or len(ending.encode()) > 20:
        stem, dot, ending = plain, "", ""
    room = _LONGEST_NAME_BYTES - len((dot + ending).encode())
    plain = stem.encode()[:room].decode(errors="ignore") + dot + ending
    return f"file_{plain}" if not plain.strip("._ ") or plain.lower() in _RESERVED else plain


class Feed:
    """Pieces of one upload on their way from the event loop to the thread that stores them, few of them at a time.

    Iterating, in the thread, raises InvalidArgument where fewer or more bytes come than were announced, and
    DeadlineExceeded where none come for `patience_seconds`.
    """

    def __init__(self, name: str, size_bytes: int, patience_seconds: float = 120.0) -> None:
        self._name = name
        self._size_bytes = size_bytes
        self._patience_seconds = patience_seconds
        self._loop = asyncio.get_running_loop()
        self._pieces: queue.SimpleQueue[bytes | Failure | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(_PIECES_WAITING)
        self._closed = False

    async def send(self, piece: bytes) -> bool:
        """Hands over a piece once there is room for it; False where nobody takes any more."""
        await self._room.acquire()
        if not self._closed:
            self._pieces.put(piece)
        return not self._closed

    def end(self, failure: Failure | None = None) -> None:
        """No more pieces come; the reading side raises `failure` where one is given."""
        self._pieces.put(failure)

    def close(self) -> None:
        """Nobody reads any more; called on the event loop."""
        self._closed = True
        self._room.release()

    def __iter__(self) -> Iterator[bytes]:
        received = 0
        while (piece := self._next(received)) is not None:
            received += len(piece)
            if received > self._size_bytes:
                raise InvalidArgument(f"{self._name}: more bytes came than the {self._size_bytes} announced")
            yield piece
            self._loop.call_soon_threadsafe(self._room.release)
        if received < self._size_bytes:
            raise InvalidArgument(f"{self._name}: the upload ended after {received} of {self._size_bytes} bytes")

    def _next(self, received: int) -> bytes | None:
        try:
            piece = self._pieces.get(timeout=self._patience_seconds)
        except queue.Empty:
            raise DeadlineExceeded(
                f"{self._name}: no bytes came for {self._patience_seconds:g} s, after {received} of {self._size_bytes}"
            ) from None
        if isinstance(piece, Failure):
            raise piece
        return piece
