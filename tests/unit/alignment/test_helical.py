import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import Cancelled, InvalidArgument
from cryofleet.numerics.fsc import fsc, resolution
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import soft_sphere
from services.alignment.helical import (
    Axis,
    Cylinder,
    HelicalSymmetry,
    Mean,
    Symmetrised,
    find,
    find_axis,
    helical_correlation,
    refine,
    refine_axis,
    rotational_correlation,
    symmetrise,
    upright,
)
from tests.unit.alignment.samples import Blobs

TMV = HelicalSymmetry(22.99 / (49 / 3), 360 / (49 / 3))
"""49 subunits in three turns of 22.99 Å, right-handed."""
TMV_SUBUNIT = ((78.0, 0.0, 0.0, 6.5, 1.0), (60.0, 5.0, 2.0, 6.5, 1.0), (40.0, -5.0, 0.0, 6.5, 0.8))
"""Gaussians: radius (Å), azimuth (degrees), height, deviation (Å), weight; the centre has a hole."""
COARSE = HelicalSymmetry(27.0, 65.0)
COARSE_SUBUNIT = ((40.0, 0.0, 0.0, 9.0, 1.0), (25.0, 30.0, 8.0, 7.0, 0.8), (48.0, -20.0, -6.0, 7.0, 0.7))
VOXEL = 6.0
BOX = 40
CYLINDER = Cylinder(outer_radius_angstrom=75.0)

MEANS: tuple[Mean, ...] = ("volume", "radius", "ring")

Volume = NDArray[np.float32]


def helix(
    symmetry: HelicalSymmetry,
    subunit: tuple[tuple[float, float, float, float, float], ...] = COARSE_SUBUNIT,
    box: int = BOX,
    voxel: float = VOXEL,
    rotation: Rotation | None = None,
    shift: NDArray[np.float64] | None = None,
) -> Volume:
    """A helix of Gaussians that is longer than the box."""
    rows = np.array(subunit)
    steps = np.arange(-math.ceil(box * voxel / symmetry.rise_angstrom), math.ceil(box * voxel / symmetry.rise_angstrom))
    centres, widths, heights = [], [], []
    for strand in range(symmetry.order):
        for radius, azimuth, height, width, weight in rows:
            angle = np.radians(azimuth + steps * symmetry.twist_degrees + 360 * strand / symmetry.order)
            z = height + steps * symmetry.rise_angstrom
            centres.append(np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1))
            widths.append(np.full(len(steps), width))
            heights.append(np.full(len(steps), weight))
    side = box * voxel
    blobs = Blobs(np.concatenate(centres) / side, np.concatenate(widths) / side, np.concatenate(heights))
    near = np.linalg.norm(blobs.centres, axis=1) < 1.0
    return Blobs(blobs.centres[near], blobs.widths[near], blobs.heights[near]).volume(box, rotation, shift)


def noisy(volume: Volume, level: float, seed: int = 0) -> Volume:
    """With white noise of so many of the volume's standard deviations."""
    noise = np.random.default_rng(seed).normal(size=volume.shape) * (level * volume.std())
    return np.asarray(volume + noise, dtype=np.float32)


def relative(found: HelicalSymmetry, truth: HelicalSymmetry) -> tuple[float, float]:
    """Errors of rise and twist as shares."""
    return abs(found.rise_angstrom / truth.rise_angstrom - 1), abs(found.twist_degrees / truth.twist_degrees - 1)


@pytest.fixture(scope="module")
def coarse() -> Volume:
    return helix(COARSE)


@pytest.fixture(scope="module")
def tmv() -> Volume:
    return helix(TMV, TMV_SUBUNIT, 48, 5.4)


def test_a_symmetry_says_its_pitch_and_hand() -> None:
    assert TMV.hand == "right"
    assert TMV.pitch_angstrom == pytest.approx(22.99)
    assert TMV.subunits_per_turn == pytest.approx(49 / 3)
    turn, rise = HelicalSymmetry(10.0, -90.0).operator(3)
    # A left-handed quarter turn, three times, is a right-handed one.
    np.testing.assert_allclose(turn.apply([1, 0, 0]), [0, 1, 0], atol=1e-12)
    assert rise == 30
    assert HelicalSymmetry(10.0, -90.0).hand == "left"
    assert HelicalSymmetry(10.0, 0.0).pitch_angstrom == math.inf


