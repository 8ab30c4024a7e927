"""Blocks of objects that were verified lately, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict


class VerifiedBlocks:
    """The blocks last used, by their digests: whatever object a block is of, its bytes are those. Safe for threads."""

    def __init__(self, max_bytes: int) -> None:
        """So many bytes are kept at most, but always the last block."""
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, digest: str) -> bytes | None:
        """The block with this digest; None where it is not kept."""
        with self._lock:
            kept = self._blocks.pop(digest, None)
            if kept is None:
                return None
            self._blocks[digest] = (kept[0], time.monotonic())
            return kept[0]

    def put(self, digest: str, block: bytes) -> None:
        """Keep a block that was found to have this digest; those not used for longest make room."""
        with self._lock:
            if digest not in self._blocks:
                self._bytes += len(block)
            self._blocks.pop(digest, None)
            self._blocks[digest] = (block, time.monotonic())
            while self._bytes > self._max_bytes and len(self._blocks) > 1:
                self._drop_oldest()

    def forget_unused(self, seconds: float) -> None:
        """Drop what nobody has used for so long."""
        with self._lock:
            before = time.monotonic() - seconds
            while self._blocks and next(iter(self._blocks.values()))[1] < before:
                self._drop_oldest()

    def __len__(self) -> int:
        return len(self._blocks)

    def _drop_oldest(self) -> None:
        _, (block, _) = self._blocks.popitem(last=False)
        self._bytes -= len(block)
