"""The gallery: what is fetched, and what is chosen by hand."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cryofleet.errors import Failure, InvalidArgument, Unavailable
from cryofleet.views.gallery import Gallery, Item, Key, SmallPicture, grey_picture


class Pictures:
    """Gives a grey square for each key, of the key's own grey."""

    def __init__(self) -> None:
        self.asked: list[Key] = []
        self.failure: Failure | None = None

    async def __call__(self, keys: Sequence[Key]) -> Sequence[SmallPicture]:
        self.asked += keys
        if self.failure is not None:
            raise self.failure
        return [np.full((3, 4), int(key) % 256, np.uint8) for key in keys]


@pytest.fixture
def pictures() -> Pictures:
    return Pictures()


@pytest.fixture
def gallery(pictures: Pictures) -> Gallery:
    made = Gallery(pictures, label="numbers", per_page=10)
    made.fill(Item(100 + number, f"number {number}") for number in range(25))
    return made


async def tell(gallery: Gallery, **said: Any) -> None:
    await gallery._sheet._handle_msg(said)


def read(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<I", data)
    return json.loads(data[4 : 4 + length]), data[4 + length :]


async def test_only_what_is_seen_is_fetched(gallery: Gallery, pictures: Pictures) -> None:
    sheet = gallery._sheet
    assert (len(sheet.captions), sheet.sheet["pages"], pictures.asked) == (10, 3, [])
    await tell(gallery, type="want", serial=sheet.sheet["serial"], places=[2, 3])
    assert pictures.asked == [102, 103]
    header, data = read(sheet.frame)
    assert header["position"] == sheet.sheet["serial"]
    assert [each["name"] for each in header["images"]] == ["2", "3"]
    with Image.open(io.BytesIO(data[: header["images"][0]["bytes"]])) as image:
        assert image.size == (4, 3)
        assert image.getpixel((0, 0)) == 102
    # However much the browser asks for, no more than one answer's worth comes; nor what is not there.
    pictures.asked.clear()
    await tell(gallery, type="want", serial=0, places=list(range(25)))
    assert len(pictures.asked) == 16
    await tell(gallery, type="want", serial=0, places=[24, 25, -1])
    assert pictures.asked[16:] == [124]


async def test_pages_turn_and_keep_what_is_chosen(gallery: Gallery) -> None:
    sheet = gallery._sheet
    await tell(gallery, type="choose", place=8)
    assert (gallery.selected, sheet.chosen) == ([108], [8])
    await tell(gallery, type="page", page=1)
    assert (gallery.page, sheet.sheet["first"], sheet.sheet["focus"], sheet.chosen) == (1, 10, 0, [])
    # Shift takes all since the last, over the page's edge.
    await tell(gallery, type="range", place=11)
    assert gallery.selected == [108, 109, 110, 111]
    assert sheet.chosen == [0, 1]
    # Going back by the left arrow leads to the page's end.
    await tell(gallery, type="page", page=0, end=True)
    assert (sheet.sheet["focus"], sheet.chosen) == (9, [8, 9])
    await tell(gallery, type="page", page=7)
    assert (gallery.page, len(sheet.captions)) == (2, 5)


async def test_all_none_and_one_less(gallery: Gallery) -> None:
    await tell(gallery, type="all")
    assert len(gallery.selected) == gallery._sheet.chosen_count == 25
    await tell(gallery, type="choose", place=0)
    assert gallery.selected == list(range(101, 125))
    await tell(gallery, type="none")
    assert gallery.selected == gallery._sheet.chosen == []
    gallery.choose([124, 101, 999])
    assert gallery.selected == [101, 124]  # in the items' order, and none that there is not
    gallery.fill([Item(124, "the last"), Item(7, "another")])
    assert (gallery.selected, gallery._sheet.chosen) == ([124], [0])
    await tell(gallery, type="choose", place=5)  # of the page that was there before
    assert gallery.selected == [124]


async def test_keys_and_captions(gallery: Gallery) -> None:
    heard: list[tuple[str, Key]] = []
    gallery.on_key = lambda key, item: heard.append((key, item))
    await tell(gallery, type="key", key="g", place=4)
    assert heard == [("g", 104)]
    serial = gallery._sheet.sheet["serial"]
    gallery.retitle([Item(104, "four", "membrane", "#e69f00")])
    assert gallery._sheet.captions[4] == ["four", "membrane", "#e69f00"]
    assert gallery._sheet.sheet["serial"] == serial  # pictures stay


async def test_failures_are_said_and_those_that_pass_tried_again(gallery: Gallery, pictures: Pictures) -> None:
    failures: list[Failure] = []
    gallery.on_failure = failures.append
    for failure, again in ((Unavailable("io is away"), True), (InvalidArgument("<b>no</b> stack"), False)):
        pictures.failure = failure
        await tell(gallery, type="want", serial=3, places=[0])
        header, _ = read(gallery._sheet.frame)
        assert (header["note"], header["again"], gallery.problem) == (str(failure), again, str(failure))
        assert failures.pop() is failure
    pictures.failure = None
    await tell(gallery, type="want", serial=3, places=[0])
    assert gallery.problem == ""


def test_values_become_greys() -> None:
    values = np.array([[-1.0, 0.0, 1.0], [2.0, np.nan, np.inf]])
    np.testing.assert_array_equal(grey_picture(values, 0.0, 1.0), [[0, 0, 255], [255, 0, 255]])
    assert grey_picture(np.ones((2, 2)), 1.0, 1.0).dtype == np.uint8
