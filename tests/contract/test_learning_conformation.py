"""TrainConformation and DecodeConformations over real gRPC."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import learning_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume, write_subtomograms
from services.learning.service import service
from tests.contract.conftest import channel_to
from tests.unit.learning.moving_domain import subtomograms

STATUS = grpc.StatusCode
VOXEL = 8.0
SIDE = 16
COUNT = 24

channel = channel_to(service)


def committed(writer: ResultWriter) -> None:
    writer.commit(
        operation="io.Upload", version=1, parameters={}, inputs={}, result={}, seconds=0.0, device="cpu",
        software="test", host="test",
    )  # fmt: skip


def put(store: Store, name: str, data: bytes) -> str:
    writer = ResultWriter(store, "default", hashlib.sha256(name.encode()).hexdigest())
    uri = writer.put(name, data)
    committed(writer)
    return uri


@pytest.fixture
def uris(store: Store) -> tuple[str, str]:
    """Subtomograms without poses, and their particles with them, of a tomogram of half the voxel size."""
    boxes, _, rotations, shifts = subtomograms(COUNT, SIDE, 0, noise=0.2)
    ids = 100 + np.arange(COUNT)
    positions = np.arange(3 * COUNT).reshape(-1, 3)
    bare = Particles.from_positions(positions, VOXEL / 2, "t", id=ids)
    writer = ResultWriter(store, "default", hashlib.sha256(b"boxes").hexdigest())
    info = VolumeInfo((SIDE,) * 3, VOXEL, "dark", -60, 60)
    uri = write_subtomograms(writer, store, "boxes", -boxes, info, bare)
    committed(writer)
    aligned = Particles.from_positions(
        positions, VOXEL / 2, "t", rotations=rotations, id=ids,
        shift_x=2 * shifts[:, 0], shift_y=2 * shifts[:, 1], shift_z=2 * shifts[:, 2],
    )  # fmt: skip
    return uri, put(store, "aligned.parquet", aligned.to_parquet())


def training(uris: tuple[str, str], **parameters: Any) -> learning_pb2.TrainConformationRequest:
    values: dict[str, Any] = {"dimensions": 2, "max_epochs": 3, "batch_size": 8, "low_pass_angstrom": 24}
    return learning_pb2.TrainConformationRequest(
        subtomograms_uri=uris[0], particles_uri=uris[1], **(values | parameters)
    )


async def refused(channel: grpc.aio.Channel, request: Message) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call_operation(channel, request)
    return error.value.code(), str(error.value.details())


def table(store: Store, uri: str) -> dict[str, Any]:
    content = json.loads(store.get(uri))
    assert isinstance(content, dict)
    return content


async def test_from_subtomograms_to_volumes(channel: grpc.aio.Channel, store: Store, uris: tuple[str, str]) -> None:
    trained = (await call_operation(channel, training(uris, validation_fraction=0.25))).result
    assert trained.epochs == 3
    points = table(store, trained.points_uri)
    assert points["ids"] == list(range(100, 100 + COUNT))
    assert np.array(points["points"]).shape == (COUNT, 2)
    assert np.ptp(points["points"]) > 0
    metrics = table(store, trained.metrics_uri)
    assert (metrics["training_subtomograms"], metrics["validation_subtomograms"]) == (18, 6)
    assert metrics["explained_share"] < 1
    assert 0 <= metrics["share_of_orientations_told"] <= 1
    config = table(store, f"{trained.model_uri}/config.json")
    assert (config["architecture"], config["dimensions"]) == ("conformation", 2)
    assert config["low_pass_cycles_per_voxel"] == pytest.approx(1 / 3)

    decode = learning_pb2.DecodeConformationsRequest(
        model_uri=trained.model_uri, points_uri=trained.points_uri, steps=5
    )
    result = (await call_operation(channel, decode)).result
    stack = open_volume(store, result.volumes_uri)
    assert stack.info == VolumeInfo((SIDE,) * 3, VOXEL, "light", count=5)
    volumes = stack.read()
    assert volumes[:, 8, 8, 8].min() > 1, "the body, protein positive, in the middle of each"
    path = table(store, result.path_uri)
    assert np.array(path["points"]).shape == (5, 2)
    assert sum(path["nearest_subtomograms"]) == COUNT
    assert sum(path["shares_of_variance"]) == pytest.approx(1)

    decode.waypoints.extend([103, 110, 107])
    result = (await call_operation(channel, decode)).result
    path = table(store, result.path_uri)
    assert path["waypoints"] == [103, 110, 107]
    np.testing.assert_allclose(path["points"][0], points["points"][3], rtol=1e-6)
    np.testing.assert_allclose(path["points"][-1], points["points"][7], rtol=1e-6)

    del decode.waypoints[:]
    for change, status, word in (
        ({"component": 3}, STATUS.INVALID_ARGUMENT, "component is 3; the space has 2 dimensions"),
        ({"waypoints": [103]}, STATUS.INVALID_ARGUMENT, "two particles at least"),
        ({"waypoints": [103, 99]}, STATUS.INVALID_ARGUMENT, "particle 99 has no point"),
        ({"points_uri": trained.metrics_uri}, STATUS.INVALID_ARGUMENT, "no table of points"),
    ):
        request = learning_pb2.DecodeConformationsRequest()
        request.CopyFrom(decode)
        request.MergeFrom(learning_pb2.DecodeConformationsRequest(**change))
        code, message = await refused(channel, request)
        assert (code, word in message) == (status, True), message
    # Points of another model, as a file that somebody brought.
    points["points"][0][0] += 1
    other = put(store, "points.json", json.dumps(points).encode())
    request = learning_pb2.DecodeConformationsRequest(model_uri=trained.model_uri, points_uri=other)
    code, message = await refused(channel, request)
    assert code == STATUS.FAILED_PRECONDITION
    assert "points of another model" in message


async def test_a_mask_and_binning(channel: grpc.aio.Channel, store: Store, uris: tuple[str, str]) -> None:
    mask = np.zeros((SIDE,) * 3, np.float32)
    mask[4:12, 8:14, 4:12] = 1
    mask_uri = put(store, "mask.mrc", encode_volume(mask, VolumeInfo(mask.shape, VOXEL, "light")))
    trained = (
        await call_operation(channel, training(uris, mask_uri=mask_uri, binning=2, low_pass_angstrom=0, max_epochs=1))
    ).result
    decode = learning_pb2.DecodeConformationsRequest(
        model_uri=trained.model_uri, points_uri=trained.points_uri, steps=2
    )
    stack = open_volume(store, (await call_operation(channel, decode)).result.volumes_uri)
    assert stack.info == VolumeInfo((8,) * 3, 2 * VOXEL, "light", count=2)
    change = np.abs(np.diff(stack.read(), axis=0)[0])
    assert change[:, 4:7].sum() > 2 * change[:, :3].sum(), "what differs lies in the mask"


async def test_what_can_not_be_trained_on(channel: grpc.aio.Channel, store: Store, uris: tuple[str, str]) -> None:
    def mask(name: str, value: float, side: int = SIDE) -> str:
        return put(store, name, encode_volume(np.full((side,) * 3, value), VolumeInfo((side,) * 3, VOXEL, "light")))

    for request, status, word in (
        (training((uris[0], "")), STATUS.FAILED_PRECONDITION, "alignment.Align"),
        (training(uris, binning=8), STATUS.INVALID_ARGUMENT, "multiple of 4"),
        (training(uris, low_pass_angstrom=10), STATUS.INVALID_ARGUMENT, "down to 16 Å"),
        (training(uris, mask_uri=mask("zero.mrc", 0)), STATUS.INVALID_ARGUMENT, "is zero throughout"),
        (training(uris, mask_uri=mask("two.mrc", 2)), STATUS.INVALID_ARGUMENT, "outside 0 to 1"),
        (training(uris, mask_uri=mask("large.mrc", 1, 20)), STATUS.INVALID_ARGUMENT, "(20, 20, 20) voxels"),
    ):
        code, message = await refused(channel, request)
        assert (code, word in message) == (status, True), message
