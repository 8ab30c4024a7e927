"""The picking view: tables opened from elsewhere, expected false positives, the gallery, rejecting many."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from cryofleet.client import Client
from cryofleet.errors import InvalidArgument, NotFound
from cryofleet.numerics.score_background import Background, Kind
from cryofleet.particles import Particles
from cryofleet.v1 import io_pb2
from cryofleet.views.histogram import Histogram, histogram_svg
from cryofleet.views.pick_pictures import square_about
from cryofleet.views.picking import PickingView
from cryofleet.views.picks import Picks
from cryofleet.views.tomogram import TomogramView

BACKGROUND = Background(1000, 0.1, 0.02, 5.0, 0.1, 0.03, (Kind(0.02, 0.3, 0.03),), Kind(0.01, 0.6, 0.05))
SCORES = [0.65, 0.2, 0.55, 0.3, 0.6]


class Platform:
    """A tomogram, a table of picks in it, and what the operation that made them wrote beside them."""

    def __init__(self, figures: dict[str, Any] | None) -> None:
        places = [[10.0 * n, 20.0, 5.0] for n in range(1, 6)]
        picks = Particles.from_positions(places, 10.0, "t", (40, 50, 60), score=np.array(SCORES))
        self.files = {"file:///k/picks.parquet": picks.to_parquet()}
        if figures is not None:
            self.files["file:///k/metrics.json"] = json.dumps(figures).encode()
        self.called: list[dict[str, Any]] = []
        self.cuts: list[io_pb2.CutSliceRequest] = []

    def download_chunks(self, uri: str) -> Iterator[bytes]:
        if uri not in self.files:
            raise NotFound(f"{uri} does not exist")
        yield self.files[uri]

    def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        self.called.append({"operation": operation, **parameters})
        if operation == "picking.DifferenceOfGaussians":
            return {"particles_uri": "file:///k/picks.parquet"}
        self.files["file:///f/metrics.json"] = json.dumps({"background": dataclasses.asdict(BACKGROUND)}).encode()
        return {"metrics_uri": "file:///f/metrics.json"}

    def cut_slice(self, request: io_pb2.CutSliceRequest) -> io_pb2.CutSliceResponse:
        kept = io_pb2.CutSliceRequest()
        kept.CopyFrom(request)
        self.cuts.append(kept)
        return io_pb2.CutSliceResponse(
            etag=str(len(self.cuts)), size_x=60, size_y=50, size_z=40, voxel_size_angstrom=10.0, black_value=-1.0,
            white_value=2.0, media_type="image/jpeg", picture=f"picture {len(self.cuts)}".encode(),
        )  # fmt: skip


async def opened(platform: Platform) -> PickingView:
    tomogram = TomogramView(cast(Client, platform), volume="file:///t.mrc", particles="file:///k/picks.parquet")
    await tomogram.open()
    view = PickingView(cast(Client, platform), tomogram, editor="ana")
    view.attach()
    await view._read_figures()
    return view


async def test_a_table_brings_its_scores_and_its_background() -> None:
    edges = np.linspace(0, 0.7, 11).tolist()
    figures = {"background": dataclasses.asdict(BACKGROUND), "peak_heights": {"edges": edges, "counts": [9] * 10}}
    view = await opened(Platform(figures))
    # All picks are shown at first, though none has the score that is usual for blobs.
    assert (view._slider.start, view._slider.end, view._slider.step, view.threshold) == (0.2, 0.65, 0.001, 0.2)
    assert view._count.object == "5 picks of 5"
    view.threshold = 0.5
    assert view._count.object == "3 picks of 5"
    assert view.view.least_score == 0.5
    expected = BACKGROUND.false_positives(0.5)
    assert f"threshold: {expected:.2g}, by the distribution of 1,000 scores" in view._expected.object
    # Of all peaks of the search, not of the picks alone; with the line of what is background.
    assert view._histogram.object.count("<rect") == 10
    assert "<polyline" in view._histogram.object
    view._let_pass.value = 3.0
    assert view.threshold == pytest.approx(BACKGROUND.threshold(3.0))
    assert BACKGROUND.false_positives(view.threshold) == pytest.approx(3.0)


async def test_of_a_table_that_says_nothing_the_platform_is_asked() -> None:
    platform = Platform(None)
    view = await opened(platform)
    assert view._expected.object == ""
    await view.estimate()
    assert platform.called == [
        {
            "operation": "picking.FilterParticles",
            "particles_uris": ["file:///k/picks.parquet"],
            "expected_false_positives": 1.0,
        }
    ]
    assert not view._let_pass.disabled
    assert "expected false positives" in view._expected.object.lower()


async def test_what_is_picked_here_keeps_its_threshold_in_standard_deviations() -> None:
    platform = Platform(None)
    tomogram = TomogramView(cast(Client, platform), volume="file:///t.mrc")
    await tomogram.open()
    view = PickingView(cast(Client, platform), tomogram)
    view.attach()
    view.threshold = 0.3
    await view.find(preview=False)
    assert (view.threshold, view._slider.end) == (0.3, 12.0)
    view.detach()
    view.attach()  # the picks are those that it left there
    assert (view.threshold, tomogram.least_score) == (0.3, 0.3)
    tomogram.particles = "file:///k/picks.parquet"
    await tomogram.open_particles()
    assert (view.threshold, view._slider.end) == (0.2, 0.65)
    await view.find(preview=False)
    assert (view.threshold, view._slider.end) == (3.0, 12.0)


async def test_the_gallery_is_sorted_and_rejects_many_at_once() -> None:
    platform = Platform(None)
    view = await opened(platform)
    view.diameter_angstrom = 100.0
    view.show_gallery = True
    assert [item.key for item in view._chooser.items] == [0, 4, 2, 3, 1]
    assert [item.title for item in view._chooser.items][:2] == ["0.65", "0.6"]
    view.threshold = 0.5
    assert [item.key for item in view._chooser.items] == [0, 4, 2]
    platform.cuts.clear()
    pictures = await view._pictures_of([0, 4])
    regions = [each.region for each in platform.cuts if each.HasField("region")]
    assert [(r.first_column, r.first_row, r.columns, r.rows) for r in regions] == [(0, 10, 20, 20), (40, 10, 20, 20)]
    # All have the greys of the whole plane, and are not cut again.
    assert {(each.black_value, each.white_value) for each in platform.cuts if each.HasField("region")} == {(-1.0, 2.0)}
    assert await view._pictures_of([4, 0]) == pictures[::-1]
    assert sum(each.HasField("region") for each in platform.cuts) == 2
    view._chooser.choose([0, 2])
    view._gallery_key("d", 0)
    assert [item.key for item in view._chooser.items] == [4]
    assert view._count.object == "1 picks of 3, 1 edits not saved"
    view._key("u")
    assert [item.key for item in view._chooser.items] == [0, 4, 2]
    view._key("r")
    view._order.value = "worst first"
    view.threshold = 0.2
    assert [item.key for item in view._chooser.items] == [1, 3, 4]
    view._gallery_key("Enter", 3)
    assert view.view.position == [40.0, 20.0, 5.0]
    await asyncio.sleep(0)


def test_many_rejected_are_one_edit() -> None:
    picks = Picks.of(Particles.from_positions(np.eye(3), 10.0), 10.0)
    picks.reject([2, 0, 2])
    assert list(picks.table["id"]) == [1]
    assert picks.edits == 1
    assert picks.undo() == 2
    assert len(picks) == 3
    assert picks.redo() == 2
    assert len(picks) == 1
    with pytest.raises(InvalidArgument, match="no pick 0"):
        picks.reject([1, 0])
    assert len(picks) == 1  # all of them or none
    picks.reject([])
    assert picks.edits == 1


def test_squares_stay_in_the_plane() -> None:
    assert square_about((1.0, 49.0, 0.0), 10, 60, 50) == (0, 40, 10, 10)
    assert square_about((30.4, 20.6, 0.0), 10, 60, 50) == (25, 16, 10, 10)
    assert square_about((5.0, 5.0, 0.0), 100, 60, 50) == (0, 0, 60, 50)


def test_a_background_is_read_as_it_was_stated() -> None:
    stated = json.loads(json.dumps(dataclasses.asdict(BACKGROUND)))
    assert Background.from_table(stated) == BACKGROUND
    assert Background.from_table({**stated, "particles": None}).particles is None
    for wrong in (
        {}, {**stated, "tail": 0.0}, {**stated, "mean": float("nan")}, {**stated, "others": [{"fraction": 2.0}]},
        {**stated, "others": 3}, {**stated, "peaks": float("inf")}, {**stated, "deviation": "wide"},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match="background"):
            Background.from_table(wrong)


@pytest.mark.parametrize(
    "peaks",
    [None, {"edges": [0, 1], "counts": []}, {"edges": [1, 0], "counts": [2]}, {"edges": [0, 1], "counts": [-1]}],
)
def test_what_is_no_histogram_is_none(peaks: Any) -> None:
    assert Histogram.of_search({"peak_heights": peaks}) is None
    assert histogram_svg(None, 1.0) == ""
