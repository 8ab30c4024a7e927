"""Clusters: what a run left of them, choosing, grouping, and what is started from the choice."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image

from cryofleet.client import Client
from cryofleet.errors import DataLoss, Failure, InvalidArgument, NotFound
from cryofleet.particles import Particles
from cryofleet.v1 import io_pb2, orchestrator_pb2
from cryofleet.views.boxes import open_boxes, read_box, sections_picture
from cryofleet.views.clustered_run import clustered, embedding_of
from cryofleet.views.clusters import ClustersView
from cryofleet.views.groups import Groups, ranges_text
from cryofleet.views.scatter import within
from cryofleet.volumes import VolumeInfo, encode_volume
from services.learning.cluster_groups import ClusterGroup, parse_groups

SIDE = 8
SIZES = (4, 3, 2)
CENTRES = "file:///centres.mrc"
PARTICLES = "file:///particles.parquet"
EMBEDDING = "file:///embedding.json"
PLACES = {1: (0.0, 0.0), 2: (10.0, 0.0), 3: (0.0, 10.0)}


def stack() -> NDArray[np.float32]:
    """Three boxes, each of its number times a ramp along x."""
    ramp = np.arange(SIDE, dtype=np.float32) * np.ones((SIDE, SIDE, SIDE), np.float32)
    return np.stack([number * ramp for number in (1, 2, 3)])


def table() -> dict[str, Any]:
    clusters = [number for number, size in enumerate(SIZES, start=1) for _ in range(size)]
    points = [(PLACES[number][0] + 0.1 * row, PLACES[number][1]) for row, number in enumerate(clusters)]
    return {
        "particles": 9, "id": list(range(100, 109)), "cluster": clusters, "explained_variance": [0.5, 0.25],
        "x": [x for x, _ in points], "y": [y for _, y in points],
        "centre_x": [x for x, _ in PLACES.values()], "centre_y": [y for _, y in PLACES.values()],
    }  # fmt: skip


def a_run(**outputs: Any) -> orchestrator_pb2.Run:
    run = orchestrator_pb2.Run(id="mine-features-1", pipeline="mine-features")
    run.finished_at.GetCurrentTime()
    arguments = {"tomogram": "file:///t.mrc", "box_size_voxels": SIDE, "threshold": 1.5, "max_epochs": 7}
    json_format.ParseDict(arguments, run.arguments)
    extract = run.steps.add(id="extract", operation="picking.Extract")
    json_format.ParseDict({"subtomograms_uri": "file:///s.json"}, extract.outputs)
    cluster = run.steps.add(id="cluster", operation="learning.Cluster")
    left = {
        "centres_uri": CENTRES,
        "particles_uri": PARTICLES,
        "model_uri": "file:///model",
        "embedding_uri": EMBEDDING,
    }
    json_format.ParseDict({**left, "sizes": SIZES, **outputs}, cluster.outputs)
    return run


class Platform:
    """Serves one run's clusters; keeps what is asked for, uploaded and started."""

    def __init__(self) -> None:
        info = VolumeInfo((SIDE,) * 3, 10.0, "light", count=3)
        clusters = np.array(table()["cluster"], np.int32) - 1
        particles = Particles.from_positions(np.ones((9, 3)), 10.0, "t", id=np.arange(100, 109), class_id=clusters)
        self.stored = {
            CENTRES: encode_volume(stack(), info),
            PARTICLES: particles.to_parquet(),
            EMBEDDING: json.dumps(table()).encode(),
        }
        self.all_runs = [orchestrator_pb2.Run(id="other"), a_run()]
        self.read: list[tuple[str, int, int]] = []
        self.uploaded = b""
        self.started: list[tuple[str, dict[str, Any]]] = []
        self.failure: Failure | None = None

    def pipelines(self) -> list[orchestrator_pb2.PipelineDescription]:
        def described(name: str, **kinds: str) -> orchestrator_pb2.PipelineDescription:
            parameters = [
                orchestrator_pb2.PipelineParameter(
                    name=each, type=kind, required=kind in ("subtomograms", "model", "file"), repeated=kind == "file"
                )
                for each, kind in kinds.items()
            ]
            return orchestrator_pb2.PipelineDescription(name=name, parameters=parameters)

        both = {"subtomograms": "subtomograms", "particles": "particles"}
        return [
            described("average", **both, symmetry="text"),
            described(
                "segment-weakly", **both, model="model", groups="list", tomograms="file", box_size_voxels="integer",
                threshold="number", max_epochs="integer",
            ),
        ]  # fmt: skip

    def runs(self, limit: int) -> list[orchestrator_pb2.Run]:
        if self.failure is not None:
            raise self.failure
        # As the platform lists them: without steps.
        listed = [orchestrator_pb2.Run.FromString(run.SerializeToString()) for run in self.all_runs]
        for run in listed:
            run.ClearField("steps")
        return listed

    def get(self, run_id: str) -> Any:
        return SimpleNamespace(id=run_id, record=next(run for run in self.all_runs if run.id == run_id))

    def list(self, uri: str) -> Iterator[io_pb2.ListResponse]:
        yield io_pb2.ListResponse(uri=uri, size_bytes=len(self.stored[uri]))

    def download_chunks(self, uri: str, offset_bytes: int = 0, length_bytes: int = 0) -> Iterator[bytes]:
        if uri not in self.stored:
            raise NotFound(f"{uri} does not exist")
        self.read.append((uri, offset_bytes, length_bytes))
        yield self.stored[uri][offset_bytes : offset_bytes + length_bytes if length_bytes else None]

    def upload(self, path: Path) -> str:
        self.uploaded = path.read_bytes()
        return "file:///uploaded.parquet"

    def run(self, pipeline: str, **arguments: Any) -> Any:
        self.started.append((pipeline, arguments))
        return orchestrator_pb2.Run(id=f"{pipeline}-1")


