"""Painting: which voxels a stroke is, what is undone, and what annotate is given."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from google.protobuf import json_format
from PIL import Image

from cryofleet.client import Client
from cryofleet.errors import Failure, InvalidArgument, NotFound
from cryofleet.v1 import common_pb2, io_pb2, orchestrator_pb2
from cryofleet.views import painted_sections
from cryofleet.views.painted_sections import FEATURE, NOT_FEATURE, NOT_LOOKED_AT, PaintedSections, from_png, to_png
from cryofleet.views.painting import PaintingView, overlay_frame
from cryofleet.views.slice_pane import SlicePane
from cryofleet.views.tomogram import TomogramView
from services.learning.painted import read_picture

SHAPE = (8, 40, 60)  # z, y, x


def disc(column: float, row: float, radius: float) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    return np.asarray(np.hypot(x - column, y - row) <= radius)


def test_a_stroke_is_all_within_the_radius_of_its_line() -> None:
    painted = PaintedSections(SHAPE)
    painted.stroke("m", 3, [[20.3, 10.6]], 5.0, FEATURE)
    labels = painted.section("m", 3)
    np.testing.assert_array_equal(labels == FEATURE, disc(20.3, 10.6, 5.0))
    # Along a line: half discs at both ends, and what is no further than the radius from the line between.
    painted.stroke("m", 4, [[10.0, 20.0], [30.0, 20.0]], 3.0, NOT_FEATURE)
    labels = painted.section("m", 4)
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    bar = (np.abs(y - 20) <= 3) & (x >= 10) & (x <= 30)
    np.testing.assert_array_equal(labels == NOT_FEATURE, bar | disc(10, 20, 3) | disc(30, 20, 3))
    assert painted.counts("m") == (int(disc(20.3, 10.6, 5.0).sum()), int((labels == NOT_FEATURE).sum()))
    assert painted.sections("m") == [3, 4]
    # The smallest brush still paints the voxel that it is in; beyond the edge there is nothing to paint.
    painted.stroke("m", 0, [[7.4, 8.6]], 0.0, FEATURE)
    assert np.argwhere(painted.section("m", 0)).tolist() == [[9, 7]]
    painted.stroke("m", 0, [[-1.0, 39.0]], 2.0, FEATURE)
    assert painted.section("m", 0).sum() == 1 + disc(-1, 39, 2).sum()
    before = painted.edits
    painted.stroke("m", 1, [[500.0, 500.0]], 2.0, FEATURE)
    assert painted.edits == before


def test_strokes_are_erased_undone_and_done_again() -> None:
    painted = PaintedSections(SHAPE)
    painted.stroke("m", 3, [[20.0, 10.0]], 5.0, FEATURE)
    painted.stroke("r", 3, [[20.0, 10.0]], 2.0, NOT_FEATURE)
    painted.stroke("m", 3, [[20.0, 10.0]], 2.0, NOT_LOOKED_AT)
    ring = disc(20, 10, 5) & ~disc(20, 10, 2)
    labels = painted.section("m", 3)
    np.testing.assert_array_equal(labels == FEATURE, ring)
    assert painted.counts("m") == (int(ring.sum()), 0)
    painted.stroke("m", 3, [[50.0, 30.0]], 2.0, NOT_LOOKED_AT)  # changes nothing, so there is nothing to undo
    assert painted.undo() == ("m", 3)
    np.testing.assert_array_equal(painted.section("m", 3) == FEATURE, disc(20, 10, 5))
    assert painted.undo() == ("r", 3)
    assert (painted.features, painted.counts("r")) == (["m"], (0, 0))
    assert painted.undo() == ("m", 3)
    assert painted.undo() is None
    assert (painted.features, painted.sections("m")) == ([], [])
    assert [painted.redo(), painted.redo(), painted.redo(), painted.redo()] == [("m", 3), ("r", 3), ("m", 3), None]
    np.testing.assert_array_equal(painted.section("m", 3) == FEATURE, ring)
    painted.undo()
    painted.stroke("m", 3, [[40.0, 10.0]], 2.0, FEATURE)
    assert painted.redo() is None


@pytest.mark.parametrize(
    ("z", "points", "radius", "value"),
    [
        (8, [[1.0, 1.0]], 2.0, FEATURE),
        (-1, [[1.0, 1.0]], 2.0, FEATURE),
        (0, [[1.0, 1.0]], 2.0, 3),
        (0, [[1.0, 1.0]], 1e9, FEATURE),
        (0, [[1.0, 1.0]], float("nan"), FEATURE),
        (0, [[float("nan"), 1.0]], 2.0, FEATURE),
        (0, [], 2.0, FEATURE),
        (0, [[1.0, 1.0, 1.0]], 2.0, FEATURE),
    ],
)
def test_what_is_no_stroke_is_refused(z: int, points: list[list[float]], radius: float, value: int) -> None:
    with pytest.raises(InvalidArgument):
        PaintedSections(SHAPE).stroke("m", z, points, radius, value)


def test_a_painting_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = PaintedSections(SHAPE)
    painted.stroke("m", 0, [[9.0, 9.0]], 3.0, FEATURE)
    noise = np.random.default_rng(1).integers(0, 3, SHAPE[1:]).astype(np.uint8)
    monkeypatch.setattr(painted_sections, "MOST_BYTES", 200)
    with pytest.raises(InvalidArgument, match="1 sections are painted"):
        painted.load("m", 1, noise)
    with pytest.raises(InvalidArgument):
        painted.load("m", 0, noise)
    assert (painted.sections("m"), painted.counts("m")) == ([0], (int(disc(9, 9, 3).sum()), 0))
    monkeypatch.setattr(painted_sections, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(painted_sections, "MOST_SECTIONS", 2)
    painted.stroke("m", 1, [[9.0, 9.0]], 3.0, FEATURE)
    painted.stroke("m", 1, [[29.0, 9.0]], 3.0, FEATURE)
    with pytest.raises(InvalidArgument, match="2 sections are painted"):
        painted.stroke("m", 2, [[9.0, 9.0]], 3.0, FEATURE)


def test_pictures_are_what_annotate_reads(tmp_path: Path) -> None:
    labels = np.random.default_rng(3).integers(0, 3, SHAPE[1:]).astype(np.uint8)
    data = to_png(labels)
    (tmp_path / "p.png").write_bytes(data)
    np.testing.assert_array_equal(read_picture(tmp_path / "p.png", "p.png", (SHAPE[1], SHAPE[2])), labels)
    np.testing.assert_array_equal(from_png(data, "p.png", (SHAPE[1], SHAPE[2])), labels)
    for damaged in (data[:40], b"", b"GIF89a" + bytes(50), data[:-30]):
        with pytest.raises(InvalidArgument, match=r"p\.png"):
            from_png(damaged, "p.png", (SHAPE[1], SHAPE[2]))
    with pytest.raises(InvalidArgument, match="60 x 40 pixels"):
        from_png(data, "p.png", (40, 61))


def test_the_overlay_is_the_painted_part() -> None:
    labels = np.zeros(SHAPE[1:], np.uint8)
    labels[5:8, 10:14] = FEATURE
    labels[6, 20] = NOT_FEATURE
    header, data = read(overlay_frame(3, labels, 9))
    assert (header["position"], header["region"], header["answers"]) == (3, [10, 5, 11, 3], 9)
    with Image.open(io.BytesIO(data)) as image:
        seen = np.asarray(image.convert("RGBA"))
    assert seen.shape == (3, 11, 4)
    assert (seen[..., 3] == 255).sum() == 13
    assert len({tuple(pixel) for pixel in seen[seen[..., 3] == 255]}) == 2
    header, _ = read(overlay_frame(3, np.zeros(SHAPE[1:], np.uint8), 10))
    assert (header["images"], header["answers"]) == ([], 10)


def read(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<I", data)
    return json.loads(data[4 : 4 + length]), data[4 + length :]


class Platform:
    """Keeps what is uploaded and which runs are started."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.started: list[tuple[str, dict[str, Any]]] = []
        self.failure: Failure | None = None

    def cut_slice(self, request: io_pb2.CutSliceRequest) -> io_pb2.CutSliceResponse:
        return io_pb2.CutSliceResponse(
            etag="e", size_x=SHAPE[2], size_y=SHAPE[1], size_z=SHAPE[0], voxel_size_angstrom=10.0, picture=b"p",
            contrast=common_pb2.CONTRAST_LIGHT,
        )  # fmt: skip

    def upload(self, path: Path) -> str:
        if self.failure is not None:
            raise self.failure
        uri = f"file:///{path.name}"
        self.stored[uri] = path.read_bytes()
        return uri

    def download_chunks(self, uri: str) -> list[bytes]:
        if uri not in self.stored:
            raise NotFound(f"{uri} does not exist")
        return [self.stored[uri]]

    def pipelines(self) -> list[orchestrator_pb2.PipelineDescription]:
        parameters = [
            orchestrator_pb2.PipelineParameter(name=name, type=kind, required=required, repeated=name == "tomograms")
            for name, kind, required in (
                ("painted", "file", True), ("tomograms", "file", True), ("features", "list", True),
                ("contrast", "text", False), ("max_epochs", "integer", False),
            )
        ]  # fmt: skip
        return [orchestrator_pb2.PipelineDescription(name="annotate", parameters=parameters)]

    def run(self, pipeline: str, **arguments: Any) -> Any:
        self.started.append((pipeline, arguments))
        run = orchestrator_pb2.Run(id=f"{pipeline}-1")
        json_format.ParseDict(arguments, run.arguments)  # what can't be sent fails here
        return run


