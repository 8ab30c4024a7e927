"""PSNR and SSIM against scikit-image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from skimage import metrics

from cryofleet.errors import InvalidArgument
from cryofleet.numerics import image_quality

#: It ships no types.
SCIKIT: Any = metrics
RNG = np.random.default_rng(3)
TRUTH = RNG.normal(0, 1, (20, 21, 22))
SEEN = TRUTH + RNG.normal(0, 0.5, TRUTH.shape)


def test_psnr_and_ssim_in_slabs_are_scikit_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_quality, "_SLAB_BYTES", 1)
    pair = (lambda i, j: TRUTH[i:j]), (lambda i, j: SEEN[i:j])
    assert image_quality.psnr(*pair, (20, 21, 22), 7.0) == pytest.approx(
        SCIKIT.peak_signal_noise_ratio(TRUTH, SEEN, data_range=7.0), rel=1e-12
    )
    assert image_quality.ssim(*pair, (20, 21, 22)) == pytest.approx(
        SCIKIT.structural_similarity(TRUTH, SEEN, win_size=7, data_range=1.0), rel=1e-10
    )


def test_equal_volumes_and_small_ones() -> None:
    same = (lambda i, j: TRUTH[i:j]), (lambda i, j: TRUTH[i:j])
    assert image_quality.psnr(*same, (20, 21, 22), 1.0) == math.inf
    assert image_quality.ssim(*same, (20, 21, 22)) == pytest.approx(1.0)
    with pytest.raises(InvalidArgument, match="SSIM needs 7 along each axis"):
        image_quality.ssim(*same, (6, 21, 22))
