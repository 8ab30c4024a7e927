"""The picking service over real gRPC: what it gives, and what it says to requests that can't work."""

from __future__ import annotations

import json

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from numpy.typing import NDArray

from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import Reply, call_operation
from cryofleet.v1 import common_pb2, picking_pb2
from cryofleet.volumes import Subtomograms, VolumeInfo, encode_volume, open_subtomograms
from services.picking.service import service
from tests.contract.conftest import channel_to

VOXEL = 10.0
SHAPE = (36, 48, 52)
DIAMETER = 80.0
#: (x, y, z), strongest first, and one whose box of 16 leaves the tomogram
PLANTED = np.array([[14, 12, 18], [38, 30, 20], [16, 34, 9], [5, 24, 26]])

STATUS = grpc.StatusCode

channel = channel_to(service)


def voxels() -> NDArray[np.float32]:
    """Dark blobs of falling depth in weak noise."""
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    volume = 0.02 * np.random.default_rng(0).standard_normal(SHAPE)
    for depth, centre in zip((4.0, 3.0, 2.0, 1.0), PLANTED, strict=True):
        square = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        volume -= depth * np.exp(-square / (2 * 2.3**2))
    return volume.astype(np.float32)


def put_volume(store: Store, name: str, volume: NDArray[np.float32], contrast: str = "dark") -> str:
    uri = f"{store.root}/default/inputs/{name}.mrc"
    info = VolumeInfo(volume.shape[-3:], VOXEL, contrast, -60, 60, None if volume.ndim == 3 else len(volume))
    store.put(uri, encode_volume(volume, info))
    return uri


def put_particles(store: Store, name: str, particles: Particles) -> str:
    uri = f"{store.root}/default/inputs/{name}.parquet"
    store.put(uri, particles.to_parquet())
    return uri


@pytest.fixture
def tomogram(store: Store) -> str:
    return put_volume(store, "tomogram", voxels())


@pytest.fixture
def truth(store: Store) -> str:
    classes = ["ring", "ring", "ball", "ball"]
    return put_particles(
        store, "truth", Particles.from_positions(PLANTED, VOXEL, "t", SHAPE, class_name=np.array(classes, object))
    )


def dog(tomogram: str, **options: object) -> picking_pb2.DifferenceOfGaussiansRequest:
    return picking_pb2.DifferenceOfGaussiansRequest(
        tomogram_uri=tomogram,
        particle_diameter_angstrom=DIAMETER,
        **{"threshold": 4.0, **options},  # type: ignore[arg-type]
    )


def extraction(tomogram: str, particles: str, box: int = 16, **options: object) -> picking_pb2.ExtractRequest:
    return picking_pb2.ExtractRequest(
        tomogram_uri=tomogram,
        particles_uri=particles,
        box_size_voxels=box,
        **options,  # type: ignore[arg-type]
    )


