"""The simulation service over gRPC: what it makes, what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from cryofleet.artifacts import open_blob
from cryofleet.particles import Particles
from cryofleet.server import Reader
from cryofleet.settings import Settings
from cryofleet.storage import Store
from cryofleet.testing import call_operation, run_operation, running_server, settings_for
from cryofleet.v1 import common_pb2, simulation_pb2
from cryofleet.volumes import open_volume
from services.simulation.service import _needs, service
from tests.unit.simulation.files import mrc_file, pdb_file


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path)


@pytest.fixture
def store(settings: Settings) -> Store:
    return Store.open(settings)


@pytest.fixture
async def channel(settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    async with running_server(service, settings) as opened:
        yield opened


def request(**changes: Any) -> simulation_pb2.SimulateTomogramRequest:
    fields: dict[str, Any] = {
        "size_x": 64,
        "size_y": 56,
        "size_z": 40,
        "voxel_size_angstrom": 12.0,
        "structures": [
            simulation_pb2.Structure(name="hexameric-ring", count=5),
            simulation_pb2.Structure(name="double-ring", count=4),
        ],
        "seed": 3,
        "tilt_min_degrees": -50.0,
    }
    return simulation_pb2.SimulateTomogramRequest(**(fields | changes))


async def test_tomogram_truth_clean_volume_and_metrics(channel: grpc.aio.Channel, store: Store) -> None:
    reply = await call_operation(channel, request())
    result = reply.result
    assert result.count == 9

    tomogram = open_volume(store, result.tomogram_uri)
    assert tomogram.info.shape == (40, 56, 64)
    assert tomogram.info.voxel_size_angstrom == 12.0
    assert tomogram.info.contrast == "dark"
    assert (tomogram.info.tilt_min_degrees, tomogram.info.tilt_max_degrees) == (-50.0, 60.0)
    clean = open_volume(store, result.clean_uri)
    assert clean.info.contrast == "light"
    assert (clean.info.tilt_min_degrees, clean.info.tilt_max_degrees) == (-90.0, 90.0)
    inside = clean.read() > 1.0
    assert tomogram.read()[inside].mean() < tomogram.read()[~inside].mean()

    truth = Particles.from_parquet(open_blob(store, result.truth_uri), result.truth_uri)
    assert truth.voxel_size_angstrom == 12.0
    assert truth.tomogram_shape == (40, 56, 64)
    assert sorted(truth.table["id"]) == list(range(9))
    counted = truth.table.groupby(["class_id", "class_name"]).size().to_dict()
    assert counted == {(0, "hexameric-ring"): 5, (1, "double-ring"): 4}
    assert truth.rotations() is not None

    metrics = Reader(store, "default", Path).read_table(result.metrics_uri)
    assert [entry["placed"] for entry in metrics["structures"]] == [5, 4]
    assert [entry["molecular_weight_kda"] for entry in metrics["structures"]] == pytest.approx([314.4, 800.8])
    assert metrics["snr_measured"] == pytest.approx(0.1, rel=0.01)
    assert metrics["signal_variance"] / metrics["noise_variance"] == pytest.approx(0.1, rel=0.01)
    assert 0.005 < metrics["occupancy"] < 0.2


def test_same_seed_same_bytes_another_seed_others(tmp_path: Path) -> None:
    def objects(name: str, **changes: Any) -> list[bytes]:
        store = Store.open(settings_for(tmp_path / name))
        result = run_operation(service, request(**changes), store)
        return [store.get(uri) for uri in (result.tomogram_uri, result.truth_uri, result.clean_uri)]

    first = objects("first")
    assert objects("second") == first
    other = objects("third", seed=4)
    assert all(a != b for a, b in zip(first, other, strict=True))
    # another noise level leaves the scene and its truth as they are
    noisier = objects("fourth", snr=0.01)
    assert noisier[1:] == first[1:]
    assert noisier[0] != first[0]


async def test_structures_from_files(channel: grpc.aio.Channel, store: Store, tmp_path: Path) -> None:
    grid = np.indices((20, 20, 20)) - 10
    ball = (np.square(grid * np.array([1, 1.5, 2]).reshape(3, 1, 1, 1)).sum(axis=0) < 64).astype(np.float32)
    files = {
        "ball.mrc": mrc_file(tmp_path, ball, 10.0),
        "atoms.pdb": pdb_file(np.random.default_rng(0).uniform(-40, 40, (3000, 3)).round(3)),
    }
    structures = []
    for name, data in files.items():
        uri = f"{store.root}/default/inputs/{name}"
        store.put(uri, data)
        structures.append(simulation_pb2.Structure(name=name, count=2, source_uri=uri))
    result = (await call_operation(channel, request(structures=structures))).result
    truth = Particles.from_parquet(open_blob(store, result.truth_uri), result.truth_uri)
    assert set(truth.table["class_name"]) == {"ball.mrc", "atoms.pdb"}
    clean = open_volume(store, result.clean_uri).read()
    x, y, z = np.rint(truth.positions()).astype(int).T
    at_centres = dict(zip(truth.table["class_name"], clean[z, y, x], strict=True))
    # 3,000 carbons in 80 Å cubed, each with f(0) of 2.509 Å less that of 16.44 Å^3 of ice
    assert at_centres["atoms.pdb"] == pytest.approx(3000 * (2.509 - 0.0945 * 16.44) * 47.878 / 80**3, rel=0.25)
    assert at_centres["ball.mrc"] > 1.5


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        (
            {"structures": [simulation_pb2.Structure(name="duoble-ring", count=1)]},
            grpc.StatusCode.INVALID_ARGUMENT,
            ["did you mean 'double-ring'", "hexameric-ring"],
        ),
        (
            {"structures": [simulation_pb2.Structure(name="double-ring", count=500)]},
            grpc.StatusCode.FAILED_PRECONDITION,
            ["placed", "of 500", "no place is left"],
        ),
        (
            {"structures": [simulation_pb2.Structure(name="barrel-with-lids", count=1)], "size_z": 16, "size_x": 16},
            grpc.StatusCode.INVALID_ARGUMENT,
            ["does not fit", "16 x 56 x 16"],
        ),
        (
            {"structures": [simulation_pb2.Structure(name="double-ring", count=1)] * 2},
            grpc.StatusCode.INVALID_ARGUMENT,
            ["double-ring", "more than once"],
        ),
        ({"tilt_max_degrees": -55.0}, grpc.StatusCode.INVALID_ARGUMENT, ["tilt_min_degrees"]),
        ({"tilt_max_degrees": -50.0}, grpc.StatusCode.INVALID_ARGUMENT, ["tilt_min_degrees"]),
        ({"snr": 0.0}, grpc.StatusCode.INVALID_ARGUMENT, ["snr"]),
        ({"structures": []}, grpc.StatusCode.INVALID_ARGUMENT, ["structures"]),
        ({"contrast": common_pb2.CONTRAST_UNSPECIFIED}, grpc.StatusCode.INVALID_ARGUMENT, ["contrast"]),
    ],
)
async def test_bad_requests(
    channel: grpc.aio.Channel, changes: dict[str, Any], status: grpc.StatusCode, words: list[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request(**changes))
    assert caught.value.code() is status, caught.value.details()
    for word in words:
        assert word in (caught.value.details() or "")


async def test_bad_structure_files_are_named(channel: grpc.aio.Channel, store: Store) -> None:
    uri = f"{store.root}/default/inputs/notes.pdb"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(
            channel, request(structures=[simulation_pb2.Structure(name="mine", count=1, source_uri=uri)])
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    store.put(uri, b"these are my notes\n")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(
            channel, request(structures=[simulation_pb2.Structure(name="mine", count=1, source_uri=uri)])
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "notes.pdb: no atoms" in (caught.value.details() or "")


def test_memory_is_stated_in_proportion_to_the_volume(store: Store) -> None:
    reader = Reader(store, "default", Path)
    small = _needs(request(), reader).memory_bytes
    large = _needs(request(size_x=1024, size_y=1024, size_z=256), reader).memory_bytes
    # density, instances, signal, noise and a spectrum: seven floats a voxel
    assert large - small == pytest.approx(28 * (1024 * 1024 * 256 - 64 * 56 * 40), rel=0.05)