@pytest.fixture
def platform() -> Platform:
    return Platform()


@pytest.fixture
async def view(platform: Platform) -> PaintingView:
    tomogram = TomogramView(cast(Client, platform), volume="file:///t.mrc")
    await tomogram.open()
    painting = PaintingView(cast(Client, platform), tomogram)
    painting.attach()
    await painting._open_pipeline()
    return painting


def stroke(view: PaintingView, number: int = 1, **more: Any) -> None:
    pane = view.view.panes["z"]
    said = {"type": "stroke", "stroke": number, "position": 3, "points": [[20.0, 10.0]], "radius": 5.0, "value": 1}
    view.view._told(pane, said | more)


def key(view: PaintingView, *keys: str) -> None:
    for each in keys:
        view.view._told(view.view.panes["z"], {"type": "key", "key": each})


def brush(pane: SlicePane) -> tuple[int | None, float, str]:
    return pane.brush["value"], pane.brush["radius"], pane.brush["colour"]


async def test_strokes_and_keys_paint(view: PaintingView) -> None:
    pane = view.view.panes["z"]
    assert brush(pane) == (FEATURE, 6.0, "#e69f00")
    assert pane.brush["keys"]["x"] == {"value": NOT_FEATURE, "colour": "#56b4e9"}  # as the server will have it
    view.view.go((20.0, 10.0, 3.0))
    stroke(view, 4)
    header, _ = read(pane.painted)
    assert (header["position"], header["answers"], header["region"]) == (3, 4, [15, 5, 11, 11])
    # By keyboard alone: tool, size, where the crosshair is.
    key(view, "x", "]", "]")
    assert brush(pane) == (NOT_FEATURE, 9.5, "#56b4e9")
    view.radius_voxels = 2.0
    view.view.go((40.0, 30.0, 3.0))
    key(view, "p")
    labels = view.painted.section("feature", 3)
    np.testing.assert_array_equal(labels == NOT_FEATURE, disc(40, 30, 2))
    key(view, "h")
    assert brush(pane) == (None, 2.0, "")
    key(view, "p")  # the hand paints nothing
    key(view, "u")
    assert view.painted.counts("feature")[1] == 0
    key(view, "r")
    assert view.painted.counts("feature")[1] == disc(40, 30, 2).sum()
    # On to another section and back to what is painted; an undo shows what it undoes.
    view.apart = 2
    key(view, "n")
    assert view.view.position[2] == 5.0
    assert read(pane.painted)[0]["images"] == []
    key(view, ",")
    assert view.view.position[2] == 3.0
    key(view, "N", "u")
    assert view.view.position[2] == 3.0
    # What is refused is said, and the browser's stroke goes.
    stroke(view, 5, radius=1e9)
    assert "radius" in view._said.object
    assert read(pane.painted)[0]["answers"] == 5
    view.detach()
    assert (pane.brush, pane.painted, view.view.on_hand) == ({}, b"", None)