async def refused(channel: grpc.aio.Channel, request: Message, status: grpc.StatusCode, *words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_operation(channel, request)
    details = caught.value.details() or ""
    assert caught.value.code() is status, details
    for word in words:
        assert word in details
    assert "\n" not in details


async def picks_of(channel: grpc.aio.Channel, store: Store, request: Message) -> Particles:
    reply = await call_operation(channel, request)
    particles = Particles.from_parquet(store.get(reply.result.particles_uri))
    assert reply.result.count == len(particles)
    return particles


async def extracted(channel: grpc.aio.Channel, store: Store, request: Message) -> tuple[Reply, Subtomograms]:
    reply = await call_operation(channel, request)
    return reply, open_subtomograms(store, reply.result.subtomograms_uri)


class TestDifferenceOfGaussians:
    async def test_planted_particles_are_picked(self, channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
        picks = await picks_of(channel, store, dog(tomogram))
        np.testing.assert_array_equal(picks.positions(), PLANTED)
        assert (np.diff(picks.table["score"]) < 0).all()
        assert picks.voxel_size_angstrom == VOXEL
        assert picks.tomogram_shape == SHAPE
        assert picks.table["id"].tolist() == [0, 1, 2, 3]

    async def test_parameters_do_what_they_say(self, channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
        best = await picks_of(channel, store, dog(tomogram, max_picks=2))
        np.testing.assert_array_equal(best.positions(), PLANTED[:2])
        # the third and fourth lie within 260 Å of the first
        far = await picks_of(channel, store, dog(tomogram, min_distance_angstrom=260.0))
        np.testing.assert_array_equal(far.positions(), PLANTED[:2])
        other = await picks_of(channel, store, dog(tomogram, contrast=common_pb2.CONTRAST_LIGHT))
        assert not {*map(tuple, other.positions())} & {*map(tuple, PLANTED)}

    async def test_too_few_picks_say_what_is_likely_wrong(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str
    ) -> None:
        wrong = dog(tomogram, contrast=common_pb2.CONTRAST_LIGHT, threshold=6.0)
        reply = await call_operation(channel, wrong)
        assert reply.result.count == 0
        assert "if protein is dark in it, give contrast=dark" in reply.result.advice
        wrong.min_picks = 2
        await refused(channel, wrong, STATUS.FAILED_PRECONDITION, "0 picks with contrast light", "give contrast=dark")
        right = dog(tomogram, min_picks=5)
        await refused(channel, right, STATUS.FAILED_PRECONDITION, "4 picks with contrast dark", "the diameter may be")
        assert not (await call_operation(channel, dog(tomogram))).result.advice

    async def test_the_tomogram_s_contrast_counts_where_none_is_given(
        self, channel: grpc.aio.Channel, store: Store
    ) -> None:
        light = put_volume(store, "light", -voxels(), "light")
        np.testing.assert_array_equal((await picks_of(channel, store, dog(light))).positions(), PLANTED)

    async def test_tables_name_the_tomogram_by_its_content(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str
    ) -> None:
        again = put_volume(store, "copy", voxels())
        other = put_volume(store, "other", voxels() * 2)
        names = [(await picks_of(channel, store, dog(uri))).tomogram for uri in (tomogram, again, other)]
        assert names[0] == names[1] != names[2]

    async def test_bad_requests(self, channel: grpc.aio.Channel, store: Store, tomogram: str) -> None:
        small = picking_pb2.DifferenceOfGaussiansRequest(tomogram_uri=tomogram, particle_diameter_angstrom=15)
        await refused(channel, small, STATUS.INVALID_ARGUMENT, "particle_diameter_angstrom", "2 voxels")
        large = picking_pb2.DifferenceOfGaussiansRequest(tomogram_uri=tomogram, particle_diameter_angstrom=400)
        await refused(channel, large, STATUS.INVALID_ARGUMENT, "particle_diameter_angstrom", "36 voxels")
        await refused(channel, dog(tomogram, sigma_ratio=1.0), STATUS.INVALID_ARGUMENT, "sigma_ratio")
        gone = f"{store.root}/default/inputs/gone.mrc"
        await refused(channel, dog(gone), STATUS.NOT_FOUND, gone)
        flat = put_volume(store, "flat", np.zeros(SHAPE, np.float32))
        await refused(channel, dog(flat), STATUS.FAILED_PRECONDITION, "constant")
        stack = put_volume(store, "stack", np.random.default_rng(0).random((2, 12, 12, 12), np.float32))
        await refused(channel, dog(stack), STATUS.FAILED_PRECONDITION, "stack of 2 boxes")


class TestExtract:
    async def test_boxes_and_their_particles(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str, truth: str
    ) -> None:
        none = picking_pb2.NORMALISATION_NONE
        reply, found = await extracted(channel, store, extraction(tomogram, truth, normalisation=none))
        assert (reply.result.count, reply.result.skipped) == (3, 1)
        assert (found.count, found.box_size) == (3, 16)
        assert found.info == VolumeInfo((16, 16, 16), VOXEL, "dark", -60, 60)
        particles = found.particles()
        np.testing.assert_array_equal(particles.positions(), PLANTED[:3])
        assert particles.table["class_name"].tolist() == ["ring", "ring", "ball"]
        volume = voxels()
        for (x, y, z), box in zip(PLANTED, found.read(0, 3), strict=False):
            np.testing.assert_array_equal(box, volume[z - 8 : z + 8, y - 8 : y + 8, x - 8 : x + 8])

    async def test_boxes_are_normalised_unless_told_otherwise(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str, truth: str
    ) -> None:
        _, found = await extracted(channel, store, extraction(tomogram, truth))
        boxes = found.read(0, 3).astype(np.float64)
        np.testing.assert_allclose(boxes.mean(axis=(1, 2, 3)), 0, atol=1e-6)
        np.testing.assert_allclose(boxes.std(axis=(1, 2, 3)), 1, atol=1e-6)

    async def test_edges_can_be_filled_and_rows_chosen(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str, truth: str
    ) -> None:
        reply, found = await extracted(
            channel,
            store,
            extraction(
                tomogram,
                truth,
                rows=common_pb2.RowRange(first=2, count=2),
                edges=picking_pb2.EDGE_POLICY_FILL_MEAN,
            ),
        )
        assert (reply.result.count, reply.result.skipped) == (2, 0)
        assert found.particles().table["id"].tolist() == [2, 3]

    async def test_where_the_particle_is_survives_rounding_shifts_and_another_voxel_size(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str
    ) -> None:
        # picked in voxels twice as wide, and moved by an alignment
        picked = Particles.from_positions([[7.1, 6.2, 9.3]], 2 * VOXEL, "t").with_columns(
            shift_x=[0.2], shift_y=[-0.1], shift_z=[0.0]
        )
        uri = put_particles(store, "coarse", picked)
        _, found = await extracted(channel, store, extraction(tomogram, uri, box=8, binning=2))
        particles = found.particles()
        assert found.info.voxel_size_angstrom == 2 * VOXEL
        assert particles.voxel_size_angstrom == VOXEL
        np.testing.assert_array_equal(particles.positions(), [[15, 12, 19]])
        np.testing.assert_allclose(particles.positions() + particles.shifts(), [[14.6, 12.2, 18.6]], atol=1e-9)

    async def test_bad_requests(self, channel: grpc.aio.Channel, store: Store, tomogram: str, truth: str) -> None:
        await refused(
            channel, extraction(tomogram, truth, box=64), STATUS.INVALID_ARGUMENT, "box of 64", "52 x 48 x 36"
        )
        await refused(channel, extraction(tomogram, truth, box=2), STATUS.INVALID_ARGUMENT, "box_size_voxels")
        rows = common_pb2.RowRange(first=3, count=2)
        await refused(
            channel, extraction(tomogram, truth, rows=rows), STATUS.INVALID_ARGUMENT, "rows 3 to 4", "rows 0 to 3"
        )
        empty = put_particles(store, "empty", Particles.from_positions(np.empty((0, 3)), VOXEL))
        await refused(channel, extraction(tomogram, empty), STATUS.FAILED_PRECONDITION, empty, "no particles")
        edge = put_particles(store, "edge", Particles.from_positions([[1, 1, 1]], VOXEL))
        await refused(channel, extraction(tomogram, edge), STATUS.FAILED_PRECONDITION, "none of the 1 particles")
        other = put_particles(store, "other", Particles.from_positions(PLANTED, VOXEL, "t", (40, 48, 52)))
        await refused(channel, extraction(tomogram, other), STATUS.FAILED_PRECONDITION, "not its particles")
        several = Particles.concat(
            [Particles.from_positions(PLANTED, VOXEL, name, id=PLANTED[:, 0]) for name in ("a", "b")]
        )
        mixed = put_particles(store, "mixed", several)
        await refused(channel, extraction(tomogram, mixed), STATUS.FAILED_PRECONDITION, "2 tomograms")
        await refused(channel, extraction(tomogram, tomogram), STATUS.INVALID_ARGUMENT, tomogram, "Parquet")


class TestMerging:
    async def test_a_shard_wholly_at_the_edges_is_empty_and_joins_the_others(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str
    ) -> None:
        mixed = put_particles(store, "mixed", Particles.from_positions([[1, 1, 1], [20, 20, 20]], VOXEL))
        parts = [
            (await extracted(channel, store, extraction(tomogram, mixed, rows=common_pb2.RowRange(first=i, count=1))))[
                0
            ]
            for i in (0, 1)
        ]
        assert [(reply.result.count, reply.result.skipped) for reply in parts] == [(0, 1), (1, 0)]
        uris = [reply.result.subtomograms_uri for reply in parts]
        reply, merged = await extracted(channel, store, picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=uris))
        assert reply.result.count == len(merged.read(0, 1)) == 1
        nothing = picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=uris[:1])
        await refused(channel, nothing, STATUS.FAILED_PRECONDITION, "none of the 1 sets", uris[0])

    async def test_shards_of_an_extraction_become_the_whole(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str, truth: str
    ) -> None:
        fill = picking_pb2.EDGE_POLICY_FILL_MEAN
        _, whole = await extracted(channel, store, extraction(tomogram, truth, edges=fill))
        parts = [
            (await extracted(channel, store, extraction(tomogram, truth, edges=fill, rows=rows)))[0]
            for rows in (common_pb2.RowRange(first=0, count=3), common_pb2.RowRange(first=3, count=1))
        ]
        uris = [reply.result.subtomograms_uri for reply in parts]
        reply, merged = await extracted(channel, store, picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=uris))
        assert reply.result.count == 4
        np.testing.assert_array_equal(merged.read(0, 4), whole.read(0, 4))
        assert merged.particles().table.equals(whole.particles().table)
        assert merged.info == whole.info
        # the boxes were not copied
        folder = reply.result.subtomograms_uri.rpartition("/")[0]
        assert not [stat.uri for stat in store.list(folder) if stat.uri.endswith(".mrc")]

    async def test_sets_that_do_not_fit(
        self, channel: grpc.aio.Channel, store: Store, tomogram: str, truth: str
    ) -> None:
        uris = [
            (await call_operation(channel, extraction(tomogram, truth, box=box))).result.subtomograms_uri
            for box in (12, 16)
        ]
        merge = picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=uris)
        await refused(channel, merge, STATUS.FAILED_PRECONDITION, "box size", *uris)
        twice = picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=uris[:1] * 2)
        await refused(channel, twice, STATUS.FAILED_PRECONDITION, "particle 0 is in")
        nothing = picking_pb2.MergeSubtomogramsRequest()
        await refused(channel, nothing, STATUS.INVALID_ARGUMENT, "subtomograms_uris")
        wrong = picking_pb2.MergeSubtomogramsRequest(subtomograms_uris=[truth])
        await refused(channel, wrong, STATUS.INVALID_ARGUMENT, truth)

    async def test_tables_are_joined_in_order(self, channel: grpc.aio.Channel, store: Store) -> None:
        uris = [
            put_particles(store, name, Particles.from_positions(PLANTED[rows], VOXEL, "t", SHAPE, id=ids))
            for name, rows, ids in (("b", [2, 3], [7, 5]), ("a", [0], [6]))
        ]
        joined = await picks_of(channel, store, picking_pb2.MergeParticlesRequest(particles_uris=uris))
        assert joined.table["id"].tolist() == [7, 5, 6]
        np.testing.assert_array_equal(joined.positions(), PLANTED[[2, 3, 0]])
        coarse = put_particles(store, "coarse", Particles.from_positions(PLANTED, 2 * VOXEL))
        request = picking_pb2.MergeParticlesRequest(particles_uris=[uris[0], coarse])
        await refused(channel, request, STATUS.INVALID_ARGUMENT, "voxels of 20")