@pytest.fixture
def platform() -> Platform:
    return Platform()


@pytest.fixture
async def view(platform: Platform) -> ClustersView:
    made = ClustersView(cast(Client, platform))
    await made.open()
    return made


def group(view: ClustersView, name: str, *clusters: int) -> None:
    view.gallery.choose(clusters)
    view._name.value_input = name
    view.gallery.on_key and view.gallery.on_key("g", 1)


async def test_the_newest_run_with_clusters_is_shown(view: ClustersView, platform: Platform) -> None:
    assert view.run_id == "mine-features-1"
    assert [item.title for item in view.gallery.items] == ["1: 4 particles", "2: 3 particles", "3: 2 particles"]
    # Of the stack no more than its header has come so far, and then the box that is looked at.
    assert [read for read in platform.read if read[0] == CENTRES] == [(CENTRES, 0, 1024)]
    platform.read.clear()
    await view.gallery._sheet._handle_msg({"type": "want", "serial": 0, "places": [1]})
    assert platform.read == [(CENTRES, 1024 + 4 * SIDE**3, 4 * SIDE**3)]
    points = np.frombuffer(view.plot.points, "<f4").reshape(-1, 2)
    np.testing.assert_allclose(points, np.array([table()["x"], table()["y"]]).T, rtol=1e-6)
    assert "50% of the variance" in view.plot.across


async def test_a_lasso_takes_clusters_or_particles(view: ClustersView, platform: Platform) -> None:
    around_first_two = [[-5.0, -5.0], [15.0, -5.0], [15.0, 5.0], [-5.0, 5.0]]
    view.plot._handle_msg({"type": "lasso", "corners": around_first_two})
    assert view.chosen == [1, 2]
    assert view._count.object == "2 clusters chosen, 7 particles"
    assert list(view.plot.lit) == [1] * 7 + [0] * 2
    assert [mark[4] for mark in view.plot.marks] == [True, True, False]
    view.plot._handle_msg({"type": "mark", "number": 3, "more": True})
    assert view.chosen == [1, 2, 3]
    view.plot._handle_msg({"type": "mark", "number": 2})
    assert view.chosen == [2]
    view.lasso_takes = "particles"
    # Particles of cluster 1 lie at 0, 0.1, 0.2 and 0.3.
    view.plot._handle_msg({"type": "lasso", "corners": [[0.05, -1], [0.25, -1], [0.25, 1], [0.05, 1]]})
    assert view.lassoed.tolist() == [101, 102]
    view.plot._handle_msg({"type": "lasso", "corners": [[-1, 9], [5, 9], [5, 11], [-1, 11]], "more": True})
    assert view.lassoed.tolist() == [101, 102, 107, 108]
    await view.save()
    saved = Particles.from_parquet(platform.uploaded).table
    assert saved["id"].tolist() == [101, 102, 107, 108]
    # What is no lasso changes nothing.
    for corners in ([[0, 0], [1, 1]], [[0, 0], [float("nan"), 1], [1, 1]], [[0, 0, 0]] * 3):
        view.plot._handle_msg({"type": "lasso", "corners": corners})
    assert len(view.lassoed) == 4


async def test_groups_are_what_segmenting_learns(view: ClustersView, platform: Platform) -> None:
    heard: list[str] = []
    view.on_started = heard.append
    await view.start()
    assert "into a group" in view._start_said.object
    group(view, "background", 3)
    group(view, "mem:<b>", 1, 2)
    assert view.gallery.items[0].note == "mem:<b>"
    assert view.gallery.items[0].colour == view.groups.colour("mem:<b>") != view.groups.colour("background")
    assert list(view.plot.kinds) == [1] * 7 + [2] * 2
    await view.start()
    [(pipeline, arguments)] = platform.started
    assert (pipeline, heard) == ("segment-weakly", ["segment-weakly-1"])
    assert parse_groups(arguments["groups"]) == (
        ClusterGroup("mem:<b>", ((1, 2),)), ClusterGroup("background", ((3, 3),)),
    )  # fmt: skip
    # Found and cut as the clustered ones were; how long is learnt is another thing.
    expected = {
        "subtomograms": "file:///s.json", "model": "file:///model", "particles": PARTICLES, "threshold": 1.5,
        "tomograms": ["file:///t.mrc"], "box_size_voxels": SIDE, "groups": arguments["groups"],
    }  # fmt: skip
    assert arguments == expected


