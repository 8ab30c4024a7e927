"""The simulation service over gRPC: what it makes, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import mrcfile
import numpy as np
import pytest

from cryofleet.artifacts import open_blob
from cryofleet.particles import Particles
from cryofleet.server import Reader
from cryofleet.storage import Store
from cryofleet.testing import call_operation, run_operation, settings_for
from cryofleet.v1 import common_pb2, simulation_pb2
from cryofleet.volumes import open_subtomograms, open_volume
from services.simulation.service import service
from tests.contract.conftest import channel_to
from tests.unit.simulation.files import mrc_file, pdb_file

#: Messages made of plain mappings, which the type stubs don't know of.
pb: Any = simulation_pb2
SHAPE = (40, 56, 64)
VOXEL = 12.0

channel = channel_to(service)


def scene_request(**changes: Any) -> simulation_pb2.SimulateSceneRequest:
    fields: dict[str, Any] = {
        "size_x": SHAPE[2],
        "size_y": SHAPE[1],
        "size_z": SHAPE[0],
        "voxel_size_angstrom": VOXEL,
        "structures": [
            pb.Structure(name="hexameric-ring", count=5),
            pb.Structure(name="double-ring", count=4),
        ],
        "seed": 3,
    }
    request: simulation_pb2.SimulateSceneRequest = pb.SimulateSceneRequest(**(fields | changes))
    return request


def subtomogram_request(particles_uri: str, **changes: Any) -> simulation_pb2.SimulateSubtomogramsRequest:
    fields: dict[str, Any] = {
        "particles_uri": particles_uri,
        "structures": [{"name": "hexameric-ring"}, {"name": "single-ring"}],
        "box_size_voxels": 20,
        "voxel_size_angstrom": 12.0,
        "tilt_scheme": {"tilt_step_degrees": 10},
        "microscope": {"defocus_um": 1},
    }
    request: simulation_pb2.SimulateSubtomogramsRequest = pb.SimulateSubtomogramsRequest(**(fields | changes))
    return request


def table(store: Store, uri: str) -> dict[str, Any]:
    return Reader(store, "default", Path).read_table(uri)


async def test_a_scene_and_its_truth(channel: grpc.aio.Channel, store: Store) -> None:
    result = (await call_operation(channel, scene_request())).result
    assert result.count == 9
    density = open_volume(store, result.density_uri)
    assert density.info.shape == SHAPE
    assert density.info.contrast == "light"
    assert (density.info.tilt_min_degrees, density.info.tilt_max_degrees) == (-90.0, 90.0)

    truth = Particles.from_parquet(open_blob(store, result.truth_uri), result.truth_uri)
    assert truth.voxel_size_angstrom == VOXEL
    assert truth.tomogram_shape == SHAPE
    assert truth.rotations() is not None
    counted = truth.table.groupby(["class_id", "class_name"]).size().to_dict()
    assert counted == {(0, "hexameric-ring"): 5, (1, "double-ring"): 4}

    voxels, labels = density.read(), open_volume(store, result.labels_uri).read()
    instances = open_volume(store, result.instances_uri).read()
    assert set(np.unique(instances)) == set(range(10))
    outside = voxels[instances == 0].mean()
    for number, class_id in zip(truth.table["id"].tolist(), truth.table["class_id"].tolist(), strict=True):
        own = instances == number + 1
        assert voxels[own].mean() > outside
        assert np.unique(labels[own]).tolist() == [class_id + 1]

    metrics = table(store, result.metrics_uri)
    assert [entry["placed"] for entry in metrics["structures"]] == [5, 4]
    assert [entry["molecular_weight_kda"] for entry in metrics["structures"]] == pytest.approx([314.4, 800.8])
    assert 0.005 < metrics["occupancy"] < 0.2


async def test_a_tilt_series_and_its_tomogram(channel: grpc.aio.Channel, store: Store, tmp_path: Path) -> None:
    scene = (await call_operation(channel, scene_request())).result
    series = (
        await call_operation(
            channel,
            pb.SimulateTiltSeriesRequest(
                density_uri=scene.density_uri,
                tilt_scheme={"tilt_min_degrees": -50, "tilt_step_degrees": 5},
                snr=0.5,
                halves=True,
            ),
        )
    ).result
    assert series.tilts == 23
    assert [float(line) for line in store.get(series.tlt_uri).split()] == list(range(-50, 61, 5))
    assert b"TiltAngle = -50" in store.get(series.mdoc_uri)
    images = open_volume(store, series.tilt_series_uri).read()
    assert images.shape == (23, SHAPE[1], SHAPE[2])
    halves = [open_volume(store, uri).read() for uri in (series.even_uri, series.odd_uri)]
    np.testing.assert_allclose((halves[0] + halves[1]) / 2, images, atol=1e-4 * np.abs(images).max())

    made = (
        await call_operation(
            channel,
            pb.ReconstructRequest(
                tilt_series_uri=series.tilt_series_uri,
                tilts_uri=series.tilts_uri,
                even_uri=series.even_uri,
                odd_uri=series.odd_uri,
                size_z=SHAPE[0],
            ),
        )
    ).result
    tomogram = open_volume(store, made.tomogram_uri)
    assert tomogram.info.shape == SHAPE
    assert (tomogram.info.tilt_min_degrees, tomogram.info.tilt_max_degrees) == (-50.0, 60.0)
    assert (tomogram.info.contrast, tomogram.info.voxel_size_angstrom) == ("dark", VOXEL)
    inside = open_volume(store, scene.instances_uri).read() > 0
    voxels = tomogram.read()
    assert voxels[inside].mean() < voxels[~inside].mean()
    even, odd = (open_volume(store, uri).read() for uri in (made.even_uri, made.odd_uri))
    np.testing.assert_allclose((even + odd) / 2, voxels, atol=1e-3 * voxels.std())

    # a user's files: a stack as a microscope's programs write it, and angles alone
    path = tmp_path / "series.st"
    with mrcfile.new(path) as file:
        file.set_data((images * 1000).astype(np.int16))
        file.set_image_stack()
        file.voxel_size = VOXEL
    uri = f"{store.root}/default/inputs/series.st"
    store.put(uri, path.read_bytes())
    again = (
        await call_operation(
            channel,
            pb.ReconstructRequest(tilt_series_uri=uri, tilts_uri=series.tlt_uri, size_z=SHAPE[0]),
        )
    ).result
    assert np.corrcoef(open_volume(store, again.tomogram_uri).read().ravel(), voxels.ravel())[0, 1] > 0.999


async def test_subtomograms_of_drawn_poses(channel: grpc.aio.Channel, store: Store) -> None:
    structures = [{"name": "hexameric-ring", "count": 4}, {"name": "single-ring", "count": 2}]
    poses = (
        await call_operation(
            channel,
            pb.SimulateParticlesRequest(
                structures=structures, voxel_size_angstrom=12.0, box_size_voxels=20, max_shift_angstrom=24
            ),
        )
    ).result
    assert poses.count == 6
    whole = (await call_operation(channel, subtomogram_request(poses.particles_uri, snr=0.5))).result
    boxes = open_subtomograms(store, whole.subtomograms_uri)
    assert (len(boxes), boxes.info.shape, boxes.info.contrast) == (6, (20, 20, 20), "dark")
    assert sorted(boxes.particles().table["class_name"]) == ["hexameric-ring"] * 4 + ["single-ring"] * 2
    # a shard holds what the whole has at its rows, so that sharding changes nothing
    part = (
        await call_operation(channel, subtomogram_request(poses.particles_uri, snr=0.5, rows={"first": 2, "count": 3}))
    ).result
    np.testing.assert_array_equal(open_subtomograms(store, part.subtomograms_uri).read(0, 3), boxes.read(2, 3))


async def test_the_density_of_a_structure(channel: grpc.aio.Channel, store: Store) -> None:
    result = (
        await call_operation(channel, pb.SimulateDensityRequest(name="double-ring", voxel_size_angstrom=5.0))
    ).result
    volume = open_volume(store, result.density_uri)
    side = volume.info.shape[0]
    voxels = volume.read()
    grids = np.indices(voxels.shape).reshape(3, -1)
    np.testing.assert_allclose(grids @ voxels.ravel() / voxels.sum(), side // 2, atol=0.02)
    metrics = table(store, result.metrics_uri)
    assert metrics["molecular_weight_kda"] == pytest.approx(800.8)


def test_same_seed_same_bytes_another_seed_others(tmp_path: Path) -> None:
    def objects(name: str, noise_seed: int = 0, **changes: Any) -> list[bytes]:
        store = Store.open(settings_for(tmp_path / name))
        scene = run_operation(service, scene_request(**changes), store)
        series = run_operation(
            service,
            pb.SimulateTiltSeriesRequest(
                density_uri=scene.density_uri, tilt_scheme={"tilt_step_degrees": 20}, seed=noise_seed
            ),
            store,
        )
        uris = (scene.density_uri, scene.truth_uri, scene.labels_uri, series.noise_free_uri, series.tilt_series_uri)
        return [store.get(uri) for uri in uris]

    first = objects("first")
    assert objects("second") == first
    assert all(a != b for a, b in zip(objects("third", seed=4), first, strict=True))
    # other noise leaves the scene and its truth as they are
    noisier = objects("first", noise_seed=1)
    assert noisier[:4] == first[:4]
    assert noisier[4] != first[4]


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
        structures.append(pb.Structure(name=name, count=2, source_uri=uri))
    result = (await call_operation(channel, scene_request(structures=structures))).result
    truth = Particles.from_parquet(open_blob(store, result.truth_uri), result.truth_uri)
    assert set(truth.table["class_name"]) == {"ball.mrc", "atoms.pdb"}
    density = open_volume(store, result.density_uri).read()
    x, y, z = np.rint(truth.positions()).astype(int).T
    cores = np.array(
        [density[c - 1 : c + 2, b - 1 : b + 2, a - 1 : a + 2].mean() for a, b, c in zip(x, y, z, strict=True)]
    )
    at_centres = {name: cores[truth.table["class_name"] == name].mean() for name in files}
    # 3,000 carbons in 80 Å cubed, each with f(0) of 2.509 Å less that of 16.44 Å^3 of ice
    assert at_centres["atoms.pdb"] == pytest.approx(3000 * (2.509 - 0.0945 * 16.44) * 47.878 / 80**3, rel=0.25)
    assert at_centres["ball.mrc"] > 1.5


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        (
            {"structures": [pb.Structure(name="duoble-ring", count=1)]},
            grpc.StatusCode.INVALID_ARGUMENT,
            ["did you mean 'double-ring'", "hexameric-ring"],
        ),
        (
            {"structures": [pb.Structure(name="double-ring", count=100)]},
            grpc.StatusCode.FAILED_PRECONDITION,
            ["placed", "of 100", "allow_partial"],
        ),
        (
            {"structures": [pb.Structure(name="double-ring", count=500)]},
            grpc.StatusCode.INVALID_ARGUMENT,
            ["500 complexes would fill", "% of the ice"],
        ),
        (
            {"structures": [pb.Structure(name="barrel-with-lids", count=1)], "size_z": 16, "size_x": 16},
            grpc.StatusCode.INVALID_ARGUMENT,
            ["does not fit", "16 x 56 x 16"],
        ),
        (
            {"structures": [pb.Structure(name="double-ring", count=1)] * 2},
            grpc.StatusCode.INVALID_ARGUMENT,
            ["double-ring", "more than once"],
        ),
        ({"structures": []}, grpc.StatusCode.INVALID_ARGUMENT, ["structures"]),
        (
            {"structures": [pb.Structure(name="double-ring")]},
            grpc.StatusCode.INVALID_ARGUMENT,
            ["double-ring", "count", "concentration_micromolar"],
        ),
    ],
)
async def test_bad_scenes(
    channel: grpc.aio.Channel, changes: dict[str, Any], status: grpc.StatusCode, words: list[str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, scene_request(**changes))
    assert caught.value.code() is status, caught.value.details()
    for word in words:
        assert word in (caught.value.details() or "")


async def test_fewer_copies_where_allowed(channel: grpc.aio.Channel, store: Store) -> None:
    request = scene_request(structures=[pb.Structure(name="double-ring", count=500)], allow_partial=True)
    result = (await call_operation(channel, request)).result
    entry = table(store, result.metrics_uri)["structures"][0]
    assert 0 < entry["placed"] == result.count < 500 == entry["asked"]
    assert entry["reason"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tilt_scheme": {"tilt_step_degrees": 0}}, "tilt_step_degrees"),
        ({"tilt_scheme": {"tilt_min_degrees": 60, "tilt_max_degrees": 60}}, "tilt_min_degrees"),
        ({"snr": 0.0}, "snr"),
        ({"noise": pb.NOISE_UNSPECIFIED}, "noise"),
    ],
)
async def test_bad_imaging(channel: grpc.aio.Channel, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, pb.SimulateTiltSeriesRequest(density_uri="file:///no/such.mrc", **changes))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert word in (caught.value.details() or "")


async def test_angles_that_do_not_fit_the_images(channel: grpc.aio.Channel, store: Store, tmp_path: Path) -> None:
    stack, tilts = f"{store.root}/default/inputs/series.mrc", f"{store.root}/default/inputs/series.tlt"
    store.put(stack, mrc_file(tmp_path, np.random.default_rng(0).normal(size=(3, 16, 16)).astype(np.float32), 10.0))
    store.put(tilts, b"-10\n0\n10\n20\n")
    request = pb.ReconstructRequest(tilt_series_uri=stack, tilts_uri=tilts, size_z=16)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for word in ("series.mrc", "3 images", "series.tlt", "4 angles"):
        assert word in (caught.value.details() or "")
    store.put(tilts, b"-10\nzero\n10\n")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "series.tlt" in (caught.value.details() or "")


async def test_a_particle_larger_than_its_box(channel: grpc.aio.Channel) -> None:
    poses = (
        await call_operation(
            channel,
            pb.SimulateParticlesRequest(
                structures=[{"name": "icosahedral-shell", "count": 1}], voxel_size_angstrom=12.0, box_size_voxels=16
            ),
        )
    ).result
    request = subtomogram_request(poses.particles_uri, structures=[{"name": "icosahedral-shell"}], box_size_voxels=16)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "icosahedral-shell" in (caught.value.details() or "")


async def test_bad_structure_files_are_named(channel: grpc.aio.Channel, store: Store) -> None:
    uri = f"{store.root}/default/inputs/notes.pdb"
    request = scene_request(structures=[pb.Structure(name="mine", count=1, source_uri=uri)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    store.put(uri, b"these are my notes\n")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "notes.pdb: no atoms" in (caught.value.details() or "")


async def test_contrast_of_the_tomogram(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(
            channel,
            pb.ReconstructRequest(
                tilt_series_uri="x", tilts_uri="y", size_z=3, contrast=common_pb2.CONTRAST_UNSPECIFIED
            ),
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "contrast" in (caught.value.details() or "")


async def test_a_scene_with_all_there_is(channel: grpc.aio.Channel, store: Store) -> None:
    request = scene_request(
        size_x=96,
        size_y=96,
        size_z=60,
        structures=[
            {"name": "hexameric-ring", "concentration_micromolar": 20},
            {"name": "single-ring", "count": 2, "placement": pb.PLACEMENT_MEMBRANE},
        ],
        vesicles=[{"count": 1, "radius_min_angstrom": 180, "radius_max_angstrom": 220}],
        filaments=[{"name": "helical-filament", "count": 1}],
        gold_beads=[{"count": 2, "diameter_angstrom": 60}],
        carbon_edges=[{"width_angstrom": 120}],
        ice_thickness_angstrom=650,
        allow_partial=True,
    )
    result = (await call_operation(channel, request)).result
    metrics = table(store, result.metrics_uri)
    names = metrics["label_names"]
    assert names[1:] == ["hexameric-ring", "single-ring", "helical-filament", "membrane", "gold", "carbon"]
    assert list(result.gold_labels) == [names.index("gold")]
    labels = open_volume(store, result.labels_uri).read()
    assert set(np.unique(labels)) >= {0, 1, names.index("membrane"), names.index("gold"), names.index("carbon")}
    truth = Particles.from_parquet(open_blob(store, result.truth_uri), result.truth_uri).table
    strand = truth[truth["class_name"] == "helical-filament"]
    assert set(strand["filament"]) == {0}
    assert set(truth[truth["class_name"] == "hexameric-ring"]["filament"]) == {-1}

    # the SNR leaves gold out: with it, the noise would be stronger
    levels = []
    for left_out in ([], list(result.gold_labels)):
        series = pb.SimulateTiltSeriesRequest(
            density_uri=result.density_uri,
            labels_uri=result.labels_uri,
            labels_left_out=left_out,
            tilt_scheme={"tilt_step_degrees": 15},
        )
        made = (await call_operation(channel, series)).result
        levels.append(table(store, made.metrics_uri)["sigma"])
    assert levels[0] > 1.02 * levels[1]


async def test_electrons_are_counted(channel: grpc.aio.Channel, store: Store) -> None:
    scene = (await call_operation(channel, scene_request())).result
    series = (
        await call_operation(
            channel,
            pb.SimulateTiltSeriesRequest(
                density_uri=scene.density_uri,
                noise=pb.NOISE_POISSON,
                microscope={"dose_per_tilt": 0.5, "detector_mtf": False},
                tilt_scheme={"tilt_step_degrees": 30, "order": pb.TILT_ORDER_SEQUENTIAL},
            ),
        )
    ).result
    metrics = table(store, series.metrics_uri)
    noise = open_volume(store, series.tilt_series_uri).read() - open_volume(store, series.noise_free_uri).read()
    # the counts' variance is their number, so that of the contrast is its inverse
    for image, electrons in zip(noise, metrics["electrons_per_pixel"], strict=True):
        assert image.var() * electrons == pytest.approx(1, rel=0.1)
    tilts = table(store, series.tilts_uri)
    assert tilts["prior_dose"] == [0.0, 0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": pb.RECONSTRUCTION_SIRT, "iterations": 5},
        {"method": pb.RECONSTRUCTION_FOURIER},
        {"window": pb.BACK_PROJECTION_WINDOW_SIRT},
        {"ctf_correction": common_pb2.CTF_CORRECTION_PHASE_FLIP},
        {"ctf_correction": common_pb2.CTF_CORRECTION_WIENER, "dose_weighting": True, "normalise": True},
        {"contrast": common_pb2.CONTRAST_LIGHT, "split_tilts": True, "binning": 2, "size_z": 20},
    ],
)
async def test_ways_to_reconstruct(channel: grpc.aio.Channel, store: Store, changes: dict[str, Any]) -> None:
    scene = (await call_operation(channel, scene_request())).result
    series = (
        await call_operation(
            channel,
            pb.SimulateTiltSeriesRequest(density_uri=scene.density_uri, tilt_scheme={"tilt_step_degrees": 4}, snr=2),
        )
    ).result
    request = pb.ReconstructRequest(
        **{"tilt_series_uri": series.tilt_series_uri, "tilts_uri": series.tilts_uri, "size_z": SHAPE[0]} | changes
    )
    made = (await call_operation(channel, request)).result
    volume = open_volume(store, made.tomogram_uri)
    binning = changes.get("binning", 1)
    assert volume.info.voxel_size_angstrom == VOXEL * binning
    inside = open_volume(store, scene.instances_uri).read()[::binning, ::binning, ::binning] > 0
    voxels = volume.read()
    light = changes.get("contrast") == common_pb2.CONTRAST_LIGHT
    assert (voxels[inside].mean() > voxels[~inside].mean()) == light
    assert volume.info.contrast == ("light" if light else "dark")
    if changes.get("split_tilts"):
        halves = [open_volume(store, uri).read() for uri in (made.even_uri, made.odd_uri)]
        assert 0.1 < np.corrcoef(halves[0].ravel(), halves[1].ravel())[0, 1] < 0.99
    metrics = table(store, made.metrics_uri)
    assert len(metrics["sirt_residuals"]) == changes.get("iterations", 0)


async def test_a_step_that_needs_what_the_angles_lack(channel: grpc.aio.Channel, store: Store, tmp_path: Path) -> None:
    stack, tilts = f"{store.root}/default/inputs/series.mrc", f"{store.root}/default/inputs/series.tlt"
    store.put(stack, mrc_file(tmp_path, np.random.default_rng(0).normal(size=(3, 16, 16)).astype(np.float32), 10.0))
    store.put(tilts, b"-10\n0\n10\n")
    request = pb.ReconstructRequest(
        tilt_series_uri=stack, tilts_uri=tilts, size_z=16, ctf_correction=common_pb2.CTF_CORRECTION_PHASE_FLIP
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "defocus_um" in (caught.value.details() or "")
    request.defocus_um = 3.0
    await call_operation(channel, request)


@pytest.mark.parametrize("aligned", [False, True])
async def test_particles_of_another_program(
    channel: grpc.aio.Channel, store: Store, shared_data: Path, aligned: bool
) -> None:
    """Real ribosomes as Warp exported them."""
    folder = shared_data / "real" / "ribosome_70s"
    uris = {}
    for path in sorted(folder.rglob("*.*")):
        if path.is_file():
            uri = f"{store.root}/default/inputs/{path.relative_to(folder)}"
            store.put(uri, path.read_bytes())
            uris[str(path.relative_to(folder))] = uri
    stacks = [uri for name, uri in uris.items() if name.endswith(".mrcs")]
    request = pb.ReconstructSubtomogramsRequest(
        particles_uri=uris["particles.star"],
        tomograms_uri=uris["tomograms.star"],
        image_uris=stacks,
        aligned=aligned,
        opposite_hand=True,
    )
    result = (await call_operation(channel, request)).result
    boxes = open_subtomograms(store, result.subtomograms_uri)
    assert (len(boxes), boxes.info.shape, boxes.info.voxel_size_angstrom) == (20, (32, 32, 32), 12.0)
    average = boxes.read(0, 20).mean(axis=0)
    radius = np.linalg.norm(np.indices(average.shape) - 16, axis=0)
    # a ribosome of 250 Å is 10 pixels in radius, light on a background of 0
    assert average[radius < 8].mean() > 4 * abs(average[radius > 13].mean())
    if aligned:
        assert boxes.particles().rotations() is None
        assert boxes.info.tilt_min_degrees == -90
    else:
        assert boxes.particles().rotations() is not None
        # of two tomograms, from -60.5 to 54.2 and from -70.7 to 44.4 degrees, what both have
        assert boxes.info.tilt_min_degrees == pytest.approx(-60.5, abs=0.1)
        assert boxes.info.tilt_max_degrees == pytest.approx(44.4, abs=0.1)
    request.image_uris.pop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "image_uris" in (caught.value.details() or "")
