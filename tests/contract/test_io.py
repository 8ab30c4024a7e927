"""The io service over real gRPC: every operation, good and bad requests, files up and down."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import re
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import mrcfile
import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import starfile
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from cryofleet.artifacts import BLOCK_BYTES, ResultWriter, content_digest, digest_of, manifest_for
from cryofleet.channels import open_blocking_channel
from cryofleet.particles import Particles
from cryofleet.settings import Settings
from cryofleet.storage import Store, file_uri
from cryofleet.testing import call_operation, running_server, settings_for
from cryofleet.v1 import common_pb2, io_pb2, io_pb2_grpc
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.io.service import service
from tests.contract.conftest import channel_to

GOLDEN = ["4ada150ab0db05bf", "ff23fbbd53bcdafa", "bbd3fc94cb244950", "7e550b02f993457d"]
"""Of an ingested volume, particles as STAR and CSV, a volume of mode 0: the digests' first 16 digits."""

RNG = np.random.default_rng(21)
TOMOGRAM = RNG.normal(0, 1, (20, 30, 40)).astype(np.float32)
INFO = VolumeInfo((20, 30, 40), 7.84, "dark", -60, 51)

channel = channel_to(service)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    files = tmp_path / "files"
    files.mkdir()
    changes: dict[str, Any] = {"read_only_roots": (file_uri(files),)}
    return settings_for(tmp_path, **changes)


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return io_pb2_grpc.IoServiceStub(channel)  # type: ignore[no-untyped-call, unused-ignore]


def put(store: Store, name: str, data: bytes) -> str:
    """An artifact as some operation would have left it."""
    writer = ResultWriter(store, "default", digest_of(data + name.encode()))
    uri = writer.put(name, data)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


def put_file(settings: Settings, name: str, data: bytes) -> str:
    """A user's file, in a folder that the server may read."""
    path = settings.home / "files" / name
    path.write_bytes(data)
    return file_uri(path)


def write_mrc(settings: Settings, name: str, array: NDArray[np.generic], voxel_size: float = 0.0) -> str:
    path = settings.home / "files" / name
    with mrcfile.new(path, array, overwrite=True) as file:
        file.voxel_size = voxel_size
    return file_uri(path)


def picks(**columns: Any) -> Particles:
    positions = [[10.25, 20.5, 5.0], [39.0, 0.0, 19.0], [20.0, 15.0, 10.0]]
    return Particles.from_positions(positions, 7.84, "TS_01", (20, 30, 40), **columns)


