"""Volumes and labels put back: in the right place and orientation, whatever the slabs, the strongest where they
overlap."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.label_colours import label_colour, overlay
from services.io.isosurface import threshold_of
from services.learning import map_back
from services.learning.map_back import Slab, Solid
from services.learning.weak_labels import BRIGHTEST

SHAPE = (30, 36, 40)


def blob(side: int, offset: tuple[float, float, float], sigma: float = 1.2, height: float = 1.0) -> NDArray[np.float32]:
    """A Gaussian at an offset (x, y, z) from the box centre."""
    z, y, x = (axis - side // 2 for axis in np.indices((side,) * 3))
    squared = (x - offset[0]) ** 2 + (y - offset[1]) ** 2 + (z - offset[2]) ** 2
    return np.asarray(height * np.exp(-squared / (2 * sigma**2)), np.float32)


def whole(slabs: list[Slab]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    assert [slab.first for slab in slabs] == list(np.cumsum([0] + [len(slab.labels) for slab in slabs])[:-1])
    return (
        np.concatenate([slab.labels for slab in slabs]),
        np.concatenate([slab.density for slab in slabs if slab.density is not None]),
    )


def centre_of_mass(density: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.maximum(density, 0).astype(np.float64)
    sums = [(weights * axis).sum() for axis in np.indices(density.shape)]
    return np.asarray(np.array(sums[::-1]) / weights.sum())


@pytest.mark.parametrize("scale", [1.0, 2.0, 1.5])
def test_a_feature_comes_where_its_pose_takes_it(scale: float) -> None:
    offset = np.array([2.0, 1.0, -1.5])
    rotation = Rotation.from_euler("zyx", [[40, 75, -20]], degrees=True)
    position = np.array([[20.3, 17.8, 14.6]])
    solids = [Solid(blob(12, tuple(offset)), scale)]
    slabs = map_back.place_volumes(solids, np.zeros(1, np.int64), position, rotation, SHAPE, 0.5)
    labels, density = whole(list(slabs))
    expected = position[0] + scale * rotation.apply(offset)[0]
    assert centre_of_mass(density) == pytest.approx(expected, abs=0.1)
    # The blob's volume at half its height, a sphere of sigma sqrt(2 ln 2), smoothed a little by interpolation.
    radius = 1.2 * scale * np.sqrt(2 * np.log(2))
    assert (labels == 1).sum() == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.35)
    assert np.array_equal(labels == 1, density >= 0.5)


def test_poses_are_those_of_the_library() -> None:
    box = blob(16, (3, 0, 1)) + blob(16, (-2, 3, 0), height=0.7)
    rotation, shift = Rotation.from_euler("zyx", [25, -50, 70], degrees=True), np.array([0.4, -1.2, 0.8])
    expected = transform_volume(box, rotation, shift, order=1)
    position = np.array([[8.0, 8.0, 8.0]]) + shift
    slabs = map_back.place_volumes(
        [Solid(box, 1.0)], np.zeros(1, np.int64), position, Rotation.concatenate([rotation]), (16, 16, 16), 0.5
    )
    # At the box's edge one leaves out what the other takes for zero.
    assert whole(list(slabs))[1] == pytest.approx(np.maximum(expected, 0), abs=5e-3)


def test_slabs_of_any_thickness_give_the_same_map(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    solids = [map_back.solid(rng.normal(0, 1, (8, 8, 8)).astype(np.float32), scale) for scale in (1.0, 2.0)]
    positions = rng.uniform(-2, 38, (12, 3))
    classes = rng.integers(0, 2, 12)
    rotations = Rotation.random(12, rng=rng)
    once = whole(list(map_back.place_volumes(solids, classes, positions, rotations, SHAPE, 0.5)))
    monkeypatch.setattr(map_back, "SLAB_BYTES", 6 * SHAPE[1] * SHAPE[2] * 7)
    slabs = list(map_back.place_volumes(solids, classes, positions, rotations, SHAPE, 0.5))
    assert [len(slab.labels) for slab in slabs] == [7, 7, 7, 7, 2]
    labels, density = whole(slabs)
    assert np.array_equal(once[0], labels)
    assert density == pytest.approx(once[1], abs=1e-6)
    assert set(np.unique(once[0])) == {0, 1, 2}


def test_the_strongest_counts_where_volumes_overlap() -> None:
    weak, strong = np.full((4, 4, 4), 0.6, np.float32), np.full((4, 4, 4), 0.9, np.float32)
    positions = np.array([[10.0, 10.0, 10.0], [12.0, 10.0, 10.0]])
    for order in ([0, 1], [1, 0]):
        slabs = map_back.place_volumes(
            [Solid(weak, 1.0), Solid(strong, 1.0)], np.array(order), positions[order], None, SHAPE, 0.5
        )
        labels, density = whole(list(slabs))
        row = labels[10, 10, 8:14].tolist()
        assert row == [1, 1, 2, 2, 2, 2]
        assert density[10, 10, 8:14] == pytest.approx([0.6, 0.6, 0.9, 0.9, 0.9, 0.9])
        assert (density > 0).sum() == 96


def test_a_box_on_its_voxels_is_copied_and_cut_off_at_the_edge() -> None:
    box = np.random.default_rng(1).uniform(0.1, 1, (5, 6, 7)).astype(np.float32)
    slabs = map_back.place_volumes(
        [Solid(box, 1.0)], np.zeros(1, np.int64), np.array([[1.0, 20, 29]]), None, SHAPE, 0.5
    )
    density = whole(list(slabs))[1]
    # Voxel (2, 3, 3) of the box, its n // 2, comes to z 29, y 20, x 1.
    assert np.array_equal(density[27:30, 17:23, 0:5], box[:3, :, 2:])
    assert (density > 0).sum() == 3 * 6 * 5


def test_shares_run_from_the_median_to_the_brightest() -> None:
    volume = blob(20, (0, 0, 0), sigma=2, height=50) + 7
    found = map_back.solid(volume, 1.0).shares
    assert float(np.median(found)) == pytest.approx(0, abs=1e-6)
    assert float(np.quantile(found, BRIGHTEST)) == pytest.approx(1, abs=1e-5)
    speck = np.full((20, 20, 20), 7, np.float32)
    speck[9, 9, 9] = 9
    assert np.array_equal(map_back.solid(speck, 1.0).shares, speck == 9)
    assert not map_back.solid(np.full((4, 4, 4), 3, np.float32), 1.0).shares.any()
    fine = map_back.solid(np.random.default_rng(0).normal(0, 1, (24, 24, 24)).astype(np.float32), 0.25).shares
    neighbours = np.corrcoef(fine[:, :, 1:].ravel(), fine[:, :, :-1].ravel())[0, 1]
    # White noise smoothed by sigma: neighbours correlate by exp(-1 / (4 sigma^2)), sigma = sqrt(15) / 2.
    assert neighbours == pytest.approx(np.exp(-1 / 15), abs=0.02)


def test_segmentations_lie_where_their_boxes_were_cut() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 4, SHAPE).astype(np.uint16)
    positions = np.array([[10.2, 12.4, 9.0], [14.0, 15.6, 12.0], [6.0, 8.0, 22.4]])
    centres = np.floor(positions + 0.5).astype(int)
    boxes = [truth[z - 4 : z + 4, y - 4 : y + 4, x - 4 : x + 4] for x, y, z in centres]
    slabs = map_back.place_labels(lambda row: boxes[row], (8, 8, 8), 1.0, positions, np.arange(3), SHAPE)
    labels = np.concatenate([slab.labels for slab in slabs])
    covered = np.zeros(SHAPE, bool)
    for x, y, z in centres:
        covered[z - 4 : z + 4, y - 4 : y + 4, x - 4 : x + 4] = True
    assert np.array_equal(labels, np.where(covered, truth, 0))


def test_the_later_segmentation_counts_unless_it_is_background() -> None:
    first, second = np.full((4, 4, 4), 1, np.uint16), np.full((4, 4, 4), 2, np.uint16)
    second[:, :, 0] = 0
    boxes = [first, second]
    positions = np.array([[10.0, 10, 10], [12.0, 10, 10]])
    rows = {}
    for order in ([0, 1], [1, 0]):
        slabs = map_back.place_labels(lambda row: boxes[row], (4, 4, 4), 1.0, positions, np.array(order), SHAPE)
        rows[order[0]] = np.concatenate([slab.labels for slab in slabs])[10, 10, 8:14].tolist()
    assert rows == {0: [1, 1, 1, 2, 2, 2], 1: [1, 1, 1, 1, 2, 2]}


def test_labels_of_larger_voxels_cover_those_nearest_to_them() -> None:
    box = np.arange(1, 28, dtype=np.uint16).reshape(3, 3, 3)
    slabs = map_back.place_labels(lambda _: box, (3, 3, 3), 3.0, np.array([[20.0, 18, 15]]), np.array([0]), SHAPE)
    labels = np.concatenate([slab.labels for slab in slabs])
    assert np.array_equal(labels[11:20, 14:23, 16:25], box.repeat(3, 0).repeat(3, 1).repeat(3, 2))
    assert (labels > 0).sum() == 9**3


def test_the_picture_shows_labels_in_their_colours() -> None:
    positions = np.array([[5.0, 5, z] for z in (3, 3, 8, 20, 25)])
    shown = map_back.picture_sections(positions, 30)
    assert shown == sorted(set(shown))
    assert len(shown) <= 4
    assert map_back.picture_sections(np.empty((0, 3)), 30) == [15]
    grey = np.tile(np.linspace(0, 1, 40, dtype=np.float32), (36, 1))
    labels = np.zeros((36, 40), np.uint16)
    labels[20, 5] = 2
    image = np.asarray(Image.open(io.BytesIO(map_back.picture([(z, grey, labels) for z in shown]))))
    assert image.shape[2] == 3
    colour = label_colour(2)
    expected = [int(colour[i : i + 2], 16) / 2 for i in (1, 3, 5)]
    assert image[20, 5] - image[20, 4] / 2 == pytest.approx(expected, abs=8)
    with pytest.raises(InvalidArgument, match="at least one section"):
        map_back.picture([])


def test_colours_of_labels_differ_and_leave_the_rest_grey() -> None:
    assert len({label_colour(label) for label in range(1, 101)}) == 100
    painted = overlay(np.full((2, 2), 100, np.uint8), np.array([[0, 1], [0, 0]]))
    assert painted[0, 0].tolist() == painted[1, 1].tolist() == [100, 100, 100]
    assert painted[0, 1].tolist() != [100, 100, 100]


def test_the_border_is_where_io_makes_its_surfaces() -> None:
    volume = blob(20, (2, 1, -3)) - 0.3 * blob(20, (-4, 0, 0))
    for level in (0.3, 0.5):
        threshold = threshold_of(volume, 10.0, "level", level)
        np.testing.assert_array_equal(volume > threshold, map_back.solid(volume, 1.0).shares > level)
