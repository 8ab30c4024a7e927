"""What a scene holds is where its truth says, and nothing overlaps."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial.transform import Rotation

from cryofleet.errors import FailedPrecondition, InvalidArgument
from services.simulation import fiducials, membranes
from services.simulation.density import Density, build, build_subunit
from services.simulation.phantoms import phantom
from services.simulation.scene import (
    Carbon,
    Filaments,
    FlatMembranes,
    GoldBeads,
    Placement,
    Scene,
    Specimen,
    Vesicles,
    build_scene,
)

VOXEL = 12.0


@cache
def density(name: str) -> Density:
    return build(name, None, "", VOXEL, 24.0)


@cache
def subunit() -> Density:
    return build_subunit("helical-filament", None, "", VOXEL, 24.0)


def filaments(**changes: Any) -> Filaments:
    helix = phantom("helical-filament").helix
    assert helix is not None
    return Filaments(subunit(), 1, helix.rise_angstrom, helix.twist_degrees, **changes)


def scene(seed: int = 1, shape: tuple[int, int, int] = (48, 72, 80), **changes: Any) -> Scene:
    return build_scene(Specimen(shape, VOXEL, 24.0, **changes), np.random.default_rng(seed))


@cache
def crowded() -> Scene:
    return scene(
        placements=(Placement(density("hexameric-ring"), 25), Placement(density("double-ring"), 15)),
        min_gap_angstrom=24.0,
    )


def test_counts_and_truth() -> None:
    made = crowded()
    assert np.bincount(made.classes).tolist() == [25, 15]
    assert [(placed.name, placed.asked, placed.placed, placed.reason) for placed in made.placed] == [
        ("double-ring", 15, 15, None),
        ("hexameric-ring", 25, 25, None),
    ]
    assert made.occupancy == np.count_nonzero(made.instances) / made.instances.size
    assert sum(placed.occupancy for placed in made.placed) == pytest.approx(made.occupancy)
    assert made.label_names == ("ice", "hexameric-ring", "double-ring", "membrane", "gold", "carbon")


def test_instances_are_the_shapes_at_their_poses() -> None:
    """Voxel by voxel: each shape is there as a whole, so that none took a voxel from another."""
    made = crowded()
    for particle, (position, rotation, index) in enumerate(
        zip(made.positions, made.rotations, made.classes, strict=True)
    ):
        structure = density(("hexameric-ring", "double-ring")[index])
        whole = np.rint(position).astype(int)
        mask = structure.rotated_shape(rotation, position - whole)
        expected = np.argwhere(mask) - np.array(mask.shape) // 2 + whole[::-1]
        own = np.argwhere(made.instances == particle + 1)
        np.testing.assert_array_equal(np.sort(own, axis=0), np.sort(expected, axis=0))
        assert (made.labels[tuple(own.T)] == index + 1).all()


def test_complexes_keep_the_gap() -> None:
    made = crowded()
    for particle in range(0, len(made.positions), 7):
        others = (made.instances > 0) & (made.instances != particle + 1)
        distance = scipy.ndimage.distance_transform_edt(~others)
        assert distance[made.instances == particle + 1].min() > 24.0 / VOXEL


def test_density_is_the_sum_of_the_structures() -> None:
    made = crowded()
    whole = sum(
        float(density(name).rotated(Rotation.identity(), np.zeros(3)).sum()) * count
        for name, count in (("hexameric-ring", 25), ("double-ring", 15))
    )
    assert float(made.density.sum()) == pytest.approx(whole, rel=0.01)
    outside = made.density[made.instances == 0].mean()
    means = scipy.ndimage.mean(made.density, made.instances, np.arange(1, len(made.positions) + 1))
    assert (np.asarray(means) > 10 * outside).all()
    assert (np.asarray(means) > 1).all()


def test_rotations_take_the_structure_into_the_volume() -> None:
    """The moments of each instance are those of the structure, turned; a transposed rotation would show."""
    made = scene(placements=(Placement(density("barrel"), 6),), shape=(64, 64, 64))
    for particle, rotation in enumerate(made.rotations):
        own = np.argwhere(made.instances == particle + 1)[:, ::-1].astype(float)
        axes = np.linalg.eigh(np.cov((own - own.mean(axis=0)).T))[1]
        # the barrel's long axis is z
        assert abs(axes[:, -1] @ rotation.apply([0, 0, 1])) > 0.99


def test_same_seed_same_scene() -> None:
    arguments: dict[str, Any] = {
        "placements": (Placement(density("hexameric-ring"), 8),),
        "vesicles": (Vesicles(1, 150, 160),),
        "filaments": (filaments(),),
        "gold_beads": (GoldBeads(2, 60),),
    }
    one, two, other = scene(**arguments), scene(**arguments), scene(seed=2, **arguments)
    np.testing.assert_array_equal(one.density, two.density)
    np.testing.assert_array_equal(one.instances, two.instances)
    np.testing.assert_array_equal(one.rotations.as_quat(), two.rotations.as_quat())
    assert not np.array_equal(one.instances, other.instances)


def test_concentration_makes_a_count() -> None:
    # 80 x 72 x 48 voxels of 12 Å are 4.78e-19 l; 50 µM in them are 14.4 molecules
    made = scene(placements=(Placement(density("hexameric-ring"), concentration_micromolar=50),))
    assert len(made.positions) == 14
    half = scene(
        placements=(Placement(density("hexameric-ring"), concentration_micromolar=50),),
        ice_thickness_angstrom=24 * VOXEL,
    )
    assert len(half.positions) == 7


def test_everything_lies_in_the_ice() -> None:
    made = scene(
        placements=(Placement(density("hexameric-ring"), 10),),
        gold_beads=(GoldBeads(3, 60),),
        filaments=(filaments(),),
        vesicles=(Vesicles(1, 100, 110),),
        ice_thickness_angstrom=30 * VOXEL,
    )
    planes = np.flatnonzero(made.labels.any(axis=(1, 2)))
    assert planes[0] >= 9
    assert planes[-1] <= 38


# --- membranes


def test_the_bilayer_has_two_heads_four_nanometres_thick() -> None:
    distance = np.arange(-60.0, 60.0, 0.1)
    profile = membranes.bilayer_profile(distance, 0.0)
    heads = distance[np.argsort(profile)[-1]]
    assert abs(heads) == pytest.approx(19, abs=1.5)
    # the chains above ice, the methyls between them below
    assert profile[np.abs(distance) < 0.1].max() < 0 < membranes.bilayer_profile(np.array([9.0]), 0.0)[0]
    outer = distance[profile > 0.5 * profile.max()]
    assert outer.max() - outer.min() == pytest.approx(membranes.THICKNESS, abs=8)
    # a low-pass keeps the integral and leaves half of a wave of its resolution
    blurred = membranes.bilayer_profile(distance, 20.0)
    assert np.trapezoid(blurred, distance) == pytest.approx(np.trapezoid(profile, distance), rel=1e-3)
    wave = np.cos(2 * np.pi * distance / 20.0)
    ratio = np.trapezoid(blurred * wave, distance) / np.trapezoid(profile * wave, distance)
    assert ratio == pytest.approx(0.5, rel=0.02)


def test_a_vesicle_is_a_closed_shell_of_the_asked_radius() -> None:
    made = scene(vesicles=(Vesicles(1, 200, 201, max_ellipticity=1.0),), shape=(48, 64, 64))
    shell = np.argwhere(made.labels == made.labels_of("membrane")[0]).astype(float)
    centre, radius = sphere_through(shell)
    assert radius * VOXEL == pytest.approx(200, rel=0.02)
    assert (np.abs(np.linalg.norm(shell - centre, axis=1) - radius) * VOXEL < membranes.THICKNESS / 2 + VOXEL).all()
    assert made.density[made.labels > 0].mean() > 0.5


def test_distances_from_an_ellipsoid_are_true_near_it() -> None:
    ellipsoid = membranes.Ellipsoid(np.array([1.0, 2.0, 3.0]), np.array([30.0, 36.0, 42.0]), Rotation.random(rng=1))
    rng = np.random.default_rng(0)
    for _ in range(50):
        point, normal = ellipsoid.surface_point(rng)
        for height in (-3.0, 0.0, 3.0):
            assert ellipsoid.distance((point + height * normal)[None])[0] == pytest.approx(height, abs=0.15)


def test_points_on_a_sphere_are_even() -> None:
    sphere = membranes.Ellipsoid(np.zeros(3), np.full(3, 5.0), Rotation.identity())
    rng = np.random.default_rng(0)
    points = np.array([sphere.surface_point(rng)[0] for _ in range(2000)])
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 5)
    # each coordinate of a point on a sphere is uniform; 4 standard errors of the mean
    assert np.abs(points.mean(axis=0)).max() < 4 * 5 / np.sqrt(3 * 2000)


def test_complexes_sit_in_membranes_upright() -> None:
    made = scene(
        placements=(
            Placement(density("hexameric-ring"), 6, where="membrane"),
            Placement(density("hexameric-ring").named("inside"), 2, where="vesicle"),
            Placement(density("hexameric-ring").named("free"), 6),
        ),
        vesicles=(Vesicles(1, 330, 340, 1.0),),
        shape=(64, 80, 80),
        min_gap_angstrom=12.0,
    )
    membrane = made.labels == made.labels_of("membrane")[0]
    centre, radius = sphere_through(np.argwhere(membrane)[:, ::-1].astype(float))
    from_centre = made.positions - centre
    distance = np.linalg.norm(from_centre, axis=1)
    upright = made.rotations.apply([0, 0, 1])
    for index in range(len(made.classes)):
        if made.classes[index] == 0:
            assert distance[index] == pytest.approx(radius, abs=1)
            assert upright[index] @ from_centre[index] / distance[index] > 0.98
        elif made.classes[index] == 1:
            assert distance[index] < radius - 3
        else:
            assert abs(distance[index] - radius) > 4
    # the membrane parts around what sits in it
    assert not (membrane & (made.instances > 0)).any()


def sphere_through(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre and radius by least squares: |p|^2 = 2 c p + r^2 - |c|^2."""
    matrix = np.column_stack([2 * points, np.ones(len(points))])
    solution = np.linalg.lstsq(matrix, (points**2).sum(axis=1), rcond=None)[0]
    return solution[:3], float(np.sqrt(solution[3] + solution[:3] @ solution[:3]))