async def refused(channel: grpc.aio.Channel, request: Any, status: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call_operation(channel, request)
    assert error.value.code() == status, error.value.details()
    return error.value.details() or ""


# --- Ingest --------------------------------------------------------------------------------------------------------


async def test_ingest_keeps_voxels_and_adds_what_the_file_lacks(
    channel: grpc.aio.Channel, settings: Settings, store: Store
) -> None:
    stored = RNG.integers(-1000, 1000, (20, 30, 40)).astype(np.int16)
    uri = write_mrc(settings, "my tomo.mrc", stored, 13.48)
    request = io_pb2.IngestRequest(
        source_uri=uri, tilt_min_degrees=-51, contrast=common_pb2.CONTRAST_LIGHT, tilt_max_degrees=60
    )
    reply = await call_operation(channel, request)
    result = reply.result
    assert (result.size_x, result.size_y, result.size_z) == (40, 30, 20)
    assert result.voxel_size_angstrom == 13.48
    assert result.statistics.mean == pytest.approx(stored.mean(), rel=1e-9)
    assert result.statistics.standard_deviation == pytest.approx(stored.std(), rel=1e-9)
    assert (result.statistics.minimum, result.statistics.maximum) == (stored.min(), stored.max())
    volume = open_volume(store, result.tomogram_uri)
    called = f"my_tomo~{content_digest(store, uri)[:12]}"
    assert volume.info == VolumeInfo((20, 30, 40), 13.48, "light", -51, 60, tomogram=called)
    np.testing.assert_array_equal(volume.read(), stored)
    again = await call_operation(channel, request)
    assert again.provenance.cached
    assert again.result == result
    # of the same bytes under another name another tomogram is made, with its own
    other = await call_operation(channel, io_pb2.IngestRequest(source_uri=write_mrc(settings, "b.mrc", stored, 13.48)))
    assert open_volume(store, other.result.tomogram_uri).info.tomogram == called.replace("my_tomo", "b")


async def test_ingest_refuses_a_voxel_size_that_the_file_denies(channel: grpc.aio.Channel, settings: Settings) -> None:
    uri = write_mrc(settings, "a.mrc", TOMOGRAM, 10.0)
    request = io_pb2.IngestRequest(source_uri=uri, voxel_size_angstrom=13.6)
    message = await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert "a.mrc: the file says a voxel of 10 Å, voxel_size_angstrom is 13.6" in message
    request.overrule_voxel_size = True
    assert (await call_operation(channel, request)).result.voxel_size_angstrom == 13.6
    assert (await call_operation(channel, io_pb2.IngestRequest(source_uri=uri, voxel_size_angstrom=0))).result


async def test_ingest_of_gzip_tiff_and_given_voxel_size(
    channel: grpc.aio.Channel, settings: Settings, store: Store, shared_data: Path
) -> None:
    uri = put_file(settings, "a.tif", (shared_data / "real/microtubule_13pf.tif").read_bytes())
    tiff = await call_operation(channel, io_pb2.IngestRequest(source_uri=uri, contrast=common_pb2.CONTRAST_LIGHT))
    assert tiff.result.voxel_size_angstrom == pytest.approx(10.52)
    assert (tiff.result.size_x, tiff.result.size_y, tiff.result.size_z) == (94, 206, 36)

    uri = put_file(settings, "a.mrc.gz", (shared_data / "maps/groel_11.5A_emdb.mrc.gz").read_bytes())
    packed = await call_operation(channel, io_pb2.IngestRequest(source_uri=uri))
    assert packed.result.voxel_size_angstrom == 2.7
    assert packed.result.statistics.mean == pytest.approx(0.081329, rel=1e-4)

    # This one says a voxel of 1 Å, which nobody meant.
    uri = put_file(settings, "emd_5592.mrc", (shared_data / "maps/emd_5592_21A.mrc").read_bytes())
    message = await refused(channel, io_pb2.IngestRequest(source_uri=uri), grpc.StatusCode.FAILED_PRECONDITION)
    assert message.startswith("emd_5592.mrc: ")
    assert "--set voxel_size_angstrom=" in message
    given = await call_operation(channel, io_pb2.IngestRequest(source_uri=uri, voxel_size_angstrom=21.0))
    assert open_volume(store, given.result.tomogram_uri).info.voxel_size_angstrom == 21.0


async def test_ingest_fills_voxels_that_are_no_numbers(
    channel: grpc.aio.Channel, settings: Settings, store: Store
) -> None:
    array = TOMOGRAM.copy()
    array[3, 2, 1] = np.nan
    path = settings.home / "files" / "nan.mrc"
    with mrcfile.new(path) as file:
        file.set_data(TOMOGRAM)
        file.voxel_size = 10.0
    content = bytearray(path.read_bytes())
    content[1024:] = array.tobytes()
    uri = put_file(settings, "nan.mrc", bytes(content))
    message = await refused(channel, io_pb2.IngestRequest(source_uri=uri), grpc.StatusCode.FAILED_PRECONDITION)
    assert message.startswith("nan.mrc: 1 voxels are NaN or infinite, the first (nan) at voxel x=1, y=2, z=3")
    request = io_pb2.IngestRequest(source_uri=uri, nan_policy=io_pb2.NAN_POLICY_FILL_MEAN)
    result = (await call_operation(channel, request)).result
    assert result.statistics.non_finite_voxels == 1
    filled = open_volume(store, result.tomogram_uri).read()[3, 2, 1]
    assert filled == pytest.approx(np.nanmean(array.astype(np.float64)), rel=1e-6)


def broken_files() -> Iterator[tuple[str, bytes, grpc.StatusCode, str]]:
    invalid, precondition = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
    whole = encode_volume(TOMOGRAM, INFO)
    yield "cut.mrc", whole[:-1], invalid, "truncated"
    yield "cut.mrc.gz", gzip.compress(whole)[:-100], invalid, "truncated"
    billions = bytearray(whole)
    struct.pack_into("<3i", billions, 0, 10**9, 10**9, 10**9)
    yield "billions.mrc", bytes(billions), invalid, "1000000000 x 1000000000 x 1000000000"
    yield "billions.mrc.gz", gzip.compress(bytes(billions)), invalid, "cannot hold"
    yield "notes.mrc", b"these are my notes\n" * 100, invalid, "text that begins 'these are my notes"
    yield "empty.mrc", b"", invalid, "an empty file"
    yield "flat.mrc", encode_volume(np.full_like(TOMOGRAM, 2), INFO), precondition, "all voxels are 2"
    yield "tilts.st", whole, precondition, "a stack of 20 images"
    oblong = bytearray(whole)
    struct.pack_into("<f", oblong, 48, 20 * 8.0)
    yield "oblong.mrc", bytes(oblong), precondition, "7.84 x 7.84 x 8 Å"


@pytest.mark.parametrize("case", list(broken_files()), ids=lambda case: case[0])
async def test_ingest_refuses_broken_files_in_one_line(
    channel: grpc.aio.Channel, settings: Settings, store: Store, case: tuple[str, bytes, grpc.StatusCode, str]
) -> None:
    name, content, status, words = case
    message = await refused(channel, io_pb2.IngestRequest(source_uri=put_file(settings, name, content)), status)
    assert message.startswith(f"{name}: ")
    assert words in message
    assert "\n" not in message
    assert list(store.list(f"{store.root}/default")) == []


async def test_ingest_of_wrong_requests(channel: grpc.aio.Channel, settings: Settings) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    uri = write_mrc(settings, "a.mrc", TOMOGRAM, 10.0)
    assert "source_uri" in await refused(channel, io_pb2.IngestRequest(), invalid)
    request = io_pb2.IngestRequest(source_uri=uri, tilt_min_degrees=60, tilt_max_degrees=-60)
    assert "tilt_min_degrees must be below" in await refused(channel, request, invalid)
    request = io_pb2.IngestRequest(source_uri=uri, voxel_size_angstrom=-1)
    assert "voxel_size_angstrom" in await refused(channel, request, invalid)
    missing = io_pb2.IngestRequest(source_uri=f"{uri}x")
    assert "a.mrcx" in await refused(channel, missing, grpc.StatusCode.NOT_FOUND)
    outside = io_pb2.IngestRequest(source_uri="file:///etc/passwd")
    await refused(channel, outside, grpc.StatusCode.PERMISSION_DENIED)


# --- Filter --------------------------------------------------------------------------------------------------------


async def test_filters_keep_what_is_known_of_the_volume(channel: grpc.aio.Channel, store: Store) -> None:
    uri = put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO))
    smooth = await call_operation(channel, io_pb2.FilterRequest(volume_uri=uri, sigma_angstrom=15.68))
    volume = open_volume(store, smooth.result.volume_uri)
    assert volume.info == INFO
    np.testing.assert_array_equal(volume.read(), scipy.ndimage.gaussian_filter(TOMOGRAM, 2.0))
    request = io_pb2.FilterRequest(volume_uri=uri, kind=io_pb2.FILTER_KIND_BAND_PASS, low_pass_angstrom=40)
    low = open_volume(store, (await call_operation(channel, request)).result.volume_uri)
    assert low.info == INFO
    # White noise of variance 1: what is left is the share of Fourier space that the filter keeps, mostly within 7.84/40
    # and surely within 7.84/40 + 0.05 cycles per voxel.
    share = low.read().var()
    assert 4 / 3 * np.pi * (7.84 / 40) ** 3 * 0.9 < share < 4 / 3 * np.pi * (7.84 / 40 + 0.05) ** 3 * 1.1


