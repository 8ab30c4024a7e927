"""Classes over real gRPC: sorting subtomograms, putting them into the classes they fit best, merging averages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.rotations import angular_distance_degrees
from cryofleet.storage import Store
from cryofleet.testing import call_operation, file_store, run_operation
from cryofleet.v1 import alignment_pb2 as pb
from cryofleet.v1 import common_pb2
from cryofleet.volumes import VolumeInfo, open_volume
from services.alignment.clustering import adjusted_rand_index
from services.alignment.service import service
from tests.contract.alignment_inputs import (
    BOX,
    VOXEL,
    WEDGE,
    particles_at,
    posed,
    put_particles,
    put_subtomograms,
    put_unsound,
    put_volume,
    refused,
)
from tests.contract.conftest import channel_to
from tests.unit.alignment.samples import Sample, asymmetric, sample

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
COUNT = 24

Volume = NDArray[np.float32]

channel = channel_to(service)


@pytest.fixture(scope="module")
def mixed() -> tuple[Sample, NDArray[np.int64]]:
    """Particles of two structures in turn, and which of them each is."""
    parts = [sample(asymmetric(k + 1), BOX, COUNT // 2, 1.0, seed=k, wedge=WEDGE) for k in range(2)]
    order = np.arange(COUNT).reshape(2, -1).T.ravel()
    data = Sample(
        np.concatenate([p.particles for p in parts])[order],
        Rotation.concatenate([p.rotations for p in parts])[order],
        np.concatenate([p.shifts for p in parts])[order],
    )
    return data, np.arange(COUNT) % 2


def at(store: Store, uri: str) -> Volume:
    return open_volume(store, uri).read()


def correlation(a: Volume, b: Volume) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


async def result_of(channel: grpc.aio.Channel, request: Any) -> Any:
    return (await call_operation(channel, request, timeout=120)).result


def put_posed(store: Store, data: Sample, **columns: Any) -> str:
    return put_particles(store, "posed", posed(data.rotations, data.shifts).with_columns(**columns))


def classify_request(store: Store, data: Sample, **options: Any) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(
        subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles),
        particles_uri=put_posed(store, data, half=1 + np.arange(len(data)) // 2 % 2),
        feature_low_pass_angstrom=BOX * VOXEL / 6,
        components=4,
        max_candidates=8,
        **options,
    )


async def test_two_structures_are_told_apart(
    channel: grpc.aio.Channel, store: Store, mixed: tuple[Sample, NDArray[np.int64]]
) -> None:
    data, truth = mixed
    result = await result_of(channel, classify_request(store, data, iterations=2))
    assert result.classes == 2
    particles = particles_at(store, result.particles_uri)
    assert particles.table["id"].tolist() == list(range(100, 100 + COUNT))
    labels = particles.table["class_id"].to_numpy()
    assert adjusted_rand_index(labels.astype(np.int64), truth) == 1
    assert result.unassigned == 0
    assert list(result.sizes) == [12, 12]
    assert sorted(set(particles.table["half"])) == [1, 2]
    rotations = particles.rotations()
    assert rotations is not None
    assert np.median(angular_distance_degrees(data.rotations, rotations)) < 5
    # The averages are dark, as the particles are.
    for k in range(2):
        kind = int(truth[labels == k][0])
        average = open_volume(store, result.average_uris[k])
        assert average.info == VolumeInfo((BOX,) * 3, VOXEL, "dark")
        likeness = [correlation(average.read(), -asymmetric(j + 1).volume(BOX)) for j in range(2)]
        assert int(np.argmax(likeness)) == kind
        assert max(likeness) > 0.7
        halves = correlation(at(store, result.half1_uris[k]), at(store, result.half2_uris[k]))
        assert 0.2 < halves < 1
    table = json.loads(store.get(result.table_uri))
    assert table["resolution_angstrom"] == pytest.approx(list(result.resolutions_angstrom))
    assert len(table["rounds"]) == 2


def test_a_classification_goes_on_from_its_checkpoint(tmp_path: Path, mixed: tuple[Sample, NDArray[np.int64]]) -> None:
    data, _ = mixed

    class Stopped(Exception):
        pass

    def stop(fraction: float, phase: str = "", **counters: float) -> None:
        # After the first of the two rounds.
        if fraction > 0.6:
            raise Stopped

    def files(folder: str, interrupted: bool) -> list[bytes]:
        store = file_store(tmp_path / folder)
        request = classify_request(store, data, iterations=2, stable_agreement=1, classes=3)
        if interrupted:
            with pytest.raises(Stopped):
                run_operation(service, request, store, progress=stop)
            assert any("_work" in found.uri for found in store.list(f"{store.root}/default"))
        result = run_operation(service, request, store)
        return [store.get(uri) for uri in (*result.average_uris, result.particles_uri, result.table_uri)]

    assert files("undisturbed", False) == files("interrupted", True)


async def test_particles_go_to_the_class_they_fit(
    channel: grpc.aio.Channel, store: Store, mixed: tuple[Sample, NDArray[np.int64]]
) -> None:
    data, truth = mixed
    request = pb.ReassignRequest(
        subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles),
        particles_uri=put_posed(store, data, class_id=np.zeros(COUNT, np.int32)),
        average_uris=[put_volume(store, f"average{k}", asymmetric(k + 1).volume(BOX)) for k in range(2)],
        max_candidates=8,
    )
    # Nobody fits best to a third, which is noise.
    noise = np.random.default_rng(0).normal(size=(BOX,) * 3)
    request.average_uris.insert(1, put_volume(store, "noise", noise))
    result = await result_of(channel, request)
    particles = particles_at(store, result.particles_uri)
    assert particles.table["class_id"].tolist() == truth.tolist()
    assert list(result.sizes) == [12, 12]
    assert result.changed == 12
    assert result.mean_score == pytest.approx(particles.table["score"].mean())
    rotations = particles.rotations()
    assert rotations is not None
    assert np.median(angular_distance_degrees(data.rotations, rotations)) < 3
    assert len(result.average_uris) == len(result.half2_uris) == len(result.resolutions_angstrom) == 2
    for k in range(2):
        assert correlation(at(store, result.average_uris[k]), -asymmetric(k + 1).volume(BOX)) > 0.8
    # A shard of them, without averages: classes are numbered as those given.
    request.make_averages = False
    request.rows.CopyFrom(common_pb2.RowRange(first=3, count=2))
    shard = await result_of(channel, request)
    assert particles_at(store, shard.particles_uri).table["class_id"].tolist() == [2, 0]
    assert list(shard.sizes) == [1, 0, 1]
    assert len(shard.average_uris) == 0


async def test_particles_are_compared_to_classes_without_them(
    channel: grpc.aio.Channel, store: Store, mixed: tuple[Sample, NDArray[np.int64]]
) -> None:
    data, truth = mixed
    wrong = truth.copy()
    wrong[:4] = 1 - wrong[:4]
    request = pb.ReassignRequest(
        subtomograms_uri=put_subtomograms(store, "a" * 64, data.particles),
        particles_uri=put_posed(store, data, class_id=wrong),
        max_angle_degrees=15,
        max_shift_voxels=1,
        max_candidates=8,
        make_averages=False,
    )
    result = await result_of(channel, request)
    particles = particles_at(store, result.particles_uri)
    assert particles.table["class_id"].tolist() == truth.tolist()
    assert result.changed == 4
    rotations = particles.rotations()
    assert rotations is not None
    assert angular_distance_degrees(data.rotations, rotations).max() < 20


async def test_averages_of_one_structure_are_merged(channel: grpc.aio.Channel, store: Store) -> None:
    frame, shift = Rotation.from_rotvec([0.9, -0.5, 1.4]), np.array([1.2, -0.8, 0.4])
    one, other = asymmetric(1), asymmetric(2)
    clean = [one.volume(BOX), other.volume(BOX), one.volume(BOX, frame, shift)]
    # The second of one structure is the better of the two, and light where the others are dark.
    rng = np.random.default_rng(0)
    halves = [
        [volume + level * volume.std() * rng.normal(size=volume.shape) for _ in range(2)]
        for volume, level in zip(clean, (1.0, 0.5, 0.3), strict=True)
    ]
    signs = [("dark", -1), ("dark", -1), ("light", 1)]

    def put(name: str, k: int, volume: NDArray[np.float64]) -> str:
        contrast, sign = signs[k]
        return put_volume(store, f"{name}{k}", sign * volume, contrast=contrast)

    poses = Rotation.from_rotvec([[0.1, 0.4, -0.3], [0.7, -0.2, 0.5], [-0.4, 0.3, 0.1]])
    shifts = np.array([[0.5, 0.2, -0.7], [0.1, 0.9, 0.3], [-0.6, 0.4, 0.8]])
    table = posed(poses, shifts).with_columns(class_id=np.array([0, -1, 1]))
    request = pb.MergeAveragesRequest(
        average_uris=[put("average", k, (halves[k][0] + halves[k][1]) / 2) for k in range(3)],
        half1_uris=[put("half1", k, halves[k][0]) for k in range(3)],
        half2_uris=[put("half2", k, halves[k][1]) for k in range(3)],
        particles_uri=put_particles(store, "posed", table),
        max_candidates=20,
    )
    result = await result_of(channel, request)
    assert result.groups == 2
    groups = list(result.group_of_average)
    assert groups[0] == groups[2] != groups[1]
    best = open_volume(store, result.average_uris[groups[0]])
    assert best.info.contrast == "dark"
    assert correlation(best.read(), -clean[2]) > 0.9
    about = json.loads(store.get(result.table_uri))
    assert about["similarity"][0][2] > 0.85 > about["similarity"][0][1]
    particles = particles_at(store, result.particles_uri)
    assert particles.table["class_id"].tolist() == [groups[0], -1, groups[1]]
    rotations = particles.rotations()
    assert rotations is not None
    # a(r) = b(F r + s): a particle that R takes a onto is what R F^-1 takes b onto; those of no class stay.
    expected = Rotation.concatenate([poses[:1] * frame.inv(), poses[1:]])
    assert angular_distance_degrees(expected, rotations).max() < 3
    moved = shifts.copy()
    moved[0] -= expected[0].apply(shift)
    np.testing.assert_allclose(particles.shifts() / 2, moved, atol=0.4)
    request.half2_uris.pop()
    await refused(channel, request, INVALID, "half1_uris and half2_uris")


async def test_requests_that_can_not_be_met_name_what_is_wrong(
    channel: grpc.aio.Channel, store: Store, mixed: tuple[Sample, NDArray[np.int64]]
) -> None:
    data, truth = mixed
    few = Sample(data.particles[:5], data.rotations[:5], data.shifts[:5])
    request = classify_request(store, few)
    await refused(channel, request, INVALID, "at least 8 particles and got 5")
    broken = data.particles.copy()
    broken[2] = 3.0
    request.particles_uri = put_posed(store, data)
    request.subtomograms_uri = put_subtomograms(store, "b" * 64, broken)
    await refused(channel, request, INVALID, "particle 102 is constant")
    subtomograms = put_subtomograms(store, "c" * 64, data.particles)
    request.subtomograms_uri = subtomograms
    request.classes = 99
    await refused(channel, request, INVALID, "classes 99: must be 1 to 24")
    request.particles_uri = ""
    await refused(channel, request, PRECONDITION, "holds no rotations")
    stranger = posed(data.rotations[:1], data.shifts[:1], np.array([7]))
    request.particles_uri = put_particles(store, "stranger", stranger)
    await refused(channel, request, INVALID, "particle 7", "stranger.parquet")

    small = put_volume(store, "small", asymmetric(1).volume(16))
    good = put_volume(store, "good", asymmetric(1).volume(BOX))
    flat = put_volume(store, "flat", np.ones((BOX,) * 3))
    unsound = put_unsound(store, "unsound", asymmetric(1).volume(BOX))
    for uri, words in ((small, "(16, 16, 16)"), (flat, "constant"), (unsound, "not finite")):
        name = uri.rpartition("/")[2]
        again = pb.ReassignRequest(subtomograms_uri=subtomograms, average_uris=[good, uri])
        await refused(channel, again, INVALID, name, words)
        await refused(channel, pb.MergeAveragesRequest(average_uris=[good, uri]), INVALID, name, words)

    classless = pb.ReassignRequest(subtomograms_uri=subtomograms, particles_uri=put_posed(store, data))
    await refused(channel, classless, PRECONDITION, "posed.parquet holds no class_id")
    classless.rows.CopyFrom(common_pb2.RowRange(first=0, count=2))
    await refused(channel, classless, INVALID, "rows need average_uris")
    crowd = put_particles(store, "crowd", posed(data.rotations, data.shifts).with_columns(class_id=truth + 1))
    merge = pb.MergeAveragesRequest(average_uris=[good, good], particles_uri=crowd)
    await refused(channel, merge, INVALID, "crowd.parquet", "class_id of 2", "2 averages")
