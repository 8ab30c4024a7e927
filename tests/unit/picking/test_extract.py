from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.fourier import fourier_crop
from services.picking.extract import cut_boxes, memory_bytes, normalise, outside_sphere, place_boxes
from services.picking.slabs import Array

SHAPE = (30, 44, 37)


@pytest.fixture(scope="module")
def tomogram() -> Array:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def cut(
    tomogram: Array,
    positions: NDArray[np.float64],
    box_size: int,
    binning: int = 1,
    normalisation: str = "none",
    edges: str = "skip",
    window_bytes: int = 256 << 20,
) -> Array:
    shape = (tomogram.shape[0], tomogram.shape[1], tomogram.shape[2])
    placement = place_boxes(positions, shape, box_size, binning, edges)
    out = np.full((len(placement.rows), *[box_size] * 3), np.nan, np.float32)
    cut_boxes(
        lambda z0, z1: tomogram[z0:z1], shape, placement, out, normalisation=normalisation, window_bytes=window_bytes
    )
    return out


def random_positions(count: int, margin: float = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(1)
    return rng.uniform(-0.5 + margin, np.array(SHAPE[::-1]) - 0.5 - margin, (count, 3))


@pytest.mark.parametrize("box", [4, 7, 8])
@pytest.mark.parametrize("window_bytes", [1, 256 << 20])
def test_boxes_are_the_tomogram_around_the_nearest_voxel_in_the_order_of_the_particles(
    tomogram: Array, box: int, window_bytes: int
) -> None:
    positions = random_positions(60, margin=5)
    boxes = cut(tomogram, positions, box, window_bytes=window_bytes)
    half = box // 2
    assert len(boxes) == 60
    for position, found in zip(positions, boxes, strict=True):
        x, y, z = np.floor(position + 0.5).astype(int)
        expected = tomogram[z - half : z - half + box, y - half : y - half + box, x - half : x - half + box]
        np.testing.assert_array_equal(found, expected)
        assert found[half, half, half] == tomogram[z, y, x]


def test_what_rounding_leaves_of_a_position_is_kept() -> None:
    positions = np.array([[10.25, 20.5, 15.75], [12.0, 9.49, 11.51]])
    placement = place_boxes(positions, SHAPE, 8)
    np.testing.assert_array_equal(placement.centres, [[10, 21, 16], [12, 9, 12]])
    np.testing.assert_array_equal(placement.corners, placement.centres - 4)
    np.testing.assert_allclose(placement.centres + placement.offsets, positions, atol=1e-12)
    assert np.abs(placement.offsets).max() <= 0.5


def test_boxes_that_leave_the_tomogram_are_skipped_and_counted(tomogram: Array) -> None:
    # along each axis a box of 8 fits around voxels 4 to length - 4
    positions, fits = [], []
    for axis, length in enumerate(SHAPE[::-1]):
        for voxel in (3, 4, length - 4, length - 3):
            position = [15.0, 15.0, 15.0]
            position[axis] = voxel
            positions.append(position)
            fits.append(4 <= voxel <= length - 4)
    placement = place_boxes(np.array(positions), SHAPE, 8)
    assert placement.rows.tolist() == np.flatnonzero(fits).tolist()
    assert placement.skipped == 6
    assert len(cut(tomogram, np.array(positions), 8)) == 6


def test_what_lies_outside_gets_the_mean_of_what_lies_inside(tomogram: Array) -> None:
    positions = np.array([[1.0, 2.0, 28.0], [36.0, 43.0, 0.0], [-4.0, 10.0, 10.0], [-5.0, 10.0, 10.0]])
    placement = place_boxes(positions, SHAPE, 8, edges="fill_mean")
    # the box of the last reaches to voxel -2
    assert placement.rows.tolist() == [0, 1]
    boxes = cut(tomogram, positions, 8, edges="fill_mean")
    inside = tomogram[24:30, 0:6, 0:5]
    np.testing.assert_array_equal(boxes[0][:6, 2:, 3:], inside)
    outside = np.ones((8, 8, 8), bool)
    outside[:6, 2:, 3:] = False
    np.testing.assert_allclose(boxes[0][outside], inside.mean(), atol=1e-6)
    np.testing.assert_array_equal(boxes[1][4:, :5, :5], tomogram[0:4, 39:44, 32:37])


def test_a_box_may_be_larger_than_the_tomogram_where_the_outside_is_filled(tomogram: Array) -> None:
    (box,) = cut(tomogram, np.array([[18.0, 22.0, 15.0]]), 64, edges="fill_mean")
    np.testing.assert_array_equal(box[17:47, 10:54, 14:51], tomogram)
    with pytest.raises(InvalidArgument, match="box of 64 voxels is larger than the tomogram of 37 x 44 x 30"):
        place_boxes(np.array([[18.0, 22.0, 15.0]]), SHAPE, 64)
    with pytest.raises(InvalidArgument, match=r"box of 32 voxels \(16 binned by 2\) is larger"):
        memory_bytes(SHAPE, 16, 2)


@pytest.mark.parametrize(("box", "binning"), [(8, 2), (7, 2), (5, 3), (6, 4)])
def test_binned_boxes_are_cropped_in_fourier_space(tomogram: Array, box: int, binning: int) -> None:
    position = np.array([[17.4, 21.2, 14.6]])
    (found,) = cut(tomogram, position, box, binning)
    x, y, z = np.array([17, 21, 15]) - box // 2 * binning
    side = box * binning
    expected = fourier_crop(tomogram[z : z + side, y : y + side, x : x + side], binning)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("box", "binning"), [(12, 2), (11, 2), (8, 3), (9, 3)])