async def test_filter_of_wrong_requests(channel: grpc.aio.Channel, store: Store) -> None:
    uri = put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO))
    band = io_pb2.FilterRequest(volume_uri=uri, kind=io_pb2.FILTER_KIND_BAND_PASS)
    message = await refused(channel, band, grpc.StatusCode.INVALID_ARGUMENT)
    assert "a band-pass needs low_pass_angstrom or high_pass_angstrom" in message
    boxes = VolumeInfo((10, 30, 40), 7.84, "dark", count=2)
    stack = put(store, "boxes.mrc", encode_volume(TOMOGRAM.reshape(2, 10, 30, 40), boxes))
    message = await refused(channel, io_pb2.FilterRequest(volume_uri=stack), grpc.StatusCode.FAILED_PRECONDITION)
    assert "is a stack of 2 boxes; one volume is needed" in message


async def test_a_band_pass_larger_than_the_instance_is_refused(store: Store, settings: Settings) -> None:
    uri = put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO))
    small = settings_for(settings.home, memory_bytes=2**20)
    async with running_server(service, small) as channel:
        request = io_pb2.FilterRequest(volume_uri=uri)
        message = await refused(channel, request, grpc.StatusCode.FAILED_PRECONDITION)
        assert "MiB" in message


# --- Export --------------------------------------------------------------------------------------------------------


