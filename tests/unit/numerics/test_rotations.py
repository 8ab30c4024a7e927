import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.rotations import (
    angular_distance_degrees,
    frame_between,
    point_group,
    rotation_grid,
    uniform_random,
)

ORDERS = {"C1": 1, "c5": 5, "D2": 4, "D7": 14, "T": 12, "O": 24, "I": 60}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_groups_have_their_order_and_are_closed(name: str, order: int) -> None:
    group = point_group(name)
    assert len(group) == order
    assert group[0].magnitude() < 1e-9
    quaternions = group.as_quat()
    # |q . q'| is 1 for one rotation: every product is one member, and each row and column of the table holds all.
    for member in group:
        table = np.abs((member * group).as_quat() @ quaternions.T) > 1 - 1e-9
        assert (table.sum(axis=0) == 1).all()
        assert (table.sum(axis=1) == 1).all()


@pytest.mark.parametrize(("name", "fold"), [("C6", 6), ("D7", 7), ("T", 3), ("O", 4), ("I", 5)])
def test_the_axis_of_highest_order_lies_along_z(name: str, fold: int) -> None:
    matrices = point_group(name).as_matrix()
    about_z = np.isclose(matrices[:, 2, 2], 1.0)
    assert about_z.sum() == fold


def test_the_icosahedron_has_a_twofold_along_y() -> None:
    turn = Rotation.from_rotvec([0, np.pi, 0])
    assert (point_group("I").inv() * turn).magnitude().min() < 1e-7


@pytest.mark.parametrize("name", ["", "C0", "X", "D", "C100", "II", "C-1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="symmetry"):
        point_group(name)


def test_distance_is_the_angle_of_the_turn() -> None:
    base = uniform_random(50, np.random.default_rng(0))
    for angle in (1e-4, 0.5, 90.0, 179.9):
        turned = Rotation.from_rotvec([0, np.radians(angle), 0]) * base
        np.testing.assert_allclose(angular_distance_degrees(base, turned), angle, rtol=1e-6)


def test_distance_ignores_the_group_of_the_reference_and_nothing_else() -> None:
    base = uniform_random(20, np.random.default_rng(1))
    for member in point_group("D7"):
        assert angular_distance_degrees(base, base * member, "D7").max() < 1e-5
    # The group acts before the rotation; after it, it is another pose.
    assert angular_distance_degrees(base, Rotation.from_euler("z", 360 / 7, degrees=True) * base, "C7").max() > 10


def test_random_rotations_are_uniform() -> None:
    rotations = uniform_random(20_000, np.random.default_rng(2))
    # Of uniform rotations the angle w has the density (1 - cos w) / pi: the mean is pi / 2 + 2 / pi.
    assert rotations.magnitude().mean() == pytest.approx(np.pi / 2 + 2 / np.pi, abs=0.02)
    directions = rotations.apply([0.0, 0.0, 1.0])
    # The mean of 20,000 unit vectors is within 4 standard errors of 0.
    assert np.abs(directions.mean(axis=0)).max() < 4 / np.sqrt(3 * 20_000)


def test_the_grid_covers_all_rotations() -> None:
    grid = rotation_grid(15.0)
    probes = uniform_random(300, np.random.default_rng(3))
    nearest = 2 * np.arccos(np.abs(probes.as_quat() @ grid.as_quat().T).max(axis=1).clip(max=1))
    # A cubic lattice of 15 degrees leaves nothing farther than 13 degrees.
    assert np.degrees(nearest.max()) < 15 * np.sqrt(3) / 2 * 1.15
    assert np.degrees(np.median(nearest)) < 15 / 2 * 1.1


def test_a_common_frame_is_found_in_spite_of_errors() -> None:
    rng = np.random.default_rng(4)
    true = uniform_random(60, rng)
    frame = Rotation.from_rotvec([0.4, -1.0, 2.0])
    members = point_group("D3")[rng.integers(0, 6, 60)]
    noise = Rotation.from_rotvec(np.radians(rng.normal(0, 1, size=(60, 3))))
    estimated = noise * true * members * frame.inv()
    estimated = Rotation.concatenate([estimated[:50], uniform_random(10, rng)])
    errors = angular_distance_degrees(true, estimated * frame_between(true, estimated, "D3"), "D3")
    assert np.median(errors[:50]) < 3
    assert angular_distance_degrees(frame_between(true, estimated, "D3"), frame, "D3")[0] < 2
