import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.interpolation import transform_volume
from services.alignment.align import Poses
from services.alignment.distinct import Distinct, carried, distinct
from tests.unit.alignment.samples import Blobs, asymmetric

BOX = 32
FRAMES = Rotation.from_rotvec([[0.0, 0.0, 0.0], [1.2, -0.4, 2.0], [0.3, 2.2, -0.6], [-1.0, 0.2, 0.7], [0.1, 0.9, 1.4]])
SHIFTS = np.array([[0.0, 0.0, 0.0], [1.5, -1.0, 0.7], [-0.4, 1.2, -1.8], [0.8, 0.8, -0.5], [1.0, -1.1, 0.2]])


def halves_of(blobs: Blobs, place: int, noise: float, seed: int) -> NDArray[np.float32]:
    """Half maps (2, n, n, n) of a structure in a frame of its own; noise as a share of the signal's deviation."""
    volume = blobs.volume(BOX, FRAMES[place], SHIFTS[place])
    errors = np.random.default_rng(seed).normal(size=(2, BOX, BOX, BOX)) * (noise * volume.std())
    return np.asarray(volume + errors, dtype=np.float32)


def mirrored(blobs: Blobs) -> Blobs:
    return Blobs(blobs.centres * [-1, 1, 1], blobs.widths, blobs.heights)


@pytest.fixture(scope="module")
def five() -> tuple[NDArray[np.float32], Distinct]:
    """A structure twice, with little and with much noise; its mirror image; another, twice."""
    one, other = asymmetric(1), asymmetric(2)
    kinds = [(one, 3.0), (one, 1.0), (mirrored(one), 1.0), (other, 2.0), (other, 1.5)]
    halves = np.stack([halves_of(blobs, k, noise, k) for k, (blobs, noise) in enumerate(kinds)])
    return halves.mean(axis=1), distinct(halves.mean(axis=1), 10.0, half_maps=halves)


def test_averages_of_one_structure_are_one_group_and_mirror_images_are_not(
    five: tuple[NDArray[np.float32], Distinct],
) -> None:
    _, found = five
    groups = found.groups.tolist()
    assert groups[0] == groups[1]
    assert groups[3] == groups[4]
    assert len(set(groups)) == 3
    # What noise allows is reached, to the scatter of a few thousand components, and other structures stay far below.
    assert found.similarity[0, 1] == pytest.approx(1, abs=0.06)
    assert found.similarity[3, 4] == pytest.approx(1, abs=0.06)
    different = found.similarity[np.not_equal.outer(found.groups, found.groups)]
    assert different.max() < 0.8
    assert np.array_equal(found.similarity, found.similarity.T)


def test_the_best_of_a_group_comes_first(five: tuple[NDArray[np.float32], Distinct]) -> None:
    _, found = five
    assert sorted(found.ranks.tolist()) == [0, 1, 2, 3, 4]
    assert found.ranks[1] < found.ranks[0]
    assert found.ranks[4] < found.ranks[3]
    assert found.resolutions_angstrom[1] < found.resolutions_angstrom[0]
    assert found.first[found.groups].tolist() == [1, 1, 2, 4, 4]
    assert found.first[0] == int(found.ranks.argmin())
    table = found.table()
    assert table["group"] == found.groups.tolist()
    assert len(table["rotation_onto_first"]) == 5  # type: ignore[arg-type]


def test_the_transformation_brings_an_average_onto_the_first_of_its_group(
    five: tuple[NDArray[np.float32], Distinct],
) -> None:
    averages, found = five
    # Of the frames: a = R0^-1 (r - t0), so that first = R1 R0^-1 (r - t0) + t1.
    expected = FRAMES[1] * FRAMES[0].inv()
    assert (expected.inv() * found.rotations[0]).magnitude() < np.radians(2.5)
    assert np.abs(found.shifts[0] - (SHIFTS[1] - expected.apply(SHIFTS[0]))).max() < 0.3
    assert found.rotations[1].magnitude() == 0
    assert (found.shifts[1] == 0).all()
    moved = transform_volume(averages[0], found.rotations[0], found.shifts[0])
    assert np.corrcoef(moved.ravel(), averages[1].ravel())[0, 1] > 2 * abs(
        np.corrcoef(averages[0].ravel(), averages[1].ravel())[0, 1]
    )


def test_poses_follow_their_reference() -> None:
    blobs = asymmetric(3)
    turn, shift = Rotation.from_rotvec([0.4, -1.0, 0.8]), np.array([1.0, -0.5, 0.3])
    pose = Poses(Rotation.from_rotvec([[1.0, 0.2, -0.6]]), np.array([[0.4, 0.9, -1.0]]), np.array([0.5]))
    # The structure's centres as average a shows them, as b = B a does, and as the particle does.
    b = turn.apply(blobs.centres * BOX) + shift
    particle = pose.rotations.apply(blobs.centres * BOX) + pose.shifts
    now = carried(pose, turn, shift)
    assert np.allclose(now.rotations.apply(b) + now.shifts, particle)
    assert now.scores.tolist() == [0.5]


def test_without_half_maps_averages_are_ranked_by_size_and_compared_as_they_are() -> None:
    one, other = asymmetric(1), asymmetric(2)
    averages = np.stack([one.volume(BOX), other.volume(BOX), one.volume(BOX, FRAMES[1], SHIFTS[1])])
    found = distinct(averages, 10.0, sizes=np.array([5, 7, 9]), low_pass_angstrom=50)
    assert found.ranks.tolist() == [2, 1, 0]
    assert found.groups.tolist() == [0, 1, 0]
    assert found.similarity[0, 2] > 0.97
    assert np.isnan(found.resolutions_angstrom).all()
    assert found.table()["resolution_angstrom"] == [None, None, None]


def test_noise_is_no_structure_and_one_average_is_one_group() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 2, 16, 16, 16)).astype(np.float32)
    found = distinct(noise.mean(axis=1), 10.0, half_maps=noise)
    assert np.isfinite(found.similarity).all()
    alone = distinct(noise[:1, 0], 10.0)
    assert alone.groups.tolist() == [0]
    assert alone.similarity.tolist() == [[1.0]]


def test_bad_input_is_refused() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 16, 16, 16)).astype(np.float32)
    with pytest.raises(InvalidArgument, match="cubes"):
        distinct(maps[:, 1:], 10.0)
    with pytest.raises(InvalidArgument, match=r"\(2, 2, 16, 16, 16\) is expected"):
        distinct(maps, 10.0, half_maps=maps)
    with pytest.raises(InvalidArgument, match="sizes"):
        distinct(maps, 10.0, sizes=np.array([1]))
    with pytest.raises(InvalidArgument, match="mask"):
        distinct(maps, 10.0, mask=maps[0, 1:])
    with pytest.raises(InvalidArgument, match=r"same 1\.5"):
        distinct(maps, 10.0, same=1.5)
    with pytest.raises(InvalidArgument, match="average 1 is constant"):
        distinct(np.stack([maps[0], np.zeros_like(maps[0])]), 10.0)
    maps[0, 0, 0, 0] = np.nan
    with pytest.raises(InvalidArgument, match="average 0 holds"):
        distinct(maps, 10.0)