async def test_export_to_relion5(channel: grpc.aio.Channel, store: Store, tmp_path: Path) -> None:
    rotations = Rotation.random(3, rng=RNG)
    shifts = np.array([[0.5, -1.0, 2.0], [0, 0, 0], [-3, 0.25, 0]])
    table = picks(
        rotations=rotations, shift_x=shifts[:, 0], shift_y=shifts[:, 1], shift_z=shifts[:, 2], score=[3.0, 2.0, 1.0],
        class_id=np.array([0, 1, -1], np.int32), half=np.array([1, 2, 1], np.int32),
    )  # fmt: skip
    request = io_pb2.ExportRequest(
        format=io_pb2.EXPORT_FORMAT_RELION5_STAR,
        particles_uri=put(store, "picks.parquet", table.to_parquet()),
        volume_uri=put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO)),
    )
    result = (await call_operation(channel, request)).result
    path = tmp_path / "particles.star"
    path.write_bytes(store.get(result.file_uri))
    read = starfile.read(path)
    centred = read[[f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"]].to_numpy()
    np.testing.assert_allclose(centred, (table.positions() + shifts - [20, 15, 10]) * 7.84, atol=1e-6)
    angles = read[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    back = Rotation.from_euler("ZYZ", angles, degrees=True)
    assert np.rad2deg((back * rotations).magnitude()).max() < 1e-5
    assert list(read["rlnClassNumber"]) == [1, 2, 0]
    assert list(read["rlnRandomSubset"]) == [1, 2, 1]
    assert list(read["rlnTomoName"]) == ["TS_01"] * 3


async def test_export_refuses_a_tomogram_in_another_frame(channel: grpc.aio.Channel, store: Store) -> None:
    star = io_pb2.EXPORT_FORMAT_RELION5_STAR
    particles = put(store, "picks.parquet", picks().to_parquet())
    for info, words in (
        (VolumeInfo((20, 30, 40), 3.92, "dark"), "counts in voxels of 7.84 Å"),
        (VolumeInfo((30, 20, 40), 7.84, "dark"), "is of a tomogram of 40 x 30 x 20 voxels"),
    ):
        volume = put(store, "tomogram.mrc", encode_volume(TOMOGRAM.reshape(info.shape), info))
        request = io_pb2.ExportRequest(format=star, particles_uri=particles, volume_uri=volume)
        assert words in await refused(channel, request, grpc.StatusCode.FAILED_PRECONDITION)
    request = io_pb2.ExportRequest(format=star, particles_uri=particles)
    message = await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert "RELION5_STAR needs particles_uri and volume_uri" in message


async def test_export_of_one_tomogram_of_several(channel: grpc.aio.Channel, store: Store, tmp_path: Path) -> None:
    other = Particles.from_positions([[1.0, 2.0, 3.0]], 7.84, "TS_02", (20, 30, 40))
    request = io_pb2.ExportRequest(
        format=io_pb2.EXPORT_FORMAT_RELION5_STAR,
        particles_uri=put(store, "picks.parquet", Particles.concat([picks(), other]).to_parquet()),
        volume_uri=put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO)),
    )
    message = await refused(channel, request, grpc.StatusCode.FAILED_PRECONDITION)
    assert "particles of 2 tomograms (TS_01, TS_02)" in message
    request.tomogram_name = "TS_02"
    result = (await call_operation(channel, request)).result
    (tmp_path / "a.star").write_bytes(store.get(result.file_uri))
    read = starfile.read(tmp_path / "a.star")
    np.testing.assert_allclose(read["rlnCenteredCoordinateXAngst"], [(1 - 20) * 7.84])


async def test_exports_call_tomograms_by_their_files(channel: grpc.aio.Channel, store: Store, tmp_path: Path) -> None:
    """As they were ingested; with the digest only where two files have one name."""
    star, csv = io_pb2.EXPORT_FORMAT_RELION5_STAR, io_pb2.EXPORT_FORMAT_CSV
    names = ["TS_01~0123456789ab", "TS_02~0123456789ab", "TS_02~ba9876543210"]
    parts = [Particles.from_positions([[1.0, 2.0, 3.0]], 7.84, name, (20, 30, 40)) for name in names]
    volume = put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO))
    optics = io_pb2.Optics(
        tilt_series_pixel_size_angstrom=1.96, voltage_kv=300, spherical_aberration_mm=2.7, amplitude_contrast=0.07
    )
    one = put(store, "one.parquet", parts[0].to_parquet())
    request = io_pb2.ExportRequest(format=star, particles_uri=one, volume_uri=volume, optics=optics)
    (tmp_path / "a.star").write_bytes(store.get((await call_operation(channel, request)).result.file_uri))
    tables = starfile.read(tmp_path / "a.star")
    assert list(tables["particles"]["rlnTomoName"]) == ["TS_01"]
    assert list(tables["particles"]["rlnOpticsGroup"]) == [1]
    assert tables["optics"].iloc[0].to_dict() == {
        "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.07,
        "rlnTomoTiltSeriesPixelSize": 1.96, "rlnOpticsGroup": 1, "rlnOpticsGroupName": "TS_01",
    }  # fmt: skip
    several = put(store, "several.parquet", Particles.concat(parts).to_parquet())
    request = io_pb2.ExportRequest(format=csv, particles_uri=several)
    read = pd.read_csv(io.BytesIO(store.get((await call_operation(channel, request)).result.file_uri)))
    assert list(read["tomogram"]) == ["TS_01", *names[1:]]
    request = io_pb2.ExportRequest(format=star, particles_uri=several, volume_uri=volume, tomogram_name="TS_01")
    (tmp_path / "b.star").write_bytes(store.get((await call_operation(channel, request)).result.file_uri))
    assert list(starfile.read(tmp_path / "b.star")["rlnTomoParticleName"]) == ["TS_01/0"]


