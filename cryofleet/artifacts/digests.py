"""Content digests: SHA-256 over the SHA-256 of an object's blocks, so that a part can be verified alone."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from cryofleet.storage.object_store import Data, in_blocks

BLOCK_BYTES = 8 * 1024 * 1024
"""What is hashed, and verified on reading, as one."""

_BLOCKS_IN_FLIGHT = 3  # that wait for their digests while the next is read; bounds the memory


def block_digest(block: bytes | memoryview) -> bytes:
    """SHA-256 of one block."""
    return hashlib.sha256(block).digest()


def combined_digest(blocks: Iterable[bytes]) -> str:
    """An object's content digest from its blocks' digests: SHA-256 over them, one after another, as hex."""
    return hashlib.sha256(b"".join(blocks)).hexdigest()


def digested_blocks(data: Data) -> Iterator[tuple[bytes, bytes]]:
    """The data in blocks, each with its digest, which is computed while the following blocks are read."""
    blocks = in_blocks(data, BLOCK_BYTES)
    first = next(blocks, None)
    if first is None:
        return
    second = next(blocks, None)
    if second is None:
        # Most objects are smaller than a block; they need no thread.
        yield first, block_digest(first)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        waiting: deque[tuple[bytes, Future[bytes]]] = deque()
        waiting.append((first, pool.submit(block_digest, first)))
        waiting.append((second, pool.submit(block_digest, second)))
        del first, second
        for block in blocks:
            waiting.append((block, pool.submit(block_digest, block)))
            if len(waiting) == _BLOCKS_IN_FLIGHT:
                block, digest = waiting.popleft()
                yield block, digest.result()
        while waiting:
            block, digest = waiting.popleft()
            yield block, digest.result()


def digest_of(data: Data) -> str:
    """The content digest of an object's bytes."""
    return combined_digest(digest for _, digest in digested_blocks(data))


def digest_file(path: str | os.PathLike[str]) -> str:
    """The content digest of a local file. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return digest_of(iter(partial(file.read, BLOCK_BYTES), b""))