def test_flat_membranes_cross_the_field() -> None:
    made = scene(flat_membranes=(FlatMembranes(1, max_tilt_degrees=0),))
    membrane = made.labels == made.labels_of("membrane")[0]
    # upright: every plane has it, at the same place
    assert membrane.any(axis=(1, 2)).all()
    np.testing.assert_array_equal(membrane[0], membrane[-1])


def test_membranes_do_not_cross() -> None:
    made = scene(flat_membranes=(FlatMembranes(2, 10),), vesicles=(Vesicles(2, 120, 130),), shape=(40, 96, 96), seed=4)
    membrane = made.labels == made.labels_of("membrane")[0]
    # two planes and two vesicles are four pieces, or more where the field cuts one
    assert scipy.ndimage.label(membrane, np.ones((3, 3, 3)))[1] >= 4
    assert [placed.placed for placed in made.placed] == [2, 2]


# --- filaments, gold, carbon


def test_filaments_follow_their_helix() -> None:
    made = scene(filaments=(filaments(persistence_length_angstrom=1e9),), shape=(40, 96, 96), seed=3)
    helix = phantom("helical-filament").helix
    assert helix is not None
    assert len(made.positions) >= 10
    assert set(made.filaments) == {0}
    steps = np.diff(made.positions, axis=0) * VOXEL
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), helix.rise_angstrom, rtol=1e-6)
    turn = made.rotations[:-1].inv() * made.rotations[1:]
    np.testing.assert_allclose(turn.as_euler("ZYX", degrees=True)[:, 0], helix.twist_degrees, atol=0.1)
    # each subunit's axis runs along the filament
    along = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    assert np.einsum("ij,ij->i", made.rotations[1:].apply([0, 0, 1]), along).min() > 0.9999


