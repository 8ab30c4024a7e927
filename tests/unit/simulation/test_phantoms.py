"""The built-in complexes: exact symmetry, published sizes, stated masses."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.rotations import point_group
from services.simulation import density, phantoms
from services.simulation.potential import render

NAMES = phantoms.names()
POINT_GROUPS = [name for name in NAMES if phantoms.phantom(name).helix is None]
SPACING = 5.0


def rendered(name: str, spacing: float = SPACING, resolution: float = 20.0) -> NDArray[np.float32]:
    scatterers = phantoms.phantom(name).scatterers()
    side = 2 * int(np.ceil((scatterers.radius_angstrom() + 2 * resolution) / spacing)) + 2
    return render(scatterers, side, spacing, resolution)


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


@pytest.mark.parametrize("name", POINT_GROUPS)
def test_pseudo_atoms_are_invariant_under_every_element_of_the_group(name: str) -> None:
    phantom = phantoms.phantom(name)
    scatterers = phantom.scatterers()
    tree = cKDTree(scatterers.positions)
    for element in point_group(phantom.symmetry):
        distance, partner = tree.query(element.apply(scatterers.positions))
        assert np.max(distance) < 1e-6
        np.testing.assert_allclose(scatterers.weights[partner], scatterers.weights, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in POINT_GROUPS if name != "two-subunit-globule"])
def test_density_is_symmetric(name: str) -> None:
    phantom = phantoms.phantom(name)
    volume = rendered(name)
    group = point_group(phantom.symmetry)
    # the first turn, and the last element, which is another axis for all but cyclic groups
    for element in (group[1], group[-1]):
        assert correlation(transform_volume(volume, element), volume) > 0.99


@pytest.mark.parametrize("name", ["double-ring", "barrel", "hexameric-ring"])
def test_rings_are_not_symmetric_under_half_a_subunit(name: str) -> None:
    phantom = phantoms.phantom(name)
    order = int(phantom.symmetry[1:])
    half_turn = point_group(f"C{2 * order}")[1]
    volume = rendered(name)
    assert correlation(transform_volume(volume, half_turn), volume) < 0.93


def test_globule_has_no_symmetry() -> None:
    volume = rendered("two-subunit-globule", 8.0, 30.0)
    for group in ("C2", "D2"):
        for element in point_group(group)[1:]:
            assert correlation(transform_volume(volume, element), volume) < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_extent_is_the_published_one_within_a_voxel(name: str) -> None:
    phantom = phantoms.phantom(name)
    volume = rendered(name, 4.0, 15.0)
    # the surface of a body low-passed lies at half its density
    inside = volume > 0.5 * np.median(volume[volume > 0.3 * volume.max()])
    for axis, published in zip((2, 1, 0), phantom.extent_angstrom, strict=True):
        if published is not None:
            covered = np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis})))
            extent = (covered[-1] - covered[0] + 1) * 4.0
            assert extent == pytest.approx(published, abs=10.0)


def helical_filament() -> tuple[phantoms.Phantom, phantoms.Helix]:
    phantom = phantoms.phantom("helical-filament")
    assert phantom.symmetry == "H"
    assert phantom.helix is not None
    return phantom, phantom.helix


def test_filament_repeats_one_subunit_by_its_helical_operator() -> None:
    phantom, helix = helical_filament()
    assert (helix.rise_angstrom, helix.twist_degrees, helix.hand, helix.subunits) == (27.5, -166.7, "left", 13)
    subunit, whole = phantom.subunit(), phantom.scatterers()
    assert subunit.molecular_weight_kda * 13 == pytest.approx(whole.molecular_weight_kda)
    assert float(subunit.weights @ subunit.positions[:, 2]) == pytest.approx(0, abs=1e-6 * subunit.weights.sum())
    found = np.concatenate(
        [turn.apply(subunit.positions) + np.array([0, 0, shift]) for turn, shift in map(helix.operator, range(-6, 7))]
    )
    np.testing.assert_allclose(found, whole.positions, atol=1e-9)
    # taken a step further, all subunits but the last lie on subunits
    turn, shift = helix.operator(1)
    distance, _ = cKDTree(whole.positions).query(turn.apply(whole.positions) + np.array([0, 0, shift]))
    assert np.count_nonzero(distance < 1e-6) >= 12 * len(subunit.positions)
    np.testing.assert_allclose(whole.centred().positions[:, 2], whole.positions[:, 2], atol=1e-9)


def test_filament_is_helical_in_its_density_and_left_handed() -> None:
    _, helix = helical_filament()
    spacing = 27.5 / 3
    volume = density.density_map(phantoms.phantom("helical-filament").scatterers(), spacing, 25.0).values
    middle = len(volume) // 2
    core = slice(middle - 12, middle + 13)  # eight subunits, none of them at an end

    def after(rotation: Rotation, steps: int) -> float:
        moved = transform_volume(volume, rotation, (0, 0, 3.0 * steps))
        return correlation(moved[core], volume[core])

    for steps in (1, 2, -1):
        assert after(helix.operator(steps)[0], steps) > 0.99
    mirrored = Rotation.from_euler("z", 166.7, degrees=True)
    assert after(mirrored, 1) < 0.95
    # polar: no twofold across the axis
    flip = Rotation.from_euler("x", 180, degrees=True)
    turns = [Rotation.from_euler("z", angle, degrees=True) * flip for angle in range(0, 360, 30)]
    assert max(after(turn, 0) for turn in turns) < 0.95


def test_a_subunit_of_a_filament_is_built_about_the_helical_axis() -> None:
    phantom, helix = helical_filament()
    subunit = density.build_subunit("helical-filament", None, "", 5.5, 20.0)
    whole = density.density_map(phantom.scatterers(), 5.5, 20.0).values
    built = np.zeros_like(whole)
    for step in helix.steps():
        turn, shift = helix.operator(step)
        box = subunit.rotated(turn, np.zeros(3))
        low = len(whole) // 2 - np.array(box.shape) // 2 + [round(shift / 5.5), 0, 0]
        built[tuple(slice(start, start + side) for start, side in zip(low, box.shape, strict=True))] += box
    assert correlation(built, whole) > 0.995
    with pytest.raises(InvalidArgument, match="'barrel' is no filament; helical-filament is"):
        density.build_subunit("barrel", None, "", 5.5, 20.0)


def test_double_ring_has_its_channel_and_seven_lobes() -> None:
    volume = rendered("double-ring", 5.0, 25.0)
    middle = volume.shape[0] // 2
    # 4.5 nm wide: empty at 1.5 nm from the axis, full in the wall at 4.5 nm, on every plane of the rings
    angles = np.arange(0, 2 * np.pi, np.pi / 90)
    for height in (-11, -4, 4, 11):

        def ring(radius: float, height: int = height) -> NDArray[np.float32]:
            y, x = middle + radius / 5 * np.sin(angles), middle + radius / 5 * np.cos(angles)
            plane: NDArray[np.float32] = volume[middle + height, np.rint(y).astype(int), np.rint(x).astype(int)]
            return plane

        assert ring(15).mean() < 0.15 * ring(45).mean()
    # 7-fold modulation dominates around the apical domains
    spectrum = np.abs(np.fft.rfft(ring(45)))[1:]
    assert int(np.argmax(spectrum)) + 1 == 7
    assert spectrum[6] > 0.2 * ring(45).sum() / 2


@pytest.mark.parametrize("name", NAMES)
def test_mass_and_potential_are_as_stated(name: str) -> None:
    phantom = phantoms.phantom(name)
    scatterers = phantom.scatterers()
    assert scatterers.molecular_weight_kda == pytest.approx(phantom.molecular_weight_kda, rel=1e-3)
    volume = rendered(name)
    integral = float(volume.sum(dtype=np.float64)) * SPACING**3
    assert integral == pytest.approx(phantom.molecular_weight_kda * 1000 * phantom.potential_per_dalton, rel=2e-3)


def test_phantoms_are_the_same_at_every_call() -> None:
    np.testing.assert_array_equal(
        phantoms.double_ring().scatterers().positions, phantoms.double_ring().scatterers().positions
    )


def test_unknown_name_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(InvalidArgument, match=r"did you mean 'double-ring'.*two-subunit-globule"):
        phantoms.phantom("duoble-ring")
    with pytest.raises(InvalidArgument, match="source_uri"):
        phantoms.phantom("xyzzy")