async def test_export_to_csv_and_mrc(channel: grpc.aio.Channel, store: Store, tmp_path: Path) -> None:
    classes = np.array([0, 4, -1], np.int32)
    particles = put(store, "picks.parquet", picks(score=[3.0, 2.0, 1.0], class_id=classes).to_parquet())
    request = io_pb2.ExportRequest(format=io_pb2.EXPORT_FORMAT_CSV, particles_uri=particles)
    csv = store.get((await call_operation(channel, request)).result.file_uri)
    read = pd.read_csv(io.BytesIO(csv))
    np.testing.assert_allclose(read[["x", "y", "z"]], picks().positions())
    assert list(read["score"]) == [3.0, 2.0, 1.0]
    assert list(read["class_number"]) == [1, 5, 0], "as RELION counts"
    assert "class_id" not in read

    volume = put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO))
    for mode, error in ((0, 0.02), (1, 1e-4), (2, 0.0), (12, 2e-3)):
        request = io_pb2.ExportRequest(format=io_pb2.EXPORT_FORMAT_MRC, volume_uri=volume, mrc_mode=mode)
        path = tmp_path / f"mode{mode}.mrc"
        path.write_bytes(store.get((await call_operation(channel, request)).result.file_uri))
        assert mrcfile.validate(path)
        with mrcfile.open(path) as file:
            labels = file.get_labels()
            assert labels[0].startswith("cryofleet contrast=dark tilt=-60..51")
            scale, offset = 1.0, 0.0
            if mode < 2:
                words = labels[1].split()
                scale, offset = float(words[-3]), float(words[-1])
            np.testing.assert_allclose(file.data * scale + offset, TOMOGRAM, atol=error)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (io_pb2.EXPORT_FORMAT_EM, "volume.em"),
        (io_pb2.EXPORT_FORMAT_HDF5, "volume.hdf"),
        (io_pb2.EXPORT_FORMAT_OME_ZARR, "volume.zarr.zip"),
        (io_pb2.EXPORT_FORMAT_TIFF, "volume.tif"),
    ],
)
async def test_export_of_a_volume_is_ingested_as_it_was(
    form: io_pb2.ExportFormat.ValueType, name: str, channel: grpc.aio.Channel, settings: Settings, store: Store
) -> None:
    volume = put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO))
    exported = await call_operation(channel, io_pb2.ExportRequest(format=form, volume_uri=volume))
    assert exported.result.file_uri.endswith(f"/{name}")
    uri = put_file(settings, name, store.get(exported.result.file_uri))
    again = await call_operation(channel, io_pb2.IngestRequest(source_uri=uri))
    assert again.result.voxel_size_angstrom == INFO.voxel_size_angstrom
    np.testing.assert_array_equal(open_volume(store, again.result.tomogram_uri).read(), TOMOGRAM)


# --- Report --------------------------------------------------------------------------------------------------------


async def test_report_of_a_whole_run(channel: grpc.aio.Channel, store: Store) -> None:
    table = picks(class_name=["ribosome", "ribosome", "proteasome"])
    fsc = {"frequency": [0.0, 0.1, 0.2, 0.3], "fsc": [1.0, 0.9, 0.2, 0.0], "particles": 77}
    box = VolumeInfo((8, 8, 8), 7.84, "dark")
    centres = RNG.normal(0, 1, (2, 8, 8, 8)).astype(np.float32)
    request = io_pb2.ReportRequest(
        title="A <run>",
        tomogram_uri=put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO)),
        particles_uri=put(store, "picks.parquet", table.to_parquet()),
        centres_uri=put(store, "centres.mrc", encode_volume(centres, VolumeInfo((8, 8, 8), 7.84, "light", count=2))),
        cluster_sizes=[60, 20],
        average_uris=[put(store, "average.mrc", encode_volume(centres[0], box))],
        fsc_uris=[put(store, "fsc.json", json.dumps(fsc).encode())],
        metrics_uris=[put(store, "metrics.json", b'{"f1": 0.875}')],
    )
    reply = await call_operation(channel, request)
    page = store.get(reply.result.report_uri).decode()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<!-- run-details -->") == 1
    for words in ("A &lt;run&gt;", "ribosome (2)", "proteasome (1)", "60 particles · 75%", "77 particles", "test.Make"):
        assert words in page, words
    # 0.143 is crossed at 0.2285 cycles per voxel of 7.84 Å
    assert f"{7.84 / 0.2285:.1f} Å at FSC 0.143" in page


async def test_averages_are_named_by_their_clusters(channel: grpc.aio.Channel, store: Store) -> None:
    """That of the second cluster was set aside, so their places say nothing."""
    volume = RNG.normal(0, 1, (8, 8, 8)).astype(np.float32)
    average = put(store, "average.mrc", encode_volume(volume, VolumeInfo((8, 8, 8), 7.84, "dark")))
    tables = {
        "first": picks(class_id=np.array([0, 0, 0], np.int32)),
        "third": picks(class_id=np.array([2, 2, 2], np.int32)).select(np.array([0, 2])),
        "mixed": picks(class_id=np.array([2, 2, 1], np.int32)),
        "none": picks(class_id=np.array([-1, -1, -1], np.int32)),
    }
    request = io_pb2.ReportRequest(
        title="Some",
        cluster_sizes=[60, 40, 20],
        average_uris=[average] * 4,
        average_particles_uris=[put(store, f"{name}.parquet", t.to_parquet()) for name, t in tables.items()],
    )
    page = store.get((await call_operation(channel, request)).result.report_uri).decode()
    headings = re.findall(r"<h3>(.*?) <span>· (.*?) ·", page)
    assert headings == [
        ("Average of cluster 1", "3 particles"),
        ("Average of cluster 3", "2 particles"),
        ("Average 3", "3 particles"),
        ("Average 4", "3 particles"),
    ]
    request.average_particles_uris.append(request.average_particles_uris[0])
    message = await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert "5 average_particles_uris for 4 average_uris" in message


