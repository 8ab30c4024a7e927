"""Slices for a screen over real gRPC: they are the volume's, small on the wire, and refused where they cannot be."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cryofleet.artifacts import content_digest
from cryofleet.numerics.label_colours import CLASS_COLOURS, rgb
from cryofleet.storage import Store
from cryofleet.v1 import common_pb2, io_pb2, io_pb2_grpc
from services.io.service import cut, service
from tests.contract.conftest import channel_to
from tests.contract.test_io_look import put_volume

SHAPE = (37, 150, 210)
# Smooth, so that JPEG keeps it to a few grey values.
Z, Y, X = np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij")
VOXELS = (np.sin(Z / 5) + np.sin(Y / 17 + Z / 9) + np.cos(X / 23 - Y / 31)).astype(np.float32)
AXES = {"x": io_pb2.AXIS_X, "y": io_pb2.AXIS_Y, "z": io_pb2.AXIS_Z}

channel = channel_to(service)


async def slice_of(channel: grpc.aio.Channel, uri: str, **fields: Any) -> io_pb2.CutSliceResponse:
    """The slice, asked for until the volume is arranged."""
    stub = io_pb2_grpc.IoServiceStub(channel)
    async with asyncio.timeout(20):
        while True:
            response = await stub.CutSlice(io_pb2.CutSliceRequest(volume_uri=uri, **fields))
            if not response.HasField("preparing_fraction"):
                return response
            assert not response.picture
            await asyncio.sleep(0.02)


def drawn(response: io_pb2.CutSliceResponse) -> NDArray[np.float64]:
    """The values that a picture shows."""
    with Image.open(io.BytesIO(response.picture)) as image:
        levels = np.asarray(image, np.float64)
    return response.black_value + levels / 255 * (response.white_value - response.black_value)


@pytest.fixture
def tomogram(store: Store) -> str:
    return put_volume(store, VOXELS)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [("z", VOXELS[9:14].mean(axis=0)), ("y", VOXELS[:, 9:14].mean(axis=1)), ("x", VOXELS[:, :, 9:14].mean(axis=2))],
)
async def test_a_slice_is_the_mean_of_its_planes(
    channel: grpc.aio.Channel, store: Store, tomogram: str, axis: str, expected: NDArray[np.float32]
) -> None:
    response = await slice_of(channel, tomogram, axis=AXES[axis], position_voxels=11, planes=5)
    assert (response.size_x, response.size_y, response.size_z) == (210, 150, 37)
    assert (response.voxel_size_angstrom, response.contrast) == (10.0, common_pb2.CONTRAST_DARK)
    assert response.tomogram == f"tomogram-{content_digest(store, tomogram)[:12]}"
    low, high = np.percentile(expected, (0.5, 99.5))
    assert response.black_value == pytest.approx(low, abs=0.02)
    assert response.white_value == pytest.approx(high, abs=0.02)
    # JPEG of quality 85 quantises smooth pictures by a few of 255 levels.
    np.testing.assert_allclose(drawn(response), np.clip(expected, low, high), atol=6 / 255 * (high - low))


async def test_a_region_at_the_edge_and_in_fewer_pixels(channel: grpc.aio.Channel, tomogram: str) -> None:
    region = io_pb2.SliceRegion(first_column=90, first_row=30, columns=120, rows=7)
    response = await slice_of(
        channel, tomogram, axis=AXES["y"], position_voxels=149, region=region, max_side_pixels=60,
        black_value=-3.0, white_value=3.0,
    )  # fmt: skip
    shown = drawn(response)
    assert shown.shape == (4, 60)
    assert response.region == region
    columns = VOXELS[30:37, 149, 90:210].reshape(7, 60, 2).mean(axis=(0, 2))
    np.testing.assert_allclose(shown.mean(axis=0), columns, atol=6 / 255 * 6)


async def test_noise_is_small_on_the_wire_and_not_sent_twice(channel: grpc.aio.Channel, store: Store) -> None:
    noise = put_volume(store, np.random.default_rng(3).normal(size=(3, 900, 900)))
    response = await slice_of(channel, noise, max_side_pixels=900)
    assert 20_000 < response.ByteSize() < 120_000
    assert (await slice_of(channel, noise, max_side_pixels=900, max_bytes=6000)).ByteSize() < 7000
    again = await slice_of(channel, noise, max_side_pixels=900, known_etag=response.etag)
    assert (again.unchanged, again.picture) == (True, b"")
    other = await slice_of(channel, noise, max_side_pixels=900, position_voxels=0, known_etag=response.etag)
    assert other.picture
    assert other.etag != response.etag


async def test_labels_have_their_colours(channel: grpc.aio.Channel, store: Store) -> None:
    labels = np.zeros(SHAPE)
    labels[18, 20:40, 50:90] = 3
    response = await slice_of(channel, put_volume(store, labels), labels=True)
    with Image.open(io.BytesIO(response.picture)) as image:
        pixels = np.asarray(image.convert("RGBA"))
    np.testing.assert_array_equal(pixels[..., 3] > 0, labels[18] > 0)
    assert tuple(pixels[25, 60, :3]) == rgb(CLASS_COLOURS[2])
    with pytest.raises(grpc.aio.AioRpcError, match="whole numbers from 0"):
        await slice_of(channel, put_volume(store, np.full(SHAPE, 0.5)), labels=True)


async def test_what_is_refused(channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
    foreign = common_pb2.Context(project="others")
    beyond = io_pb2.SliceRegion(columns=211, rows=1)
    stack = put_volume(store, np.zeros((3, 4, 4, 4)), stack=True)
    for uri, fields, status, words in (
        (tomogram, {"position_voxels": 37}, "INVALID_ARGUMENT", "37 voxels along z"),
        (tomogram, {"region": beyond}, "INVALID_ARGUMENT", "not in a slice of 210 columns and 150 rows"),
        (tomogram, {"black_value": 2.0, "white_value": 1.0}, "INVALID_ARGUMENT", "black below white"),
        (tomogram, {"planes": 65}, "INVALID_ARGUMENT", "planes"),
        (tomogram, {"max_side_pixels": 9}, "INVALID_ARGUMENT", "at least 16"),
        (tomogram, {"context": foreign}, "PERMISSION_DENIED", "project"),
        (f"{tomogram}x", {}, "NOT_FOUND", "does not exist"),
        (stack, {}, "FAILED_PRECONDITION", "a stack of 3 boxes"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await slice_of(channel, uri, **fields)
        assert error.value.code().name == status, error.value.details()
        assert words in str(error.value.details())


async def test_only_the_last_volumes_keep_a_copy_on_disk(channel: grpc.aio.Channel, store: Store) -> None:
    shape = (4, 20, 30)
    volumes = [np.full(shape, number) + np.arange(30) / 30 for number in range(cut._COPIES + 2)]
    uris = [put_volume(store, volume) for volume in volumes]
    for uri in uris:
        await slice_of(channel, uri, axis=AXES["x"])
    [viewing] = cut._viewing.values()
    assert len(list(viewing.instance.scratch.folder.rglob("cubes"))) == cut._COPIES
    # One whose copy is gone is copied once more.
    response = await slice_of(channel, uris[0], axis=AXES["y"], black_value=-0.5, white_value=1.5)
    np.testing.assert_allclose(drawn(response), volumes[0][:, 10], atol=6 / 255 * 2)