class TestEvaluate:
    async def test_figures(self, channel: grpc.aio.Channel, store: Store, truth: str) -> None:
        # in voxels half as wide: two hits, 20 and 0 Å off, and two misses
        positions = 2 * PLANTED[[0, 1, 2]] + np.array([[4, 0, 0], [0, 0, 0], [30, 0, 0]])
        positions = np.concatenate([positions, [[0, 0, 0]]])
        picks = put_particles(store, "picks", Particles.from_positions(positions, VOXEL / 2))
        reply = await call_operation(
            channel, picking_pb2.EvaluateRequest(particles_uri=picks, truth_uri=truth, distance_angstrom=20)
        )
        assert (reply.result.matched, reply.result.precision, reply.result.recall) == (2, 0.5, 0.5)
        assert reply.result.f1 == 0.5
        metrics = json.loads(store.get(reply.result.metrics_uri))
        assert metrics["matched_distance_angstrom"] == {"mean": 10.0, "median": 10.0, "max": 20.0}
        assert {score["class"]: score["recall"] for score in metrics["classes"]} == {"ring": 1.0, "ball": 0.0}

    async def test_no_picks_and_no_truth(self, channel: grpc.aio.Channel, store: Store, truth: str) -> None:
        empty = put_particles(store, "empty", Particles.from_positions(np.empty((0, 3)), VOXEL))
        request = picking_pb2.EvaluateRequest(particles_uri=empty, truth_uri=truth, distance_angstrom=50)
        result = (await call_operation(channel, request)).result
        assert (result.precision, result.recall, result.f1, result.matched) == (0, 0, 0, 0)
        request = picking_pb2.EvaluateRequest(particles_uri=truth, truth_uri=empty, distance_angstrom=50)
        await refused(channel, request, STATUS.FAILED_PRECONDITION, empty, "no particles")
        request = picking_pb2.EvaluateRequest(particles_uri=truth, truth_uri=truth)
        await refused(channel, request, STATUS.INVALID_ARGUMENT, "distance_angstrom")