def test_stiffness_of_filaments() -> None:
    """Over one persistence length the direction's correlation falls to 1 / e."""
    from services.simulation.filaments import grow

    rng = np.random.default_rng(0)
    cosines = []
    for _ in range(300):
        poses = grow(np.zeros(3), Rotation.identity(), 1.0, 30.0, 20.0, 41, lambda _: True, rng)
        axes = [pose.rotation.apply([0, 0, 1]) for pose in poses]
        cosines.append(axes[20] @ axes[40])
    # of cos, whose standard deviation is about 0.5: 4 standard errors
    assert np.mean(cosines) == pytest.approx(np.exp(-1), abs=0.12)


def test_a_length_limits_a_filament() -> None:
    made = scene(filaments=(filaments(length_angstrom=275.0),), shape=(40, 96, 96))
    assert len(made.positions) == 10


def test_gold_is_heavy_and_round() -> None:
    made = scene(gold_beads=(GoldBeads(2, 100),))
    gold = made.labels == made.labels_of("gold")[0]
    volume = 2 * 4 / 3 * np.pi * (50 / VOXEL) ** 3
    assert gold.sum() == pytest.approx(volume, rel=0.1)
    voltage = fiducials.potential_above_ice("Au")
    # 19.3 g/cm^3 of f = 10.6 Å, less 4.5 V of ice
    assert voltage == pytest.approx(25.4, abs=1)
    assert made.density.sum() == pytest.approx(volume * voltage, rel=0.02)
    assert scipy.ndimage.label(gold)[1] == 2