async def test_report_with_the_tomogram_alone_and_with_too_much(channel: grpc.aio.Channel, store: Store) -> None:
    tomogram = put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO))
    request = io_pb2.ReportRequest(title="Bare", tomogram_uri=tomogram)
    reply = await call_operation(channel, request)
    assert b"Averages" not in store.get(reply.result.report_uri)
    request.fsc_uris.append(put(store, "fsc.json", b"{}"))
    message = await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert "1 fsc_uris for 0 average_uris" in message


async def test_report_with_pictures(channel: grpc.aio.Channel, store: Store) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(buffer, "PNG")
    request = io_pb2.ReportRequest(title="Drawn", picture_uris=[put(store, "<a>.png", buffer.getvalue())])
    page = store.get((await call_operation(channel, request)).result.report_uri).decode()
    assert base64.b64encode(buffer.getvalue()).decode() in page
    assert "<a>" not in page
    request.picture_uris.append(put(store, "page.png", b"<svg onload='alert(1)'/>"))
    message = await refused(channel, request, grpc.StatusCode.INVALID_ARGUMENT)
    assert "page.png is no PNG picture" in message


async def test_report_with_labels_and_codes(channel: grpc.aio.Channel, store: Store) -> None:
    labels = np.zeros(INFO.shape, np.float32)
    labels[:, 1:3] = 2
    codes = {"x": [0, 1.0], "y": [0, 2.0], "cluster": [1, 2], "centre_x": [0, 1], "centre_y": [0, 2]}
    request = io_pb2.ReportRequest(
        title="Labels",
        tomogram_uri=put(store, "tomogram.mrc", encode_volume(TOMOGRAM, INFO)),
        labels_uri=put(store, "labels.mrc", encode_volume(labels, INFO)),
        label_names=["ribosome", "membrane"],
        embedding_uri=put(store, "embedding.json", json.dumps(codes).encode()),
    )
    page = store.get((await call_operation(channel, request)).result.report_uri).decode()
    assert f"membrane ({int((labels == 2).sum()):,} voxels" in page
    assert "ribosome (" not in page
    assert "All 2 particles by their codes" in page

    other = VolumeInfo((4, 4, 4), INFO.voxel_size_angstrom, "dark")
    small = put(store, "small.mrc", encode_volume(np.zeros((4, 4, 4)), other))
    halves = put(store, "halves.mrc", encode_volume(labels + 0.5, INFO))
    table = put(store, "table.json", b'{"f1": 1}')
    invalid, failed = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
    for field, value, status, words in (
        ("labels_uri", small, failed, "(4, 4, 4) voxels"),
        ("labels_uri", halves, invalid, "whole numbers"),
        ("embedding_uri", table, invalid, "holds no codes"),
        ("tomogram_uri", "", invalid, "give tomogram_uri too"),
    ):
        wrong = io_pb2.ReportRequest.FromString(request.SerializeToString())
        setattr(wrong, field, value)
        assert words in await refused(channel, wrong, status)


# --- Upload --------------------------------------------------------------------------------------------------------


def header(file_name: str, data: bytes, **changed: Any) -> io_pb2.UploadHeader:
    fields: Any = {"name": file_name, "size_bytes": len(data), "digest": digest_of(data)} | changed
    return io_pb2.UploadHeader(**fields)


def parts(head: io_pb2.UploadHeader, data: bytes, chunk: int = 2**20) -> list[io_pb2.UploadRequest]:
    pieces = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    return [io_pb2.UploadRequest(header=head), *(io_pb2.UploadRequest(chunk=piece) for piece in pieces)]


def only_folders_of(store: Store) -> list[str]:
    return [stat.uri for stat in store.list(store.root)]


async def upload_refused(settings: Settings, messages: list[io_pb2.UploadRequest]) -> tuple[grpc.StatusCode, str]:
    """Status and message of an upload that the server ends early, as the blocking client sees them.

    gRPC's asyncio client may report a failed write instead, where the server has ended the call meanwhile.
    """

    def call() -> tuple[grpc.StatusCode, str]:
        with open_blocking_channel(settings.address, None) as channel, pytest.raises(grpc.RpcError) as error:
            io_pb2_grpc.IoServiceStub(channel).Upload(iter(messages))  # type: ignore[no-untyped-call, unused-ignore]
        failed: Any = error.value
        return failed.code(), failed.details()

    return await asyncio.to_thread(call)


