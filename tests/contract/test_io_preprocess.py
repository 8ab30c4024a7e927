"""Filter's kinds, Rescale, Crop, Rotate and AdjustContrast over real gRPC."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.artifacts import ResultWriter, digest_of
from cryofleet.numerics import fourier
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import common_pb2, io_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.io.service import service
from tests.contract.conftest import channel_to

INFO = VolumeInfo((20, 30, 40), 8.0, "dark", -50, 70)
TOMOGRAM = np.random.default_rng(4).normal(3, 1, INFO.shape).astype(np.float32)

channel = channel_to(service)


def stored(store: Store, array: NDArray[np.float32] = TOMOGRAM, info: VolumeInfo = INFO) -> str:
    data = encode_volume(array, info)
    writer = ResultWriter(store, "default", digest_of(data))
    uri = writer.put("volume.mrc", data)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


async def refused(channel: grpc.aio.Channel, request: Any, status: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call_operation(channel, request)
    assert error.value.code() == status, error.value.details()
    return error.value.details() or ""


async def test_median(channel: grpc.aio.Channel, store: Store) -> None:
    request = io_pb2.FilterRequest(volume_uri=stored(store), kind=io_pb2.FILTER_KIND_MEDIAN, radius_voxels=2)
    volume = open_volume(store, (await call_operation(channel, request)).result.volume_uri)
    assert volume.info == INFO
    np.testing.assert_array_equal(volume.read(), scipy.ndimage.median_filter(TOMOGRAM, 5))


async def test_filters_say_what_they_took_for_noise(channel: grpc.aio.Channel, store: Store) -> None:
    uri = stored(store)
    diffusion = io_pb2.FilterRequest(volume_uri=uri, kind=io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION)
    result = (await call_operation(channel, diffusion)).result
    # three deviations of the difference of two voxels of noise of 1
    assert result.kappa == pytest.approx(3 * np.sqrt(2), rel=0.03)
    assert not result.HasField("noise_standard_deviation")
    assert open_volume(store, result.volume_uri).read().std() < 0.5
    means = io_pb2.FilterRequest(
        volume_uri=uri, kind=io_pb2.FILTER_KIND_NON_LOCAL_MEANS, search_radius_voxels=1, strength=2
    )
    result = (await call_operation(channel, means)).result
    assert result.noise_standard_deviation == pytest.approx(1, rel=0.05)
    assert open_volume(store, result.volume_uri).read().std() < 0.5
    shrunk = io_pb2.FilterRequest(
        volume_uri=uri, kind=io_pb2.FILTER_KIND_WAVELET, wavelet_levels=2, noise_standard_deviation=1.5
    )
    result = (await call_operation(channel, shrunk)).result
    assert result.noise_standard_deviation == 1.5
    assert open_volume(store, result.volume_uri).read().std() < 0.5


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"kind": io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION, "time_step": 0.2}, "time_step"),
        ({"kind": io_pb2.FILTER_KIND_ANISOTROPIC_DIFFUSION, "kappa": 0}, "kappa"),
        ({"kind": io_pb2.FILTER_KIND_MEDIAN, "radius_voxels": 6}, "radius_voxels"),
        ({"kind": io_pb2.FILTER_KIND_NON_LOCAL_MEANS, "search_radius_voxels": 7}, "search_radius_voxels"),
    ],
)
async def test_filters_out_of_range(fields: dict[str, Any], rule: str, channel: grpc.aio.Channel, store: Store) -> None:
    request = io_pb2.FilterRequest(volume_uri=stored(store), **fields)
    assert rule in await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)


async def test_rescale_by_a_factor_and_to_a_voxel_size(channel: grpc.aio.Channel, store: Store) -> None:
    uri = stored(store)
    binned = (await call_operation(channel, io_pb2.RescaleRequest(volume_uri=uri, factor=2))).result
    volume = open_volume(store, binned.volume_uri)
    assert volume.info == VolumeInfo((10, 15, 20), 16.0, "dark", -50, 70)
    assert (binned.size_x, binned.size_y, binned.size_z, binned.voxel_size_angstrom) == (20, 15, 10, 16.0)
    np.testing.assert_allclose(volume.read(), fourier.fourier_crop(TOMOGRAM, 2), atol=1e-5)
    finer = (await call_operation(channel, io_pb2.RescaleRequest(volume_uri=uri, voxel_size_angstrom=5))).result
    assert finer.factor == 0.625
    assert open_volume(store, finer.volume_uri).info.shape == (32, 48, 64)
    for request in (
        io_pb2.RescaleRequest(volume_uri=uri),
        io_pb2.RescaleRequest(volume_uri=uri, factor=2, voxel_size_angstrom=5),
    ):
        assert "one of the two" in await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)
    request = io_pb2.RescaleRequest(volume_uri=uri, voxel_size_angstrom=0.5)
    message = await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert "voxel_size_angstrom is 0.5" in message
    assert "has voxels of 8 Å: from an eighth of that" in message
    request = io_pb2.RescaleRequest(volume_uri=uri, factor=32)
    assert "an axis of 20 voxels" in await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)


async def test_crop(channel: grpc.aio.Channel, store: Store) -> None:
    uri = stored(store)
    request = io_pb2.CropRequest(volume_uri=uri, first_x=5, size_x=10, first_z=18)
    result = (await call_operation(channel, request)).result
    volume = open_volume(store, result.volume_uri)
    assert volume.info == VolumeInfo((2, 30, 10), 8.0, "dark", -50, 70)
    np.testing.assert_array_equal(volume.read(), TOMOGRAM[18:, :, 5:15])
    for request, message in (
        (
            io_pb2.CropRequest(volume_uri=uri, first_y=25, size_y=6),
            "first_y is 25, size_y 6: .* has 30 voxels along y",
        ),
        (io_pb2.CropRequest(volume_uri=uri, first_z=20), "first_z is 20, size_z 0: .* has 20 voxels along z"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=message):
            await call_operation(channel, request)


async def test_rotate_by_either_description(channel: grpc.aio.Channel, store: Store) -> None:
    uri = stored(store)
    turn = Rotation.from_rotvec([0, 0.2, 0])
    qx, qy, qz, qw = turn.as_quat()
    by_quaternion = io_pb2.RotateRequest(volume_uri=uri, qx=qx, qy=qy, qz=qz, qw=qw)
    by_axis = io_pb2.RotateRequest(volume_uri=uri, angle_degrees=np.degrees(0.2), axis_y=2, axis_z=0)
    first = (await call_operation(channel, by_quaternion)).result
    second = (await call_operation(channel, by_axis)).result
    one, other = open_volume(store, first.volume_uri), open_volume(store, second.volume_uri)
    np.testing.assert_allclose(one.read(), other.read(), atol=1e-5)
    assert first.tilt_range_known
    # the slices turn with the volume, from z towards x
    assert one.info.tilt_min_degrees == pytest.approx(-50 - np.degrees(0.2))
    assert one.info.tilt_max_degrees == pytest.approx(70 - np.degrees(0.2))
    lost = (await call_operation(channel, io_pb2.RotateRequest(volume_uri=uri, angle_degrees=10))).result
    assert not lost.tilt_range_known
    info = open_volume(store, lost.volume_uri).info
    assert (info.tilt_min_degrees, info.tilt_max_degrees) == (-90, 90)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give angle_degrees, or all of"),
        ({"qx": 1, "qy": 0, "qz": 0}, "give angle_degrees, or all of"),
        ({"qx": 1, "qy": 0.5, "qz": 0, "qw": 0}, "a quaternion of length 1.11"),
        ({"angle_degrees": 5, "axis_z": 0}, "that is no axis"),
    ],
)
async def test_rotations_that_are_none(
    fields: dict[str, Any], message: str, channel: grpc.aio.Channel, store: Store
) -> None:
    request = io_pb2.RotateRequest(volume_uri=stored(store), **fields)
    assert message in await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)


async def test_adjust_contrast(channel: grpc.aio.Channel, store: Store) -> None:
    uri = stored(store)
    inverted = (await call_operation(channel, io_pb2.AdjustContrastRequest(volume_uri=uri, invert=True))).result
    volume = open_volume(store, inverted.volume_uri)
    assert inverted.contrast == common_pb2.CONTRAST_LIGHT
    assert volume.info == VolumeInfo(INFO.shape, 8.0, "light", -50, 70)
    np.testing.assert_allclose(volume.read(), 2 * TOMOGRAM.mean() - TOMOGRAM, atol=1e-5)
    standard = (await call_operation(channel, io_pb2.AdjustContrastRequest(volume_uri=uri, standardise=True))).result
    assert standard.contrast == common_pb2.CONTRAST_DARK
    values = open_volume(store, standard.volume_uri).read()
    assert values.mean() == pytest.approx(0, abs=1e-5)
    assert values.std() == pytest.approx(1, rel=1e-5)
    other = np.random.default_rng(1).exponential(2, (10, 20, 20)).astype(np.float32)
    reference = stored(store, other, VolumeInfo((10, 20, 20), 8.0, "light"))
    request = io_pb2.AdjustContrastRequest(volume_uri=uri, reference_uri=reference)
    message = await refused(channel, request, grpc.StatusCode.FAILED_PRECONDITION)
    assert "protein is dark in the result, and light in" in message
    request.invert = True
    matched = (await call_operation(channel, request)).result
    found = open_volume(store, matched.volume_uri).read()
    np.testing.assert_allclose(np.quantile(found, [0.1, 0.5, 0.9]), np.quantile(other, [0.1, 0.5, 0.9]), rtol=0.02)
    for fields in ({}, {"invert": False}, {"standardise": True, "reference_uri": reference}):
        request = io_pb2.AdjustContrastRequest(volume_uri=uri, **fields)
        assert "give invert, standardise or reference_uri" in await refused(
            channel, request, grpc.StatusCode.INVALID_ARGUMENT
        )