def test_carbon_reaches_into_the_field() -> None:
    made = scene(carbon=Carbon(240, 120, 6000), placements=(Placement(density("hexameric-ring"), 5),))
    carbon = made.labels == made.labels_of("carbon")[0]
    planes = np.flatnonzero(carbon.any(axis=(1, 2)))
    assert len(planes) == pytest.approx(120 / VOXEL, abs=1)
    # along one axis it reaches 240 Å in, along the other across the whole field
    reach = [int(carbon[planes[0]].sum(axis=axis).max()) for axis in (0, 1)]
    assert min(reach) == pytest.approx(240 / VOXEL, abs=1.5)
    assert max(reach) >= 72
    assert not (carbon & (made.instances > 0)).any()


# --- what can't be done


def test_a_structure_larger_than_the_volume() -> None:
    with pytest.raises(
        InvalidArgument, match=r"'icosahedral-shell' does not fit into the empty volume of 80 x 72 x 12"
    ):
        scene(placements=(Placement(density("icosahedral-shell"), 1),), shape=(12, 72, 80))
    with pytest.raises(InvalidArgument, match="of which 12 in depth are ice"):
        scene(placements=(Placement(density("icosahedral-shell"), 1),), ice_thickness_angstrom=12 * VOXEL)


def test_more_than_the_ice_can_hold() -> None:
    with pytest.raises(InvalidArgument, match=r"5000 complexes would fill \d+% of the ice"):
        scene(placements=(Placement(density("double-ring"), 5000),))


def test_no_place_left_is_an_error_unless_told_otherwise() -> None:
    small: dict[str, Any] = {"placements": (Placement(density("double-ring"), 60),), "shape": (32, 40, 48)}
    with pytest.raises(FailedPrecondition, match=r"placed \d+ of 60 'double-ring'.*no place is left.*allow_partial"):
        scene(**small)
    made = scene(**small, allow_partial=True)
    (placed,) = made.placed
    assert 5 < placed.placed == len(made.positions) < 60
    assert placed.reason is not None
    assert "no place is left" in placed.reason
    # a fact: where there was room for one more at its own orientation, it would be there
    assert made.occupancy > 0.1


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(density("hexameric-ring")), "either a count or a concentration"),
        (Placement(density("hexameric-ring"), 3, 5.0), "either a count or a concentration"),
        (Placement(density("hexameric-ring"), 3, where="membrane"), "in a membrane, and there is none"),
        (Placement(density("hexameric-ring"), 3, where="vesicle"), "inside vesicles, and there are none"),
    ],
)
def test_placements_that_say_too_little(placement: Placement, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        scene(placements=(placement,))


def test_nothing_to_place() -> None:
    with pytest.raises(InvalidArgument, match="nothing to place"):
        scene()


def test_vesicles_too_large_for_the_ice() -> None:
    with pytest.raises(FailedPrecondition, match="placed 0 of 1 'vesicles'"):
        scene(vesicles=(Vesicles(1, 500, 600),))
