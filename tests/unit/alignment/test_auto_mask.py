"""Masks that averages make of themselves."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.masks import radius_grid, soft_sphere
from services.alignment.auto_mask import auto_mask, otsu
from tests.unit.alignment.samples import Blobs, symmetric

BOX = 48


def with_noise(volume: NDArray[np.float32], snr: float, seed: int = 0) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).normal(size=volume.shape).astype(np.float32)
    return volume + noise * np.float32(volume.std() / np.sqrt(snr))


def test_otsu_splits_two_classes_and_knows_one() -> None:
    rng = np.random.default_rng(0)
    classes = np.concatenate([rng.normal(0, 0.1, 9000), rng.normal(4, 0.1, 1000)]).astype(np.float32)
    threshold, separation = otsu(classes)
    assert 0.5 < threshold < 3.5
    # Within the classes 0.01 is left of 0.01 + 0.9 * 0.1 * 16.
    assert separation == pytest.approx(1 - 0.01 / 1.45, abs=2e-3)
    assert otsu(rng.normal(size=100_000).astype(np.float32))[1] == pytest.approx(2 / np.pi, abs=0.01)
    assert otsu(np.ones(5, np.float32)) == (1.0, 0.0)


@pytest.mark.parametrize("snr", [None, 0.1])
def test_a_particle_lies_in_its_mask(snr: float | None) -> None:
    clean = symmetric("D7").volume(BOX)
    result = auto_mask(clean if snr is None else with_noise(clean, snr), 5.0)
    mask = result.mask
    assert (clean * mask).sum() > 0.98 * clean.sum()
    assert mask.dtype == np.float32
    assert mask.min() == 0
    assert mask.max() == 1
    assert result.share == pytest.approx(mask.mean())
    assert result.low_pass_angstrom == 30
    # Wherever the density is above a tenth of its peak the mask is whole, and far from it there is none.
    assert (mask[clean > 0.1 * clean.max()] > 0.99).mean() > 0.97
    assert result.share < 0.3


def test_a_ball_is_grown_by_what_was_asked() -> None:
    """The low-pass keeps a ball's surface in place, where half of its density is and Otsu's threshold lies."""
    ball = soft_sphere(BOX, 9.5, 1)
    result = auto_mask(ball, 1.0, dilation_voxels=3, edge_voxels=4)
    radius = radius_grid(BOX)
    assert result.threshold == pytest.approx(0.5, abs=0.15)
    assert (result.mask[radius <= 12] == 1).all()
    assert (result.mask[radius >= 18] == 0).all()
    assert np.abs(result.mask - soft_sphere(BOX, 13, 4)).max() < 0.7


def test_a_small_particle_in_noise_is_found_by_its_peak() -> None:
    """2% of the box, SNR 0.05: Otsu's threshold would cut the noise in half."""
    blob = Blobs(np.array([[0.1, 0.0, -0.05]]), np.array([0.05]), np.ones(1)).volume(BOX)
    result = auto_mask(with_noise(blob, 0.05), 5.0)
    assert (blob * result.mask).sum() > 0.9 * blob.sum()
    assert result.share < 0.04


def test_only_the_largest_part_is_kept() -> None:
    blobs = Blobs(np.array([[0.2, 0, 0], [-0.25, 0, 0]]), np.array([0.06, 0.04]), np.ones(2))
    mask = auto_mask(blobs.volume(BOX), 5.0).mask
    c = BOX // 2
    assert mask[c, c, c + 10] == 1
    assert mask[c, c, c - 12] == 0


def test_no_claim_without_a_particle() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        with pytest.raises(InvalidArgument, match="no particle stands out"):
            auto_mask(rng.normal(size=(32, 32, 32)).astype(np.float32), 5.0)
    with pytest.raises(InvalidArgument, match="constant"):
        auto_mask(np.ones((16, 16, 16), np.float32), 5.0)
    with pytest.raises(InvalidArgument, match="not finite"):
        auto_mask(np.full((16, 16, 16), np.nan, np.float32), 5.0)
    with pytest.raises(InvalidArgument, match="cubic"):
        auto_mask(np.ones((16, 16, 12), np.float32), 5.0)


def test_a_threshold_is_neither_above_all_nor_below() -> None:
    volume = symmetric("C4").volume(32)
    with pytest.raises(InvalidArgument, match="lower threshold_sigma"):
        auto_mask(volume, 5.0, threshold_sigma=50)
    with pytest.raises(InvalidArgument, match="the mask would take"):
        auto_mask(volume, 5.0, threshold_sigma=-2)
    loose, tight = (auto_mask(volume, 5.0, threshold_sigma=s).share for s in (0.5, 2.0))
    assert tight < loose
