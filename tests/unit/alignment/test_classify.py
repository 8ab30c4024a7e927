from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import Cancelled, InvalidArgument
from cryofleet.numerics.rotations import angular_distance_degrees, frame_between
from cryofleet.numerics.transfer import wedge_transfer
from cryofleet.progress import Progress
from services.alignment.align import Aligner, Poses, Search, align, prepare_reference, standardise
from services.alignment.classify import (
    UNASSIGNED,
    State,
    class_sums,
    classify,
    iterate,
    reassign,
)
from services.alignment.clustering import adjusted_rand_index
from services.alignment.reconstruction import divide
from tests.unit.alignment.samples import Sample, asymmetric, sample

BOX = 32
WEDGE = (-60.0, 60.0)
SEARCH = Search(BOX, 10.0, wedge_transfer(BOX, *WEDGE), low_pass_angstrom=50.0, max_candidates=12)


def mixed(counts: tuple[int, int], snr: float, seed: int = 0) -> tuple[Sample, NDArray[np.int64]]:
    """Particles of two structures in random order, and which of them each is."""
    rng = np.random.default_rng(seed)
    parts = [sample(asymmetric(k + 1), BOX, n, snr, seed=10 * seed + k, wedge=WEDGE) for k, n in enumerate(counts)]
    order = rng.permutation(sum(counts))
    data = Sample(
        np.concatenate([p.particles for p in parts])[order],
        Rotation.concatenate([p.rotations for p in parts])[order],
        np.concatenate([p.shifts for p in parts])[order],
    )
    return data, np.repeat([0, 1], counts)[order]


def poses_of(data: Sample) -> Poses:
    return Poses(data.rotations, data.shifts, np.zeros(len(data)))


class Scripted:
    """Machinery whose scores are given round by round; alignment adds 1 to every shift and remembers the labels."""

    def __init__(self, *scores: NDArray[np.float64], components: int = 1) -> None:
        self.scores = list(scores)
        self.components = components
        self.aligned: list[tuple[list[int], int]] = []

    def align(self, poses: Poses, labels: NDArray[np.int64], classes: int, progress: Progress) -> Poses:
        self.aligned.append((labels.tolist(), classes))
        return Poses(poses.rotations, poses.shifts + 1, poses.scores + 0.25)

    def reduce(self, poses: Poses, progress: Progress) -> tuple[NDArray[np.float32], int]:
        # The round can be told from the shifts, so a resumed run gets the scores of its round.
        return self.scores[int(poses.shifts[0, 0])].astype(np.float32), self.components


def start(count: int) -> State:
    return State(
        np.zeros(count, dtype=np.int64), Poses(Rotation.identity(count), np.zeros((count, 3)), np.zeros(count))
    )


def scores(labels: list[int]) -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(size=(len(labels), 1)) + 20.0 * np.array(labels)[:, None]


HALF = [0] * 12 + [1] * 11


def test_the_loop_ends_when_the_classes_stay() -> None:
    machinery = Scripted(scores(HALF), scores(HALF))
    state = iterate(machinery, start(23), iterations=9)
    assert state.labels.tolist() == HALF
    assert [r.sizes for r in state.rounds] == [(12, 11)] * 2
    assert [r.agreement for r in state.rounds] == [-1.0, 1.0]
    # The first round takes the poses as they are; then each class's particles are known to the alignment.
    assert machinery.aligned == [(HALF, 2)]
    assert state.rounds[1].mean_score == 0.25
    assert state.rounds[1].class_scores == (0.25, 0.25)


def test_the_loop_ends_with_its_rounds() -> None:
    other = HALF[::-1]
    machinery = Scripted(*[scores(HALF), scores(other), scores(HALF)] * 2)
    state = iterate(machinery, start(23), iterations=3)
    assert len(state.rounds) == 3
    assert state.rounds[1].agreement < 0.9


def test_tiny_clusters_are_no_class_and_reported() -> None:
    labels = [0] * 12 + [1] * 11 + [2] * 2
    machinery = Scripted(scores(labels), scores(labels))
    state = iterate(machinery, start(25), classes=3, least=3)
    assert state.labels.tolist() == [0] * 12 + [1] * 11 + [UNASSIGNED] * 2
    assert state.rounds[0].sizes == (12, 11)
    assert state.rounds[0].unassigned == 2
    assert state.rounds[0].criterion["sizes"] == [12, 11, 2]
    # Where nothing is large enough, all are one class.
    assert iterate(Scripted(scores(labels)), start(25), least=20, iterations=1).labels.tolist() == [0] * 25


