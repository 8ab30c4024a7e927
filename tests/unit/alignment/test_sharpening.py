"""B factors that are known, found and undone."""

import numpy as np
import pytest
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import filter_radially, low_pass
from cryofleet.numerics.fsc import fsc, shell_counts, shell_sums
from services.alignment.sharpening import fsc_weight, guinier_fit, sharpen

N = 40
VOXEL = 2.0


def noise(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(N, N, N)).astype(np.float32)


def blurred(volume: NDArray[np.float32], b: float) -> NDArray[np.float32]:
    return filter_radially(volume, lambda k: np.exp(np.float32(b / 4) * (k / np.float32(VOXEL)) ** 2))


@pytest.mark.parametrize("b", [-300.0, -60.0, 0.0, 40.0])
def test_the_b_factor_of_a_flat_spectrum_is_found(b: float) -> None:
    """White noise: the logarithm of a shell's amplitude has the variance 1 / (2 components)."""
    fit = guinier_fit(blurred(noise(1), b), VOXEL, 10.0, 4.0)
    x = fit.inverse_square_angstrom
    counts = shell_counts(N)[8:21]
    centre = np.average(x, weights=counts)
    expected_error = 4 / np.sqrt(2 * (counts * (x - centre) ** 2).sum())
    assert abs(fit.b_factor_angstrom2 - b) < 4 * expected_error
    assert fit.standard_error_angstrom2 == pytest.approx(expected_error, rel=0.6)
    np.testing.assert_allclose(x, (np.arange(8, 21) / (N * VOXEL)) ** 2)
    # rfftn of white noise of deviation 1 has amplitudes n^1.5.
    error = np.hypot(expected_error / 4 * centre, 1 / np.sqrt(2 * counts.sum()))
    assert abs(fit.intercept - 1.5 * np.log(N)) < 4 * error


def test_the_fsc_takes_the_noise_off_the_fit() -> None:
    """Noise as strong as the signal at 6 Å flattens the plot; amplitudes times C are those of the signal."""
    signal = blurred(noise(2), -100.0)
    halves = [signal + np.float32(0.4) * noise(3 + i) for i in range(2)]
    average = (halves[0] + halves[1]) * np.float32(0.5)
    curve = fsc(*halves)[1]
    plain = guinier_fit(average, VOXEL, 16.0, 5.0).b_factor_angstrom2
    weighted = guinier_fit(average, VOXEL, 16.0, 5.0, curve).b_factor_angstrom2
    assert abs(weighted + 100) < 12
    assert abs(plain + 100) > 2 * abs(weighted + 100)


def test_sharpening_undoes_a_blur_up_to_the_resolution() -> None:
    volume = noise(5)
    result = sharpen(blurred(volume, -200.0), VOXEL, 5.0, b_factor_angstrom2=-200.0)
    np.testing.assert_allclose(result.volume, low_pass(volume, 5.0, VOXEL, edge=1 / N), atol=1e-4)
    assert result.fit is None
    # At 5 Å, shell 16, the amplitude rises by exp(200 / 4 / 25).
    assert result.largest_gain == pytest.approx(np.exp(2), rel=1e-4)
    fitted = sharpen(blurred(volume, -200.0), VOXEL, 5.0, fit_from_angstrom=10.0)
    assert fitted.fit is not None
    assert fitted.b_factor_angstrom2 == fitted.fit.b_factor_angstrom2 == pytest.approx(-200, abs=10)
    amplitude = np.sqrt(shell_sums(np.abs(scipy.fft.rfftn(fitted.volume)) ** 2, N) / shell_counts(N))
    assert amplitude[8] / amplitude[15] == pytest.approx(1, abs=0.1)
    assert (amplitude[18:] < 1e-3 * amplitude[15]).all()


def test_shells_are_weighted_by_what_the_halves_agree_on() -> None:
    curve = np.linspace(1.0, -0.2, N // 2 + 1)
    volume = noise(6)
    result = sharpen(volume, VOXEL, 4.0, b_factor_angstrom2=0.0, fsc=curve)
    before, after = (shell_sums(np.abs(scipy.fft.rfftn(v)) ** 2, N) for v in (volume, result.volume))
    # Within a shell the weight is interpolated, so shells of unit width see it a little smeared.
    np.testing.assert_allclose(np.sqrt(after / before)[2:15], fsc_weight(curve)[2:15], atol=0.01)
    np.testing.assert_allclose(
        fsc_weight(np.array([1.0, 1 / 3, 0.143, 0.0, -0.5])), [1, 0.7071, 0.5002, 0, 0], atol=1e-4
    )


def test_bad_input_is_named() -> None:
    volume = noise(7)
    with pytest.raises(InvalidArgument, match="one of the two"):
        sharpen(volume, VOXEL, 5.0)
    with pytest.raises(InvalidArgument, match="one of the two"):
        sharpen(volume, VOXEL, 5.0, b_factor_angstrom2=-10, fit_from_angstrom=10)
    with pytest.raises(InvalidArgument, match="4 Å at best"):
        sharpen(volume, VOXEL, 3.0, b_factor_angstrom2=-10)
    with pytest.raises(InvalidArgument, match="closer to 0"):
        sharpen(volume, VOXEL, 4.0, b_factor_angstrom2=-2000)
    with pytest.raises(InvalidArgument, match="2 shells, a fit needs 4"):
        guinier_fit(volume, VOXEL, 5.2, 4.7)
    with pytest.raises(InvalidArgument, match="larger number"):
        guinier_fit(volume, VOXEL, 5.0, 10.0)
    with pytest.raises(InvalidArgument, match="no amplitude"):
        guinier_fit(low_pass(volume, 8, VOXEL, edge=0), VOXEL, 10.0, 4.0)
    with pytest.raises(InvalidArgument, match="shells 0 to 20"):
        sharpen(volume, VOXEL, 5.0, b_factor_angstrom2=0, fsc=np.ones(5))
    with pytest.raises(InvalidArgument, match="cubic"):
        sharpen(volume[:4], VOXEL, 5.0, b_factor_angstrom2=0)
    with pytest.raises(InvalidArgument, match="not finite"):
        sharpen(volume * np.float32(np.nan), VOXEL, 5.0, b_factor_angstrom2=0)
