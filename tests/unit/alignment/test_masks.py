"""Masks against their closed forms."""

import math

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.masks import radius_grid, soft_cylinder, soft_dilation, soft_ellipsoid, soft_sphere

N = 40
C = N // 2


def test_a_cylinder_is_one_inside_and_half_in_the_middle_of_its_edge() -> None:
    mask = soft_cylinder(N, 8, 11, 4)
    assert mask[C, C, C + 8] == 1
    assert mask[C + 11, C, C] == 1
    assert mask[C, C - 10, C] == pytest.approx(0.5)
    assert mask[C + 13, C, C] == pytest.approx(0.5)
    assert mask[C, C, C + 12] == pytest.approx(0, abs=1e-7)
    assert mask[C + 15, C, C] == pytest.approx(0, abs=1e-7)
    # Beyond the rim the distance is to the rim: 3-4-5 from (8, 11).
    assert soft_cylinder(N, 8, 11, 10)[C + 15, C, C + 11] == pytest.approx(0.5)
    hard = soft_cylinder(N, 8, 11, 0)
    assert set(np.unique(hard)) == {0, 1}
    # Gauss's circle: the error of the count of 8^2 pi is a few per cent.
    assert hard.sum() == pytest.approx(math.pi * 64 * 23, rel=0.04)


def test_an_ellipsoid_lies_along_its_axes() -> None:
    mask = soft_ellipsoid(N, (12, 8, 5), 4)
    for axis, semi in zip((2, 1, 0), (12, 8, 5), strict=True):
        at = [C, C, C]
        at[axis] += semi
        assert mask[tuple(at)] == pytest.approx(1)
        at[axis] += 2
        assert mask[tuple(at)] == pytest.approx(0.5, abs=1e-5)
        at[axis] += 2
        assert mask[tuple(at)] == pytest.approx(0, abs=1e-5)
    assert soft_ellipsoid(N, (12, 8, 5), 0).sum() == pytest.approx(4 / 3 * math.pi * 480, rel=0.03)
    np.testing.assert_allclose(soft_ellipsoid(N, (9, 9, 9), 5), soft_sphere(N, 9, 5), atol=1e-5)
    with pytest.raises(InvalidArgument, match="positive"):
        soft_ellipsoid(N, (9, 0, 9), 5)


def test_a_point_grows_to_a_sphere() -> None:
    point = np.zeros((N, N, N), bool)
    point[C, C, C] = True
    np.testing.assert_allclose(soft_dilation(point, 7, 5), soft_sphere(N, 7, 5), atol=1e-6)
    # A sphere of 6 grown by 4 is one of 10, within the half voxel by which its surface is known.
    grown = soft_dilation(radius_grid(N) <= 6, 4, 4)
    assert (grown >= soft_sphere(N, 9.5, 4) - 1e-6)[radius_grid(N) <= 9.5].all()
    assert np.abs(grown - soft_sphere(N, 10, 4)).max() < math.pi / 2 / 4 * 0.9


def test_dilation_takes_any_shape_and_refuses_nothing() -> None:
    inside = np.zeros((6, 9, 12), bool)
    inside[3, 4, 2] = True
    mask = soft_dilation(inside, 0, 4)
    assert mask.shape == inside.shape
    assert mask[3, 4, 4] == pytest.approx(0.5)
    np.testing.assert_array_equal(soft_dilation(inside, 0, 0), inside)
    np.testing.assert_array_equal(soft_dilation(np.ones((4, 4, 4), bool), 2, 2), 1)
    with pytest.raises(InvalidArgument, match="empty"):
        soft_dilation(~np.ones((4, 4, 4), bool), 1, 1)
    with pytest.raises(InvalidArgument, match="negative"):
        soft_dilation(inside, -1, 1)
