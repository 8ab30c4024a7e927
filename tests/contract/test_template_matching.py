"""Template matching and what works on lists of picks, over real gRPC: good requests, and what bad ones are told."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.fourier import gaussian
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.rotations import angular_distance_degrees, rotation_grid
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import common_pb2, picking_pb2
from cryofleet.volumes import VolumeInfo, encode_volume, open_volume
from services.picking.service import service
from services.picking.template import sphere
from tests.contract.conftest import channel_to

SHAPE = (40, 64, 72)
VOXEL = 10.0
STEP = 45.0
GRID = rotation_grid(STEP)
#: (x, y, z) and the number of the orientation.
PLANTED = [((16, 18, 20), 11), ((50, 20, 18), 60), ((30, 48, 22), 100)]
STATUS = grpc.StatusCode

channel = channel_to(service)


def density() -> NDArray[np.float32]:
    rng = np.random.default_rng(5)
    noise = gaussian(rng.standard_normal((12, 12, 12)).astype(np.float32), 1)
    return np.asarray(noise / noise.std() * sphere(12, 4), np.float32)


def put(store: Store, name: str, volume: NDArray[Any], contrast: str, size: float = VOXEL, tilt: float = 90) -> str:
    uri = f"{store.root}/default/inputs/{name}.mrc"
    info = VolumeInfo(volume.shape, size, contrast, -tilt, tilt)
    store.put(uri, encode_volume(volume.astype(np.float32), info))
    return uri


@pytest.fixture
def tomogram(store: Store) -> str:
    volume = (0.3 * np.random.default_rng(0).standard_normal(SHAPE)).astype(np.float32)
    for (x, y, z), number in PLANTED:
        volume[z - 6 : z + 6, y - 6 : y + 6, x - 6 : x + 6] -= transform_volume(density(), GRID[number])
    return put(store, "tomogram", volume, "dark")


@pytest.fixture
def template(store: Store) -> str:
    return put(store, "template", density(), "light")


def search(tomogram: str, template: str, **options: Any) -> picking_pb2.TemplateMatchRequest:
    return picking_pb2.TemplateMatchRequest(
        tomogram_uri=tomogram, template_uri=template, **{"angular_step_degrees": STEP, **options}
    )


async def refused(channel: grpc.aio.Channel, request: Any, status: grpc.StatusCode, *words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    details = caught.value.details() or ""
    assert caught.value.code() is status, details
    for word in words:
        assert word in details
    assert "\n" not in details


def table(store: Store, uri: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(store.get(uri))
    return loaded


def particles(store: Store, uri: str) -> Particles:
    return Particles.from_parquet(store.get(uri), uri)


async def test_planted_templates_are_found_with_their_orientations(
    channel: grpc.aio.Channel, store: Store, tomogram: str, template: str
) -> None:
    result = (
        await call_operation(channel, search(tomogram, template, class_name="blob", expected_false_positives=0.1))
    ).result
    picks = particles(store, result.particles_uri)
    assert result.count == len(picks) == 3
    found = {tuple(place): i for i, place in enumerate(picks.positions().astype(int).tolist())}
    rotations = picks.rotations()
    assert rotations is not None
    for place, number in PLANTED:
        assert angular_distance_degrees(rotations[found[place]], GRID[number])[0] < 1e-5
    assert set(picks.table["class_name"]) == {"blob"}
    assert (picks.table["score"] >= result.threshold).all()
    scores = open_volume(store, result.scores_uri)
    assert scores.info.shape == SHAPE
    assert scores.info.contrast == "light"
    x, y, z = PLANTED[0][0]
    assert open_volume(store, result.rotations_uri).read()[z, y, x] == PLANTED[0][1]
    assert len(particles(store, result.orientations_uri)) == result.orientations == len(GRID)
    metrics = table(store, result.metrics_uri)
    assert metrics["expected_false_positives"] == pytest.approx(0.1)
    assert metrics["particles_expected"] == pytest.approx(3, abs=1)


async def test_parts_of_a_plan_join_to_the_whole(
    channel: grpc.aio.Channel, store: Store, tomogram: str, template: str
) -> None:
    plan = (
        await call_operation(
            channel,
            picking_pb2.PlanTemplateMatchRequest(
                tomogram_uri=tomogram, template_uri=template, angular_step_degrees=STEP, orientations_per_row=60
            ),
        )
    ).result
    assert plan.rows > 1
    assert plan.orientations == len(GRID)
    options = {"plan_uri": plan.plan_uri}
    parts = [
        (
            await call_operation(
                channel, search(tomogram, template, rows=common_pb2.RowRange(first=row, count=1), **options)
            )
        ).result.match_uri
        for row in range(plan.rows)
    ]
    joined = (await call_operation(channel, picking_pb2.PickPeaksRequest(match_uris=parts))).result
    whole = (await call_operation(channel, search(tomogram, template))).result
    ours, theirs = (open_volume(store, uri).read() for uri in (joined.scores_uri, whole.scores_uri))
    assert np.abs(ours - theirs).max() < 1e-5
    np.testing.assert_array_equal(
        particles(store, joined.particles_uri).positions(), particles(store, whole.particles_uri).positions()
    )
    again = (await call_operation(channel, picking_pb2.PickPeaksRequest(match_uris=[whole.match_uri]))).result
    assert again.count == whole.count
    fewer = picking_pb2.PickPeaksRequest(match_uris=parts[1:])
    await refused(channel, fewer, STATUS.FAILED_PRECONDITION, "rows of the search are missing", "first is 0")
    twice = picking_pb2.PickPeaksRequest(match_uris=[*parts, whole.match_uri])
    await refused(channel, twice, STATUS.FAILED_PRECONDITION, "another search")
    other = search(tomogram, template, symmetry="C2", rows=common_pb2.RowRange(first=0, count=1), **options)
    await refused(channel, other, STATUS.FAILED_PRECONDITION, "orientations")
    beyond = search(tomogram, template, rows=common_pb2.RowRange(first=plan.rows, count=1), **options)
    await refused(channel, beyond, STATUS.INVALID_ARGUMENT, f"rows {plan.rows} to")


async def test_background_hand_region_and_masks(
    channel: grpc.aio.Channel, store: Store, tomogram: str, template: str
) -> None:
    region = np.zeros(SHAPE)
    region[:, :, 40:] = 1
    result = (
        await call_operation(
            channel,
            search(
                tomogram,
                template,
                subtract_background=True,
                test_handedness=True,
                region_mask_uri=put(store, "region", region, "light"),
                mask_radii_angstrom=[50, 40, 45],
                whiten=True,
                threshold=0.5,
            ),
        )
    ).result
    assert particles(store, result.particles_uri).positions().tolist() == [list(PLANTED[1][0])]
    metrics = table(store, result.metrics_uri)
    assert set(metrics["search"]["maps"]) == {"scores", "background", "mirror"}
    assert metrics["handedness"]["hand"] in ("as given", "mirrored", "undecided")
    assert (open_volume(store, result.scores_uri).read()[:, :, :40] == 0).all()


async def test_refinement_and_filters(channel: grpc.aio.Channel, store: Store, tomogram: str, template: str) -> None:
    off = Rotation.from_rotvec([0.06, -0.05, 0.03])
    given = Particles.from_positions(
        np.array([place for place, _ in PLANTED]) + 0.6,
        VOXEL,
        "t",
        SHAPE,
        GRID[[number for _, number in PLANTED]] * off,
        score=[0.1, 0.2, 0.3],
        class_name=np.array(["a", "b", "a"], object),
    )
    uri = f"{store.root}/default/inputs/given.parquet"
    store.put(uri, given.to_parquet())
    request = picking_pb2.RefinePicksRequest(tomogram_uri=tomogram, particles_uri=uri, template_uri=template)
    refined = particles(store, (await call_operation(channel, request)).result.particles_uri)
    assert np.abs(refined.positions() - [place for place, _ in PLANTED]).max() < 0.3
    rotations = refined.rotations()
    assert rotations is not None
    # less than half a voxel at the template's radius of 4
    assert angular_distance_degrees(GRID[[number for _, number in PLANTED]], rotations).max() < 7

    async def kept(**options: Any) -> list[int]:
        filtering = picking_pb2.FilterParticlesRequest(particles_uris=[uri], **options)
        result = (await call_operation(channel, filtering)).result
        rows: list[int] = particles(store, result.particles_uri).table["id"].tolist()
        assert result.removed == 3 - len(rows)
        return rows

    objects = np.zeros(SHAPE)
    objects[20, 18, 30] = 1
    segmentation = put(store, "objects", objects, "light")
    assert await kept(score_min=0.15) == [1, 2]
    assert await kept(class_names=["a"]) == [0, 2]
    assert await kept(segmentation_uri=segmentation, segmentation_distance_max_angstrom=140) == [0]
    assert await kept(segmentation_uri=segmentation, segmentation_distance_min_angstrom=140) == [1, 2]
    assert await kept(border_angstrom=140) == [0, 1, 2]
    assert await kept(border_angstrom=180) == [1]
    assert await kept(min_distance_angstrom=350) == [2]
    assert await kept(min_distance_angstrom=350, within_class=True) == [1, 2]
    assert await kept(max_particles=1) == [2]
    assert await kept(score_min=0.25, expected_false_positives=1) == [2]
    few = picking_pb2.FilterParticlesRequest(particles_uris=[uri], expected_false_positives=1)
    await refused(channel, few, STATUS.FAILED_PRECONDITION, "3 separate peaks, too few")


async def test_a_membrane_and_a_grid_are_sampled(channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
    z, y, x = np.indices(SHAPE)
    radius = np.sqrt((x - 36) ** 2 + (y - 32) ** 2 + (z - 20) ** 2)
    membrane = put(store, "membrane", np.abs(radius - 14) < 1.6, "light")
    request = picking_pb2.SampleSurfaceRequest(segmentation_uri=membrane, spacing_angstrom=50, smoothing_angstrom=15)
    picks = particles(store, (await call_operation(channel, request)).result.particles_uri)
    away = picks.positions() - [36, 32, 20]
    rotations = picks.rotations()
    assert rotations is not None
    assert np.abs(np.linalg.norm(away, axis=1) - 14).max() < 0.5
    assert ((rotations.apply([0, 0, 1]) * away).sum(axis=1) > 0.99 * np.linalg.norm(away, axis=1)).all()
    grid = picking_pb2.SampleGridRequest(tomogram_uri=tomogram, spacing_angstrom=100, mask_uri=membrane)
    places = particles(store, (await call_operation(channel, grid)).result.particles_uri).positions()
    assert (np.abs(np.linalg.norm(places - [36, 32, 20], axis=1) - 14) < 3).all()
    empty = picking_pb2.SampleSurfaceRequest(
        segmentation_uri=put(store, "empty", np.zeros(SHAPE), "light"), spacing_angstrom=50
    )
    await refused(channel, empty, STATUS.FAILED_PRECONDITION, "no surface")


async def test_saliency_gives_picks_and_volumes(channel: grpc.aio.Channel, store: Store) -> None:
    volume = 0.2 * np.random.default_rng(1).standard_normal((40, 64, 72))
    z, y, x = np.indices(volume.shape)
    centres = [(18, 18, 20), (52, 24, 18), (34, 46, 22)]
    for a, b, c in centres:
        volume[(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 <= 25] -= 1
    request = picking_pb2.SaliencyRequest(
        tomogram_uri=put(store, "dots", volume, "dark"), particle_diameter_angstrom=100, max_picks=3
    )
    result = (await call_operation(channel, request)).result
    picks = particles(store, result.particles_uri).positions()
    assert result.supervoxels > 50
    assert all(np.linalg.norm(picks - centre, axis=1).min() < 3 for centre in centres)
    suppressed = open_volume(store, result.suppressed_uri)
    assert suppressed.info.shape == (40, 64, 72)
    assert suppressed.info.contrast == "dark"
    assert open_volume(store, result.saliency_uri).read().min() >= 0


async def test_a_range_of_sizes_and_a_preview(channel: grpc.aio.Channel, store: Store) -> None:
    volume = 0.05 * np.random.default_rng(1).standard_normal((40, 64, 72))
    z, y, x = np.indices(volume.shape)
    for (a, b, c), radius in (((18, 18, 20), 4), ((48, 36, 20), 8)):
        volume[(x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 <= radius**2] -= 1
    uri = put(store, "balls", volume, "dark")
    request = picking_pb2.DifferenceOfGaussiansRequest(
        tomogram_uri=uri, particle_diameter_angstrom=70, particle_diameter_max_angstrom=180, threshold=6
    )
    result = (await call_operation(channel, request)).result
    picks = particles(store, result.particles_uri)
    sizes = dict(zip(map(tuple, picks.positions().astype(int).tolist()), picks.table["diameter_angstrom"], strict=True))
    # to a scale step, a quarter of an octave
    assert sizes[(18, 18, 20)] == pytest.approx(80, rel=0.2)
    assert sizes[(48, 36, 20)] == pytest.approx(160, rel=0.2)
    assert result.particle_diameter_angstrom in set(picks.table["diameter_angstrom"])
    preview = picking_pb2.DifferenceOfGaussiansRequest(
        tomogram_uri=uri, particle_diameter_angstrom=80, threshold=4, preview_z=20, preview_planes=6
    )
    seen = particles(store, (await call_operation(channel, preview)).result.particles_uri).positions()
    assert (18, 18, 20) in {tuple(place) for place in seen.astype(int).tolist()}
    assert ((seen[:, 2] >= 17) & (seen[:, 2] < 23)).all()
    preview.preview_z = 40
    await refused(channel, preview, STATUS.INVALID_ARGUMENT, "preview_z is 40", "planes 0 to 39")


async def test_evaluation_by_volume_class_and_angle(channel: grpc.aio.Channel, store: Store) -> None:
    rotations = Rotation.random(3, rng=np.random.default_rng(0))
    truth = Particles.from_positions(
        [[10, 10, 10], [30, 10, 10], [50, 10, 10]], VOXEL, "t", SHAPE, rotations, class_name=["a", "a", "b"]
    )
    turn = Rotation.from_rotvec([0, 0, np.pi / 2])
    picks = Particles.from_positions(
        [[11, 10, 10], [34, 10, 10], [50, 11, 10], [60, 60, 30]],
        VOXEL,
        "t",
        SHAPE,
        Rotation.concatenate([rotations[0] * turn, rotations[1], rotations[2], rotations[0]]),
        class_name=["a", "a", "a", "b"],
        score=[4.0, 3.0, 2.0, 1.0],
    )
    uris = []
    for name, rows in (("truth", truth), ("picks", picks)):
        uris.append(f"{store.root}/default/inputs/{name}.parquet")
        store.put(uris[-1], rows.to_parquet())
    instances = np.zeros(SHAPE)
    for number, (x, y, z) in enumerate(truth.positions().astype(int)):
        instances[z - 5 : z + 6, y - 5 : y + 6, x - 5 : x + 6] = number + 1
    request = picking_pb2.EvaluateRequest(
        particles_uri=uris[1],
        truth_uri=uris[0],
        distance_angstrom=25,
        symmetries=[picking_pb2.ClassSymmetry(class_name="a", symmetry="C4")],
    )
    near = (await call_operation(channel, request)).result
    assert (near.matched, near.precision) == (2, 0.5)
    assert near.average_precision == pytest.approx((1 + 2 / 3) / 3)
    assert near.median_angular_error_degrees == pytest.approx(0, abs=1e-5)
    metrics = table(store, near.metrics_uri)
    assert {entry["class"]: entry["f1"] for entry in metrics["by_class"]} == {"a": pytest.approx(0.4), "b": 0}
    assert metrics["confusion"]["a"] == {"a": 1, "none": 1, "b": 1}
    request.instances_uri = put(store, "instances", instances, "light")
    inside = (await call_operation(channel, request)).result
    assert inside.matched == 3
    assert table(store, inside.metrics_uri)["matched_by"] == "volume"
    request.class_names.append("c")
    await refused(channel, request, STATUS.INVALID_ARGUMENT, "no particles of class 'c'")


async def test_what_cannot_work_is_said(channel: grpc.aio.Channel, store: Store, tomogram: str, template: str) -> None:
    mismatch = put(store, "coarse", density(), "light", 10.2)
    await refused(channel, search(tomogram, mismatch), STATUS.FAILED_PRECONDITION, "10.2 Å", "of 10 Å")
    await call_operation(channel, search(tomogram, put(store, "close", density(), "light", 10.05)))
    large = put(store, "large", np.random.default_rng(0).random((44, 44, 44)), "light")
    await refused(channel, search(tomogram, large), STATUS.INVALID_ARGUMENT, "larger than the tomogram")
    zero = put(store, "zero", np.zeros((12, 12, 12)), "light")
    masked = search(tomogram, template, mask_uri=zero)
    await refused(channel, masked, STATUS.INVALID_ARGUMENT, "the mask is zero everywhere")
    small = put(store, "small", np.ones((8, 8, 8)), "light")
    await refused(channel, search(tomogram, template, mask_uri=small), STATUS.INVALID_ARGUMENT, "must be the same")
    await refused(channel, search(tomogram, template, symmetry="Q7"), STATUS.INVALID_ARGUMENT, "symmetry")
    lying = search(tomogram, template, symmetry="C2")
    await refused(channel, lying, STATUS.INVALID_ARGUMENT, "symmetry C2: the template correlates only")
    await refused(channel, search(tomogram, template, mask_radii_angstrom=[1, 2]), STATUS.INVALID_ARGUMENT, "mask")
    flat = put(store, "flat", np.ones(SHAPE), "dark")
    await refused(channel, search(flat, template), STATUS.FAILED_PRECONDITION, "constant")
    spoilt = f"{store.root}/default/inputs/spoilt.mrc"
    data = bytearray(store.get(tomogram))
    data[2000:2004] = np.array([np.nan], np.float32).tobytes()
    store.put(spoilt, bytes(data))
    await refused(channel, search(spoilt, template), STATUS.FAILED_PRECONDITION, "not finite", "planes 0")
    await refused(channel, search(tomogram, tomogram), STATUS.INVALID_ARGUMENT, "must be a cube")
    alone = picking_pb2.PickPeaksRequest(match_uris=[put(store, "no", density(), "light")])
    await refused(channel, alone, STATUS.INVALID_ARGUMENT, "not JSON")
