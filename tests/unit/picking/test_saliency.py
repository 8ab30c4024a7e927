"""Robust PCA finds what a matrix was made of; saliency finds particles, and background is pressed down."""

from __future__ import annotations

import tracemalloc
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import Cancelled, FailedPrecondition, Internal, InvalidArgument
from services.picking import saliency as module
from services.picking.difference_of_gaussians import difference_of_gaussians
from services.picking.evaluate import Evaluation, evaluate
from services.picking.robust_pca import robust_pca
from services.picking.saliency import Saliency, enlarge, memory_bytes, saliency
from services.simulation.density import build
from services.simulation.projection import project
from services.simulation.scene import Placement, Specimen, build_scene
from services.simulation.weighted_back_projection import weighted_back_projection

Array = NDArray[np.float32]
VOXEL = 10.0
DIAMETER = 10.0
SHAPE = (40, 64, 64)


@pytest.mark.parametrize("shape", [(120, 100), (100, 120), (600, 40)])
def test_robust_pca_recovers_a_low_rank_and_a_sparse_matrix(shape: tuple[int, int]) -> None:
    # the setting of Candes et al., section 4.1: Gaussian factors of variance 1 / n, signs at random places
    rng = np.random.default_rng(0)
    rank = 3
    low_rank = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])) / np.sqrt(shape[0] * shape[1])
    sparse = np.where(rng.random(shape) < 0.05, rng.choice((-1.0, 1.0), shape), 0.0)
    found = robust_pca(low_rank + sparse, tolerance=1e-9)
    assert np.linalg.norm(found.low_rank - low_rank) < 1e-5 * np.linalg.norm(low_rank)
    assert np.linalg.norm(found.sparse - sparse) < 1e-5 * np.linalg.norm(sparse)
    assert found.rank == rank
    # a sparse matrix is zero, not small, where it is zero
    np.testing.assert_array_equal(found.sparse != 0, sparse != 0)
    assert found.residual < 1e-9


def test_robust_pca_of_scaled_transposed_and_plain_matrices() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(50, 8))
    matrix[7] += 20
    found = robust_pca(matrix)
    np.testing.assert_allclose(found.low_rank + found.sparse, matrix, atol=1e-6 * float(np.linalg.norm(matrix)))
    scaled, turned = robust_pca(1e6 * matrix), robust_pca(matrix.T)
    np.testing.assert_allclose(scaled.sparse, 1e6 * found.sparse, atol=1)
    np.testing.assert_allclose(turned.sparse.T, found.sparse, atol=1e-5)
    assert robust_pca(np.zeros((3, 4))).rank == 0
    # a dear sparse matrix leaves everything to the other, and a cheap one takes it
    assert not robust_pca(matrix, sparsity_weight=10).sparse.any()
    assert not robust_pca(matrix, sparsity_weight=1e-3).low_rank.any()


def test_robust_pca_refuses_what_it_cannot_split() -> None:
    matrix = np.random.default_rng(2).normal(size=(20, 10))
    with pytest.raises(InvalidArgument, match="rows and columns"):
        robust_pca(matrix[0])
    with pytest.raises(InvalidArgument, match="sparsity_weight"):
        robust_pca(matrix, sparsity_weight=0)
    with pytest.raises(Internal, match="after 3 iterations"):
        robust_pca(matrix, max_iterations=3)
    matrix[3, 3] = np.inf
    with pytest.raises(FailedPrecondition, match="not finite"):
        robust_pca(matrix)


def centres(shape: tuple[int, int, int], seed: int, count: int, gap: float) -> NDArray[np.float64]:
    """(x, y, z) at least `gap` apart and a radius from the faces."""
    rng = np.random.default_rng(seed)
    placed: list[NDArray[np.float64]] = []
    while len(placed) < count:
        place = rng.uniform(DIAMETER / 2 + 1, np.array(shape[::-1]) - DIAMETER / 2 - 2)
        if all(np.linalg.norm(place - other) >= gap for other in placed):
            placed.append(place)
    return np.array(placed)


def balls(shape: tuple[int, int, int], places: NDArray[np.float64], diameter: float) -> Array:
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    volume = np.zeros(shape, np.float32)
    for px, py, pz in places:
        distance = np.sqrt((x - px) ** 2 + (y - py) ** 2 + (z - pz) ** 2)
        np.maximum(volume, np.clip(diameter / 2 + 0.5 - distance, 0, 1), out=volume)
    return volume


