from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from services.learning.pose_normalisation import find_poses, normalise_poses, structure_weights
from tests.unit.learning.shapes import CHIRAL, blobs, correlation

SIDE = 24


def turned_boxes() -> NDArray[np.float32]:
    turns = Rotation.random(8, random_state=4)
    shifts = np.random.default_rng(5).uniform(-2, 2, (8, 3))
    return np.stack([blobs(CHIRAL, SIDE, turn, tuple(shift)) for turn, shift in zip(turns, shifts, strict=True)])


def test_turned_and_shifted_structures_end_in_one_pose() -> None:
    boxes = turned_boxes()
    normalised = normalise_poses(boxes)
    before = [correlation(boxes[0], box) for box in boxes[1:]]
    after = [correlation(normalised[0], box) for box in normalised[1:]]
    assert max(before) < 0.85
    # Two trilinear interpolations of blobs of 1.3 voxels and more.
    assert min(after) > 0.95


def test_normalising_twice_changes_little() -> None:
    once = normalise_poses(turned_boxes()[:3])
    twice = normalise_poses(once)
    assert min(correlation(a, b) for a, b in zip(once, twice, strict=True)) > 0.95


def test_it_holds_in_noise() -> None:
    boxes = turned_boxes()
    noisy = boxes + np.random.default_rng(6).normal(0, boxes[0].std() / np.sqrt(0.2), boxes.shape).astype(np.float32)
    axes = find_poses(structure_weights(noisy)).axes
    clean = find_poses(structure_weights(boxes)).axes
    angles = Rotation.from_matrix(axes @ clean.transpose(0, 2, 1)).magnitude()
    assert np.degrees(np.median(angles)) < 15


def test_a_mirror_image_is_not_turned_into_its_original() -> None:
    bent = ((8.5, 0, 0, 1.5, 1.2), (0, 6, 0, 1.5, 1.2), (0, 0, 4.5, 1.5, 1.2), (-1, -1, -1, 1.5, 1.0))
    box = blobs(bent, SIDE + 5)
    mirrored = box[:, :, ::-1].copy()
    turned = blobs(bent, SIDE + 5, Rotation.from_euler("xz", [70, 50], degrees=True))
    normalised = normalise_poses(np.stack([box, turned, mirrored]))
    assert correlation(normalised[0], normalised[1]) > 0.95
    assert correlation(normalised[0], normalised[2]) < 0.9


def test_axes_are_rotations_longest_first_and_moments_are_those_of_the_equations() -> None:
    weights = np.random.default_rng(7).random((4, 10, 10, 10), np.float32) ** 4
    poses = find_poses(weights)
    np.testing.assert_allclose(np.linalg.det(poses.axes), 1.0, atol=1e-12)
    z, y, x = (axis.ravel() for axis in np.mgrid[:10, :10, :10] - 5)
    places = np.stack([x, y, z], axis=1)
    for f, centre, axes in zip(weights.astype(np.float64).reshape(4, -1), poses.centres, poses.axes, strict=True):
        np.testing.assert_allclose(centre, (f[:, None] * places).sum(axis=0) / f.sum(), atol=1e-9)
        along = (places - centre) @ axes
        covariance = (f[:, None] ** 2 * along).T @ along
        diagonal = np.diag(covariance)
        np.testing.assert_allclose(covariance, np.diag(diagonal), atol=1e-6 * diagonal[0])
        assert diagonal[0] > diagonal[1] > diagonal[2]
        third_moments = (f[:, None] ** 2 * along**3).sum(axis=0)
        assert third_moments[0] > 0
        assert third_moments[1] > 0


def test_a_flat_membrane_becomes_horizontal() -> None:
    offset = np.arange(SIDE) - SIDE // 2
    z, y, x = np.meshgrid(offset, offset, offset, indexing="ij")
    normal = np.array([0.6, 0.0, 0.8])
    distance = normal[0] * x + normal[1] * y + normal[2] * z
    box = np.exp(-(distance**2) / 8).astype(np.float32)
    profile = normalise_poses(box[None])[0][:, 8:16, 8:16].mean(axis=(1, 2))
    assert profile.argmax() == SIDE // 2
    assert profile[SIDE // 2 - 5] < 0.2 * profile[SIDE // 2]


def test_the_box_mean_fills_what_was_outside() -> None:
    box = blobs(((6, 0, 0, 1.5, 1.0),), SIDE) + 3.0
    normalised = normalise_poses(box[None])[0]
    assert normalised[SIDE // 2, SIDE // 2, SIDE // 2] == pytest.approx(4.0, abs=0.1)
    # One side of the box comes from beyond the old one.
    outside = np.isclose(normalised, box.mean(), rtol=0, atol=1e-5)
    assert outside.sum() >= 4 * SIDE**2


def test_a_box_without_structure_stays_as_it_is() -> None:
    np.testing.assert_allclose(normalise_poses(np.full((1, 8, 8, 8), 2.0, np.float32)), 2.0)
