"""The FSC under a mask, freed of what the mask adds."""

import numpy as np
import pytest
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import low_pass
from cryofleet.numerics.fsc import corrected_fsc, fsc, resolution, shell_counts, shell_index, shell_sums
from cryofleet.numerics.masks import radius_grid, soft_sphere

N = 48
VOXEL = 5.0
TIGHT = (radius_grid(N) <= 10).astype(np.float32)


def noise(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(N, N, N)).astype(np.float32)


def deviation(mask: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the masked FSC of independent noise, by shells: 1 / sqrt(independent components).

    A mask m leaves a share (sum m^2)^2 / (N sum m^4) of the components of a wide shell independent.
    """
    share = float((mask**2).sum()) ** 2 / (mask.size * float((mask**4).sum()))
    return np.asarray(1 / np.sqrt(shell_counts(N) * share))


def halves(seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The same coarse density, up to 60 Å, much stronger than the independent noise."""
    coarse = 40 * low_pass(noise(seed), 60.0, VOXEL, edge=0.01) + np.float32(20)
    return coarse + noise(seed + 1), coarse + noise(seed + 2)


def test_a_tight_mask_adds_correlation_that_the_correction_takes_off() -> None:
    first, second = halves(10)
    result = corrected_fsc(first, second, TIGHT, VOXEL)
    # 60 Å is shell 4, the low-pass's edge ends at 0.0933 n = 4.5; three shells further the halves share nothing.
    beyond = slice(8, N // 2 + 1)
    error = deviation(TIGHT)[beyond]
    inflated = result.masked[beyond] / error
    left = result.corrected[beyond] / (error * np.sqrt(1 + 1 / 8) / (1 - result.randomised[beyond]))
    assert np.abs(result.unmasked[beyond] * np.sqrt(shell_counts(N)[beyond])).max() < 4
    assert inflated.mean() > 5
    assert (inflated > 3).mean() > 0.5
    assert abs(left.mean()) < 3 / np.sqrt(len(left) / 3)  # a tight mask ties some three neighbours together
    assert np.abs(left).max() < 4
    assert resolution(result.frequency, result.masked, VOXEL) < 0.7 * result.resolution_angstrom()
    # They share shell 4 and nothing of shell 5, where the masked curve is still high.
    assert result.masked[5] > 0.5
    assert N * VOXEL / 5 < result.resolution_angstrom() < N * VOXEL / 4


def test_what_the_halves_share_stays() -> None:
    """White signal and noise of the same power: FSC 1/2 at all frequencies, with any mask."""
    signal = noise(20)
    mask = soft_sphere(N, 12, 5)
    result = corrected_fsc(signal + noise(21), signal + noise(22), mask, VOXEL, randomise_from_angstrom=60)
    error = deviation(mask) * (1 - 0.5**2)
    z = ((result.corrected - 0.5) / np.hypot(error, deviation(mask) * 0.5 / np.sqrt(8)))[6:]
    assert abs(z.mean()) < 1.0
    assert np.abs(z).max() < 4
    assert result.resolution_angstrom() == 2 * VOXEL
    assert result.resolution_angstrom(0.8) == pytest.approx(N * VOXEL, rel=0.5)


def test_the_correction_is_the_formula() -> None:
    first, second = halves(30)
    mask = soft_sphere(N, 9, 2)
    result = corrected_fsc(first, second, mask, VOXEL, randomise_from_angstrom=N * VOXEL / 6)
    np.testing.assert_array_equal(result.masked, fsc(first, second, mask)[1])
    np.testing.assert_array_equal(result.unmasked, fsc(first, second)[1])
    np.testing.assert_array_equal(result.corrected[:6], result.masked[:6])
    masked, randomised = result.masked[6:], result.randomised[6:]
    np.testing.assert_allclose(result.corrected[6:], (masked - randomised) / (1 - randomised), rtol=1e-12)
    assert result.randomised_from_angstrom == pytest.approx(N * VOXEL / 6)
    # What is kept is not mixed with what is not: far below the cut the two curves agree.
    np.testing.assert_allclose(result.randomised[:3], result.masked[:3], atol=0.01)


@pytest.mark.parametrize("last", [6, 10])
def test_halves_that_end_at_a_cliff_are_not_read_beyond_it(last: int) -> None:
    """Halves averaged to one reference up to a band agree there and nowhere else: no shell beyond it is claimed."""
    mask = soft_sphere(N, 0.3 * N, 3)
    found = []
    for seed in range(4):
        common, *own = (scipy.fft.rfftn(noise(70 + 3 * seed + i).astype(np.float64)) for i in range(3))
        shell = shell_index(N)
        first, second = (scipy.fft.irfftn(np.where(shell <= last, 3 * common, f), (N, N, N)) for f in own)
        result = corrected_fsc(first.astype(np.float32), second.astype(np.float32), mask, VOXEL, seed=seed)
        assert round(N * VOXEL / result.randomised_from_angstrom) == last + 1
        found.append(N * VOXEL / result.resolution_angstrom())
    # Read between the last shell that agrees and the first that does not.
    assert last < np.mean(found) < last + 1


def test_halves_that_part_smoothly_are_read_where_they_do() -> None:
    """White noise, and the signal of a particle within the mask, falling by 1/e^2 to shell 12."""
    mask, particle = soft_sphere(N, 0.32 * N, 3), soft_sphere(N, 0.25 * N, 2)
    radius = np.minimum(shell_index(N), N)
    found, expected = [], []
    for seed in range(4):
        pattern = scipy.fft.rfftn(noise(90 + 3 * seed) * particle) * np.exp(-2 * (radius / 12) ** 2)
        signal = 20 * scipy.fft.irfftn(pattern, (N, N, N))
        first, second = (noise(91 + 3 * seed + i) for i in range(2))
        result = corrected_fsc(first + signal.astype(np.float32), second + signal.astype(np.float32), mask, VOXEL)
        found.append(N * VOXEL / result.resolution_angstrom())
        power = shell_sums(np.abs(scipy.fft.rfftn(signal * mask)) ** 2, N)
        noisy = shell_sums(np.abs(scipy.fft.rfftn(first.astype(np.float64) * mask)) ** 2, N)
        expected.append(N * VOXEL / resolution(np.arange(N // 2 + 1) / N, power / (power + noisy), VOXEL))
    # The curve crosses at a slope of some 0.15 a shell, and is known to 0.05 there.
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.5)


def test_random_phases_keep_amplitudes_and_a_real_volume() -> None:
    """With no mask to speak of, shells below the cut are untouched and those beyond correlate to nothing."""
    whole = np.ones((N, N, N), np.float32)
    same = noise(40)
    result = corrected_fsc(same, same, whole, VOXEL, randomise_from_angstrom=N * VOXEL / 10, realisations=1)
    np.testing.assert_allclose(result.randomised[:10], 1.0, atol=1e-9)
    assert np.abs(result.randomised[10:] * np.sqrt(shell_counts(N)[10:])).max() < 4
    np.testing.assert_allclose(result.corrected, 1.0, atol=1e-9)


def test_more_realisations_leave_less_error() -> None:
    """Variance of the corrected FSC of noise: 1 + 1/m times that of the masked one."""
    spread = {}
    shells = slice(6, N // 2 + 1)
    for m in (1, 8):
        z = []
        for seed in range(4):
            result = corrected_fsc(
                noise(50 + 2 * seed), noise(51 + 2 * seed), TIGHT, VOXEL, seed=seed, realisations=m,
                randomise_from_angstrom=N * VOXEL / 3,
            )  # fmt: skip
            z.append((result.corrected / deviation(TIGHT))[shells])
        spread[m] = float(np.var(z))
    # 76 values, some 30 of them independent, and the same maps in both: the ratio is known to 15%.
    assert spread[8] / spread[1] == pytest.approx((1 + 1 / 8) / 2, rel=0.45)


def test_automatic_start_and_the_same_seed() -> None:
    first, second = halves(60)
    result = corrected_fsc(first, second, TIGHT, VOXEL, seed=3, realisations=2)
    start = round(N * VOXEL / result.randomised_from_angstrom)
    assert (result.unmasked[1:start] >= 0.8).all()
    assert result.unmasked[start] < 0.8
    again = corrected_fsc(first, second, TIGHT, VOXEL, seed=3, realisations=2)
    np.testing.assert_array_equal(result.corrected, again.corrected)
    assert (corrected_fsc(first, second, TIGHT, VOXEL, seed=4, realisations=2).randomised != result.randomised).any()
    whole = corrected_fsc(first, first, TIGHT, VOXEL)
    np.testing.assert_array_equal(whole.corrected, whole.masked)
    assert whole.randomised_from_angstrom == 2 * VOXEL


def test_shell_counts_are_those_of_the_full_transform() -> None:
    for n in (15, 16):
        k = scipy.fft.fftfreq(n) * n
        radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2)
        counts = np.bincount(np.rint(radius).astype(int).ravel())
        np.testing.assert_array_equal(shell_counts(n), counts[: n // 2 + 1])


def test_bad_input_is_named() -> None:
    a = noise(0)
    with pytest.raises(InvalidArgument, match="zero everywhere"):
        corrected_fsc(a, a, np.zeros_like(a), VOXEL)
    with pytest.raises(InvalidArgument, match="10 to 240 Å"):
        corrected_fsc(a, a, TIGHT, VOXEL, randomise_from_angstrom=5)
    with pytest.raises(InvalidArgument, match="realisations"):
        corrected_fsc(a, a, TIGHT, VOXEL, realisations=0)
    with pytest.raises(InvalidArgument, match="mask is"):
        corrected_fsc(a, a, TIGHT[:4], VOXEL)
