from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.masks import soft_sphere
from cryofleet.numerics.rotations import point_group
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment import dimension_reduction
from services.alignment.align import Poses, standardise
from services.alignment.band import Band
from services.alignment.clustering import adjusted_rand_index
from services.alignment.dimension_reduction import (
    Features,
    features,
    features_bytes,
    neighbourhoods,
    significant,
    weighted_pca,
)
from services.alignment.reconstruction import Contributions, divide, volume_of
from tests.unit.alignment.samples import Blobs, Sample, asymmetric, sample

BOX = 32
WEDGE = (-60.0, 60.0)
TRANSFER = wedge_transfer(BOX, *WEDGE)


def planted(
    count: int, size: int, variances: tuple[float, ...], noise: float, shown: float, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Values (count, 2, size) with weights, of orthonormal components (q, 2, size) and scores; missing at random."""
    rng = np.random.default_rng(seed)
    q = len(variances)
    axes = np.linalg.qr(rng.normal(size=(2 * size, q)))[0].T.reshape(q, 2, size)
    scores = rng.normal(size=(count, q)) * np.sqrt(variances)
    weights = np.where(rng.uniform(size=(count, size)) < shown, rng.uniform(0.3, 1.0, (count, size)), 0.0)
    errors = rng.normal(size=(count, 2, size)) * np.sqrt(noise / np.maximum(weights, 1e-9))[:, None]
    values = np.where(weights[:, None] > 0, 1.0 + np.tensordot(scores, axes, 1) + errors, 0.0)
    return values.astype(np.float32), weights.astype(np.float32), axes, scores


def average_of(data: Sample) -> NDArray[np.float32]:
    band = Band(BOX, 1.0, BOX / 2 - 0.5, None, "cpu")
    poses = poses_of(data)
    terms, coverage = Contributions(band, TRANSFER, point_group("C1"), "cpu").of(
        torch.from_numpy(standardise(data.particles)), *poses.tensors(np.arange(len(data)), "cpu")
    )
    components = divide(terms.sum(dim=0), coverage.sum(dim=0), len(data))
    return np.asarray(volume_of(band, components[None])[0].numpy(), dtype=np.float32)


def poses_of(data: Sample) -> Poses:
    return Poses(data.rotations, data.shifts, np.zeros(len(data)))


def test_without_missing_data_the_fit_is_the_closed_form_of_probabilistic_pca() -> None:
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(60, 12)) * np.linspace(4, 1, 12) + 3).astype(np.float32)
    pca = weighted_pca(values[:, None], np.ones((60, 12), np.float32), 3, iterations=3000, tolerance=0)
    centred = values - values.mean(axis=0)
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / 60)
    noise = eigenvalues[:-3].mean()
    assert np.allclose(pca.mean[0], values.mean(axis=0), atol=1e-4)
    assert pca.noise_variance == pytest.approx(noise, rel=1e-3)
    assert np.allclose(pca.variances, eigenvalues[::-1][:3] - noise, rtol=2e-2)
    assert np.allclose(np.abs(np.sum(pca.components[:, 0] * vectors.T[::-1][:3], axis=1)), 1, atol=1e-2)
    # Tipping & Bishop, eq. 9: the posterior mean is the projection, shrunk by variance / (variance + noise).
    expected = (centred @ pca.components[:, 0].T) * (pca.variances / (pca.variances + pca.noise_variance))
    assert np.allclose(pca.scores, expected, atol=0.05)


def test_the_log_likelihood_is_that_of_the_observed_values_and_never_falls() -> None:
    values, weights, _, _ = planted(40, 10, (9.0, 4.0), 0.2, 0.7)
    pca = weighted_pca(values, weights, 2, iterations=60, tolerance=0)
    history = np.array(pca.log_likelihood)
    assert len(history) > 10
    assert np.diff(history).min() >= -1e-8 * abs(history[-1])
    assert history[-1] > history[0] + 50
    spread = pca.components.reshape(2, -1).T * np.sqrt(pca.variances)
    total = 0.0
    for x, w in zip(values, weights, strict=True):
        seen = np.tile(w > 0, 2)
        covariance = (spread @ spread.T + np.diag(pca.noise_variance / np.maximum(np.tile(w, 2), 1e-30)))[seen][:, seen]
        total += scipy.stats.multivariate_normal.logpdf(x.ravel()[seen], pca.mean.ravel()[seen], covariance)
    assert history[-1] == pytest.approx(total, rel=1e-9)


def test_planted_components_are_found_with_a_third_of_the_values_missing() -> None:
    values, weights, axes, scores = planted(200, 120, (60.0, 25.0), 0.5, 0.67)
    pca = weighted_pca(values, weights, 2)
    flat = pca.components.reshape(2, -1)
    assert np.allclose(flat @ flat.T, np.eye(2), atol=1e-9)
    assert pca.variances[0] > pca.variances[1]
    overlap = np.abs(np.sum(flat * axes.reshape(2, -1), axis=1))
    # Paul, Stat. Sinica 17 (2007): cos^2 = (1 - g / l^2) / (1 + g / l), g = 240 values / 200 particles, l the signal to
    # noise of a component at the mean weight.
    ratio = np.array([60.0, 25.0]) * weights.mean() / 0.5
    assert np.allclose(overlap, np.sqrt((1 - 1.2 / ratio**2) / (1 + 1.2 / ratio)), atol=0.02)
    for k in range(2):
        assert abs(np.corrcoef(pca.scores[:, k], scores[:, k])[0, 1]) > 0.97
    assert pca.noise_variance == pytest.approx(0.5, rel=0.05)


def test_the_same_seed_gives_the_same_and_blocks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights, _, _ = planted(50, 20, (9.0, 4.0), 0.2, 0.7)
    first, again = (weighted_pca(values, weights, 2, iterations=20, seed=3) for _ in range(2))
    assert first.scores.tobytes() == again.scores.tobytes()
    monkeypatch.setattr(dimension_reduction, "_ROWS", 50)
    whole = weighted_pca(values, weights, 2, iterations=60, tolerance=0)
    monkeypatch.setattr(dimension_reduction, "_ROWS", 7)
    blocks = weighted_pca(values, weights, 2, iterations=60, tolerance=0)
    assert np.allclose(whole.scores, blocks.scores, atol=1e-4)


def test_features_that_nobody_shows_are_left_at_nothing() -> None:
    values, weights, _, _ = planted(40, 10, (9.0,), 0.2, 0.8)
    values[:, :, 3], weights[:, 3] = 0, 0
    pca = weighted_pca(values, weights, 1)
    assert np.isfinite(pca.scores).all()
    assert np.abs(pca.components[:, :, 3]).max() < 1e-6


def test_only_components_above_the_noise_are_significant() -> None:
    blocks = np.arange(120) // 3
    values, weights, _, _ = planted(100, 120, (60.0, 40.0), 1.0, 0.7)
    found, level = significant(values, weights, weighted_pca(values, weights, 5), blocks)
    assert found == 2
    # (1 + sqrt(g))^2 - 1 for g = 240 / 100 values per particle, as many as are seen and as much as they weigh.
    assert 1 < level < 20
    noise, weights, _, _ = planted(100, 120, (1e-9,), 1.0, 0.7)
    assert significant(noise, weights, weighted_pca(noise, weights, 5), blocks)[0] == 0


def test_neighbourhoods_are_cubes_of_frequencies() -> None:
    points = np.array([[0, 0, 0], [2, 2, 2], [3, 0, 0], [0, -1, 0]], dtype=np.float32)
    block = neighbourhoods(points)
    assert block[0] == block[1]
    assert len(set(block.tolist())) == 3


def test_a_particle_of_the_average_itself_leaves_no_difference() -> None:
    blobs = asymmetric()
    data = sample(blobs, BOX, 6, None, wedge=WEDGE)
    deviation = np.array([p.std() for p in data.particles]).mean()
    average = blobs.volume(BOX) / deviation
    found = features(data.read, 6, poses_of(data), average, TRANSFER, k_max=6)
    without = features(data.read, 6, poses_of(data), np.zeros_like(average), TRANSFER, k_max=6)

    def power(f: Features) -> float:
        return float((np.abs(f.values * f.deviations) ** 2).sum())

    # Deviations differ by some percent from particle to particle, and the table's interpolation by half of one.
    assert power(found) < 0.01 * power(without)
    # A wedge of +-60 degrees leaves two thirds, less what its blurred edges lose and gain.
    assert (found.weights > 0.5).mean() == pytest.approx(2 / 3, abs=0.04)
    assert ((found.weights == 0) | (found.weights >= 0.1)).all()
    assert found.weights.max() <= 1
    # What is well within the wedge of the particle's own frame is not shown, and what is well outside of it is.
    k = data.rotations[0].apply(found.points)
    angle = np.degrees(np.arctan(np.abs(k[:, 2]) / np.maximum(np.abs(k[:, 0]), 1e-9)))
    far = np.hypot(k[:, 0], k[:, 2]) > 4
    assert found.weights[0][far & (angle > 80)].max() < 0.3
    assert found.weights[0][far & (angle < 45)].min() > 0.8


def test_a_mask_keeps_differences_within_it() -> None:
    blobs = asymmetric()
    extra = Blobs(np.array([[0.3, 0.0, 0.0]]), np.array([0.05]), np.array([2.0]))
    rotations = Rotation.random(3, random_state=0)
    boxes = np.stack([blobs.volume(BOX, r) + extra.volume(BOX, r) for r in rotations])
    poses = Poses(rotations, np.zeros((3, 3)), np.zeros(3))
    average = blobs.volume(BOX) / boxes.std(axis=(1, 2, 3)).mean()

    def power(mask: NDArray[np.float32]) -> float:
        found = features(lambda i, n: boxes[i : i + n], 3, poses, average, None, mask=mask)
        assert (found.weights == 1).all()
        return float((np.abs(found.values * found.deviations) ** 2).sum())

    assert power(soft_sphere(BOX, 4, 1)) < 0.05 * power(soft_sphere(BOX, 13, 2))


@pytest.fixture(scope="module")
def two_structures() -> tuple[Sample, NDArray[np.int64]]:
    """Two structures of which one lacks one of eight Gaussians, at SNR 0.3."""
    whole = asymmetric(1)
    less = Blobs(whole.centres[:-1], whole.widths[:-1], whole.heights[:-1])
    parts = [sample(b, BOX, 40, 0.3, seed=s, wedge=WEDGE) for s, b in enumerate((whole, less))]
    data = Sample(
        np.concatenate([p.particles for p in parts]),
        Rotation.concatenate([p.rotations for p in parts]),
        np.concatenate([p.shifts for p in parts]),
    )
    return data, np.repeat([0, 1], 40)


def wedge_share(score: NDArray[np.float32], rotations: Rotation) -> float:
    """The share of a score's variance that how the wedge lies in the reference's frame explains, to second order."""
    beam = rotations.inv().apply([0, 0, 1])
    terms = np.stack([beam[:, i] * beam[:, j] for i in range(3) for j in range(i, 3)], axis=1)
    left = score - terms @ np.linalg.lstsq(terms, score, rcond=None)[0]
    return float(1 - left.var() / score.var())


def two_clusters(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.asarray(fcluster(linkage(scores, "ward"), 2, "maxclust"), dtype=np.int64)


def test_structures_are_told_apart_and_not_orientations_of_the_wedge(
    two_structures: tuple[Sample, NDArray[np.int64]],
) -> None:
    data, labels = two_structures
    poses = poses_of(data)
    average = average_of(data)
    found = features(data.read, len(data), poses, average, TRANSFER, k_max=6)
    pca = weighted_pca(found.values, found.weights, 4)
    count, _ = significant(found.values, found.weights, pca, neighbourhoods(found.points))
    assert count >= 1
    assert adjusted_rand_index(two_clusters(pca.scores[:, :count]), labels) >= 0.9
    assert wedge_share(pca.scores[:, 0], data.rotations) < 0.3
    # Plain principal components: the particles themselves, 0 where nothing is seen.
    bare = features(data.read, len(data), poses, np.zeros_like(average), TRANSFER, k_max=6)
    filled = bare.values * bare.weights[:, None]
    plain = weighted_pca(filled, np.ones_like(bare.weights), 4)
    assert wedge_share(plain.scores[:, 0], data.rotations) > 0.5
    assert adjusted_rand_index(two_clusters(plain.scores), labels) < 0.3


def test_features_on_disk_are_those_in_memory(tmp_path: Path, two_structures: tuple[Sample, NDArray[np.int64]]) -> None:
    data, _ = two_structures
    average = asymmetric(1).volume(BOX)
    poses = Poses(data.rotations[:6], data.shifts[:6], np.zeros(6))
    memory, disk, parallel = (
        features(data.read, 6, poses, average, TRANSFER, k_max=5, scratch=scratch, threads=threads)
        for scratch, threads in ((None, 1), (tmp_path, 1), (None, 2))
    )
    assert isinstance(disk.values, np.memmap)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) == features_bytes(6, len(memory.points))
    for other in (disk, parallel):
        assert np.array_equal(memory.values, other.values)
        assert np.array_equal(memory.weights, other.weights)


def test_bad_input_is_refused() -> None:
    values, weights, _, _ = planted(10, 5, (1.0,), 1.0, 0.9)
    with pytest.raises(InvalidArgument, match="10 components of 10 particles"):
        weighted_pca(values, weights, 10)
    with pytest.raises(InvalidArgument, match=r"\(particles, features\)"):
        weighted_pca(values, weights[:, :4], 1)
    with pytest.raises(InvalidArgument, match="nothing is observed"):
        weighted_pca(values, np.zeros_like(weights), 1)
    box = np.zeros((8, 8, 8), np.float32)
    poses = Poses(Rotation.identity(2), np.zeros((2, 3)), np.zeros(2))
    with pytest.raises(InvalidArgument, match="poses of 2 particles, but 3"):
        features(lambda i, n: box[None], 3, poses, box, None)
    with pytest.raises(InvalidArgument, match="one box"):
        features(lambda i, n: box[None], 2, poses, box, None, mask=box[1:])
    with pytest.raises(InvalidArgument, match=r"\(8, 8, 5\) is expected"):
        features(lambda i, n: box[None], 2, poses, box, box)
    with pytest.raises(InvalidArgument, match="must be a cube"):
        features(lambda i, n: box[None], 2, poses, box[1:], None)
