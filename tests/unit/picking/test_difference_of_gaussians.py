from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max

from cryofleet.errors import Cancelled, FailedPrecondition, InvalidArgument
from services.picking.difference_of_gaussians import (
    Picks,
    difference_of_gaussians,
    memory_bytes,
    plan_tiles,
    preview,
    sigmas_voxels,
    suppress,
)
from services.picking.slabs import Array, read_memory_bytes

VOXEL = 10.0


def pick(
    volume: Array, diameter_voxels: float, contrast: str = "light", tile_bytes: int = 256 << 20, **options: float
) -> Picks:
    return difference_of_gaussians(
        lambda z0, z1: volume[z0:z1],
        volume.shape,
        VOXEL,
        diameter_voxels * VOXEL,
        contrast=contrast,
        tile_bytes=tile_bytes,
        **options,  # type: ignore[arg-type]
    )


def noise(shape: tuple[int, int, int], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gaussian_blob(
    shape: tuple[int, int, int], centre_xyz: tuple[float, float, float], sigma: float
) -> NDArray[np.float64]:
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    square = (x - centre_xyz[0]) ** 2 + (y - centre_xyz[1]) ** 2 + (z - centre_xyz[2]) ** 2
    return np.exp(-square / (2 * sigma**2))


def scipy_filtered(volume: Array, diameter_voxels: float) -> NDArray[np.float64]:
    narrow, wide = sigmas_voxels(diameter_voxels, 1.0)
    exact = volume.astype(np.float64)
    filtered: NDArray[np.float64] = ndimage.gaussian_filter(exact, narrow) - ndimage.gaussian_filter(exact, wide)
    return filtered


@pytest.mark.parametrize("contrast", ["dark", "light"])
@pytest.mark.parametrize(("shape", "diameter"), [((33, 41, 38), 6.0), ((20, 67, 70), 10.5), ((9, 30, 31), 9.0)])
def test_peaks_are_those_of_scipy_and_scikit_image(shape: tuple[int, int, int], diameter: float, contrast: str) -> None:
    volume = noise(shape) + 50
    picks = pick(volume, diameter, contrast, threshold=0.5, min_distance_angstrom=0)

    filtered = scipy_filtered(volume, diameter) * (1 if contrast == "light" else -1)
    scores = (filtered - filtered.mean()) / filtered.std()
    find_peaks: Callable[..., NDArray[np.int64]] = peak_local_max
    expected = find_peaks(scores, min_distance=1, threshold_abs=0.5, exclude_border=1)
    z, y, x = picks.positions.T[::-1]
    assert {*zip(z, y, x, strict=True)} == {*map(tuple, expected)}
    # single precision in each of three axes, of a difference a tenth of what is subtracted
    np.testing.assert_allclose(picks.scores, scores[z, y, x], atol=1e-4)
    assert (np.diff(picks.scores) <= 0).all()


@pytest.mark.parametrize("shape", [(45, 40, 37), (13, 81, 70), (64, 150, 20)])
@pytest.mark.parametrize("tile_bytes", [1, 1 << 20, 4 << 20])
def test_tiles_do_not_show(shape: tuple[int, int, int], tile_bytes: int) -> None:
    volume = noise(shape, seed=1)
    diameter = 9.0  # the Gaussians reach 11 voxels, more than the least tile
    whole = pick(volume, diameter, threshold=1)
    tiled = pick(volume, diameter, threshold=1, tile_bytes=tile_bytes)
    tiles = plan_tiles(shape, sigmas_voxels(diameter, 1)[1], tile_bytes)
    assert (tile_bytes == 1) <= (tiles.depth < shape[0])
    np.testing.assert_array_equal(tiled.positions, whole.positions)
    np.testing.assert_allclose(tiled.scores, whole.scores, atol=1e-4)
    assert tiled.mean == pytest.approx(whole.mean, abs=1e-6)
    assert tiled.deviation == pytest.approx(whole.deviation, rel=1e-6)


def test_some_tiles_are_cut_along_y() -> None:
    assert plan_tiles((64, 150, 20), 2.9, 1).rows < 150


@pytest.mark.parametrize("plane", range(10, 21))
def test_a_peak_between_two_planes_is_found_once_wherever_tiles_meet(plane: int) -> None:
    shape = (32, 24, 24)
    volume = gaussian_blob(shape, (12, 11, plane + 0.5), 2.0).astype(np.float32)
    picks = pick(volume, 7, tile_bytes=1, threshold=2, min_distance_angstrom=0)
    (x, y, z), *others = picks.positions.tolist()
    assert (x, y) == (12, 11)
    assert z in (plane, plane + 1)
    assert not others


def test_planted_particles_are_found_at_their_voxels_strongest_first() -> None:
    shape = (40, 60, 50)
    planted = [((12, 14, 11), 3.0), ((35, 40, 26), 2.0), ((20, 45, 15), 1.0)]
    diameter = 10.0
    volume = 0.02 * noise(shape)
    for centre, height in planted:
        volume -= (height * gaussian_blob(shape, centre, diameter / (2 * math.sqrt(3)))).astype(np.float32)
    picks = pick(volume, diameter, "dark", threshold=5)
    assert picks.positions.tolist() == [list(centre) for centre, _ in planted]
    # of the other contrast there are at most the rims of the blobs
    rims = pick(volume, diameter, "light", threshold=5).positions
    assert not {*map(tuple, rims.tolist())} & {centre for centre, _ in planted}


def test_response_to_a_gaussian_blob_is_the_analytic_one() -> None:
    # the convolution of Gaussians is the Gaussian of summed variances
    shape, width, height, diameter = (57, 57, 57), 3.0, 5.0, 9.0
    volume = (height * gaussian_blob(shape, (28, 28, 28), width)).astype(np.float32)
    picks = pick(volume, diameter, threshold=5)
    narrow, wide = (height * (width**2 / (width**2 + sigma**2)) ** 1.5 for sigma in sigmas_voxels(diameter, 1))
    peak = picks.scores[0] * picks.deviation + picks.mean
    # a Gaussian cut off at 4 sigma lacks 6.3e-5 of its weight on each axis
    assert peak == pytest.approx(narrow - wide, abs=3 * 6.3e-5 * (narrow + wide))


def test_a_ball_answers_most_to_its_own_diameter() -> None:
    centre, radius = 24, 7.0
    z, y, x = np.ogrid[:49, :49, :49]
    distance = np.sqrt((x - centre) ** 2 + (y - centre) ** 2 + (z - centre) ** 2)
    ball = np.clip(radius + 0.5 - distance, 0, 1).astype(np.float32)

    def response(diameter: float) -> float:
        picks = pick(ball, diameter, threshold=3)
        assert picks.positions[0].tolist() == [centre] * 3
        return float(picks.scores[0] * picks.deviation + picks.mean)

    # centred between sigma_1 and sigma_2 the best diameter is 1 / sqrt(1.1) of the ball's
    best = 2 * radius / math.sqrt(1.1)
    assert response(best) > response(0.9 * best)
    assert response(best) > response(1.1 * best)


def test_the_peak_of_an_offset_tomogram_is_as_exact() -> None:
    volume = noise((24, 40, 40), seed=3)
    plain, offset = pick(volume, 8, threshold=1), pick(volume + np.float32(4096), 8, threshold=1)
    np.testing.assert_array_equal(plain.positions, offset.positions)
    # voxels near 4096 are stored to 2.4e-4, of which the filter averages many
    np.testing.assert_allclose(plain.scores, offset.scores, atol=2e-3)


def test_nothing_is_picked_on_the_faces() -> None:
    # a particle cut in half by the face, which reflection makes whole
    volume = gaussian_blob((30, 30, 30), (15, 15, -0.5), 3).astype(np.float32)
    assert len(pick(volume, 10, threshold=1).scores) == 0
    picks = pick(noise((30, 30, 30)), 4, threshold=-100, min_distance_angstrom=0).positions
    assert picks.min() == 1
    assert picks.max() == 28


def test_threshold_keeps_just_the_peaks_that_reach_it() -> None:
    volume = noise((40, 50, 60), seed=5)
    every = pick(volume, 5, threshold=-100, min_distance_angstrom=0)
    for threshold in (-0.5, 0.5, 1.0, 2.5):
        some = pick(volume, 5, threshold=threshold, min_distance_angstrom=0, tile_bytes=1)
        expected = every.positions[every.scores >= threshold]
        np.testing.assert_array_equal(some.positions, expected)


def test_noise_has_about_one_peak_to_the_cube_of_the_diameter() -> None:
    # Bardeen et al. 1986, eq. 4.11b: 0.016 / R^3 maxima in a unit of volume of a Gaussian random field, R the square
    # root of 3 (mean k^2) / (mean k^4) over its power spectrum, here k^4 exp(-(k sigma)^2) with sigma between the two
    diameter = 10.0
    sigma = math.sqrt(1.1) * sigmas_voxels(diameter, 1)[0]
    expected = 0.016 / (math.sqrt(3 / 4.5) * sigma) ** 3
    volume = noise((90, 110, 110), seed=5)
    positions = pick(volume, diameter, threshold=-100, min_distance_angstrom=0).positions
    # away from the faces, where the volume and its reflection have maxima together
    peaks = ((positions >= 10) & (positions < np.array(volume.shape[::-1]) - 10)).all(axis=1).sum()
    # of independent peaks; these keep apart and scatter less
    assert peaks == pytest.approx(expected * 70 * 90 * 90, abs=3 * math.sqrt(peaks))
    assert expected * diameter**3 < 1.2


def test_peaks_are_sifted_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = noise((48, 40, 40), seed=6)
    expected = pick(volume, 4, threshold=2)
    monkeypatch.setattr("services.picking.difference_of_gaussians.SIFT_PEAKS", 10)
    np.testing.assert_array_equal(pick(volume, 4, threshold=2, tile_bytes=1).positions, expected.positions)


def test_picks_keep_their_distance_and_number() -> None:
    volume = noise((30, 60, 60), seed=2)
    picks = pick(volume, 6, threshold=1)
    differences = picks.positions[:, None] - picks.positions
    distances = np.sqrt((differences**2).sum(axis=2))[np.triu_indices(len(picks.scores), 1)]
    assert len(picks.scores) > 20
    assert distances.min() >= 6
    few = pick(volume, 6, threshold=1, max_picks=7)
    np.testing.assert_array_equal(few.positions, picks.positions[:7])


def test_of_equal_peaks_the_first_in_z_y_x_stays() -> None:
    positions = np.array([[5, 5, 6], [5, 6, 5], [6, 5, 5], [5, 5, 9]])
    kept = suppress(positions, np.array([1.0, 1, 1, 1]), 3.0)
    # (6, 5, 5) has the least z and y; (5, 5, 9) is sqrt(17) from it
    assert kept.tolist() == [2, 3]


def test_peaks_exactly_the_least_distance_apart_both_stay() -> None:
    positions = np.array([[0, 0, 0], [3, 4, 0], [0, 0, 4]])
    assert suppress(positions, np.array([3.0, 2, 1]), 5.0).tolist() == [0, 1]
    assert suppress(positions, np.array([3.0, 2, 1]), 4.0).tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 8)] * 3, st.integers(0, 3)), max_size=30, unique_by=lambda peak: peak[:3]),
    st.floats(0, 6),
    st.integers(0, 5),
)
def test_suppression_is_the_plain_greedy_one(
    peaks: list[tuple[int, int, int, int]], distance: float, max_picks: int
) -> None:
    array = np.array(peaks, np.int64).reshape(-1, 4)
    kept = suppress(array[:, :3], array[:, 3].astype(float), distance, max_picks)
    greedy: list[tuple[int, ...]] = []
    for x, y, z, _ in sorted(peaks, key=lambda peak: (-peak[3], peak[2], peak[1], peak[0])):
        if all((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 >= distance**2 * (1 - 1e-8) for a, b, c in greedy):
            greedy.append((x, y, z))
    assert [tuple(position) for position in array[kept, :3].tolist()] == greedy[: max_picks or None]


def test_every_plane_is_read_once_and_memory_is_kept_to() -> None:
    shape, diameter, tile_bytes = (80, 128, 128), 6.0, 4 << 20
    volume = noise(shape, seed=4)
    read: list[int] = []

    def read_slab(z0: int, z1: int) -> Array:
        read.extend(range(z0, z1))
        return volume[z0:z1].copy()

    tracemalloc.start()
    difference_of_gaussians(read_slab, shape, 1.0, diameter, contrast="light", tile_bytes=tile_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tiles = plan_tiles(shape, sigmas_voxels(diameter, 1)[1], tile_bytes)
    assert tiles.depth < 10
    assert tiles.rows == 128
    # beside one plane in the middle, for the offset
    assert sorted(read) == sorted([*range(80), 40])
    assert peak < tiles.memory_bytes
    assert tiles.memory_bytes - read_memory_bytes(shape) <= tile_bytes


def test_parts_along_y_do_not_add_up_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.picking.slabs.READ_BYTES", 1)  # a plane at a time
    shape, diameter, tile_bytes = (60, 400, 100), 6.0, 2 << 20
    volume = noise(shape)
    tiles = plan_tiles(shape, sigmas_voxels(diameter, 1)[1], tile_bytes)
    assert tiles.rows < 200
    tracemalloc.start()
    difference_of_gaussians(
        lambda z0, z1: volume[z0:z1].copy(), shape, 1.0, diameter, contrast="light", tile_bytes=tile_bytes
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < tiles.memory_bytes


def test_memory_does_not_grow_with_the_number_of_planes() -> None:
    # picks of 30 voxels' diameter are few
    thick, thicker = (memory_bytes((planes, 1000, 1000), VOXEL, 300) for planes in (300, 3000))
    assert thick < 512 << 20
    assert thicker - thick < 64 << 20


@pytest.mark.parametrize(("diameter", "words"), [(1.9, "2 voxels"), (13, "smallest side, 12")])
def test_impossible_diameters_are_named(diameter: float, words: str) -> None:
    with pytest.raises(InvalidArgument, match=f"particle_diameter_angstrom.*{words}"):
        pick(noise((12, 30, 30)), diameter)
    with pytest.raises(InvalidArgument, match="particle_diameter_angstrom"):
        memory_bytes((12, 30, 30), VOXEL, diameter * VOXEL)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_refused(value: float) -> None:
    volume = noise((12, 20, 20))
    volume[7, 3, 4] = value
    with pytest.raises(FailedPrecondition, match="not finite"):
        pick(volume, 5)


def test_a_constant_tomogram_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="constant"):
        pick(np.full((12, 20, 20), 0.3, np.float32), 5)


def test_progress_rises_to_the_end_and_can_stop_the_work() -> None:
    fractions: list[float] = []

    def note(fraction: float, phase: str = "", **counters: float) -> None:
        fractions.append(fraction)
        if len(fractions) == 5:
            raise Cancelled("enough")

    volume = noise((30, 20, 20))
    with pytest.raises(Cancelled):
        difference_of_gaussians(lambda z0, z1: volume[z0:z1], volume.shape, 1.0, 5.0, contrast="dark", progress=note)
    assert len(fractions) == 5
    assert fractions == sorted(fractions)
    assert all(0 < fraction < 1 for fraction in fractions)


@pytest.mark.parametrize(("first", "count"), [(0, 9), (25, 10), (50, 10), (0, 60)])
def test_a_preview_has_the_peaks_of_the_whole(first: int, count: int) -> None:
    volume, read = noise((60, 40, 42), seed=8), set[int]()

    def read_slab(z0: int, z1: int) -> Array:
        read.update(range(z0, z1))
        return volume[z0:z1]

    whole = pick(volume, 6, threshold=-100, min_distance_angstrom=0)
    some = preview(
        read_slab, volume.shape, first, count, VOXEL, 60, contrast="light", threshold=-100, min_distance_angstrom=0
    )
    inside = (whole.positions[:, 2] >= first) & (whole.positions[:, 2] < first + count)
    np.testing.assert_array_equal(some.positions, whole.positions[inside])
    responses = whole.scores[inside] * whole.deviation + whole.mean
    np.testing.assert_allclose(some.scores * some.deviation + some.mean, responses, atol=1e-5)
    assert min(read) >= first - 9
    assert max(read) < first + count + 9


@pytest.mark.parametrize(("first", "count"), [(-1, 3), (5, 0), (28, 3)])
def test_a_preview_outside_the_tomogram_is_refused(first: int, count: int) -> None:
    volume = noise((30, 20, 20))
    with pytest.raises(InvalidArgument, match="planes 0 to 29"):
        preview(lambda z0, z1: volume[z0:z1], volume.shape, first, count, VOXEL, 60, contrast="light")
