from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from benchmarks.microtubule import lattice_patch, wall_distance
from cryofleet.errors import InvalidArgument
from cryofleet.numerics.cylindrical import cylindrical_spectrum, cylindrical_transform, trace_axis


def tube(order: int = 0, frequency: float = 0.0, bend: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A tube of radius 9 along y whose wall carries one helix, and its axis; (z, y, x) = (40, 120, 44)."""
    z, y, x = np.meshgrid(np.arange(40.0), np.arange(120.0), np.arange(44.0), indexing="ij")
    u = (np.arange(120.0) - 60) / 60
    axis = np.stack([21.3 + bend * u**2, np.arange(120.0), 19.6 - 0.5 * bend * u], axis=1)
    dx, dz = x - axis[:, 0][None, :, None], z - axis[:, 2][None, :, None]
    # counter-clockwise seen from +y runs from z to x
    angle = np.arctan2(dx, dz)
    wall = np.exp(-0.5 * ((np.hypot(dx, dz) - 9) / 1.5) ** 2)
    return wall * (1 + np.cos(2 * np.pi * frequency * y - order * angle)), axis


@pytest.mark.parametrize("order", [3, -3, 5, -10])
def test_a_helix_is_found_at_its_order_and_frequency(order: int) -> None:
    volume, axis = tube(order, 24 / 120)
    for points, step in ((axis, 1.0), (axis[::-1], 0.5)):
        unrolled = cylindrical_transform(volume, points, np.arange(7.0, 12.0), 64, step)
        spectrum = cylindrical_spectrum(unrolled, step)
        row, column = np.unravel_index(int(np.argmax(spectrum.power[5:])), spectrum.power[5:].shape)
        assert spectrum.orders[column] == order
        resolution = 1 / (unrolled.shape[1] * step)
        assert abs(spectrum.axial_frequency[row + 5] - 0.2) <= resolution / 2 + 1e-9


def test_protofilaments_are_counted_at_the_equator() -> None:
    volume, axis = tube(7)
    spectrum = cylindrical_spectrum(cylindrical_transform(volume, axis, np.arange(7.0, 12.0), 64))
    equator = spectrum.line(0.0)
    assert abs(spectrum.orders[int(np.argmax(equator))]) == 7
    assert equator[spectrum.orders == 7] == pytest.approx(equator[spectrum.orders == -7])


def test_a_curved_axis_is_found_in_noise() -> None:
    volume, axis = tube(bend=4.0)
    noisy = volume + np.random.default_rng(1).normal(0, 1, volume.shape)
    noisy[5:35, 80:84, 2:9] += 8  # a bright thing beside it
    found = trace_axis(noisy, 9.0, along="y")
    assert np.abs(found - axis).max() < 0.3


def test_bad_axes_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least two points"):
        cylindrical_transform(np.zeros((4, 4, 4)), np.zeros((1, 3)), np.ones(1), 8)
    with pytest.raises(InvalidArgument, match="along"):
        trace_axis(np.zeros((4, 4, 4)), 2.0, along="w")


def test_a_real_microtubule_has_13_protofilaments_and_a_3_start_lattice(shared_data: Path) -> None:
    volume = tifffile.imread(shared_data / "real" / "microtubule_13pf.tif").astype(np.float32)
    axis = trace_axis(volume, 10.5, along="y")
    radii = np.arange(8.0, 14.0, 0.5)
    spectrum = cylindrical_spectrum(cylindrical_transform(volume, axis, radii, 96), 1.052, radii)
    orders = spectrum.orders
    counted = (orders >= 8) & (orders <= 20)
    assert orders[counted][int(np.argmax(spectrum.line(0.0)[counted]))] == 13
    near = (spectrum.axial_frequency > 1 / 4.4) & (spectrum.axial_frequency < 1 / 3.8)
    inside = np.abs(orders) <= 15
    lines = spectrum.power[near].max(axis=0)[inside]
    strongest = orders[inside][np.argsort(lines)[::-1][:2]]
    assert {abs(int(order)) for order in strongest} == {3, 10}
    assert strongest[0] * strongest[1] < 0


def test_distance_to_a_wall() -> None:
    axis = np.stack([np.full(20, 5.0), np.arange(20.0), np.full(20, 7.0)], axis=1)
    positions = np.array([[15.0, 9.0, 7.0], [5.0, 4.5, 19.0], [5.0, 10.0, 7.0]])
    assert wall_distance(positions, axis, 10.0) == pytest.approx([0, 2, 10], abs=1e-3)


def test_a_lattice_patch_repeats_along_z_and_climbs_to_the_side() -> None:
    z, y, x = np.meshgrid(*[np.arange(20.0) - 9.5] * 3, indexing="ij")
    ball = np.exp(-0.5 * (x**2 + y**2 + z**2) / 2.0**2)
    patch = lattice_patch(ball, 110.0, 13, 40.0, voxel_size_angstrom=10.0)
    template, mask = patch.template, patch.mask
    assert template.shape == mask.shape == (22, 22, 22)
    assert mask.min() == 0
    assert 0.98 < mask.max() <= 1
    column = template[:, 11, 11]
    assert column[[7, 11, 15]] == pytest.approx(column[11], rel=0.02)  # 40 Å are four voxels
    assert column[9] < 0.8 * column[11]
    # the neighbour counter-clockwise lies 53 Å to +y, 13 Å inwards, and 9 Å lower in a left-handed lattice
    neighbour = template[9:13, 16, 10]
    assert int(np.argmax(neighbour)) == 1
    assert template[:, :, 18:].max() < 0.01 * template.max()  # nothing outside the wall
