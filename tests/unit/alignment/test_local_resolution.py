"""Local resolution of half maps whose FSC is known on both sides of the box."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import filter_radially, low_pass
from cryofleet.numerics.masks import soft_sphere
from services.alignment.local_resolution import band_centres, filter_locally, local_resolution

N = 64
VOXEL = 4.0
STRENGTH = 30.0


def noise(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(N, N, N)).astype(np.float32)


def decay_for(resolution_voxels: float, threshold: float) -> float:
    """b of the signal's power STRENGTH exp(-b k^2), beside white noise of power 1, whose FSC P / (P + 1) is the
    threshold at that resolution.
    """
    return float(np.log(STRENGTH * (1 - threshold) / threshold) * resolution_voxels**2)


def signal_to(resolution_voxels: float, threshold: float) -> NDArray[np.float32]:
    decay = decay_for(resolution_voxels, threshold)
    return filter_radially(noise(1), lambda k: np.sqrt(np.float32(STRENGTH) * np.exp(-np.float32(decay) * k * k)))


@pytest.mark.parametrize(("threshold", "wavelengths"), [(0.5, 1.0), (0.143, 1.5)])
def test_one_resolution_everywhere(threshold: float, wavelengths: float) -> None:
    """The error of the local FSC at 0.5 is 0.09 (1 - 0.5^2) = 0.07, and at 0.143 with windows of 1.5 wavelengths
    0.09 / 1.5^1.5 = 0.05. d FSC / d ln k = -2 b k^2 FSC (1 - FSC) is -1.7 and -1.3 there: a spread of 4%.
    """
    signal = signal_to(5.0, threshold)
    result = local_resolution(
        signal + noise(2), signal + noise(3), VOXEL, threshold=threshold, window_wavelengths=wavelengths
    )
    voxels = result.resolution_angstrom / VOXEL
    assert np.median(voxels) == pytest.approx(5.0, rel=0.04)
    low, high = np.quantile(voxels, [0.16, 0.84])
    assert low > 4.5
    assert high < 5.5


def test_each_side_of_the_box_has_its_own_resolution() -> None:
    """7 voxels on one side, 3.5 on the other, by the FSC's closed form. What is far from both borders (the box is
    periodic) is still reached by the better side's window: a tenth too good is what the docstring allows.
    """
    better = np.arange(N) >= N // 2
    signal = np.where(better, signal_to(3.5, 0.5), signal_to(7.0, 0.5))
    result = local_resolution(signal + noise(2), signal + noise(3), VOXEL)
    voxels = result.resolution_angstrom / VOXEL
    assert np.median(voxels[:, :, 12:20]) == pytest.approx(7.0, rel=0.1)
    assert np.median(voxels[:, :, 44:52]) == pytest.approx(3.5, rel=0.04)
    middle = np.median(voxels, axis=(0, 1))
    # From one side to the other within two wavelengths of the coarser.
    assert middle[18] > 6
    assert middle[32] < 4.5
    inside = soft_sphere(N, 6, 0)
    shifted = np.roll(inside, 16, axis=2)
    assert result.quantiles(shifted)[1] == pytest.approx(3.5 * VOXEL, rel=0.06)
    low, median, high = result.quantiles(np.roll(inside, -16, axis=2))
    assert low < median < high


def test_noise_alone_has_no_resolution_and_identical_maps_the_best() -> None:
    result = local_resolution(noise(4), noise(5), VOXEL)
    assert result.coarsest_angstrom == pytest.approx(N * VOXEL / 3)
    assert (result.resolution_angstrom == np.float32(result.coarsest_angstrom)).mean() > 0.98
    best = local_resolution(noise(4), noise(4), VOXEL)
    np.testing.assert_allclose(best.resolution_angstrom, 2 * VOXEL, rtol=1e-6)


def test_bands_reach_from_three_cycles_to_nyquist() -> None:
    centres = band_centres(N)
    assert centres[0] == 3 / N
    assert 0.5 / 1.12 < centres[-1] <= 0.5


def test_a_uniform_map_filters_as_the_low_pass_does() -> None:
    volume = noise(6)
    expected = low_pass(volume, 20.0, VOXEL, edge=1 / N)
    found = filter_locally(volume, np.full(volume.shape, 20.0, np.float32), VOXEL)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_each_voxel_is_filtered_to_its_own_resolution() -> None:
    volume = noise(7)
    x = np.arange(N)
    resolution = np.broadcast_to(np.where(x < N // 2, 40.0, 10.0), volume.shape).astype(np.float32)
    found = filter_locally(volume, resolution, VOXEL)
    np.testing.assert_allclose(found[..., :32], low_pass(volume, 40, VOXEL, edge=1 / N)[..., :32], atol=1e-4)
    np.testing.assert_allclose(found[..., 32:], low_pass(volume, 10, VOXEL, edge=1 / N)[..., 32:], atol=1e-4)
    # Between two levels the frequencies of both are mixed: the power of white noise there lies between theirs.
    ramp = np.broadcast_to(np.linspace(10, 40, N), volume.shape).astype(np.float32)
    power = (filter_locally(volume, ramp, VOXEL) ** 2).mean(axis=(0, 1))
    fine, coarse = ((low_pass(volume, r, VOXEL, edge=1 / N) ** 2).mean() for r in (10, 40))
    assert power[:4].mean() == pytest.approx(fine, rel=0.25)
    assert power[-4:].mean() == pytest.approx(coarse, rel=0.25)


def test_bad_input_is_named() -> None:
    a = noise(0)
    with pytest.raises(InvalidArgument, match="two cubes"):
        local_resolution(a, a[:32], VOXEL)
    with pytest.raises(InvalidArgument, match="second half map"):
        local_resolution(a, np.zeros_like(a), VOXEL)
    with pytest.raises(InvalidArgument, match="threshold"):
        local_resolution(a, a, VOXEL, threshold=1.5)
    with pytest.raises(InvalidArgument, match="window_wavelengths"):
        local_resolution(a, a, VOXEL, window_wavelengths=0.1)
    with pytest.raises(InvalidArgument, match="at least 16"):
        local_resolution(a[:8, :8, :8], a[:8, :8, :8], VOXEL)
    with pytest.raises(InvalidArgument, match="positive"):
        filter_locally(a, np.zeros_like(a), VOXEL)
    with pytest.raises(InvalidArgument, match="resolution map"):
        filter_locally(a, a[:4], VOXEL)