async def test_an_average_takes_the_chosen_particles(view: ClustersView, platform: Platform) -> None:
    view._which.value = "average"
    await view.start()
    assert "choose some clusters" in view._start_said.object
    group(view, "ring", 3)
    view.gallery.choose([2, 3])
    await view.start()
    assert platform.started == [
        ("average", {"subtomograms": "file:///s.json", "particles": "file:///uploaded.parquet"})
    ]
    saved = Particles.from_parquet(platform.uploaded).table
    assert saved["id"].tolist() == [104, 105, 106, 107, 108]
    assert saved["class_name"].tolist() == ["", "", "", "ring", "ring"]


async def test_what_fails_is_said(platform: Platform) -> None:
    view = ClustersView(cast(Client, platform))
    failures: list[Failure] = []
    view.on_failure = failures.append
    platform.failure = NotFound("<b>away</b>")
    await view.open()
    assert view._said.object == "<b>away</b>"
    assert failures == [platform.failure]
    platform.failure = None
    platform.stored[EMBEDDING] = b"{"
    await view.open()
    assert "no JSON" in view._said.object
    platform.all_runs = []
    view = ClustersView(cast(Client, platform))
    await view.open()
    assert (view._nothing.visible, view._both.visible) == (True, False)


def test_a_run_without_clusters_has_none() -> None:
    assert clustered(orchestrator_pb2.Run(id="r")) is None
    assert clustered(a_run(centres_uri="")) is None  # not there yet
    found = clustered(a_run())
    assert found is not None
    assert (found.subtomograms_uri, found.sizes) == ("file:///s.json", SIZES)


@pytest.mark.parametrize(
    "change",
    [
        {"x": [1.0]},
        {"y": [float("inf")] * 9},
        {"cluster": [0] * 9},
        {"cluster": [2**31 - 1] * 9},
        {"id": ["a"] * 9},
        {"centre_x": [1.0]},
        {"x": None},
    ],
)
def test_what_is_no_embedding_is_refused(change: dict[str, Any]) -> None:
    assert len(embedding_of(table(), "e").ids) == 9
    with pytest.raises(InvalidArgument, match=r"e\.json"):
        embedding_of(table() | change, "e.json")
    with pytest.raises(InvalidArgument):
        embedding_of([1], "e.json")


def test_boxes_are_read_one_by_one_and_not_believed(platform: Platform) -> None:
    client = cast(Client, platform)
    boxes = open_boxes(client, CENTRES)
    assert len(boxes) == 3
    np.testing.assert_array_equal(read_box(client, boxes, 2), stack()[2])
    whole = platform.stored[CENTRES]
    platform.stored[CENTRES] = whole[:-1]
    with pytest.raises(DataLoss):
        open_boxes(client, CENTRES)
    with pytest.raises(DataLoss, match="bytes came"):
        read_box(client, boxes, 2)


def test_a_picture_has_three_sections_and_the_mean() -> None:
    box = np.zeros((5, 5, 5), np.float32)
    box[2, 1, 4] = 1  # z, y, x
    picture = sections_picture(box, "light")
    assert picture.shape == (11, 11)
    assert np.argwhere(picture[:5, :5] == 255).tolist() == [[1, 4]]  # y, x
    assert not picture[:5, 6:].any()  # y, z at x = 2
    assert not picture[6:, :5].any()  # z, x at y = 2
    assert np.argwhere(picture[6:, 6:]).tolist() == [[1, 4]]
    with Image.open(io.BytesIO(_png(sections_picture(-box, "dark")))) as image:
        np.testing.assert_array_equal(np.asarray(image), picture)


def _png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def test_groups_hold_each_cluster_once() -> None:
    groups = Groups()
    groups.put(" membrane ", [4, 1, 10, 9, 8])
    groups.put("ice", [8])
    assert groups.texts() == ["membrane:1,4,9-10", "ice:8"]
    groups.put("ice", [9])
    groups.put("background", [2])
    groups.put("ribosome", [3])
    assert list(groups) == ["membrane", "ice", "ribosome", "background"]  # as their numbers are
    assert (groups.of(9), groups.of(77)) == ("ice", "")
    groups.release([8, 9])
    assert "ice" not in list(groups)
    for name, clusters in ((" ", [1]), ("x", []), ("x" * 101, [1])):
        with pytest.raises(InvalidArgument):
            groups.put(name, clusters)
    assert ranges_text([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"


def test_a_lasso_may_be_concave() -> None:
    horseshoe = np.array([[0, 0], [3, 0], [3, 3], [2, 3], [2, 1], [1, 1], [1, 3], [0, 3]], np.float64)
    points = np.array([[0.5, 2.0], [1.5, 2.0], [2.5, 2.0], [1.5, 0.5], [4.0, 0.5], [-1.0, 0.5]])
    assert within(points, horseshoe).tolist() == [True, False, True, True, False, False]
