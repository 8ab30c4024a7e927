"""MapBack and Enrichment over real gRPC: maps from centres, averages and segmentations; what can't be is refused."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation
from scipy.stats import hypergeom

from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.learning.service import service
from tests.contract.conftest import channel_to

STATUS = grpc.StatusCode
VOXEL = 10.0
SHAPE = (20, 32, 36)

channel = channel_to(service)


def put(store: Store, name: str, data: bytes) -> str:
    writer = ResultWriter(store, "default", hashlib.sha256(name.encode() + data).hexdigest())
    uri = writer.put(name, data)
    writer.commit(
        operation="io.Upload", version=1, parameters={}, inputs={}, result={}, seconds=0.0, device="cpu",
        software="test", host="test",
    )  # fmt: skip
    return uri


def put_volume(
    store: Store, array: NDArray[Any], voxel: float = VOXEL, contrast: str = "dark", stack: bool = False
) -> str:
    info = VolumeInfo(array.shape[-3:], voxel, contrast, count=len(array) if stack else None)
    return put(store, "volume.mrc", encode_volume(array.astype(np.float32), info))


def put_particles(store: Store, positions: Any, voxel: float = VOXEL, *, names: Any = None, **columns: Any) -> str:
    particles = Particles.from_positions(np.array(positions), voxel, "t", **columns)
    if names is not None:
        particles = particles.with_columns(tomogram=names)
    return put(store, "particles.parquet", particles.to_parquet())


def tomogram(store: Store) -> str:
    return put_volume(store, np.random.default_rng(0).normal(0, 1, SHAPE))


def rod(side: int, height: float = 1.0) -> NDArray[np.float32]:
    """Structure from the centre along x."""
    box = np.zeros((side,) * 3, np.float32)
    box[side // 2, side // 2, side // 2 :] = height
    return box


async def refused(channel: grpc.aio.Channel, request: Message) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call_operation(channel, request)
    return error.value.code(), str(error.value.details())


def table(store: Store, uri: str) -> dict[str, Any]:
    content = json.loads(store.get(uri))
    assert isinstance(content, dict)
    return content


async def test_decoded_centres_at_their_particles(channel: grpc.aio.Channel, store: Store) -> None:
    # Binned centres of clusters 0 to 2 in light contrast; the second is stronger only before it is scaled.
    centres = np.stack([rod(8), rod(8, 5.0), np.ones((8, 8, 8), np.float32)])
    particles = put_particles(
        store, [[10, 10, 8], [24.0, 20, 12], [100, 5, 5], [8, 24, 10], [20, 8, 15]],
        class_id=np.array([0, 1, 1, -1, 2], np.int32), class_name=np.array(["a", "b", "b", "", "c"], object),
    )  # fmt: skip
    field = tomogram(store)
    request = learning_pb2.MapBackRequest(
        tomogram_uri=field,
        particles_uri=particles,
        volume_uris=[put_volume(store, centres, 2 * VOXEL, "light", stack=True)],
    )
    result = (await call_operation(channel, request)).result
    labels, density = open_volume(store, result.labels_uri), open_volume(store, result.density_uri)
    assert labels.info.shape == density.info.shape == SHAPE
    assert labels.info.voxel_size_angstrom == VOXEL
    assert density.info.contrast == "light"
    voxels, dense = labels.read(), density.read()
    # Four voxels of 20 Å from the centre on; halfway beyond the ends still at half the height.
    assert voxels[8, 10, 9:18].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert voxels[12, 20, 23:32].tolist() == [2, 2, 2, 2, 2, 2, 2, 2, 0]
    assert np.unique(voxels).tolist() == [0, 1, 2]
    assert dense[8, 10, 12] == dense[12, 20, 26] == pytest.approx(1)
    assert dense.min() == 0
    assert np.array_equal(voxels > 0, dense >= 0.5)
    metrics = table(store, result.metrics_uri)
    assert result.placed == metrics["placed"] == 3
    assert (metrics["outside_of_the_tomogram"], metrics["without_class"]) == (1, 1)
    rows = {row["label"]: row for row in metrics["classes"]}
    assert [(rows[n]["name"], rows[n]["particles"]) for n in (1, 2, 3)] == [("a", 1), ("b", 1), ("c", 1)]
    assert rows[1]["voxels"] == (voxels == 1).sum()
    assert rows[3]["voxels"] == 0  # a centre without contrast
    picture = np.asarray(Image.open(io.BytesIO(store.get(result.picture_uri))))
    assert (picture.max(axis=2) > picture.min(axis=2) + 20).any()
    again = (await call_operation(channel, request)).result
    assert again.labels_uri == result.labels_uri


async def test_averages_are_turned_and_shifted_by_poses_unless_told_otherwise(
    channel: grpc.aio.Channel, store: Store
) -> None:
    turned = Rotation.from_euler("z", [[90], [0]], degrees=True)  # x onto y
    particles = put_particles(
        store, [[5.0, 5, 4], [9, 10, 6]], 2 * VOXEL, rotations=turned, class_id=np.array([3, 7], np.int32),
        shift_x=np.array([1.0, 0]), shift_y=np.zeros(2), shift_z=np.zeros(2),
    )  # fmt: skip
    averages = [put_volume(store, -rod(8)), put_volume(store, -rod(6))]
    field = tomogram(store)
    found = {}
    for poses in (True, False):
        request = learning_pb2.MapBackRequest(
            tomogram_uri=field, particles_uri=particles, volume_uris=averages, poses=poses
        )
        result = (await call_operation(channel, request)).result
        voxels = open_volume(store, result.labels_uri).read()
        found[poses] = [tuple(place[::-1]) for place in np.argwhere(voxels == 1).tolist()]
        assert np.argwhere(voxels == 2)[:, ::-1].tolist() == [[x, 20, 12] for x in (18, 19, 20)]
    # Classes 3 and 7 take the first and the second volume; positions and shifts count in voxels of 20 Å.
    assert found[True] == [(12, y, 8) for y in (10, 11, 12, 13)]
    assert found[False] == [(x, 10, 8) for x in (10, 11, 12, 13)]


async def test_segmentations_in_the_particles_order(channel: grpc.aio.Channel, store: Store) -> None:
    stack = np.zeros((3, 4, 4, 4), np.float32)
    stack[0], stack[1, :, :, :2], stack[2] = 1, 2, 1
    particles = put_particles(
        store, [[10, 10, 10], [12, 10, 10], [-20, 3, 3]], score=np.array([0.5, 0.9, 0.1]),
        class_id=np.array([1, 2, 1], np.int32), class_name=np.array(["membrane", "ribosome", "membrane"], object),
    )  # fmt: skip
    request = learning_pb2.MapBackRequest(
        tomogram_uri=tomogram(store), particles_uri=particles, segmentations_uri=put_volume(store, stack, stack=True)
    )
    result = (await call_operation(channel, request)).result
    voxels = open_volume(store, result.labels_uri).read()
    assert voxels[10, 10, 7:15].tolist() == [0, 1, 1, 2, 2, 0, 0, 0]
    assert (result.density_uri, result.placed) == ("", 2)
    rows = table(store, result.metrics_uri)["classes"]
    assert [(row["label"], row["name"], row["particles"], row["voxels"]) for row in rows] == [
        (1, "membrane", 1, 32),
        (2, "ribosome", 1, 32),
    ]


async def test_maps_that_cannot_be(channel: grpc.aio.Channel, store: Store) -> None:
    field, box = tomogram(store), put_volume(store, rod(8))
    two = put_volume(store, np.stack([rod(8), rod(8)]), stack=True)
    positions = [[10, 10, 8], [12, 12, 8]]
    plain = put_particles(store, positions)
    far = put_particles(store, [[10, 10, 8], [12, 12, 8]], id=np.array([4, 9]), class_id=np.array([0, 2], np.int32))
    mixed = put_particles(store, positions, names=np.array(["tomogram-a", "tomogram-b"], object))
    shaped = put(store, "p.parquet", Particles.from_positions(np.array(positions), VOXEL, "t", (9, 9, 9)).to_parquet())
    outside = put_particles(store, [[-5, 0, 0]])
    halves = put_volume(store, np.full((2, 4, 4, 4), 0.5), stack=True)
    ask = learning_pb2.MapBackRequest
    cases = [
        (ask(tomogram_uri=field, particles_uri=plain), STATUS.INVALID_ARGUMENT, "one of the two"),
        (ask(tomogram_uri=two, particles_uri=plain, volume_uris=[box]), STATUS.FAILED_PRECONDITION, "stack of 2 boxes"),
        (ask(tomogram_uri=field, particles_uri=plain, volume_uris=[two]), STATUS.INVALID_ARGUMENT, "no classes"),
        (ask(tomogram_uri=field, particles_uri=far, volume_uris=[two, box]), STATUS.INVALID_ARGUMENT, "one stack"),
        (ask(tomogram_uri=field, particles_uri=mixed, volume_uris=[box]), STATUS.FAILED_PRECONDITION, "2 tomograms"),
        (ask(tomogram_uri=field, particles_uri=shaped, volume_uris=[box]), STATUS.FAILED_PRECONDITION, "(9, 9, 9)"),
        (
            ask(tomogram_uri=field, particles_uri=outside, volume_uris=[box]),
            STATUS.FAILED_PRECONDITION,
            "none of the 1",
        ),
        (ask(tomogram_uri=field, particles_uri=plain, segmentations_uri=box), STATUS.INVALID_ARGUMENT, "1 boxes"),
        (ask(tomogram_uri=field, particles_uri=plain, segmentations_uri=halves), STATUS.INVALID_ARGUMENT, "no labels"),
    ]
    for request, status, words in cases:
        found = await refused(channel, request)
        assert found[0] == status, found
        assert words in found[1]
    some = (await call_operation(channel, ask(tomogram_uri=field, particles_uri=far, volume_uris=[two]))).result
    assert some.placed == 1
    assert table(store, some.metrics_uri)["note"] == "1 particles are left out: there is no average of class 3"


async def test_particles_near_a_label(channel: grpc.aio.Channel, store: Store) -> None:
    labels = np.zeros(SHAPE, np.float32)
    labels[:, :, 18:20] = 4
    labels[:, :, 30:] = 1
    rng = np.random.default_rng(1)
    near = [[17.0, *rng.uniform(2, 18, 2)] for _ in range(12)]
    far = [[*rng.uniform(0, 14, 2), 9.0] for _ in range(28)]
    classes = np.array([2] * 9 + [5] * 3 + [2] * 3 + [5] * 25, np.int32)
    particles = put_particles(store, near + far, class_id=classes, class_name=np.where(classes == 2, "bound", "free"))
    request = learning_pb2.EnrichmentRequest(
        particles_uri=particles, near_labels_uri=put_volume(store, labels), near_label=4, distance_angstrom=20
    )
    result = (await call_operation(channel, request)).result
    assert list(result.classes) == [3, 6], "counted from 1"
    assert list(result.ratios) == pytest.approx([(9 / 12) / (12 / 40), (3 / 28) / (12 / 40)])
    # 9 or more of 12 among 12 near of 40, for both classes; the other's complement stays at 1 or below.
    assert result.p_values[0] == pytest.approx(2 * hypergeom.sf(8, 40, 12, 12))
    metrics = table(store, result.metrics_uri)
    assert metrics["particles_near"] == 12
    assert [row["name"] for row in metrics["classes"]] == ["bound", "free"]
    assert metrics["classes"][0]["ratio_low"] > 1 > metrics["classes"][1]["ratio_high"]
    request.near_label = 7
    assert "no voxel of the segmentation has the label 7" in (await refused(channel, request))[1]


async def test_particles_near_others_of_their_tomogram(channel: grpc.aio.Channel, store: Store) -> None:
    names = np.array(["a", "a", "b", "b", "b", "c"], object)
    particles = put_particles(
        store, [[0, 0, 0], [9, 0, 0], [0, 0, 0], [9, 0, 0], [20, 0, 0], [0, 0, 0]], names=names,
        class_id=np.array([0, 0, 1, 1, 1, 1], np.int32),
    )  # fmt: skip
    targets = put_particles(store, [[1, 0, 0], [40, 0, 0]], VOXEL / 2, names=np.array(["a", "b"], object))
    request = learning_pb2.EnrichmentRequest(particles_uri=particles, near_particles_uri=targets, distance_angstrom=10)
    result = (await call_operation(channel, request)).result
    rows = {row["class"]: row for row in table(store, result.metrics_uri)["classes"]}
    # Near are the first of a, and none of b: a target at voxel 40 of 5 Å is 20 voxels of 10 Å from 0.
    assert (rows[1]["near"], rows[2]["near"]) == (1, 1)
    assert rows[1]["near_by_chance"] == pytest.approx(1)
    assert rows[2]["near_by_chance"] == pytest.approx(1)
    # All of a tomogram's particles are of one class, so that shuffling within it changes nothing.
    assert list(result.ratios) == pytest.approx([1, 1])
    assert list(result.p_values) == pytest.approx([1, 1])
    other = put_particles(store, [[0, 0, 0]])
    request = learning_pb2.EnrichmentRequest(particles_uri=particles, near_particles_uri=other)
    status, message = await refused(channel, request)
    assert status == STATUS.FAILED_PRECONDITION
    assert "'a', 'b', 'c'" in message
    assert "'t'" in message


async def test_enrichments_that_cannot_be(channel: grpc.aio.Channel, store: Store) -> None:
    classes = np.array([0, 1], np.int32)
    plain, classified = (
        put_particles(store, [[0, 0, 0], [9, 9, 9]]),
        put_particles(store, [[0, 0, 0], [9, 9, 9]], class_id=classes),
    )
    several = put_particles(store, [[0, 0, 0], [9, 9, 9]], class_id=classes, names=np.array(["a", "b"], object))
    labels = put_volume(store, np.ones(SHAPE))
    ask = learning_pb2.EnrichmentRequest
    cases = [
        (ask(particles_uri=plain, near_particles_uri=plain), STATUS.INVALID_ARGUMENT, "no classes"),
        (ask(particles_uri=classified), STATUS.INVALID_ARGUMENT, "one of the two"),
        (ask(particles_uri=several, near_labels_uri=labels), STATUS.FAILED_PRECONDITION, "is of one tomogram"),
        (
            ask(particles_uri=classified, near_particles_uri=classified, distance_angstrom=1),
            STATUS.FAILED_PRECONDITION,
            "no particle lies near",
        ),
    ]
    for request, status, words in cases:
        found = await refused(channel, request)
        assert found[0] == status, found
        assert words in found[1]