async def test_what_is_saved_is_what_annotate_takes(view: PaintingView, platform: Platform) -> None:
    await view.start()
    assert not platform.started
    assert "nothing is painted" in view._said.object
    stroke(view)
    view._show_feature("<b>other</b>")
    stroke(view, 2, position=6, value=2)
    await view.start()
    [(pipeline, arguments)] = platform.started
    assert pipeline == "annotate"
    assert arguments["painted"] == "file:///t.mrc"
    assert arguments["tomograms"] == ["file:///t.mrc"]
    assert arguments["contrast"] == "light"
    assert "not saved" not in view._count.object
    first, second = arguments["features"]
    assert (first["name"], first["sections"], second["name"], second["sections"]) == (
        "feature",
        [3],
        "<b>other</b>",
        [6],
    )
    labels = from_png(platform.stored[first["painted_uris"][0]], "p", (SHAPE[1], SHAPE[2]))
    np.testing.assert_array_equal(labels == FEATURE, disc(20, 10, 5))
    # Somebody else goes on with it.
    other = PaintingView(cast(Client, platform), view.view)
    await other.go_on(view.saved)
    assert other.painted.features == ["feature", "<b>other</b>"]
    assert other.painted.counts("feature") == view.painted.counts("feature")
    platform.failure = NotFound("no store")
    stroke(view, 3, value=2)
    await view.start()
    assert len(platform.started) == 1
    assert "not saved" in view._count.object


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"{", "no painting"),
        (b"[]", "no painting"),
        (b'{"features": [{"name": "m", "painted_uris": ["file:///p.png"], "sections": []}]}', "no painting"),
        (b'{"features": [{"name": "m", "painted_uris": ["file:///p.png"], "sections": [8]}]}', "sections that are not"),
        (b'{"features": [{"name": "m", "painted_uris": ["file:///p.png"], "sections": [2]}]}', "damaged PNG"),
        (bytes(2 << 20), "more than"),
    ],
)
async def test_what_is_no_painting_is_refused(view: PaintingView, platform: Platform, index: bytes, said: str) -> None:
    platform.stored |= {"file:///i.json": index, "file:///p.png": b"\x89PNG\r\n\x1a\n" + bytes(100)}
    await view.go_on("file:///i.json")
    assert said in view._said.object
    assert view.painted.features == []
