"""Wedge, noise and contrast of a simulated tomogram."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from services.simulation.tomogram import reconstruct

SHAPE = (32, 30, 40)


def blobs() -> NDArray[np.float32]:
    volume = np.zeros(SHAPE, np.float32)
    z, y, x = np.indices(SHAPE)
    for cz, cy, cx in np.random.default_rng(1).uniform(8, 24, (6, 3)):
        volume += np.exp(-((z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2) / 8).astype(np.float32)
    return volume


def outside(volume: NDArray[np.float32], tilt_min: float, tilt_max: float) -> float:
    """Fraction of the variance in the missing wedge, angles from the definition: atan2(kz, kx) folded to (-90, 90]."""
    power = np.abs(np.fft.fftn(volume.astype(np.float64))) ** 2
    power[0, 0, 0] = 0
    kz = np.fft.fftfreq(SHAPE[0])[:, None]
    kx = np.fft.fftfreq(SHAPE[2])[None, :]
    angle = np.degrees(np.arctan2(kz, kx))
    angle = np.where(angle > 90, angle - 180, np.where(angle <= -90, angle + 180, angle))
    missing = ((angle < tilt_min - 0.01) | (angle > tilt_max + 0.01)) & ((kz != 0) | (kx != 0))
    # Nyquist stands for both signs
    missing[SHAPE[0] // 2] = missing[:, SHAPE[2] // 2] = False
    return float(power[missing[:, None, :].repeat(SHAPE[1], axis=1)].sum() / power.sum())


@pytest.mark.parametrize(("low", "high"), [(-60, 60), (-50, 70)])
def test_wedge_is_empty_of_signal_and_noise_and_lies_where_the_tilts_say(low: float, high: float) -> None:
    made = reconstruct(blobs(), 0.5, low, high, "light", np.random.default_rng(0))
    assert outside(made.tomogram, low, high) < 1e-10
    # with the sign of z turned, an uneven range would miss
    if low != -high:
        assert outside(made.tomogram, -high, -low) > 0.01
    # and nothing but the wedge is missing: white noise fills the rest
    assert outside(made.tomogram, low + 10, high) > 0.01
    assert outside(made.tomogram, low, high - 10) > 0.01


@pytest.mark.parametrize("snr", [0.003, 0.1, 5.0])
def test_snr_is_the_one_asked_for(snr: float) -> None:
    density = blobs()
    made = reconstruct(density, snr, -60, 60, "dark", np.random.default_rng(4))
    clean = reconstruct(density, 1e9, -60, 60, "dark", np.random.default_rng(4)).tomogram
    measured = clean.var(dtype=np.float64) / (made.tomogram - clean).var(dtype=np.float64)
    assert measured == pytest.approx(snr, rel=0.01)
    assert made.snr == pytest.approx(measured, rel=1e-3)


def test_correlation_of_two_tomograms_is_that_of_the_snr() -> None:
    """rho = SNR / (1 + SNR) for one scene with independent noise."""
    density, snr = blobs(), 0.4
    rng = np.random.default_rng(9)
    made = [reconstruct(density, snr, -60, 60, "dark", rng).tomogram.ravel() for _ in range(16)]
    pairs = [np.corrcoef(first, second)[0, 1] for first, second in zip(made[::2], made[1::2], strict=True)]
    # each pair scatters by about 1/sqrt(independent voxels) = 1/sqrt(2/3 of 38,400)
    assert np.mean(pairs) == pytest.approx(snr / (1 + snr), abs=4 / np.sqrt(8 * 25_600))


def test_contrast_is_the_sign_of_protein() -> None:
    density = blobs()
    dark = reconstruct(density, 100, -60, 60, "dark", np.random.default_rng(0)).tomogram
    light = reconstruct(density, 100, -60, 60, "light", np.random.default_rng(0)).tomogram
    protein = density > 0.5 * density.max()
    assert dark[protein].mean() < dark[~protein].mean()
    assert light[protein].mean() > light[~protein].mean()
    with pytest.raises(InvalidArgument, match="contrast"):
        reconstruct(density, 1, -60, 60, "bright", np.random.default_rng(0))


def test_full_tilt_range_and_high_snr_give_the_scene_back() -> None:
    density = blobs()
    made = reconstruct(density, 1e8, -90, 90, "light", np.random.default_rng(0))
    np.testing.assert_allclose(made.tomogram, density, atol=2e-3)


def test_threads_and_input_leave_no_trace() -> None:
    density = blobs()
    before = density.copy()
    one = reconstruct(density, 0.1, -60, 60, "dark", np.random.default_rng(7), workers=1).tomogram
    two = reconstruct(density, 0.1, -60, 60, "dark", np.random.default_rng(7), workers=2).tomogram
    assert one.tobytes() == two.tobytes()
    np.testing.assert_array_equal(density, before)


def test_an_empty_scene_has_no_snr() -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        reconstruct(np.zeros(SHAPE, np.float32), 0.1, -60, 60, "dark", np.random.default_rng(0))
    with pytest.raises(InvalidArgument, match="snr"):
        reconstruct(blobs(), 0, -60, 60, "dark", np.random.default_rng(0))