@pytest.mark.parametrize("arguments", [(0.0, 10.0), (-1.0, 10.0), (math.nan, 1.0), (1.0, 181.0), (1.0, 10.0, 0)])
def test_a_symmetry_that_is_none(arguments: tuple[float, float]) -> None:
    with pytest.raises(InvalidArgument):
        HelicalSymmetry(*arguments)


# Correlations


def test_only_the_right_operator_correlates(coarse: Volume) -> None:
    assert helical_correlation(coarse, COARSE, VOXEL, CYLINDER) > 0.995
    assert helical_correlation(coarse, HelicalSymmetry(27.0, -65.0), VOXEL, CYLINDER) < 0.1
    # A multiple of a symmetry is one; twice as many subunits are not.
    assert helical_correlation(coarse, HelicalSymmetry(54.0, 130.0), VOXEL, CYLINDER) > 0.995
    assert helical_correlation(coarse, HelicalSymmetry(13.5, 32.5), VOXEL, CYLINDER) < 0.9
    assert helical_correlation(-5 * coarse + 3, COARSE, VOXEL, CYLINDER) > 0.995


def test_a_plain_cylinder_has_nothing_to_correlate() -> None:
    r = np.arange(BOX) - BOX // 2
    tube = np.exp(-((np.hypot(r[:, None], r) - 7) ** 2) / 8)
    volume = np.broadcast_to(tube, (BOX,) * 3).astype(np.float32)
    plain = noisy(volume, 0.5, seed=4)
    for tube_of in (volume, plain):
        assert abs(helical_correlation(tube_of, COARSE, VOXEL, CYLINDER)) < 0.05
        assert abs(rotational_correlation(tube_of, 5, VOXEL, CYLINDER)) < 0.02
    assert rotational_correlation(plain, 5, VOXEL, CYLINDER, "volume") > 0.5


def test_the_rotational_correlation_is_the_mean_over_all_pairs_of_rotations() -> None:
    # A fivefold and a threefold part, with power at orders that both rules meet.
    volume = helix(HelicalSymmetry(30.0, 20.0, 5)) + 0.7 * helix(HelicalSymmetry(41.0, -10.0, 3))
    r = np.arange(BOX) - BOX // 2
    radius = np.hypot(r[:, None], r)
    within = (radius >= 1) & (radius <= CYLINDER.outer_radius_angstrom / VOXEL)  # type: ignore[operator]
    first, last = CYLINDER.slices(BOX)
    for order in (3, 5):
        turned = [
            transform_volume(volume, Rotation.from_euler("z", 360 * m / order, degrees=True))[first : last + 1, within]
            for m in range(order)
        ]
        table = np.corrcoef([t.ravel() for t in turned])
        expected = (table.sum() - order) / (order * (order - 1))
        found = rotational_correlation(volume, order, VOXEL, CYLINDER, "volume")
        # A hard edge on the voxel grid against circles.
        assert found == pytest.approx(expected, abs=0.02)


def test_rotational_correlation_of_what_has_the_symmetry_or_nothing_of_it() -> None:
    cylinder = Cylinder(outer_radius_angstrom=66.0)
    rings = helix(HelicalSymmetry(60.0, 0.0, 4))
    for removed in MEANS:
        assert rotational_correlation(rings, 4, VOXEL, cylinder, removed) > 0.99
    # Of a fourfold structure all power but the rings' lies in orders 4, 8, ..., of which 3 divides 12, and that has 1%.
    assert rotational_correlation(rings, 3, VOXEL, cylinder, "ring") == pytest.approx(-1 / 2, abs=0.02)
    r = np.arange(BOX) - BOX // 2
    discs = np.exp(-((np.hypot(r[:, None], r) - 6) ** 2) / 8) * np.cos(2 * np.pi * r / 8)[:, None, None]
    assert rotational_correlation(discs.astype(np.float32), 7, VOXEL, cylinder, "radius") > 0.99
    noise = noisy(discs.astype(np.float32), 0.3, seed=1)
    # Noise has all orders up to pi r alike, some 30 on average over the radii; one of every seventh is the ring's.
    assert rotational_correlation(noise, 7, VOXEL, cylinder, "ring") == pytest.approx(-1 / 30, abs=0.02)


