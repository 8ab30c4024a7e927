"""Standardising, inverting and matching values; the sign of protein."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import skimage.exposure

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import no_progress
from services.io import contrast, contrast_sign
from tests.unit.io.arrays import Volume, collected, noise, reader


@pytest.mark.parametrize("sign", [1, -1])
def test_matched_values_have_the_references_distribution(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "SLAB_BYTES", 1)
    volume = noise(20, 21, 22)
    reference = np.random.default_rng(1).exponential(3, (18, 20, 25)).astype(np.float32)
    found = collected(
        lambda write: contrast.match_histogram(
            reader(volume), volume.shape, reader(reference), reference.shape, sign, write
        )
    )
    shares = np.linspace(0.01, 0.95, 50)
    np.testing.assert_allclose(np.quantile(found, shares), np.quantile(reference, shares), atol=0.02)
    expected = skimage.exposure.match_histograms(sign * volume, reference)
    # but for the sparse tail, where values lie between two of the reference
    middle = expected < np.quantile(reference, 0.95)
    np.testing.assert_allclose(found[middle], expected[middle], atol=0.05)
    order = np.argsort(sign * volume.ravel(), kind="stable")
    assert (np.diff(found.ravel()[order]) >= 0).all()


def test_standardising_and_inverting() -> None:
    volume = noise(12, 13, 14) * np.float32(3)
    found = contrast.statistics_of(reader(volume), volume.shape)
    change = contrast.linear(-1 / found.standard_deviation, found.mean, 0.0)
    standard = collected(lambda write: contrast.adjust(reader(volume), volume.shape, change, write, no_progress))
    assert standard.mean() == pytest.approx(0, abs=1e-5)
    assert standard.std() == pytest.approx(1, rel=1e-5)
    assert np.corrcoef(standard.ravel(), volume.ravel())[0, 1] == pytest.approx(-1, abs=1e-6)
    with pytest.raises(FailedPrecondition, match="all voxels are 1: there is no contrast"):
        contrast.statistics_of(reader(np.ones((4, 4, 4), np.float32)), (4, 4, 4))


def blobs(seed: int) -> Volume:
    rng = np.random.default_rng(seed)
    points = np.zeros((64, 128, 128), np.float32)
    points[tuple(rng.integers(0, side, 60) for side in points.shape)] = 1
    density = scipy.ndimage.gaussian_filter(points, 4)
    return np.asarray(density / density.std(), np.float32)


def test_the_sign_of_what_is_dense() -> None:
    dense, noisy = blobs(0), noise(64, 128, 128, mean=0.0) * np.float32(5)
    dark = contrast_sign.estimate_skewness(reader(noisy - dense), dense.shape, 10.0)
    light = contrast_sign.estimate_skewness(reader(noisy + dense), dense.shape, 10.0)
    neither = contrast_sign.estimate_skewness(reader(noisy), dense.shape, 10.0)
    assert dark.significant
    assert dark.value < 0
    assert light.significant
    assert light.value > 0
    assert not neither.significant
