"""Fourier transforms and filters against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from cryofleet.errors import InvalidArgument
from cryofleet.numerics import fourier


def wave(shape: tuple[int, int, int], cycles: tuple[int, int, int], phase: float = 0.4) -> fourier.Array:
    """A cosine with so many cycles along (z, y, x) of the volume."""
    grids = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    angle = 2 * np.pi * sum(c * g for c, g in zip(cycles, grids, strict=True))
    return np.cos(angle + phase).astype(np.float32)


def noise(*shape: int) -> fourier.Array:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(8, 10, 12), (7, 9, 11), (2, 8, 10, 13)])
def test_inverse_undoes_forward(shape: tuple[int, ...]) -> None:
    volume = noise(*shape)
    assert fourier.forward(volume).dtype == np.complex64
    back = fourier.inverse(fourier.forward(volume), shape)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, volume, atol=2e-6)


def test_radial_frequency_is_in_reciprocal_angstrom() -> None:
    radius = fourier.radial_frequency((8, 10, 12), voxel_size_angstrom=4.0)
    assert radius.shape == (8, 10, 7)
    assert radius[0, 0, 0] == 0
    assert radius[0, 0, 6] == pytest.approx(1 / 8)  # Nyquist of 4 Å voxels is 8 Å
    assert radius[1, 2, 3] == pytest.approx(np.sqrt((1 / 8) ** 2 + (2 / 10) ** 2 + (3 / 12) ** 2) / 4)
    full = fourier.radial_frequency((8, 10, 12), half=False)
    assert full.shape == (8, 10, 12)
    assert full[-1, 0, -2] == pytest.approx(np.sqrt((1 / 8) ** 2 + (2 / 12) ** 2))


def test_low_pass_keeps_what_is_coarser_and_removes_what_is_finer_than_the_edge() -> None:
    shape = (40, 40, 40)
    kept, removed = wave(shape, (0, 3, 4)), wave(shape, (8, 0, 6))  # 5/40 and 10/40 cycles per voxel
    # 1/r is 0.15 cycles per voxel of 5 Å, the edge ends at 0.2
    filtered = fourier.low_pass(kept + removed, 5 / 0.15, 5.0)
    np.testing.assert_allclose(filtered, kept, atol=1e-5)


def test_high_pass_removes_the_mean() -> None:
    shape = (40, 40, 40)
    kept, removed = wave(shape, (0, 12, 0)), wave(shape, (1, 0, 0))
    filtered = fourier.high_pass(kept + removed + 7, 10 / 0.1, 10.0)
    np.testing.assert_allclose(filtered, kept, atol=2e-5)
    # where the edge would reach below zero frequency it ends there: the mean goes in any case
    assert abs(float(fourier.high_pass(kept + 7, 10 / 0.01, 10.0).mean())) < 1e-5


def test_band_pass_is_the_product_of_both_and_works_on_stacks() -> None:
    stack = noise(3, 16, 18, 20)
    both = fourier.low_pass(fourier.high_pass(stack, 80, 8), 30, 8)
    np.testing.assert_allclose(fourier.band_pass(stack, 80, 30, 8), both, atol=2e-6)
    np.testing.assert_allclose(fourier.band_pass(stack[1], 80, 30, 8), both[1], atol=2e-6)


@pytest.mark.parametrize(("low", "high"), [(30, 80), (30, 30), (None, 0), (-1, None)])
def test_band_pass_refuses_bands_that_are_none(low: float | None, high: float | None) -> None:
    with pytest.raises(InvalidArgument):
        fourier.band_pass(noise(8, 8, 8), low, high, 8)


def test_gaussian_spreads_a_point_into_a_normalised_gaussian() -> None:
    volume = np.zeros((32, 32, 32), np.float32)
    volume[16, 16, 16] = 1
    sigma = 2.0
    blurred = fourier.gaussian(volume, sigma)
    axis = np.arange(32) - 16
    line = np.exp(-(axis**2) / (2 * sigma**2)) / np.sqrt(2 * np.pi) / sigma
    expected = line[:, None, None] * line[None, :, None] * line[None, None, :]
    np.testing.assert_allclose(blurred, expected, atol=1e-6)


def test_soft_step_is_half_at_the_middle_of_its_edge() -> None:
    frequency = np.array([0, 0.1, 0.125, 0.15, 0.5], np.float32)
    np.testing.assert_allclose(fourier.soft_step(frequency, 0.1, 0.05), [1, 1, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(fourier.soft_step(frequency, 0.12, 0), [1, 1, 0, 0, 0])


def test_apply_transfer_needs_the_half_grid() -> None:
    volume = noise(6, 8, 10)
    np.testing.assert_allclose(fourier.apply_transfer(volume, np.full((6, 8, 6), 2.0)), 2 * volume, atol=1e-5)
    with pytest.raises(InvalidArgument, match="half spectrum"):
        fourier.apply_transfer(volume, np.ones((6, 8, 10)))


@pytest.mark.parametrize(("shape", "factor"), [((24, 20, 16), 2), ((24, 18, 15), 3), ((20, 20, 20), 4)])
def test_fourier_crop_samples_band_limited_volumes_exactly(shape: tuple[int, int, int], factor: int) -> None:
    volume = wave(shape, (1, 0, 2)) + wave(shape, (0, 2, 1), 1.3) + 0.7
    cropped = fourier.fourier_crop(volume, factor)
    np.testing.assert_allclose(cropped, volume[::factor, ::factor, ::factor], atol=3e-6)


def test_fourier_crop_does_not_alias() -> None:
    # 11 of 24 cycles would show as 1 of 12 when every second voxel is taken
    cropped = fourier.fourier_crop(wave((24, 24, 24), (0, 0, 11)), 2)
    assert np.abs(cropped).max() < 1e-6


def test_fourier_crop_drops_the_remainder_and_takes_stacks_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = noise(2, 13, 14, 17)
    whole = fourier.fourier_crop(stack, 3)
    assert whole.shape == (2, 4, 4, 5)
    np.testing.assert_allclose(whole[1], fourier.fourier_crop(stack[1, :12, :12, :15], 3), atol=1e-6)
    np.testing.assert_allclose(whole.mean(axis=(1, 2, 3)), stack[:, :12, :12, :15].mean(axis=(1, 2, 3)), atol=1e-6)
    monkeypatch.setattr(fourier, "CHUNK_VOXELS", 1)
    np.testing.assert_allclose(fourier.fourier_crop(stack, 3), whole, atol=1e-6)


def test_fourier_crop_by_one_changes_nothing_and_by_less_is_refused() -> None:
    volume = noise(5, 6, 7)
    np.testing.assert_array_equal(fourier.fourier_crop(volume, 1), volume)
    with pytest.raises(InvalidArgument, match="at least 1"):
        fourier.fourier_crop(volume, 0)
    with pytest.raises(InvalidArgument, match="binned by 6"):
        fourier.fourier_crop(volume, 6)


def test_fast_length_has_small_primes_only() -> None:
    assert fourier.fast_length(97) == 100
    assert fourier.fast_length(96) == 96
