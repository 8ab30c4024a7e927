"""Poses have the distributions that were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from services.simulation.poses import draw_poses


def test_counts_are_exact_and_shuffled() -> None:
    poses = draw_poses([30, 70], np.random.default_rng(1))
    assert np.bincount(poses.classes).tolist() == [30, 70]
    assert 0 < poses.classes[:50].sum() < 50
    assert not poses.shifts_voxels.any()


def test_uniform_orientations_have_the_angles_of_so3() -> None:
    angles = draw_poses([4000], np.random.default_rng(2)).rotations.magnitude()
    # the density of rotation angles is (1 - cos w) / pi, so that their mean is pi / 2 + 2 / pi; its error is 0.01
    assert angles.mean() == pytest.approx(np.pi / 2 + 2 / np.pi, abs=0.04)


def test_shifts_fill_a_ball() -> None:
    shifts = draw_poses([4000], np.random.default_rng(3), max_shift_voxels=5).shifts_voxels
    radii = np.linalg.norm(shifts, axis=1)
    assert radii.max() <= 5
    # half of a ball's volume lies within 2^(-1/3) of its radius; 3 standard errors
    assert np.mean(radii < 5 / np.cbrt(2)) == pytest.approx(0.5, abs=0.024)
    assert np.abs(shifts.mean(axis=0)).max() < 0.15


def test_orientations_about_one_axis_keep_it() -> None:
    poses = draw_poses([500], np.random.default_rng(4), axis=(0, 1, 0), structure_axis=(0, 0, 2))
    np.testing.assert_allclose(poses.rotations.apply([0, 0, 1]), np.tile([0.0, 1.0, 0.0], (500, 1)), atol=1e-12)
    turned = poses.rotations.apply([1, 0, 0])
    turns = np.sort(np.arctan2(turned[:, 2], turned[:, 0]))
    # Kolmogorov's distance from uniform, at 1.6 / sqrt(n) for one in a hundred
    assert np.abs((turns + np.pi) / (2 * np.pi) - (np.arange(500) + 0.5) / 500).max() < 1.7 / np.sqrt(500)


@pytest.mark.parametrize("axis", [(0, 0, 0), (1, 2), (np.nan, 0, 1)])
def test_a_direction_that_is_none_is_refused(axis: tuple[float, ...]) -> None:
    with pytest.raises(InvalidArgument, match="axis"):
        draw_poses([1], np.random.default_rng(0), axis=axis)
