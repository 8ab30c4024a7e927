"""CTF correction against images made column by column at each column's own defocus."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.ctf import Ctf, ctf_grid, defocus_at
from services.simulation.ctf_correction import METHODS, correct_ctf, strip_width

PIXEL = 2.0
SIDE = 256
# A point spreads over lambda defocus k = 25 pixels at Nyquist; the tilt changes the phase there by 1.7 at the edges.
CTF = Ctf(defocus_um=1.0)
EDGE = 26
WHITE: dict[str, Any] = {"method": "wiener", "snr": 25.0, "snr_falloff_angstrom": 0.0}


def specimen(seed: int = 0) -> NDArray[np.float32]:
    """Dark blobs of white spectrum: correlations then weigh all frequencies alike."""
    return np.random.default_rng(seed).normal(size=(SIDE, SIDE)).astype(np.float32)


def seen(truth: NDArray[np.float32], tilt_degrees: float, ctf: Ctf = CTF) -> NDArray[np.float32]:
    """The image of a dark specimen (-CTF is its transfer): the sum of its columns, each through the CTF of its own
    defocus."""
    total = np.zeros((SIDE, SIDE // 2 + 1), np.complex128)
    for column in range(SIDE):
        defocus = float(defocus_at(ctf.defocus_um, tilt_degrees, (column - SIDE // 2) * PIXEL))
        alone = np.zeros_like(truth)
        alone[:, column] = truth[:, column]
        total -= np.fft.rfft2(alone) * ctf_grid(ctf.with_defocus(defocus), truth.shape, PIXEL)
    return np.fft.irfft2(total, truth.shape).astype(np.float32)


def ring_correlation(first: NDArray[np.float32], second: NDArray[np.float32], rings: int = 24) -> NDArray[np.float64]:
    """Fourier ring correlation of two patches under a Hann window, so that their edges do not count."""
    side = first.shape[0], first.shape[1]
    window = np.hanning(side[0])[:, None] * np.hanning(side[1])[None, :]
    a, b = np.fft.rfft2(first * window), np.fft.rfft2(second * window)
    radius = np.hypot(np.fft.fftfreq(side[0])[:, None], np.fft.rfftfreq(side[1])[None, :])
    ring = np.minimum((radius * 2 * rings).astype(int), rings).ravel()
    cross, power_a, power_b = (np.bincount(ring, (x * y.conj()).real.ravel()) for x, y in ((a, b), (a, a), (b, b)))
    return np.asarray((cross / np.sqrt(power_a * power_b))[:rings])


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    inner = slice(EDGE, -EDGE)
    return float(np.corrcoef(first[inner, inner].ravel(), second[inner, inner].ravel())[0, 1])


@pytest.mark.parametrize("tilt", [0.0, 60.0, -60.0])
def test_phase_flip_leaves_no_ring_negative(tilt: float) -> None:
    truth = specimen()
    image = seen(truth, tilt)
    corrected = correct_ctf(image, PIXEL, CTF, tilt)
    # Towards the edges the defocus differs most from the axis'
    for columns in (slice(EDGE, 90), slice(-90, -EDGE), slice(96, 160)):
        before, after = (ring_correlation(x[:, columns], truth[:, columns]) for x in (image, corrected))
        assert before.min() < -0.5
        assert after.min() > -0.1
        assert np.median(after) > 0.8


def test_without_tilt_both_do_what_theory_says() -> None:
    """Far from edges, on white noise seen through the CTF with noise of a 25th of its power.

    The correlation with the truth is mean|CTF| / sqrt(mean(CTF^2) + 1/25) for the phase flip, and the square root of
    mean(CTF^2 / (CTF^2 + 1/25)) for Wiener, which no other linear filter exceeds.
    """
    truth = np.tile(specimen(), (3, 3))
    transfer = ctf_grid(CTF, truth.shape, PIXEL)
    image = np.fft.irfft2(-np.fft.rfft2(truth) * transfer, truth.shape).astype(np.float32)
    image += np.random.default_rng(1).normal(0, 0.2, truth.shape).astype(np.float32)
    middle = np.s_[SIDE : 2 * SIDE, SIDE : 2 * SIDE]
    flipped = correct_ctf(image, PIXEL, CTF)[middle]
    wiener = correct_ctf(image, PIXEL, CTF, **WHITE)[middle]
    squared = ctf_grid(CTF, truth.shape, PIXEL, half=False) ** 2
    best = np.sqrt(np.mean(squared / (squared + 0.04)))
    assert correlation(wiener, truth[middle]) == pytest.approx(best, abs=0.01)
    expected = np.mean(np.sqrt(squared)) / np.sqrt(np.mean(squared) + 0.04)
    assert correlation(flipped, truth[middle]) == pytest.approx(expected, abs=0.01)
    assert expected < best - 0.02


def test_noisy_images_of_a_tilted_specimen_gain_from_both() -> None:
    truth = specimen()
    noisy = seen(truth, 50.0) + np.random.default_rng(1).normal(0, 0.2, truth.shape).astype(np.float32)
    assert correlation(noisy, truth) < 0.1
    assert correlation(correct_ctf(noisy, PIXEL, CTF, 50.0), truth) > 0.8
    # The edges, whose surroundings are not in the image, cost Wiener more: its filter reaches farther
    assert correlation(correct_ctf(noisy, PIXEL, CTF, 50.0, **WHITE), truth) > 0.77


@pytest.mark.parametrize("settings", [{"method": "phase_flip"}, WHITE])
def test_the_gradient_counts(settings: dict[str, Any]) -> None:
    """At a high tilt a correction at one defocus undoes itself towards the edges; the gradient's sign matters too."""
    truth = specimen()
    image = seen(truth, 60.0)
    ours, flat, wrong = (correlation(correct_ctf(image, PIXEL, CTF, tilt, **settings), truth) for tilt in (60, 0, -60))
    assert ours > flat + 0.07
    assert flat > wrong + 0.1


def test_no_seams() -> None:
    """No step in the error from column to column, be it in the middle of a strip or where two meet."""
    truth = specimen()
    image = seen(truth, 60.0)
    step = strip_width(CTF, PIXEL, 60.0, SIDE)
    assert 4 <= step <= SIDE // 4
    error = (correct_ctf(image, PIXEL, CTF, 60.0) - truth).std(axis=0)[EDGE:-EDGE]
    assert error.max() < 1.25 * np.median(error)
    assert np.abs(np.diff(error)).max() < 0.25 * np.median(error)


def test_the_mean_is_kept_and_so_is_the_shape() -> None:
    image = (np.random.default_rng(0).normal(size=(61, 90)) + 100).astype(np.float32)
    for method in METHODS:
        corrected = correct_ctf(image, PIXEL, CTF, 40.0, method=method)
        assert corrected.shape == image.shape
        assert corrected.dtype == np.float32
        assert corrected.mean() == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "inverse"}, "known are phase_flip, wiener"),
        ({"snr": 0.0}, "snr is 0"),
        ({"strip_pixels": 0}, "at least 1"),
        ({"pixel_size_angstrom": 0.0}, "pixel_size_angstrom"),
        ({"image": np.zeros((4, 4, 4), np.float32)}, "expected \\[v, u\\]"),
        ({"image": np.full((8, 8), np.nan, np.float32)}, "not finite"),
    ],
)
def test_what_can_not_be_corrected(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"image": np.zeros((16, 16), np.float32), "pixel_size_angstrom": PIXEL, "ctf": CTF}
    with pytest.raises(InvalidArgument, match=message):
        correct_ctf(**(arguments | change))