def test_without_a_significant_component_there_is_one_class_unless_more_are_asked_for() -> None:
    assert iterate(Scripted(scores(HALF), components=0), start(23), iterations=1).labels.max() == 0
    forced = iterate(Scripted(scores(HALF), components=0), start(23), classes=2, iterations=1)
    assert forced.labels.tolist() == HALF


def test_a_run_goes_on_from_any_of_its_states() -> None:
    script = [scores(HALF), scores(HALF[::-1]), scores([*HALF[1:], 0]), scores(HALF)]
    states: list[State] = []
    whole = iterate(Scripted(*script), start(23), iterations=4, checkpoint=states.append)
    assert len(states) == 4
    again = iterate(Scripted(*script), State.from_arrays(states[1].to_arrays()), iterations=4)
    assert again.rounds == whole.rounds
    assert np.array_equal(again.labels, whole.labels)
    assert np.array_equal(again.poses.shifts, whole.poses.shifts)


@pytest.fixture(scope="module")
def particles() -> tuple[Sample, NDArray[np.int64]]:
    return mixed((20, 20), 0.5)


def test_a_class_without_a_particle_is_the_class_of_the_others(particles: tuple[Sample, NDArray[np.int64]]) -> None:
    data, labels = particles
    few = Sample(data.particles[:8], data.rotations[:8], data.shifts[:8])
    sums = class_sums(few.read, 8, poses_of(few), labels[:8], 3, SEARCH)
    assert sums.counts.sum(axis=1).tolist() == [*np.bincount(labels[:8]).tolist(), 0]
    # Rows in turn are the half sets.
    assert sums.counts.sum(axis=0).tolist() == [4, 4]
    averages = sums.averages()
    assert np.isfinite(averages).all()
    assert (averages[2] == 0).all()
    assert np.isfinite(sums.resolutions(10.0)).all()
    # Leaving out particle 3 by subtraction, or by never adding it.
    left = labels[:8].copy()
    left[3] = UNASSIGNED
    expected = class_sums(few.read, 8, poses_of(few), left, 3, SEARCH)
    only = class_sums(few.read, 8, poses_of(few), np.where(np.arange(8) == 3, 0, UNASSIGNED), 1, SEARCH)
    band = sums.band
    own = only.sums[0, 1][None], only.weights[0, 1][None]
    every = torch.arange(len(band))
    found = list(sums.without(band, every, 4.0, np.array([3]), own))
    joined = torch.from_numpy(band.radius <= 4.0)
    for k in range(3):
        components, there = found[k]
        assert bool(there[0]) == bool(expected.counts[k].sum() > 0)
        whole = divide(expected.sums[k].sum(0), expected.weights[k].sum(0), int(expected.counts[k].sum()))
        half = divide(expected.sums[k][1], expected.weights[k][1], int(expected.counts[k][1]))
        scale = float(whole.abs().max()) + 1e-6
        assert float((components[0] - torch.where(joined, whole, half)).abs().max()) < 1e-3 * scale


def test_particles_find_the_class_and_the_pose_they_came_from(particles: tuple[Sample, NDArray[np.int64]]) -> None:
    data, labels = particles
    averages = np.stack([asymmetric(1).volume(BOX), asymmetric(2).volume(BOX)])
    found = reassign(data.read, len(data), averages, SEARCH)
    assert np.array_equal(found.labels, labels)
    assert np.median(angular_distance_degrees(data.rotations, found.poses.rotations)) < 2
    assert np.array_equal(found.scores.argmax(axis=1), found.labels)
    assert np.array_equal(found.scores.max(axis=1), found.poses.scores)
    # One class, one alignment.
    one = reassign(data.read, 8, averages[:1], SEARCH)
    aligner = Aligner(SEARCH)
    references = aligner.references(torch.from_numpy(prepare_reference(averages[0]))[None])
    expected = aligner.align(torch.from_numpy(standardise(data.read(0, 8))), references)
    assert np.allclose(one.poses.scores, expected.scores.numpy(), atol=1e-6)


