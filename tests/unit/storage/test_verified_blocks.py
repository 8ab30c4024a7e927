"""Blocks that were verified are not read again while there is room for them, and are only those that were written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from cryofleet.artifacts import BLOCK_BYTES, ResultWriter, open_blob
from cryofleet.artifacts.digests import digested_blocks
from cryofleet.artifacts.verified_blocks import VerifiedBlocks
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


def part(uri: str, store: Store, kept: VerifiedBlocks, first: int, last: int) -> bytes:
    """From the middle of one block to the middle of another, of a blob that was just opened."""
    blob = open_blob(store, uri)
    blob.blocks = kept
    return blob.read(first * BLOCK_BYTES + 7, (last - first) * BLOCK_BYTES)


def test_only_what_is_missing_is_read_and_verified(store: Store, uri: str, hashed: list[int]) -> None:
    kept = VerifiedBlocks(3 * BLOCK_BYTES)
    for first, last, read in ((1, 2, [1, 2]), (1, 2, []), (0, 3, [0, 3]), (0, 0, []), (2, 3, []), (0, 1, [1])):
        hashed.clear()
        expected = DATA[first * BLOCK_BYTES + 7 : last * BLOCK_BYTES + 7]
        assert part(uri, store, kept, first, last) == expected
        assert hashed == read, (first, last)
    assert len(kept) == 3


def test_a_blob_alone_keeps_one_block(store: Store, uri: str, hashed: list[int]) -> None:
    blob = open_blob(store, uri)
    assert blob.read() == DATA
    assert blob.read(4 * BLOCK_BYTES + 4) == b"end"
    assert hashed == [0, 1, 2, 3, ord("t")]
    assert len(blob.blocks) == 1


def test_room_is_made_by_what_was_not_used_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    kept = VerifiedBlocks(20)
    blocks = {hashlib.sha256(text).hexdigest(): text for text in (b"0123456789", b"abcdefghij", b"ABCDEFGHIJ")}
    one, two, three = blocks
    kept.put(one, blocks[one])
    now = 2.0
    kept.put(two, blocks[two])
    now = 3.0
    assert kept.get(one) == blocks[one]
    kept.put(three, blocks[three])
    assert [kept.get(each) for each in (one, two, three)] == [blocks[one], None, blocks[three]]
    now = 10.0
    assert kept.get(one) == blocks[one]
    now = 12.0
    kept.forget_unused(5.0)
    assert (len(kept), kept.get(one)) == (1, blocks[one])
    kept.put(two, bytes(1000))  # larger than all the room: it is kept, and nothing else
    assert (len(kept), kept.get(two)) == (1, bytes(1000))
