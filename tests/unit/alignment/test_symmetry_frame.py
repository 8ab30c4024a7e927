"""Where a symmetry lies in sums that were made without it."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics.rotations import angular_distance_degrees, point_group
from services.alignment.band import Band
from services.alignment.reconstruction import components_of
from services.alignment.symmetry_frame import Frame, centre_of_mass, find_frame
from tests.unit.alignment.samples import symmetric

BOX = 32
RADIUS = 0.35
TILTED = Rotation.from_euler("zyx", [40.0, 65.0, -20.0], degrees=True)
OFF = np.array([1.4, -0.8, 0.5])


def sampled_by_wedges(band: Band, axis: NDArray[np.float64], spread_degrees: float) -> NDArray[np.float64]:
    """How often each component is sampled by wedges of ±40° about `axis`, laid within ±`spread_degrees` of another."""
    first = np.cross(axis, [0.0, 0.0, 1.0])
    first /= np.linalg.norm(first)
    second = np.cross(axis, first)
    points = band.points.numpy().astype(np.float64)
    angle = np.degrees(np.arctan2(points @ second, points @ first))
    weights = np.zeros(len(band))
    for turned in np.linspace(-spread_degrees, spread_degrees, 11):
        weights += np.abs((angle - turned + 90) % 180 - 90) <= 40
    return weights


def frame_of(group: str, weights: NDArray[np.float64] | None, band: Band) -> Frame:
    """Of a volume of `group` whose axes are `TILTED` and whose centre is `OFF`."""
    volume = symmetric(group, 2).volume(BOX, TILTED, OFF)
    weights = np.full(len(band), 20.0) if weights is None else weights
    components = components_of(band, volume)[0].numpy().astype(np.complex128)
    shell = np.rint(band.radius).astype(int)
    power = (np.bincount(shell, np.abs(components) ** 2) / np.maximum(np.bincount(shell), 1))[shell]
    ratio = np.full(len(band), 0.5)
    return find_frame(band, components * weights, weights, ratio, power, group, RADIUS, centre_of_mass(volume))


@pytest.mark.parametrize("group", ["C2", "C7", "D3", "O"])
def test_axes_and_centre_are_found(group: str) -> None:
    frame = frame_of(group, None, Band(BOX, 1.0, 12.0, None, "cpu"))
    axis = frame.rotation.apply([0.0, 0.0, 1.0])
    if group[0] == "C":
        # The other way up, or turned about its axis, it is the same group.
        assert abs(axis @ TILTED.apply([0.0, 0.0, 1.0])) > np.cos(np.radians(1.5))
        along = TILTED.apply([0.0, 0.0, 1.0])
        off = frame.centre_voxels - OFF
        assert np.linalg.norm(off - along * (off @ along)) < 0.15
    else:
        members = point_group(group)
        turned = frame.rotation * members * frame.rotation.inv()
        nearest = [float(angular_distance_degrees(turned, TILTED * g * TILTED.inv(), "C1").min()) for g in members]
        assert max(nearest) < 3
        np.testing.assert_allclose(frame.centre_voxels, OFF, atol=0.15)


def test_an_axis_is_found_though_all_wedges_lie_alike() -> None:
    """Of 180° about the axis a ninth is never seen: each turn by a seventh meets what no wedge showed."""
    band = Band(BOX, 1.0, 12.0, None, "cpu")
    along = TILTED.apply([0.0, 0.0, 1.0])
    weights = sampled_by_wedges(band, along, 25.0)
    assert 0.2 < (weights == 0).mean() < 0.4
    frame = frame_of("C7", weights, band)
    assert abs(frame.rotation.apply([0.0, 0.0, 1.0]) @ along) > np.cos(np.radians(1.5))
    off = frame.centre_voxels - OFF
    assert np.linalg.norm(off - along * (off @ along)) < 0.2