def test_no_particle_is_compared_to_itself() -> None:
    # Noise alone, and a class of one particle, which fits itself far better than anything else, if it is let.
    noise = np.random.default_rng(0).normal(size=(8, BOX, BOX, BOX)).astype(np.float32)
    labels = np.array([1, 0, 0, 0, 0, 0, 0, 0])
    poses = Poses(Rotation.identity(8), np.zeros((8, 3)), np.zeros(8))
    sums = class_sums(lambda i, n: noise[i : i + n], 8, poses, labels, 2, SEARCH)
    found = reassign(lambda i, n: noise[i : i + n], 8, sums, SEARCH)
    assert found.labels[0] == 0
    assert found.scores[0, 1] == -np.inf
    assert np.isfinite(found.scores[1:]).all()
    assert reassign(lambda i, n: noise[i : i + n], 1, sums.averages()[1:], SEARCH).scores[0, 0] > 0.65
    assert found.poses.scores.max() < 0.5


def test_two_structures_are_sorted_from_one_common_average(
    particles: tuple[Sample, NDArray[np.int64]], tmp_path: Path
) -> None:
    data, labels = particles
    both = asymmetric(1).volume(BOX) + asymmetric(2).volume(BOX)
    first = align(data.read, len(data), both, replace(SEARCH, low_pass_angstrom=4 * SEARCH.voxel_size_angstrom))
    found = classify(
        data.read, len(data), first, SEARCH, iterations=2, feature_cycles=6, components=4, scratch=tmp_path
    )
    kept = found.labels != UNASSIGNED
    assert kept.mean() >= 0.9
    assert len(found.averages) == 2
    assert adjusted_rand_index(found.labels[kept], labels[kept]) >= 0.9
    assert list(tmp_path.iterdir()) == []
    # The second round aligns to the classes' own averages.
    assert found.rounds[1].mean_score > found.rounds[0].mean_score
    for kind in range(2):
        mine = kept & (labels == kind)
        frame = frame_between(data.rotations[mine], found.poses.rotations[mine])
        errors = angular_distance_degrees(data.rotations[mine], found.poses.rotations[mine] * frame)
        assert np.median(errors) < 3
    assert found.half_maps.shape == (2, 2, BOX, BOX, BOX)
    assert np.isfinite(found.averages).all()
    table = found.table()
    assert table["rounds"][0]["agreement"] == -1.0  # type: ignore[index]


def test_one_structure_stays_one_class() -> None:
    data = sample(asymmetric(1), BOX, 30, 0.2, seed=4, wedge=WEDGE)
    found = classify(data.read, 30, poses_of(data), SEARCH, iterations=1, feature_cycles=6, components=4)
    assert found.labels.tolist() == [0] * 30


def test_it_can_be_stopped_and_bad_input_is_refused(particles: tuple[Sample, NDArray[np.int64]]) -> None:
    data, _ = particles
    poses = poses_of(data)

    def stop(fraction: float, phase: str = "", **counters: float) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        classify(data.read, len(data), poses, SEARCH, progress=stop)
    with pytest.raises(InvalidArgument, match="at least 8 particles"):
        classify(data.read, 5, poses, SEARCH)
    with pytest.raises(InvalidArgument, match="poses of 40 particles, but 30"):
        classify(data.read, 30, poses, SEARCH)
    with pytest.raises(InvalidArgument, match="classes 99"):
        classify(data.read, 40, poses, SEARCH, classes=99)
    with pytest.raises(InvalidArgument, match="least 0"):
        classify(data.read, 40, poses, SEARCH, least=0)
    with pytest.raises(InvalidArgument, match="labels run from 0 to 2"):
        class_sums(data.read, 40, poses, np.arange(40) % 3, 2, SEARCH)
    with pytest.raises(InvalidArgument, match="boxes of 32 voxels"):
        reassign(data.read, 40, np.zeros((2, 16, 16, 16), np.float32), SEARCH)
    empty = class_sums(
        data.read, 4, Poses(Rotation.identity(4), np.zeros((4, 3)), np.zeros(4)), np.full(4, -1), 1, SEARCH
    )
    with pytest.raises(InvalidArgument, match="no class holds two"):
        reassign(data.read, 4, empty, SEARCH)
    with pytest.raises(InvalidArgument, match="made of 4 particles, not of 40"):
        reassign(data.read, 40, empty, SEARCH)
