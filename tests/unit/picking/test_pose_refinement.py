"""Refining picks: finer than the grid, in bounds, the same in any order."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.numerics.fourier import gaussian
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.rotations import angular_distance_degrees
from services.picking.pose_refinement import refine
from services.picking.template import Template, sphere
from services.picking.template_matching import Tomogram, survey

BOX = 20
SHAPE = (56, 64, 72)


def scene() -> tuple[Template, Tomogram, np.ndarray[tuple[int, ...], np.dtype[np.float64]], Rotation]:
    rng = np.random.default_rng(0)
    density = gaussian((rng.standard_normal((BOX,) * 3) * sphere(BOX, 6)).astype(np.float32), 1.2)
    density /= density.std()
    places = np.array([[18.3, 16.6, 20.2], [45.7, 40.4, 30.9], [20.5, 44.1, 40.0], [50.2, 15.9, 14.6]])
    poses = Rotation.random(4, rng=np.random.default_rng(1))
    volume = (0.5 * rng.standard_normal(SHAPE)).astype(np.float32)
    for place, pose in zip(places, poses, strict=True):
        x, y, z = np.rint(place).astype(int)
        shift = place - np.rint(place)
        half = BOX // 2
        volume[z - half : z + half, y - half : y + half, x - half : x + half] += transform_volume(density, pose, shift)
    tomogram = Tomogram(lambda a, b: volume[a:b], SHAPE, *survey(lambda a, b: volume[a:b], SHAPE))
    return Template(density, sphere(BOX, 8)), tomogram, places, poses


@pytest.mark.parametrize("turning", [False, True])
def test_poses_are_found_much_finer_than_they_were_given(turning: bool) -> None:
    template, tomogram, places, poses = scene()
    template = Template(template.density, template.mask, turning)
    off = Rotation.from_rotvec(np.radians(8) * np.array([[1, 0, 0], [0, -1, 0], [0.6, 0.8, 0], [0, 0.6, -0.8]]))
    found = refine(tomogram, template, np.rint(places) + 1, poses * off, angle_degrees=6, max_shift_voxels=3)
    assert np.linalg.norm(found.positions - places, axis=1).max() < 0.3
    # a fifth of a voxel at the template's radius of 6
    assert angular_distance_degrees(poses, found.rotations).max() < 2
    assert found.scores.min() > 0.6
    assert found.scores.max() <= 1


def test_order_does_not_matter_and_shifts_are_limited() -> None:
    template, tomogram, places, poses = scene()
    found = refine(tomogram, template, np.rint(places), poses, angle_degrees=5, max_shift_voxels=2)
    order = np.array([2, 0, 3, 1])
    again = refine(tomogram, template, np.rint(places)[order], poses[order], angle_degrees=5, max_shift_voxels=2)
    assert again.positions == pytest.approx(found.positions[order], abs=1e-6)
    assert again.scores == pytest.approx(found.scores[order], abs=1e-6)
    far = refine(tomogram, template, np.rint(places) + 6, poses, angle_degrees=5, max_shift_voxels=2)
    # and no more than a voxel by the last parabola
    assert np.abs(far.positions - (np.rint(places) + 6)).max() <= 3


def test_nothing_to_refine() -> None:
    template, tomogram, _, _ = scene()
    found = refine(tomogram, template, np.empty((0, 3)), Rotation.identity(0), angle_degrees=5)
    assert len(found.positions) == len(found.scores) == 0