def test_a_particle_stays_in_the_centre_of_a_binned_box(box: int, binning: int) -> None:
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    sigma = 1.2 * binning
    blob = np.exp(-((x - 18) ** 2 + (y - 22) ** 2 + (z - 15) ** 2) / (2 * sigma**2)).astype(np.float32)
    (found,) = cut(blob, np.array([[18.0, 22.0, 15.0]]), box, binning)
    assert np.unravel_index(found.argmax(), found.shape) == (box // 2,) * 3
    along = np.arange(box) - box // 2
    expected = np.exp(-(along**2) * binning**2 / (2 * sigma**2))
    # above the new Nyquist a Gaussian of 1.2 new voxels has exp(-(pi 1.2)^2 / 2) = 8e-4 of its amplitude at DC
    np.testing.assert_allclose(found[box // 2, box // 2], expected, atol=4e-3)


def test_normalisations(tomogram: Array) -> None:
    positions = random_positions(5, margin=6)
    raw = cut(tomogram * 7 + 30, positions, 10)
    whole = cut(tomogram * 7 + 30, positions, 10, normalisation="box")
    background = cut(tomogram * 7 + 30, positions, 10, normalisation="background")
    outside = outside_sphere(10)
    for box in whole:
        assert box.mean(dtype=float) == pytest.approx(0, abs=1e-6)
        assert box.std(dtype=float) == pytest.approx(1, abs=1e-6)
    for box in background:
        assert box[outside].mean(dtype=float) == pytest.approx(0, abs=1e-6)
        assert box[outside].std(dtype=float) == pytest.approx(1, abs=1e-6)
    # both are scalings and offsets of the box alone
    for a, b, c in zip(raw, whole, background, strict=True):
        np.testing.assert_allclose(b, (a - a.mean()) / a.std(), atol=1e-4)
        assert np.corrcoef(a.ravel(), c.ravel())[0, 1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("box", [4, 9, 16])
def test_the_background_lies_outside_of_the_inscribed_sphere(box: int) -> None:
    outside = outside_sphere(box)
    for index in itertools.product(range(box), repeat=3):
        distance = np.linalg.norm(np.array(index) - box // 2)
        assert outside[index] == (distance > box / 2)
    assert 0 < outside.sum() < box**3


@pytest.mark.parametrize("how", ["box", "background"])
def test_a_constant_box_is_not_blown_up(how: str) -> None:
    box = np.full((6, 6, 6), 1000.1, np.float32)
    normalise(box, how, outside_sphere(6))
    # the mean in single precision is off by half a unit in the last place at most
    assert np.abs(box).max() <= 1000.1 * 2**-24


@pytest.mark.parametrize("window_bytes", [1, 60_000, 256 << 20])
def test_planes_are_read_once_for_each_part_along_y_and_only_where_needed(tomogram: Array, window_bytes: int) -> None:
    # boxes of 4 in two groups, at planes 3 to 9 and 21 to 25
    z = np.array([23.0, 5.0, 7.0, 5.0, 23.0])
    positions = np.stack([[10.0, 12, 30, 20, 8], [10.0, 40, 9, 25, 38], z], axis=1)
    placement = place_boxes(positions, SHAPE, 4)
    read: list[int] = []

    def read_slab(z0: int, z1: int) -> Array:
        read.extend(range(z0, z1))
        return tomogram[z0:z1]

    out = np.zeros((5, 4, 4, 4), np.float32)
    cut_boxes(read_slab, SHAPE, placement, out, normalisation="none", window_bytes=window_bytes)
    np.testing.assert_array_equal(out, cut(tomogram, positions, 4))
    assert set(read) == {*range(3, 9), *range(21, 25)}
    if window_bytes > 1 << 20:
        assert sorted(read) == sorted(set(read))


def test_memory_is_that_of_a_window_not_of_the_tomogram() -> None:
    shape, box = (200, 100, 100), 16
    rng = np.random.default_rng(2)
    positions = rng.uniform(10, np.array(shape[::-1]) - 10, (300, 3))
    placement = place_boxes(positions, shape, box)
    out = np.zeros((len(placement.rows), box, box, box), np.float32)
    tracemalloc.start()
    cut_boxes(lambda z0, z1: np.zeros((z1 - z0, 100, 100), np.float32), shape, placement, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 32 planes of window, 32 read at once, and the boxes in work; the tomogram has 200
    assert peak < (2 * 32 + 8) * 40_000 + 16 * box**3
    assert peak < memory_bytes(shape, box)


def test_positions_that_are_nowhere_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="row 1 "):
        place_boxes(np.array([[10.0, 10, 10], [1e300, 10, 10]]), SHAPE, 4)
