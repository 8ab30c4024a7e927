"""Median, anisotropic diffusion, non-local means and wavelets: brick by brick as of the whole volume."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import pywt
import scipy.ndimage
from skimage.restoration import denoise_nl_means

from cryofleet.errors import Cancelled, FailedPrecondition, InvalidArgument
from cryofleet.numerics import fourier
from services.io import anisotropic_diffusion as diffusion
from services.io import bricks, median, non_local_means, wavelet
from tests.unit.io.arrays import Volume, collected, noise, reader

SHAPE = (37, 45, 50)


@pytest.fixture
def small_bricks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bricks, "SIDE", 16)
    monkeypatch.setattr(bricks, "SLAB_BYTES", 1)


def with_a_box(*shape: int) -> Volume:
    volume = noise(*shape)
    volume[10:25, 12:30, 15:40] += 4
    return volume


# --- Bricks --------------------------------------------------------------------------------------------------------


def test_a_cancelled_filter_stops_at_the_next_brick(small_bricks: None) -> None:
    calls = []

    def progress(fraction: float, phase: str = "", **counters: float) -> None:
        calls.append(fraction)
        if len(calls) == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        bricks.by_bricks(reader(noise(*SHAPE)), SHAPE, 2, lambda brick: brick, lambda slab: None, progress)
    assert len(calls) == 3
    assert calls == sorted(calls)


def test_memory_stays_within_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bricks, "SLAB_BYTES", 1 << 20)
    shape = (160, 96, 96)
    volume = noise(*shape)
    tracemalloc.start()
    try:
        median.median(reader(volume), shape, 1, lambda slab: None, workers=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < median.memory_bytes(shape, 1, 2) < volume.nbytes


# --- Median --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1, 2])
def test_median_is_scipys(radius: int, small_bricks: None) -> None:
    volume = noise(*SHAPE)
    found = collected(lambda write: median.median(reader(volume), SHAPE, radius, write, workers=2))
    np.testing.assert_array_equal(found, scipy.ndimage.median_filter(volume, 2 * radius + 1))


# --- Anisotropic diffusion -----------------------------------------------------------------------------------------


def diffuse(volume: Volume, kappa: float, steps: int, conductance: diffusion.Conductance, scratch: Path) -> Volume:
    return collected(
        lambda write: diffusion.anisotropic_diffusion(
            reader(volume), volume.shape, kappa, steps, 0.125, conductance, write, scratch
        )
    )


def one_step(volume: Volume, kappa: float, conductance: str) -> Volume:
    """The formula, by the shifted differences to the six neighbours."""
    padded = np.pad(volume.astype(np.float64), 1, mode="edge")
    middle = padded[1:-1, 1:-1, 1:-1]
    change = np.zeros_like(middle)
    for axis in range(3):
        for shift in (1, -1):
            difference = np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1] - middle
            share = (difference / kappa) ** 2
            change += difference * (np.exp(-share) if conductance == "exponential" else 1 / (1 + share))
    return (middle + 0.125 * change).astype(np.float32)


@pytest.mark.parametrize("conductance", ["exponential", "rational"])
def test_diffusion_is_the_formula_over_several_passes(
    conductance: diffusion.Conductance, small_bricks: None, tmp_path: Path
) -> None:
    volume = with_a_box(*SHAPE)
    expected = volume
    for _ in range(23):
        expected = one_step(expected, 2.5, conductance)
    found = diffuse(volume, 2.5, 23, conductance, tmp_path)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert not list(tmp_path.iterdir())


def test_diffusion_without_edges_is_heat(tmp_path: Path) -> None:
    # With kappa far above all differences, a wave of the grid decays by 1 - step (2 - 2 cos k) each step.
    x = np.arange(32)
    wave = np.broadcast_to(np.cos(2 * np.pi * (x + 0.5) / 16), (4, 4, 32)).astype(np.float32)
    decay = (1 - 0.125 * (2 - 2 * np.cos(2 * np.pi / 16))) ** 10
    np.testing.assert_allclose(diffuse(wave, 1e4, 10, "exponential", tmp_path), decay * wave, atol=1e-5)


def test_diffusion_smooths_regions_and_keeps_their_edge(tmp_path: Path) -> None:
    volume = noise(24, 32, 32, mean=0.0) * np.float32(0.3)
    volume[:, :, 16:] += 10
    kappa = diffusion.estimated_kappa(reader(volume), volume.shape)
    assert kappa == pytest.approx(3 * np.sqrt(2) * 0.3, rel=0.06)
    found = diffuse(volume, kappa, 20, "exponential", tmp_path)
    assert found[:, :, :15].std() < 0.25 * 0.3
    # a Gaussian of that strength would have left half of the step
    step = found[:, :, 16].mean() - found[:, :, 15].mean()
    assert step > 9.9
    assert found.mean() == pytest.approx(volume.mean(), abs=1e-4)


def test_diffusion_refuses_what_is_unstable(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"time_step is 0.2: .*at most 1/6"):
        diffusion.anisotropic_diffusion(
            reader(noise(8, 8, 8)), (8, 8, 8), 1.0, 1, 0.2, "rational", lambda slab: None, tmp_path
        )
    with pytest.raises(FailedPrecondition, match="give kappa"):
        diffusion.estimated_kappa(reader(np.zeros((8, 8, 8), np.float32)), (8, 8, 8))


# --- Non-local means -----------------------------------------------------------------------------------------------


def test_non_local_means_is_that_of_the_whole_volume(small_bricks: None) -> None:
    shape = (18, 24, 40)
    volume = noise(*shape)
    found = collected(lambda write: non_local_means.non_local_means(reader(volume), shape, 1.0, 1, 1, 0.8, write))
    whole = denoise_nl_means(volume, patch_size=3, patch_distance=1, h=0.8, sigma=1.0)
    # integral images of other origins round otherwise
    np.testing.assert_allclose(found, whole, atol=1e-4)
    assert found.std() < 0.7 * volume.std()


# --- Wavelets ------------------------------------------------------------------------------------------------------


def test_noise_level_is_that_of_the_noise_whatever_stands_in_it() -> None:
    volume = with_a_box(64, 64, 64) * np.float32(3)
    assert wavelet.noise_standard_deviation(reader(volume), volume.shape) == pytest.approx(3, rel=0.02)


def test_wavelets_shrink_alike_in_all_bricks(small_bricks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = with_a_box(70, 60, 64)

    def shrink() -> Volume:
        return collected(lambda write: wavelet.wavelet_shrinkage(reader(volume), volume.shape, 1.0, 2, 1.0, write))

    in_bricks = shrink()
    monkeypatch.setattr(bricks, "SIDE", 128)
    monkeypatch.setattr(bricks, "SLAB_BYTES", 1 << 28)
    np.testing.assert_allclose(in_bricks, shrink(), atol=1e-5)
    clean = np.full(volume.shape, 2, np.float32)
    clean[10:25, 12:30, 15:40] += 4
    # noise alone has 1; of the wavelets that shrink here, the box's edges keep theirs
    assert np.sqrt(np.mean((in_bricks - clean) ** 2)) < 0.45


def test_wavelet_thresholds_are_those_of_bayes_shrink() -> None:
    volume = with_a_box(64, 64, 64)
    found = collected(lambda write: wavelet.wavelet_shrinkage(reader(volume), volume.shape, 1.0, 1, 1.0, write))
    approximation, details = pywt.wavedecn(volume, "db2", "symmetric", 1)
    for band, coefficients in details.items():
        signal = np.sqrt(max(np.mean(coefficients.astype(np.float64) ** 2) - 1, 0))
        limit = min(1 / signal, np.abs(coefficients).max()) if signal else np.abs(coefficients).max()
        details[band] = pywt.threshold(coefficients, limit, "soft")
    np.testing.assert_allclose(found, pywt.waverecn([approximation, details], "db2", "symmetric"), atol=1e-5)


def test_noise_of_any_colour_is_shrunk_where_its_level_is_not_given() -> None:
    shape = (64, 64, 64)
    ramp = fourier.filter_radially(noise(*shape, mean=0.0), lambda frequency: frequency)
    ramp /= ramp.std()
    volume = ramp.copy()
    volume[20:40, 20:40, 20:40] += 4

    def left(sigma: float | None) -> float:
        shrunk = collected(lambda write: wavelet.wavelet_shrinkage(reader(volume), shape, sigma, 3, 1.0, write))
        return float(np.sqrt(np.mean((shrunk - (volume - ramp)) ** 2)))

    assert left(None) < 0.35
    assert left(None) < left(1.0)


def test_too_many_levels_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="shortest side has 2 levels; wavelet_levels is 4"):
        wavelet.wavelet_shrinkage(reader(noise(16, 40, 40)), (16, 40, 40), 1.0, 4, 1.0, lambda slab: None)
