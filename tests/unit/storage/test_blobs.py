"""What is read is what was written, and how often that is verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cryofleet.artifacts import BLOCK_BYTES, ResultWriter, open_blob
from cryofleet.artifacts.digests import digested_blocks
from cryofleet.errors import DataLoss
from cryofleet.storage import Store

DATA = b"".join(bytes([number]) * BLOCK_BYTES for number in range(4)) + b"the end"


@pytest.fixture
def uri(store: Store) -> str:
    writer = ResultWriter(store, "apo", "0" * 64)
    uri = writer.put("volume.mrc", DATA)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first byte of each block that is read and verified."""
    seen: list[int] = []
    original = digested_blocks

    def watched(data: Iterator[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for block, digest in original(data):
            seen.append(block[0])
            yield block, digest

    monkeypatch.setattr("cryofleet.artifacts.blobs.digested_blocks", watched)
    return seen


def test_small_reads_one_after_another_hash_a_block_once(store: Store, uri: str, hashed: list[int]) -> None:
    blob = open_blob(store, uri)
    assert blob.read() == DATA
    assert blob.read(4 * BLOCK_BYTES + 4) == b"end"
    assert hashed == [0, 1, 2, 3, ord("t")]


def test_each_read_is_verified(store: Store, uri: str) -> None:
    blob = open_blob(store, uri)
    blob.read(0, 2 * BLOCK_BYTES)
    damage(uri, 7)
    with pytest.raises(DataLoss, match="block 0"):
        blob.read(0, 8)


def test_a_blob_that_verifies_once_hashes_no_block_again(store: Store, uri: str, hashed: list[int]) -> None:
    blob = open_blob(store, uri)
    blob.verify_once()
    for first, last, read in ((1, 2, [1, 2]), (1, 2, []), (2, 2, []), (0, 2, [0, 1, 2]), (0, 1, []), (2, 3, [3])):
        hashed.clear()
        expected = DATA[first * BLOCK_BYTES + 7 : last * BLOCK_BYTES + 9]
        assert blob.read(first * BLOCK_BYTES + 7, len(expected)) == expected
        assert hashed == read, (first, last)
    damage(uri, 4 * BLOCK_BYTES)
    with pytest.raises(DataLoss, match="block 4"):
        blob.read(4 * BLOCK_BYTES)


def damage(uri: str, byte: int) -> None:
    with Path(uri.removeprefix("file://")).open("r+b") as file:
        file.seek(byte)
        file.write(b"x")