async def test_a_file_goes_up_once_and_comes_down_the_same(stub: Any, store: Store) -> None:
    data = RNG.bytes(BLOCK_BYTES + 3_000_000)
    head = header("TS_01.mrc", data)
    asked = await stub.Upload(iter([io_pb2.UploadRequest(header=head)]))
    assert (asked.present, asked.uri) == (False, "")
    answer = await stub.Upload(iter(parts(head, data)))
    assert not answer.present
    assert answer.uri.endswith("/TS_01.mrc")
    assert content_digest(store, answer.uri) == head.digest
    manifest = manifest_for(store, answer.uri)
    assert manifest is not None
    assert (manifest.operation, manifest.parameters["name"]) == ("io.Upload", "TS_01.mrc")
    again = await stub.Upload(iter([io_pb2.UploadRequest(header=head)]))
    assert (again.present, again.uri) == (True, answer.uri)

    received = [r async for r in stub.Download(io_pb2.DownloadRequest(uri=answer.uri))]
    assert b"".join(r.chunk for r in received) == data
    assert {r.size_bytes for r in received} == {len(data)}
    assert max(len(r.chunk) for r in received) <= 2**21


async def test_an_empty_file_goes_up_and_down(stub: Any) -> None:
    answer = await stub.Upload(iter(parts(header("empty.txt", b""), b"")))
    assert answer.uri.endswith("/empty.txt")
    received = [r async for r in stub.Download(io_pb2.DownloadRequest(uri=answer.uri))]
    assert [(r.size_bytes, r.chunk) for r in received] == [(0, b"")]


async def test_the_project_of_an_upload_and_its_safe_name(stub: Any, store: Store) -> None:
    head = header("..%2fx\x7f.mrc", b"abc", context=common_pb2.Context(project="lab-3"))
    answer = await stub.Upload(iter(parts(head, b"abc")))
    assert answer.uri.startswith(f"{store.root}/lab-3/")
    assert answer.uri.endswith("/_2fx_.mrc")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "0" * 64}, "announced was 000"),
        ({"size_bytes": 10}, "more bytes came than the 10 announced"),
        ({"size_bytes": 4_000_000}, "the upload ended after 3000000 of 4000000 bytes"),
        ({"name": "../a.mrc"}, "name"),
        ({"digest": "xyz"}, "digest"),
    ],
)
async def test_wrong_uploads_leave_nothing(
    channel: grpc.aio.Channel, settings: Settings, store: Store, change: dict[str, Any], words: str
) -> None:
    data = RNG.bytes(3_000_000)
    status, message = await upload_refused(settings, parts(header("a.mrc", data, **change), data))
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert words in message
    assert only_folders_of(store) == []


async def test_messages_of_an_upload_in_the_wrong_order(
    channel: grpc.aio.Channel, settings: Settings, store: Store
) -> None:
    head = header("a.mrc", b"12345678")
    first = io_pb2.UploadRequest(header=head)
    chunk = io_pb2.UploadRequest(chunk=b"1234")
    for messages, words in (
        ([chunk], "the first message of an upload must be its header"),
        ([], "the first message of an upload must be its header"),
        ([first, chunk, first], "a second header came"),
    ):
        status, message = await upload_refused(settings, messages)
        assert status == grpc.StatusCode.INVALID_ARGUMENT
        assert words in message
    for _ in range(100):
        if not only_folders_of(store):
            break
        await asyncio.sleep(0.05)
    assert only_folders_of(store) == []


async def test_an_upload_that_is_broken_off_leaves_nothing_and_can_be_repeated(
    stub: Any, store: Store, settings: Settings
) -> None:
    data = RNG.bytes(2 * BLOCK_BYTES + 5)
    head = header("a.mrc", data)
    enough = asyncio.Event()

    async def half() -> AsyncIterator[io_pb2.UploadRequest]:
        for message in parts(head, data)[:12]:
            yield message
        enough.set()
        await asyncio.Event().wait()

    call = stub.Upload(half())
    await enough.wait()
    await asyncio.sleep(0.2)
    call.cancel()
    root = Path(store.root.removeprefix("file://"))
    for _ in range(100):
        if not any(path.is_file() for path in root.rglob("*")):
            break
        await asyncio.sleep(0.05)
    assert [path for path in root.rglob("*") if path.is_file()] == []
    answer = await stub.Upload(iter(parts(head, data)))
    assert store.get(answer.uri) == data


async def test_the_same_file_from_two_callers_at_once(stub: Any, store: Store) -> None:
    data = RNG.bytes(5_000_000)
    head = header("a.mrc", data)
    answers = await asyncio.gather(*(stub.Upload(iter(parts(head, data))) for _ in range(2)))
    assert len({answer.uri for answer in answers}) == 1
    assert store.get(answers[0].uri) == data