# Finding


def test_a_coarse_helix_is_found_from_nothing(coarse: Volume) -> None:
    for volume in (coarse, -noisy(coarse, 1.5)):
        best, *_ = find(volume, (8.0, 50.0), (-180.0, 180.0), VOXEL, CYLINDER)
        assert max(relative(best.symmetry, COARSE)) < 0.01
        assert abs(best.symmetry.twist_degrees - 65) < 0.5
        assert best.symmetry.hand == "right"
        assert best.ambiguities == ()


def test_a_left_handed_strand_pair_is_found_from_nothing() -> None:
    """27.5 Å and -166.7 degrees, as F-actin: the short-pitch helix is left-handed, the two strands are right-handed."""
    actin = HelicalSymmetry(27.5, -166.7)
    subunit = ((20.0, 0.0, 0.0, 12.0, 1.0), (32.0, 10.0, 12.0, 9.0, 0.7), (32.0, -8.0, -10.0, 8.0, 0.7))
    best, *_ = find(noisy(helix(actin, subunit), 1.0), (10.0, 50.0), (-180.0, 180.0), VOXEL, CYLINDER)
    assert max(relative(best.symmetry, actin)) < 0.01
    assert best.symmetry.hand == "left"


def test_strands_of_a_rotational_symmetry() -> None:
    three = HelicalSymmetry(30.0, 40.0, 3)
    volume = noisy(helix(three), 1.0)
    best, *_ = find(volume, (10.0, 50.0), (-60.0, 60.0), VOXEL, CYLINDER, order=3)
    assert max(relative(best.symmetry, three)) < 0.01
    assert best.score > 0.7
    # Symmetry that isn't there costs.
    assert helical_correlation(volume, HelicalSymmetry(30.0, 40.0, 2), VOXEL, CYLINDER) < 0.6 * best.score


def test_subunits_of_tobacco_mosaic_virus_are_found(tmv: Volume) -> None:
    """Subunits 31 Å apart around the rim and 23 Å along, at 5.4 Å voxels; the rise is far below the voxel."""
    cylinder = Cylinder(outer_radius_angstrom=100.0)
    volume = noisy(tmv, 1.0)
    frequency, curve = fsc(volume, noisy(tmv, 1.0, seed=9), soft_sphere(48, 20, 3))
    # Half maps that reach no further than real ones of a few hundred segments do.
    assert 13 < resolution(frequency, curve, 5.4) < 25
    best, *_ = find(volume, (1.2, 3.0), (10.0, 40.0), 5.4, cylinder)
    assert max(relative(best.symmetry, TMV)) < 0.002
    assert abs(best.symmetry.twist_degrees - TMV.twist_degrees) < 0.1
    assert best.symmetry.pitch_angstrom == pytest.approx(22.99, rel=0.003)
    assert best.ambiguities == ()


def test_refinement_does_not_stay_where_it_starts(tmv: Volume) -> None:
    """Other points of the same turns lie in between, each a peak of its own."""
    start = HelicalSymmetry(1.40 * 1.08, 22.04 * 1.08)
    cylinder = Cylinder(outer_radius_angstrom=100.0)
    found = refine(noisy(tmv, 1.5), start, 5.4, cylinder, rise_search_angstrom=0.2, twist_search_degrees=3.0)
    assert max(relative(found.symmetry, TMV)) < 0.005
    assert found.rise_width_angstrom < 0.1
    assert found.twist_width_degrees < 0.2


def test_where_only_turns_are_seen_the_rise_is_said_to_be_open() -> None:
    """A smooth coil: many small steps of a pitch of 60 Å."""
    coil = helix(HelicalSymmetry(3.0, 18.0), ((45.0, 0.0, 0.0, 10.0, 1.0),))
    best, *_ = find(noisy(coil, 0.5), (8.0, 40.0), (-180.0, 180.0), VOXEL, CYLINDER)
    assert any("turns of" in text for text in best.ambiguities)
    twist = best.symmetry.twist_degrees
    turns = best.symmetry.rise_angstrom / 60 * 360
    assert abs((twist - turns + 180) % 360 - 180) < 8