@cache
def planted(seed: int = 0) -> tuple[Array, NDArray[np.float64]]:
    """15 balls half as dense as the noise deviates, 1.4 diameters apart: a signal-to-noise ratio of 0.25 in them."""
    places = centres(SHAPE, seed, 15, 1.4 * DIAMETER)
    noise = np.random.default_rng(seed + 100).standard_normal(SHAPE, np.float32)
    return 0.5 * balls(SHAPE, places, DIAMETER) + noise, places


def found_in(volume: Array, **options: Any) -> Saliency:
    return saliency(volume, VOXEL, DIAMETER * VOXEL, **{"contrast": "light", **options})


@cache
def plain() -> Saliency:
    return found_in(planted()[0])


def compared(picks: NDArray[np.int64], truth: NDArray[np.float64]) -> Evaluation:
    return evaluate(picks.astype(np.float64) * VOXEL, truth * VOXEL, DIAMETER * VOXEL / 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_particles_are_found(seed: int) -> None:
    volume, places = planted(seed)
    found = found_in(volume) if seed else plain()
    score = compared(found.positions, places)
    assert score.recall >= 0.9
    assert score.precision >= 0.9
    # much nearer than what counts as found
    assert np.median(score.matching.distances) < DIAMETER * VOXEL / 5
    assert found.supervoxels > 10 * len(places)
    assert 0 < found.rank < module.FEATURES
    assert (np.diff(found.scores) <= 0).all()
    assert (found.scores >= 2).all()


def test_saliency_is_high_at_particles_and_low_beside_them() -> None:
    _, places = planted()
    found = plain()
    assert found.factor == 1
    inside = balls(SHAPE, places, 0.6 * DIAMETER) > 0.5
    outside = balls(SHAPE, places, 2 * DIAMETER) == 0
    assert found.saliency.min() >= 0
    assert found.saliency[inside].mean() > 10 * found.saliency[outside].mean()


def test_the_background_is_suppressed_and_the_picks_are_whole() -> None:
    volume, places = planted()
    found = plain()
    outside = balls(SHAPE, places, 2 * DIAMETER) == 0
    assert found.suppressed[outside].std() < 0.3 * volume[outside].std()
    x, y, z = found.positions.T
    np.testing.assert_allclose(found.suppressed[z, y, x], volume[z, y, x], rtol=1e-5, atol=1e-6)
    # by its definition
    weight = np.minimum(1, found.saliency / (found.mean + 2 * found.deviation))
    np.testing.assert_allclose(found.suppressed, volume.mean() + weight * (volume - volume.mean()), atol=1e-5)
    # and to some purpose: nearer to what was there before the noise
    truth = balls(SHAPE, places, DIAMETER).ravel()
    assert np.corrcoef(found.suppressed.ravel(), truth)[0, 1] > 1.3 * np.corrcoef(volume.ravel(), truth)[0, 1]


def test_dark_is_light_upside_down() -> None:
    volume, _ = planted()
    dark = found_in(-volume, contrast="dark")
    np.testing.assert_array_equal(dark.positions, plain().positions)
    np.testing.assert_allclose(dark.saliency, plain().saliency, atol=1e-5)
    np.testing.assert_allclose(dark.suppressed, -plain().suppressed, atol=1e-5)
    # holes as deep as particles are high are no particles
    assert compared(found_in(-volume).positions, planted()[1]).recall < 0.2


def test_scale_and_offset_change_nothing() -> None:
    volume, _ = planted()
    changed = found_in(1000 * volume + np.float32(5000))
    # the order of equal-looking super-voxels in SLIC may turn on a rounding: few voxels may change sides
    assert np.corrcoef(changed.saliency.ravel(), plain().saliency.ravel())[0, 1] > 0.99
    assert compared(changed.positions, plain().positions.astype(np.float64)).f1 > 0.95


def test_groups_of_supervoxels_hardly_show(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, places = planted()
    monkeypatch.setattr(module, "MAX_ROWS", 1000)
    dealt = found_in(volume)
    assert dealt.supervoxels > 3000
    assert np.corrcoef(dealt.saliency.ravel(), plain().saliency.ravel())[0, 1] > 0.98
    assert compared(dealt.positions, places).f1 > 0.9


def test_same_input_same_bytes() -> None:
    volume, _ = planted()
    again = found_in(volume.copy(), workers=2)
    for name in ("saliency", "suppressed", "positions", "scores"):
        assert getattr(again, name).tobytes() == getattr(plain(), name).tobytes()


def test_blocks_hardly_show(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, places = planted()
    monkeypatch.setattr(module, "BLOCK", 40)
    cut = found_in(volume)
    # other super-voxels, as they end at the blocks' faces, of the same features
    assert np.corrcoef(cut.saliency.ravel(), plain().saliency.ravel())[0, 1] > 0.9
    assert compared(cut.positions, places).f1 > 0.9


def test_features_of_a_block_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With super-voxels that do not depend on the blocks what is left is what the halo cuts off."""
    volume = planted()[0]

    def cubes(density: Array, plan: object, compactness: float) -> NDArray[np.int64]:
        z, y, x = (np.arange(side) // 4 for side in density.shape)
        return (z[:, None, None] * 1000 + y[:, None]) * 1000 + x

    def numbered(*arguments: Any) -> NDArray[np.int64]:
        cube = cubes(*arguments)
        return np.unique(cube, return_inverse=True)[1].reshape(cube.shape)

    monkeypatch.setattr(module, "_supervoxels", numbered)
    whole = found_in(volume)
    monkeypatch.setattr(module, "BLOCK", 32)
    blocks = found_in(volume)
    np.testing.assert_allclose(blocks.saliency, whole.saliency, atol=0.02 * whole.saliency.max())


def test_a_fine_tomogram_is_reduced_and_picks_come_back_to_its_grid() -> None:
    shape = (52, 84, 91)
    diameter = 20.0
    places = np.array([[20.0, 24.0, 16.0], [66.0, 58.0, 33.0], [24.0, 62.0, 30.0], [64.0, 20.0, 22.0]])
    volume = balls(shape, places, diameter) + np.random.default_rng(5).standard_normal(shape, np.float32)
    found = saliency(volume, 5.0, diameter * 5.0, contrast="light", threshold=3.0)
    assert found.factor == 2
    assert found.saliency.shape == (26, 42, 45)
    score = evaluate(found.positions.astype(np.float64) * 5.0, places * 5.0, diameter * 5.0 / 4)
    assert (score.recall, score.precision) == (1, 1)
    full = enlarge(found.saliency, 2, shape)
    np.testing.assert_allclose(full[4:50:2, 4:80:2, 4:80:2], found.saliency[2:25, 2:40, 2:40], rtol=1e-6)
    np.testing.assert_allclose(full[5, 4, 4], found.saliency[2:4, 2, 2].mean(), rtol=1e-5)
    assert found.suppressed.shape == shape


def test_nothing_outside_the_mask_counts() -> None:
    volume, places = planted()
    mask = np.zeros(SHAPE, np.bool_)
    mask[:, :, :36] = True
    gold = volume.copy()
    gold[:, :, 56:] *= 5
    found = found_in(gold, mask=mask)
    assert (found.positions[:, 0] < 36).all()
    assert not found.saliency[~mask].any()
    inside = places[places[:, 0] < 34]
    assert compared(found.positions, inside).recall > 0.8
    assert found.mean == pytest.approx(float(found.saliency[mask].mean()), rel=1e-5)
    with pytest.raises(FailedPrecondition, match="mask leaves"):
        found_in(volume, mask=np.zeros(SHAPE, np.bool_))


def test_threshold_distance_and_number_of_picks() -> None:
    volume, _ = planted()
    positions = found_in(volume, threshold=0.0).positions
    gaps = np.linalg.norm(positions[:, None] - positions, axis=2)[np.triu_indices(len(positions), 1)]
    assert gaps.min() >= DIAMETER
    assert len(positions) > len(plain().positions)
    np.testing.assert_array_equal(found_in(volume, max_picks=3).positions, plain().positions[:3])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"particle_diameter_angstrom": 39.0}, "at least 4 voxels"),
        ({"particle_diameter_angstrom": 450.0}, "smallest side"),
        ({"contrast": "bright"}, "contrast"),
        ({"supervoxel_size_voxels": 11.0}, "supervoxel_size_voxels"),
        ({"supervoxel_size_voxels": 1.0}, "supervoxel_size_voxels"),
        ({"compactness": 0.0}, "compactness"),
        ({"max_picks": -1}, "max_picks"),
        ({"mask": np.ones((2, 2, 2), np.bool_)}, "mask"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"particle_diameter_angstrom": 100.0, "contrast": "light", **options}
    with pytest.raises(InvalidArgument, match=match):
        saliency(planted()[0], VOXEL, **arguments)


def test_tomograms_that_cannot_be_picked_are_refused() -> None:
    volume = planted()[0].copy()
    volume[7, 3, 3] = np.nan
    with pytest.raises(FailedPrecondition, match=r"not finite .* plane 7"):
        found_in(volume)
    with pytest.raises(FailedPrecondition, match="constant"):
        found_in(np.full(SHAPE, 3, np.float32))


def test_particles_without_noise_are_found() -> None:
    places = centres(SHAPE, 3, 8, 2 * DIAMETER)
    found = found_in(balls(SHAPE, places, DIAMETER), threshold=3.0)
    assert compared(found.positions, places).f1 == 1


def test_the_smallest_particles_are_found() -> None:
    places = np.array([[12.0, 14.0, 10.0], [30.0, 16.0, 14.0], [20.0, 30.0, 20.0]])
    volume = 3 * balls((30, 40, 44), places, 4.0)
    volume += np.random.default_rng(7).standard_normal(volume.shape, np.float32)
    found = saliency(volume, 1.0, 4.0, contrast="light", max_picks=3)
    assert evaluate(found.positions.astype(np.float64), places, 2.0).f1 == 1


def test_progress_rises_and_stops_the_work() -> None:
    told: list[float] = []

    def listen(fraction: float, phase: str = "", **counters: float) -> None:
        told.append(fraction)

    def stop(fraction: float, phase: str = "", **counters: float) -> None:
        if fraction > 0.8:
            raise Cancelled("enough")

    found_in(planted()[0], progress=listen)
    assert told == sorted(told)
    assert told[0] == 0
    assert told[-1] > 0.95
    with pytest.raises(Cancelled):
        found_in(planted()[0], progress=stop)


@pytest.mark.parametrize(("shape", "diameter"), [((40, 64, 64), 10.0), ((56, 80, 90), 22.0), ((30, 70, 160), 6.0)])
def test_memory_is_bounded(shape: tuple[int, int, int], diameter: float) -> None:
    volume = np.random.default_rng(0).standard_normal(shape, np.float32)
    plain()  # what is loaded once is no one's
    tracemalloc.start()
    saliency(volume, 1.0, diameter, contrast="dark", threshold=0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    bound = memory_bytes(shape, 1.0, diameter)
    assert peak < bound
    assert bound < 5 * peak + (150 << 20)


@pytest.mark.parametrize("diameter", [12.0, 20.0, 40.0])
def test_a_large_tomogram_and_what_is_made_of_it_fit_in_four_gib(diameter: float) -> None:
    shape = (300, 1000, 1000)
    assert memory_bytes(shape, 1.0, diameter) + 4 * 3e8 < 4 << 30


def test_a_simulated_crowd_is_picked_nearly_as_well_as_by_differences_of_gaussians() -> None:
    """Two ring-shaped structures 24 Å apart at the least, projected, with noise, and reconstructed with a wedge."""
    shape, voxel, diameter = (64, 120, 120), 12.0, 190.0
    kinds = [(build(name, None, "", voxel, 24.0), n) for name, n in (("hexameric-ring", 22), ("double-ring", 16))]
    rng = np.random.default_rng(1)
    specimen = Specimen(
        shape, voxel, 24.0, placements=[Placement(density, n) for density, n in kinds], min_gap_angstrom=24.0
    )
    scene = build_scene(specimen, rng)
    angles = np.arange(-60.0, 61.0, 3.0)
    images = project(scene.density, angles)
    images = images + rng.standard_normal(images.shape, np.float32) * np.float32(images.std() / np.sqrt(0.05))
    volume = weighted_back_projection(images - images.mean(), angles, shape[0], shape[2])
    found = saliency(volume, voxel, diameter, contrast="light")
    other = difference_of_gaussians(lambda z0, z1: volume[z0:z1], shape, voxel, diameter, contrast="light")
    truth = scene.positions * voxel
    ours, theirs = (
        evaluate(picks.positions.astype(np.float64) * voxel, truth, diameter / 2).f1 for picks in (found, other)
    )
    assert ours > 0.85
    assert ours > theirs - 0.1