# --- Download and List ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "length"), [(0, 5), (BLOCK_BYTES - 3, 9), (BLOCK_BYTES + 7, 0), (100, 10**12)])
async def test_byte_ranges(stub: Any, store: Store, offset: int, length: int) -> None:
    data = np.random.default_rng(0).bytes(BLOCK_BYTES + 5_000_000)
    uri = put(store, "a.bin", data)
    request = io_pb2.DownloadRequest(uri=uri, offset_bytes=offset, length_bytes=length)
    received = b"".join([r.chunk async for r in stub.Download(request)])
    assert received == (data[offset : offset + length] if length else data[offset:])


async def test_damage_is_found_on_the_way_down(stub: Any, store: Store) -> None:
    data = RNG.bytes(2 * BLOCK_BYTES)
    uri = put(store, "a.bin", data)
    path = Path(uri.removeprefix("file://"))
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES + 17)
        file.write(bytes([data[BLOCK_BYTES + 17] ^ 1]))
    whole = io_pb2.DownloadRequest(uri=uri, length_bytes=BLOCK_BYTES)
    assert b"".join([r.chunk async for r in stub.Download(whole)]) == data[:BLOCK_BYTES]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        [r async for r in stub.Download(io_pb2.DownloadRequest(uri=uri))]
    assert error.value.code() == grpc.StatusCode.DATA_LOSS
    assert uri in (error.value.details() or "")


@pytest.mark.parametrize(
    ("uri", "offset", "status"),
    [
        ("{root}/default/missing", 0, grpc.StatusCode.NOT_FOUND),
        ("file:///etc/passwd", 0, grpc.StatusCode.PERMISSION_DENIED),
        ("{root}/../../etc/passwd", 0, grpc.StatusCode.PERMISSION_DENIED),
        ("", 0, grpc.StatusCode.INVALID_ARGUMENT),
        ("{file}", 99, grpc.StatusCode.INVALID_ARGUMENT),
        ("{file}", -1, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_downloads_that_cannot_be(
    stub: Any, store: Store, uri: str, offset: int, status: grpc.StatusCode
) -> None:
    file = put(store, "a.bin", b"0123456789")
    request = io_pb2.DownloadRequest(uri=uri.format(root=store.root, file=file), offset_bytes=offset)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        [r async for r in stub.Download(request)]
    assert error.value.code() == status


async def test_list_names_objects_in_order(stub: Any, store: Store) -> None:
    names = [f"part-{i:04}.bin" for i in range(260)]
    folder = f"{store.root}/default/_work/x"
    for name in reversed(names):
        store.put(f"{folder}/{name}", name.encode())
    listed = [r async for r in stub.List(io_pb2.ListRequest(uri=folder))]
    assert [r.uri for r in listed] == [f"{folder}/{name}" for name in names]
    assert {r.size_bytes for r in listed} == {len(names[0])}
    assert [r async for r in stub.List(io_pb2.ListRequest(uri=f"{store.root}/default/nothing"))] == []
    for uri in ("file:///etc", f"{store.root}/somebody-elses", store.root):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            [r async for r in stub.List(io_pb2.ListRequest(uri=uri))]
        assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED


# --- The service as a whole ----------------------------------------------------------------------------------------


async def test_golden_outputs(channel: grpc.aio.Channel, settings: Settings, store: Store) -> None:
    """The same bytes as ever: where one of these digests changes, the operation's version must rise."""
    array = (np.arange(6 * 5 * 4).reshape(6, 5, 4) * 37 % 101).astype(np.float32)
    source = put_file(settings, "a.mrc", encode_volume(array, VolumeInfo((6, 5, 4), 8.0, "dark")))
    ingested = await call_operation(channel, io_pb2.IngestRequest(source_uri=source))
    tomogram = ingested.result.tomogram_uri
    positions = [[1.25, 2.5, 3.0], [0.0, 4.0, 5.0]]
    rotations = Rotation.from_quat([[0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]])
    table = Particles.from_positions(positions, 8.0, "TS_01", (6, 5, 4), rotations, score=[0.5, 0.25])
    particles = put(store, "picks.parquet", table.to_parquet())
    requests = (
        io_pb2.ExportRequest(format=io_pb2.EXPORT_FORMAT_RELION5_STAR, particles_uri=particles, volume_uri=tomogram),
        io_pb2.ExportRequest(format=io_pb2.EXPORT_FORMAT_CSV, particles_uri=particles),
        io_pb2.ExportRequest(format=io_pb2.EXPORT_FORMAT_MRC, volume_uri=tomogram, mrc_mode=0),
    )
    uris = [tomogram, *[(await call_operation(channel, request)).result.file_uri for request in requests]]
    assert [content_digest(store, uri)[:16] for uri in uris] == GOLDEN


def test_the_service_never_imports_torch() -> None:
    code = "import sys, services.io.service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
