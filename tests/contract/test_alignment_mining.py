"""Mining over real gRPC: half sets and clusters, sums of classes in shards, reassigning by them, classes that last."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest

from cryofleet.numerics.rotations import angular_distance_degrees
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.v1 import common_pb2
from cryofleet.volumes import open_volume
from services.alignment.service import service
from tests.contract.alignment_inputs import (
    BOX,
    WEDGE,
    particles_at,
    posed,
    put_file,
    put_particles,
    put_subtomograms,
    refused,
)
from tests.contract.conftest import channel_to
from tests.unit.alignment.samples import Sample, asymmetric, sample

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
COUNT = 12

channel = channel_to(service)


@pytest.fixture(scope="module")
def data() -> Sample:
    return sample(asymmetric(1), BOX, COUNT, 1.0, wedge=WEDGE)


async def result_of(channel: grpc.aio.Channel, request: Any) -> Any:
    return (await call_operation(channel, request, timeout=120)).result


def rows(first: int, count: int) -> common_pb2.RowRange:
    return common_pb2.RowRange(first=first, count=count)


async def test_clusters_get_half_sets_and_lose_their_poses(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    clusters = np.repeat([3, 1, 0], [7, 4, 1])
    table = posed(data.rotations, data.shifts).with_columns(class_id=clusters)
    request = pb.DivideParticlesRequest(
        subtomograms_uri=subtomograms, particles_uri=put_particles(store, "clusters", table), min_particles=3, seed=5
    )
    result = await result_of(channel, request)
    assert list(result.sizes) == [7, 5]
    every = particles_at(store, result.particles_uri)
    assert every.rotations() is None
    assert every.table["id"].tolist() == list(range(100, 112))
    assert sorted(every.table["half"]) == [1] * 6 + [2] * 6
    parts = [particles_at(store, uri).table for uri in result.cluster_uris]
    assert [part["id"].tolist() for part in parts] == [list(range(100, 107)), list(range(107, 112))]
    # Half sets stay what they were.
    request.particles_uri = put_particles(store, "halves", table.with_columns(half=np.repeat([2, 1], 6)))
    kept = particles_at(store, (await result_of(channel, request)).particles_uri)
    assert kept.table["half"].tolist() == [2] * 6 + [1] * 6
    request.particles_uri = ""
    assert list((await result_of(channel, request)).sizes) == [12]


async def test_shards_of_a_reassignment_do_what_one_call_does(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    labels = np.array([0, 1, 0, 1, 0, 1, -1, 1, 0, 1, 0, 1])
    table = posed(data.rotations, data.shifts).with_columns(class_id=labels, half=1 + np.arange(COUNT) // 2 % 2)
    particles = put_particles(store, "sorted", table)

    async def summed(first: int, count: int) -> str:
        request = pb.SumClassesRequest(
            subtomograms_uri=subtomograms, particles_uri=particles, rows=rows(first, count), symmetry="c1"
        )
        return str((await result_of(channel, request)).sums_uri)

    shards = [await summed(0, 5), await summed(5, 4), await summed(9, 3)]
    made = await result_of(channel, pb.AverageClassesRequest(sums_uris=shards, particle_diameter_angstrom=180))
    assert list(made.sizes) == [5, 6]
    average = open_volume(store, made.average_uris[1])
    assert average.info.contrast == "dark"
    truth = -asymmetric(1).volume(BOX)
    assert np.corrcoef(average.read().ravel(), truth.ravel())[0, 1] > 0.7
    curve = json.loads(store.get(made.fsc_uris[1]))
    assert curve["particles"] == 6
    assert curve["resolution_angstrom"] == pytest.approx(made.resolutions_angstrom[1])

    whole = pb.ReassignRequest(
        subtomograms_uri=subtomograms, particles_uri=particles, max_candidates=6, make_averages=False
    )
    expected = particles_at(store, (await result_of(channel, whole)).particles_uri)
    whole.sums_uri = made.sums_uri
    parts = []
    for first, count in ((0, 7), (7, 5)):
        whole.rows.CopyFrom(rows(first, count))
        parts.append((await result_of(channel, whole)).particles_uri)
    settled = await result_of(
        channel,
        pb.SettleClassesRequest(particles_uris=parts, before_uri=particles, min_particles=2, max_changed=1),
    )
    found = particles_at(store, settled.particles_uri)
    assert found.table["id"].tolist() == expected.table["id"].tolist()
    assert found.table["half"].tolist() == table.table["half"].tolist()
    np.testing.assert_allclose(found.table["score"], expected.table["score"], atol=1e-3)
    turned, straight = found.rotations(), expected.rotations()
    assert turned is not None
    assert straight is not None
    assert np.median(angular_distance_degrees(straight, turned)) < 0.1
    shared = np.zeros((2, 2), dtype=int)
    np.add.at(shared, (expected.table["class_id"].to_numpy(), found.table["class_id"].to_numpy()), 1)
    assert max(np.trace(shared), np.trace(shared[::-1])) == COUNT

    # Sums of another table, or of one that was imaged otherwise, say nothing of these particles.
    whole.particles_uri = put_particles(store, "other", table.with_columns(class_id=np.zeros(COUNT, dtype=np.int64)))
    await refused(channel, whole, INVALID, "sums.npz", "other.parquet", "same arguments")
    whole.particles_uri = particles
    whole.symmetry = "C2"
    await refused(channel, whole, INVALID, "sums.npz", "symmetric")
    whole.average_uris.append(made.average_uris[0])
    await refused(channel, whole, INVALID, "give average_uris or sums_uri, not both")
    missing = pb.AverageClassesRequest(sums_uris=shards[:2])
    await refused(channel, missing, INVALID, "ends with row 8, but there are 12 particles")
    missing.sums_uris[:] = [put_file(store, "no-sums", b"something else")]
    await refused(channel, missing, INVALID, "no-sums is no file of arrays")


async def test_tables_of_classes_become_one_and_nothing_is_lost(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    halves = 1 + np.arange(COUNT) % 2
    before = posed(data.rotations, data.shifts).with_columns(class_id=np.repeat([0, 1], 6), half=halves)
    plain = before.without_columns("qx", "qy", "qz", "qw", "shift_x", "shift_y", "shift_z")
    # One class of a cluster ended empty, one is too small, and the last two particles are in no table.
    tables = [before.select(np.arange(12) // 4 == k) for k in range(2)]
    tables += [before.select(np.zeros(12, dtype=bool)), before.select([8, 9])]
    request = pb.SettleClassesRequest(
        particles_uris=[put_particles(store, f"table{k}", table) for k, table in enumerate(tables)],
        before_uri=put_particles(store, "before", plain),
        class_per_table=True,
        min_particles=4,
        max_changed=0.1,
    )
    result = await result_of(channel, request)
    found = particles_at(store, result.particles_uri)
    assert found.table["id"].tolist() == list(range(100, 112))
    assert found.table["class_id"].tolist() == [0] * 4 + [1] * 4 + [-1] * 4
    assert found.table["half"].tolist() == halves.tolist()
    assert (result.classes, result.dissolved, result.unassigned) == (2, 1, 4)
    # Two of the first class went to the second, and four to none.
    assert result.changed == 6
    assert not result.stable
    np.testing.assert_allclose(found.shifts()[:10], before.shifts()[:10])
    members = [particles_at(store, uri).table["id"].tolist() for uri in result.class_particles_uris]
    assert members == [list(range(100, 104)), list(range(104, 108))]
    assert json.loads(store.get(result.table_uri))["unassigned"] == 4

    again = pb.SettleClassesRequest(
        particles_uris=[result.particles_uri], before_uri=result.particles_uri, min_particles=4, max_changed=0
    )
    settled = await result_of(channel, again)
    assert settled.stable
    assert settled.changed == 0
    assert settled.unassigned == 4


async def test_requests_that_can_not_be_met_name_what_is_wrong(
    channel: grpc.aio.Channel, store: Store, data: Sample
) -> None:
    subtomograms = put_subtomograms(store, "a" * 64, data.particles)
    plain = posed(data.rotations, data.shifts)
    table = plain.with_columns(class_id=np.zeros(COUNT, dtype=np.int64), half=1 + np.arange(COUNT) % 2)
    good = put_particles(store, "good", table)

    def summing(name: str, particles: Any) -> pb.SumClassesRequest:
        return pb.SumClassesRequest(subtomograms_uri=subtomograms, particles_uri=put_particles(store, name, particles))

    await refused(channel, summing("classless", plain), PRECONDITION, "classless.parquet", "class_id")
    await refused(channel, summing("whole", table.without_columns("half")), PRECONDITION, "half set 1 or 2")
    await refused(channel, summing("none", table.with_columns(class_id=-1)), PRECONDITION, "no particle in any class")
    unposed = table.without_columns("qx", "qy", "qz", "qw")
    await refused(channel, summing("unposed", unposed), PRECONDITION, "unposed.parquet holds no rotations")
    broken = data.particles.copy()
    broken[2] = 3.0
    constant = summing("constant", table)
    constant.subtomograms_uri = put_subtomograms(store, "b" * 64, broken)
    await refused(channel, constant, INVALID, "particle 102 is constant")

    one_sided = await result_of(channel, summing("one-sided", table.with_columns(half=1)))
    averaging = pb.AverageClassesRequest(sums_uris=[one_sided.sums_uri])
    await refused(channel, averaging, PRECONDITION, "class 0 has no particle in one of its half sets")

    stranger = table.select([0]).with_columns(id=7)
    settling = pb.SettleClassesRequest(particles_uris=[put_particles(store, "stranger", stranger)], before_uri=good)
    await refused(channel, settling, INVALID, "particle 7", "stranger.parquet")
    settling.particles_uris[:] = [good, good]
    await refused(channel, settling, INVALID, "particle 100 is in the tables more than once")
    settling.particles_uris[:] = [good]
    settling.min_particles = 13
    await refused(channel, settling, PRECONDITION, "none of the 1 classes has 13 particles")
    settling.particles_uris[:] = [put_particles(store, "halfless", table.without_columns("half"))]
    await refused(channel, settling, PRECONDITION, "halfless.parquet has no column 'half'")