def test_a_lattice_that_is_its_own_mirror_image_leaves_the_hand_open() -> None:
    stack = helix(HelicalSymmetry(30.0, 45.0, 4), ((40.0, 0.0, 0.0, 10.0, 1.0),))
    best, *_ = find(stack, (10.0, 40.0), (-80.0, 80.0), VOXEL, CYLINDER, order=4)
    assert best.symmetry.rise_angstrom == pytest.approx(30, rel=0.01)
    assert abs(best.symmetry.twist_degrees) == pytest.approx(45, abs=0.5)
    assert any(text.startswith("hand") for text in best.ambiguities)


def test_a_search_reports_and_stops(coarse: Volume) -> None:
    fractions: list[float] = []

    def report(fraction: float, phase: str = "", **counters: float) -> None:
        fractions.append(fraction)
        if len(fractions) == 5:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        find(coarse, (10.0, 40.0), (-90.0, 90.0), VOXEL, CYLINDER, progress=report)
    assert fractions == sorted(fractions)


# Imposing


def covered_error(result: Symmetrised, truth: Volume) -> float:
    """Root mean square of the difference over the truth's deviation, where something was averaged."""
    there = result.coverage > 0
    return float(np.sqrt(((result.volume - truth)[there] ** 2).mean()) / truth[there].std())


@pytest.mark.parametrize("symmetry", [COARSE, HelicalSymmetry(27.5, -166.7), HelicalSymmetry(30.0, 40.0, 3)])
def test_symmetry_is_imposed_exactly_and_fills_the_box(symmetry: HelicalSymmetry) -> None:
    truth = helix(symmetry)
    cut = truth.copy()
    first, last = CYLINDER.slices(BOX)
    # Whatever lies outside the part that is used can't matter: the spline's reach is a few voxels.
    cut[: first - 5], cut[last + 6 :] = 50.0, -50.0
    result = symmetrise(cut, symmetry, VOXEL, CYLINDER)
    assert covered_error(result, truth) < 0.01
    r = np.arange(BOX) - BOX // 2
    inside = np.hypot(r[:, None], r) <= 75 / VOXEL
    assert (result.coverage[:, inside] >= symmetry.order).all()
    assert (result.coverage[:, ~inside] == 0).all()
    assert (result.volume[:, ~inside] == 0).all()


def test_the_coverage_counts_the_subunits_and_noise_falls_with_it(coarse: Volume) -> None:
    noise = noisy(coarse, 1.0) - coarse
    result = symmetrise(noise, COARSE, VOXEL, CYLINDER)
    first, last = CYLINDER.slices(BOX)
    # So many subunits as fit into the soft-ended part, on average over z.
    expected = (last - first - 2) * VOXEL / COARSE.rise_angstrom
    there = result.coverage > 0
    assert result.coverage[there].mean() == pytest.approx(expected, rel=0.05)
    # Interpolation damps noise further, by a known half at most.
    ratio = result.volume[there].var() / noise.var() * expected
    assert 0.35 < ratio < 1.1


def test_symmetrising_twice_changes_nothing(coarse: Volume) -> None:
    once = symmetrise(noisy(coarse, 0.5), COARSE, VOXEL, CYLINDER).volume
    assert helical_correlation(once, COARSE, VOXEL, Cylinder(66.0)) > 0.99
    flat = np.full((BOX,) * 3, 3.0, np.float32)
    flat[0, 0, 0] = 4.0
    mean = symmetrise(flat, COARSE, VOXEL, CYLINDER)
    np.testing.assert_allclose(mean.volume[mean.coverage > 0], 3.0, rtol=1e-4)


def test_a_wrong_hand_destroys_the_helix(coarse: Volume) -> None:
    result = symmetrise(coarse, HelicalSymmetry(27.0, -65.0), VOXEL, CYLINDER)
    assert covered_error(result, coarse) > 0.7


# The axis


