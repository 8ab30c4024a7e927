"""Estimates of a tomogram over real gRPC: what they say, and what they say where they can't tell."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.artifacts import ResultWriter, digest_of, open_blob
from cryofleet.numerics import fourier
from cryofleet.numerics.wedge import wedge_mask
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import common_pb2, io_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.io.service import service
from tests.contract.conftest import channel_to

SHAPE = (64, 80, 80)
RNG = np.random.default_rng(8)

channel = channel_to(service)


def white() -> NDArray[np.float32]:
    return RNG.normal(0, 1, SHAPE).astype(np.float32)


def stored(store: Store, array: NDArray[np.float32], contrast: str = "dark", low: float = -60, high: float = 60) -> str:
    data = encode_volume(array, VolumeInfo(SHAPE, 10.0, contrast, low, high))
    writer = ResultWriter(store, "default", digest_of(data))
    uri = writer.put("volume.mrc", data)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


def table(store: Store, uri: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(open_blob(store, uri).read())
    return content


async def test_wedge_found_and_not_found(channel: grpc.aio.Channel, store: Store) -> None:
    seen = fourier.apply_transfer(white(), wedge_mask(SHAPE, -45, 57, half=True))
    request = io_pb2.EstimateWedgeRequest(tomogram_uri=stored(store, seen), tilt_step_degrees=0)
    result = (await call_operation(channel, request)).result
    assert result.found
    assert result.tilt_min_degrees == pytest.approx(-45, abs=2)
    assert result.tilt_max_degrees == pytest.approx(57, abs=2)
    assert result.tilt_axis_degrees == pytest.approx(0, abs=2)
    # it says -60 to 60
    assert result.HasField("as_stated")
    assert not result.as_stated
    assert len(table(store, result.metrics_uri)["power_by_angle"]["angle_degrees"]) == 180

    request = io_pb2.EstimateWedgeRequest(tomogram_uri=stored(store, white()))
    result = (await call_operation(channel, request)).result
    assert not result.found
    assert not result.HasField("tilt_min_degrees")
    assert not result.HasField("as_stated")


async def test_snr_of_halves_and_of_one(channel: grpc.aio.Channel, store: Store) -> None:
    signal = scipy.ndimage.gaussian_filter(white(), 2)
    signal *= np.sqrt(0.5) / signal.std()
    # each half has an SNR of 0.5, their mean of 1
    even, odd = stored(store, signal + white()), stored(store, signal + white())
    result = (await call_operation(channel, io_pb2.EstimateTomogramSnrRequest(even_uri=even, odd_uri=odd))).result
    assert result.method == io_pb2.SNR_METHOD_HALVES
    assert result.snr == pytest.approx(1, rel=0.1)
    assert result.correlation == pytest.approx(1 / 3, rel=0.1)
    assert result.reliable
    spectral = table(store, result.metrics_uri)["spectral"]
    assert len(spectral["frequency_per_angstrom"]) == len(spectral["snr"]) == 48
    assert max(spectral["frequency_per_angstrom"]) == pytest.approx(0.05, rel=0.02)

    single = (await call_operation(channel, io_pb2.EstimateTomogramSnrRequest(tomogram_uri=even))).result
    assert single.method == io_pb2.SNR_METHOD_SPECTRUM
    assert not single.HasField("correlation")


async def test_snr_needs_halves_of_one_tomogram(channel: grpc.aio.Channel, store: Store) -> None:
    even = stored(store, white())
    for request in (
        io_pb2.EstimateTomogramSnrRequest(),
        io_pb2.EstimateTomogramSnrRequest(even_uri=even),
        io_pb2.EstimateTomogramSnrRequest(tomogram_uri=even, odd_uri=even),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="give even_uri and odd_uri, or tomogram_uri alone"):
            await call_operation(channel, request)
    with pytest.raises(grpc.aio.AioRpcError, match="the halves are the same tomogram"):
        await call_operation(channel, io_pb2.EstimateTomogramSnrRequest(even_uri=even, odd_uri=even))


async def test_slab(channel: grpc.aio.Channel, store: Store) -> None:
    inside = scipy.ndimage.gaussian_filter(white(), 2)
    inside[:20], inside[45:] = 0, 0
    uri = stored(store, white() + 10 * inside / inside.std())
    result = (await call_operation(channel, io_pb2.FindSlabRequest(tomogram_uri=uri))).result
    assert result.found
    assert result.thickness_angstrom == pytest.approx(250, abs=30)
    assert result.bottom.z_at_centre_voxels == pytest.approx(20, abs=2)
    assert result.top.z_at_centre_voxels == pytest.approx(45, abs=2)
    mask = open_volume(store, result.mask_uri).read()
    assert (mask[30] == 1).all()
    assert (mask[8] == 0).all()
    assert len(table(store, result.metrics_uri)["surfaces"]) == 64
    nothing = (await call_operation(channel, io_pb2.FindSlabRequest(tomogram_uri=stored(store, white())))).result
    assert not nothing.found
    assert not nothing.mask_uri
    assert not nothing.HasField("thickness_angstrom")


async def test_gold_and_contrast(channel: grpc.aio.Channel, store: Store) -> None:
    volume = 0.3 * white()
    z, y, x = np.indices(SHAPE)
    beads = np.array([[20, 30, 40], [60, 50, 20]])
    for bead in beads:
        volume[(x - bead[0]) ** 2 + (y - bead[1]) ** 2 + (z - bead[2]) ** 2 <= 25] -= 4
    uri = stored(store, volume)
    found = (await call_operation(channel, io_pb2.FindGoldRequest(tomogram_uri=uri))).result
    assert found.count == 2
    assert found.margin > 2.5
    particles = Particles.from_parquet(open_blob(store, found.particles_uri), found.particles_uri)
    positions = particles.positions()[np.argsort(particles.positions()[:, 0])]
    np.testing.assert_allclose(positions, beads, atol=1)
    assert particles.voxel_size_angstrom == 10
    mask = open_volume(store, found.mask_uri)
    # radius 5 and a margin of 3 voxels
    assert mask.read().sum() == pytest.approx(2 * 4 / 3 * np.pi * 8**3, rel=0.05)

    sign = (await call_operation(channel, io_pb2.EstimateContrastRequest(tomogram_uri=uri))).result
    assert sign.reliable
    assert sign.contrast == common_pb2.CONTRAST_DARK
    assert sign.as_stated
    vague = (await call_operation(channel, io_pb2.EstimateContrastRequest(tomogram_uri=stored(store, white())))).result
    assert vague.contrast == common_pb2.CONTRAST_UNSPECIFIED
    assert not vague.reliable
    assert not vague.HasField("as_stated")
