"""Names and bytes of uploads, without a server."""

import asyncio
from collections.abc import Iterator

import pytest

from cryofleet.errors import Cancelled, DeadlineExceeded, InvalidArgument
from cryofleet.storage import checked_uri
from services.io.upload import Feed, safe_name


@pytest.mark.parametrize(
    ("given", "safe"),
    [
        ("TS_01 (bin4).mrc.gz", "TS_01 (bin4).mrc.gz"),
        ("tomö.mrc", "tomö.mrc"),
        ("..", "file_"),
        ("../../etc/passwd", "_.._etc_passwd"),
        (".hidden.mrc", "hidden.mrc"),
        ("100%25.mrc", "100_25.mrc"),
        ("manifest.json", "file_manifest.json"),
        ("   ", "file_"),
        ("a\x7fb\u202e.mrc", "a_b_.mrc"),
    ],
)
def test_names_are_made_safe(given: str, safe: str) -> None:
    assert safe_name(given) == safe
    assert checked_uri(f"file:///root/{safe}") == f"file:///root/{safe}"


def test_long_names_keep_their_ending() -> None:
    name = safe_name("å" * 200 + ".mrc")
    assert name.endswith("å.mrc")
    assert len(name.encode()) <= 200


async def read_in_thread(feed: Feed) -> bytes:
    def join(pieces: Iterator[bytes]) -> bytes:
        return b"".join(pieces)

    try:
        return await asyncio.to_thread(join, iter(feed))
    finally:
        feed.close()


async def test_pieces_arrive_whole_and_in_order() -> None:
    pieces = [bytes([i]) * 1000 for i in range(50)]
    feed = Feed("a.mrc", 50_000)
    reading = asyncio.create_task(read_in_thread(feed))
    for piece in pieces:
        assert await feed.send(piece)
    feed.end()
    assert await reading == b"".join(pieces)


async def test_nobody_waits_for_a_reader_that_is_gone() -> None:
    feed = Feed("a.mrc", 10)
    reading = asyncio.create_task(read_in_thread(feed))
    sent = 0
    async with asyncio.timeout(5):
        while await feed.send(b"12345678"):
            sent += 1
    assert sent <= 10
    with pytest.raises(InvalidArgument, match=r"a.mrc: more bytes came than the 10 announced"):
        await reading


async def test_too_few_bytes_a_broken_upload_and_a_stalled_one() -> None:
    feed = Feed("a.mrc", 10)
    await feed.send(b"123")
    feed.end()
    with pytest.raises(InvalidArgument, match=r"a.mrc: the upload ended after 3 of 10 bytes"):
        await read_in_thread(feed)
    feed = Feed("a.mrc", 10)
    feed.end(Cancelled("left"))
    with pytest.raises(Cancelled, match=r"left"):
        await read_in_thread(feed)
    feed = Feed("a.mrc", 10, patience_seconds=0.05)
    with pytest.raises(DeadlineExceeded, match=r"no bytes came for 0.05 s, after 0 of 10"):
        await read_in_thread(feed)