def test_the_axis_is_found_and_refined() -> None:
    symmetry = HelicalSymmetry(30.0, 25.0, 3)
    rotation = Rotation.from_rotvec([0.5, -0.7, 0.9])
    shift = np.array([1.7, -1.2, 0.6])
    tilted = helix(symmetry, rotation=rotation, shift=shift) * soft_sphere(BOX, 16, 3)
    direction = rotation.apply([0, 0, 1])
    offset = shift - direction * (shift @ direction)

    def errors(axis: Axis) -> tuple[float, float]:
        cosine = abs(float(axis.direction @ direction))
        return math.degrees(math.acos(min(1.0, cosine))), float(np.linalg.norm(axis.shift_voxels - offset))

    start = find_axis(noisy(tilted, 1.0))
    angle, distance = errors(start)
    assert angle < 3
    assert distance < 0.7
    assert start.direction[2] >= 0
    cylinder = Cylinder(outer_radius_angstrom=60.0)
    axis, found = refine_axis(tilted, start, HelicalSymmetry(31.0, 26.5, 3), VOXEL, cylinder)
    angle, distance = errors(axis)
    assert angle < 0.3
    assert distance < 0.1
    # Turning the axis round keeps the hand.
    assert max(relative(found.symmetry, symmetry)) < 0.01
    straight = upright(tilted, axis)
    assert helical_correlation(straight, symmetry, VOXEL, cylinder) > 0.97


def test_poses_go_with_an_average_that_is_put_upright() -> None:
    volume = helix(COARSE, box=24, voxel=12.0) * soft_sphere(24, 8, 2)
    axis = Axis(Rotation.from_rotvec([0.3, 0.2, -0.4]), np.array([0.8, -0.5, 0.3]))
    rotation, shift = Rotation.from_rotvec([-0.2, 0.5, 0.1]), np.array([0.4, 0.9, -0.7])
    particle = transform_volume(volume, rotation, shift)
    again = transform_volume(upright(volume, axis), rotation * axis.rotation, shift + rotation.apply(axis.shift_voxels))
    assert np.corrcoef(particle.ravel(), again.ravel())[0, 1] > 0.99


# What can't work


def test_bad_input_is_named(coarse: Volume) -> None:
    with pytest.raises(InvalidArgument, match="cube"):
        symmetrise(coarse[1:], COARSE, VOXEL)
    with pytest.raises(InvalidArgument, match="finite"):
        symmetrise(np.full((BOX,) * 3, np.nan), COARSE, VOXEL)
    with pytest.raises(InvalidArgument, match="voxel_size"):
        symmetrise(coarse, COARSE, 0.0)
    with pytest.raises(InvalidArgument, match="rise_angstrom"):
        symmetrise(coarse, HelicalSymmetry(200.0, 10.0), VOXEL)
    with pytest.raises(InvalidArgument, match="outer_radius"):
        symmetrise(coarse, COARSE, VOXEL, Cylinder(outer_radius_angstrom=500.0))
    with pytest.raises(InvalidArgument, match="inner_radius"):
        rotational_correlation(coarse, 3, VOXEL, Cylinder(inner_radius_angstrom=100.0, outer_radius_angstrom=90.0))
    with pytest.raises(InvalidArgument, match="central_fraction"):
        symmetrise(coarse, COARSE, VOXEL, Cylinder(central_fraction=0.05))
    with pytest.raises(InvalidArgument, match="order"):
        rotational_correlation(coarse, 1, VOXEL)
    with pytest.raises(InvalidArgument, match="constant"):
        find(np.ones((BOX,) * 3), (10.0, 40.0), (-90.0, 90.0), VOXEL)
    with pytest.raises(InvalidArgument, match="constant"):
        find_axis(np.ones((BOX,) * 3))
    for rises, twists, message in (
        ((0.0, 40.0), (-90.0, 90.0), "positive"),
        ((40.0, 10.0), (-90.0, 90.0), "rising order"),
        ((10.0, 90.0), (-90.0, 90.0), "can't be seen"),
        ((10.0, 40.0), (-190.0, 90.0), "-180"),
        ((0.01, 40.0), (-180.0, 180.0), "too many"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            find(coarse, rises, twists, VOXEL, CYLINDER)
