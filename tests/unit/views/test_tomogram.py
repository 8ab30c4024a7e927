"""The tomogram view against a platform that is played: what it asks for, and what it draws."""

from __future__ import annotations

import io
import json
import struct
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from cryofleet.client import Client
from cryofleet.errors import Failure, NotFound, Unauthenticated, Unavailable
from cryofleet.particles import Particles
from cryofleet.v1 import common_pb2, io_pb2
from cryofleet.views.picks import Picks
from cryofleet.views.slice_pane import SlicePane
from cryofleet.views.tomogram import TomogramView

SIZES = (60, 50, 40)


class Platform:
    """Answers with pictures of the right shape; what it was asked is kept."""

    def __init__(self) -> None:
        self.asked: list[io_pb2.CutSliceRequest] = []
        self.failure: Failure | None = None
        self.preparing: float | None = None

    def cut_slice(self, request: io_pb2.CutSliceRequest) -> io_pb2.CutSliceResponse:
        if self.failure is not None:
            raise self.failure
        kept = io_pb2.CutSliceRequest()
        kept.CopyFrom(request)
        self.asked.append(kept)
        response = io_pb2.CutSliceResponse(
            etag=f"{request.axis}-{request.position_voxels}-{request.planes}",
            size_x=SIZES[0], size_y=SIZES[1], size_z=SIZES[2], voxel_size_angstrom=10.0,
            contrast=common_pb2.CONTRAST_DARK, black_value=-1.0, white_value=2.0, media_type="image/png",
            position_voxels=request.position_voxels,
        )  # fmt: skip
        if request.known_etag == response.etag:
            response.unchanged = True
            return response
        if self.preparing is not None and request.axis != io_pb2.AXIS_Z:
            response.preparing_fraction = self.preparing
            return response
        whole = {1: (50, 40), 2: (60, 40), 3: (60, 50)}[request.axis]
        region = request.region if request.HasField("region") else io_pb2.SliceRegion(columns=whole[0], rows=whole[1])
        response.region.CopyFrom(region)
        picture = io.BytesIO()
        Image.new("L", (region.columns, region.rows), 128).save(picture, "PNG")
        response.picture = picture.getvalue()
        return response


def read(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<I", data)
    return json.loads(data[4 : 4 + length]), data[4 + length :]


async def ask(pane: SlicePane, position: int, region: list[int] | None = None) -> tuple[dict[str, Any], bytes]:
    await pane._handle_msg({"type": "want", "position": position, "region": region, "pixels": 320})
    return read(pane.frame)


@pytest.fixture
def platform() -> Platform:
    return Platform()


@pytest.fixture
async def view(platform: Platform) -> TomogramView:
    made = TomogramView(cast(Client, platform), volume="file:///t.mrc")
    await made.open()
    platform.asked.clear()
    return made


async def test_slices_open_in_the_middle_and_follow_each_other(view: TomogramView, platform: Platform) -> None:
    assert view.position == [30.0, 25.0, 20.0]
    assert [(pane.columns, pane.rows, pane.count) for pane in view.panes.values()] == [
        (50, 40, 60), (60, 40, 50), (60, 50, 40),
    ]  # fmt: skip
    header, pictures = await ask(view.panes["z"], 33)
    assert header["region"] == [0, 0, 60, 50]
    assert sum(each["bytes"] for each in header["images"]) == len(pictures)
    with Image.open(io.BytesIO(pictures)) as image:
        assert image.size == (60, 50)
    assert view.position == [30.0, 25.0, 33.0]
    assert view.panes["x"].cross == [25.0, 33.0]
    view._told(view.panes["x"], {"type": "click", "place": [12.0, 7.0], "pick": None})
    assert view.position == [30.0, 12.0, 7.0]
    assert (view.panes["y"].start, view.panes["z"].start) == (12, 7)


async def test_greys_stay_while_one_scrolls_and_pictures_are_not_sent_twice(
    view: TomogramView, platform: Platform
) -> None:
    await ask(view.panes["z"], 10)
    _, second = await ask(view.panes["z"], 11)
    await ask(view.panes["z"], 12)
    assert not platform.asked[0].HasField("black_value")
    assert [(each.black_value, each.white_value) for each in platform.asked[1:]] == [(-1.0, 2.0)] * 2
    platform.asked.clear()
    _, again = await ask(view.panes["z"], 11)
    assert platform.asked[0].known_etag == "3-11-1"
    assert again == second
    # Of another part, or with other percentiles, greys are found anew.
    await ask(view.panes["z"], 11, [4, 5, 6, 7])
    view.percentiles = (1, 99)
    await ask(view.panes["z"], 11)
    assert [each.HasField("black_value") for each in platform.asked[1:]] == [False, False]
    assert platform.asked[1].region == io_pb2.SliceRegion(first_column=4, first_row=5, columns=6, rows=7)


async def test_a_wiped_volume_and_labels_share_the_line(view: TomogramView, platform: Platform) -> None:
    view.param.update(second="file:///b.mrc", labels="file:///l.mrc", compare="wipe")
    header, _ = await ask(view.panes["z"], 5)
    assert [each["name"] for each in header["images"]] == ["main", "second", "labels"]
    assert [each.volume_uri[-5] for each in platform.asked] == ["t", "b", "l"]
    assert sum(each.max_bytes for each in platform.asked) <= 110_000
    assert [each.labels for each in platform.asked] == [False, False, True]


async def test_what_goes_wrong_is_said_and_tried_again_where_it_may_pass(
    view: TomogramView, platform: Platform
) -> None:
    platform.preparing = 0.4
    header, _ = await ask(view.panes["x"], 5)
    assert header["again"]
    assert "40%" in header["note"]
    failures: list[Failure] = []
    view.on_failure = failures.append
    for failure, again in (
        (Unavailable("the orchestrator is away"), True),
        (NotFound("<b>t.mrc</b> does not exist"), False),
        (Unauthenticated("the token has expired"), False),
    ):
        platform.failure = failure
        header, _ = await ask(view.panes["z"], 5)
        assert header["again"] == again
        assert str(failure) in header["note"]
        assert view.problem == str(failure)
        assert failures.pop() is failure
    # Each answer differs from the last: one that did not would never be sent.
    said = [view.panes["z"].frame]
    for _ in range(2):
        await ask(view.panes["z"], 5)
        said.append(view.panes["z"].frame)
    assert len(set(said)) == 3
    platform.failure = None
    header, _ = await ask(view.panes["z"], 5)
    assert (header["note"], view.problem) == ("", "")


async def test_picks_are_circled_where_they_are(view: TomogramView) -> None:
    view.diameter = 80.0
    view.show_picks(Picks.of(Particles.from_positions([[20.0, 10.0, 22.0]], 10.0), 10.0))
    await ask(view.panes["z"], 20)
    [mark] = view.panes["z"].marks
    assert mark[:3] == (0, 20.0, 10.0)
    assert mark[3] == pytest.approx(np.sqrt(12))  # radius 4, two planes off
    await ask(view.panes["z"], 30)
    assert view.panes["z"].marks == []
