import numpy as np
import pytest
import scipy.fft

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import fsc, resolution, shell_index


def noise(seed: int, n: int = 32) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(n, n, n)).astype(np.float32)


def test_a_volume_correlates_with_itself_and_against_its_negative() -> None:
    frequency, same = fsc(noise(0), 3 * noise(0))
    np.testing.assert_allclose(same, 1.0, atol=1e-6)
    np.testing.assert_allclose(fsc(noise(0), -noise(0))[1], -1.0, atol=1e-6)
    np.testing.assert_allclose(frequency, np.arange(17) / 32)


def test_independent_noise_correlates_to_nothing() -> None:
    _, values = fsc(noise(1), noise(2))
    shells = shell_index(32)
    for s in range(4, 17):
        # Over M independent components the deviation is 1/sqrt(M).
        assert abs(values[s]) < 4 / np.sqrt((shells == s).sum())


def test_common_signal_in_noise_gives_the_expected_curve() -> None:
    signal, a, b = noise(3, 48), noise(4, 48), noise(5, 48)
    _, values = fsc(signal + a, signal + b)
    # Equal power of signal and noise: s^2 / (s^2 + n^2) = 1/2.
    assert values[6:].mean() == pytest.approx(0.5, abs=0.02)


def test_friedel_mates_count_as_in_the_full_transform() -> None:
    a, b = noise(6, 16), noise(6, 16) + noise(7, 16)
    fa, fb = scipy.fft.fftn(a.astype(float)), scipy.fft.fftn(b.astype(float))
    k = np.fft.fftfreq(16) * 16
    shells = np.rint(np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2)).astype(int)
    _, values = fsc(a, b)
    for s in range(9):
        at = shells == s
        expected = (fa[at] * fb[at].conj()).sum().real / np.sqrt((abs(fa[at]) ** 2).sum() * (abs(fb[at]) ** 2).sum())
        assert values[s] == pytest.approx(expected, rel=1e-9)


def test_an_empty_shell_correlates_to_zero() -> None:
    flat = np.full((16, 16, 16), 2.0, dtype=np.float32)
    np.testing.assert_array_equal(fsc(flat, noise(8, 16))[1][1:], 0.0)


def test_resolution_is_interpolated_between_shells() -> None:
    frequency = np.arange(5) / 10
    # 0.5 falls to 0.1 between 0.2 and 0.3: 0.3 is crossed half way.
    assert resolution(frequency, np.array([1, 0.9, 0.5, 0.1, 0.6]), 2.0, 0.3) == pytest.approx(2.0 / 0.25)
    assert resolution(frequency, np.ones(5), 2.0) == 4.0
    assert resolution(frequency, np.zeros(5), 2.0) == 20.0


def test_unequal_volumes_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="two cubes"):
        fsc(noise(0, 8), noise(0, 16))
    with pytest.raises(InvalidArgument, match="mask"):
        fsc(noise(0, 8), noise(1, 8), noise(0, 4))
