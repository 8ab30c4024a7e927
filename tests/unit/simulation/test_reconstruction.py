"""Reconstructions give back what was projected, on its own scale, and leave the missing wedge empty."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.wedge import wedge_mask
from services.simulation.fourier_inversion import fourier_inversion
from services.simulation.projection import project
from services.simulation.sirt import sirt
from services.simulation.weighted_back_projection import (
    Window,
    angular_shares,
    filter_response,
    weighted_back_projection,
)
from tests.unit.simulation.test_projection import gaussians, rendered

Array = NDArray[np.float32]
SHAPE = (48, 8, 56)
WINDOWS: tuple[tuple[Window, int], ...] = (("ramp", 1), ("hamming", 1), ("sirt", 1), ("sirt", 10**6))
ALL_ANGLES = np.arange(-90.0, 91.0, 1.0)


def sirt_volume(stack: Array, angles: NDArray[np.float64], depth: int, width: int, workers: int = 1) -> Array:
    return sirt(stack, angles, depth, width, 30, workers=workers).volume


METHODS: dict[str, Callable[..., Array]] = {
    "ramp": weighted_back_projection,
    "hamming": partial(weighted_back_projection, window="hamming"),
    "sirt-like": partial(weighted_back_projection, window="sirt", sirt_iterations=30),
    "fourier": fourier_inversion,
    "sirt": sirt_volume,
}


def phantom() -> Array:
    centres, width = gaussians(SHAPE, 1.6, 10)
    centres[:, [0, 2]] *= 0.8
    return rendered(SHAPE, centres, width)


def correlation(a: Array, b: Array) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("name", METHODS)
def test_a_full_series_gives_the_phantom_back(name: str) -> None:
    volume = phantom()
    made = METHODS[name](project(volume, ALL_ANGLES, 84), ALL_ANGLES, SHAPE[0], SHAPE[2])
    scale = float(np.vdot(made, volume) / np.vdot(volume, volume))
    if name in ("ramp", "fourier"):
        assert correlation(made, volume) > 0.9999
        assert scale == pytest.approx(1, abs=1e-3)
    else:
        # windows, and 30 iterations, leave fine detail behind
        assert correlation(made, volume) > 0.98
        assert 0.85 < scale < 1


@pytest.mark.parametrize("name", ["ramp", "fourier", "sirt"])
@pytest.mark.parametrize("limits", [(-60, 60), (-50, 70)])
def test_the_missing_wedge_is_where_the_tilt_range_says(name: str, limits: tuple[int, int]) -> None:
    """A reconstruction of noise, all of whose frequencies would be there, in the middle of a wider one."""
    low, high = limits
    angles = np.arange(low, high + 1, 1.0)
    stack = np.random.default_rng(5).standard_normal((len(angles), 6, 128)).astype(np.float32)
    volume = METHODS[name](stack, angles, 64, 64)
    # the box cuts what is without end: a window narrows the spread of its edges
    window = np.hanning(64)[:, None, None] * np.hanning(64)
    power = (np.abs(np.fft.fft2((volume * window), axes=(0, 2))) ** 2).mean(axis=1)
    k = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None, :])
    band = (k > 0.1) & (k < 0.4)
    # two degrees on either side of the border belong to the window's spread
    inside = wedge_mask((64, 1, 64), low + 4, high - 4)[:, 0] > 0
    outside = wedge_mask((64, 1, 64), low - 4, high + 4)[:, 0] == 0
    assert power[band & outside].mean() < 0.01 * power[band & inside].mean()
    # and of the mirrored range, which would be a tilt the wrong way round
    if low != -high:
        lost = wedge_mask((64, 1, 64), -high, -low)[:, 0] == 0
        assert power[band & lost & inside].mean() > 0.5 * power[band & inside].mean()


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_independent_and_threads_change_nothing(name: str) -> None:
    angles = np.arange(-60.0, 61.0, 10.0)
    stack = np.random.default_rng(6).standard_normal((len(angles), 40, 30)).astype(np.float32)
    whole = METHODS[name](stack, angles, 12, 24, workers=1)
    np.testing.assert_array_equal(METHODS[name](stack, angles, 12, 24, workers=3), whole)
    np.testing.assert_array_equal(METHODS[name](stack[:, 16:32], angles, 12, 24), whole[:, 16:32])


def test_residuals_of_sirt_fall() -> None:
    volume = phantom()
    angles = np.arange(-60.0, 61.0, 3.0)
    made = sirt(project(volume, angles, 84), angles, SHAPE[0], SHAPE[2], 30, non_negative=True)
    assert made.residuals[0] == 1
    assert all(later < earlier for earlier, later in zip(made.residuals, made.residuals[1:], strict=False))
    assert made.residuals[-1] < 0.1
    assert made.volume.min() >= 0


def test_each_image_stands_for_its_own_share_of_the_angles() -> None:
    shares = np.degrees(angular_shares(np.array([10.0, 0.0, 4.0, 5.0])))
    # halfway to the neighbours; the gap behind the ends counts as the step beside it
    np.testing.assert_allclose(shares, [5.0, 4.0, 2.5, 3.0])
    assert angular_shares(ALL_ANGLES).sum() == pytest.approx(np.pi)
    # -90 and 90 are one direction, and share what is theirs
    np.testing.assert_allclose(np.degrees(angular_shares(ALL_ANGLES)[[0, 1, -1]]), [0.5, 1.0, 0.5])


def test_uneven_steps_keep_the_scale() -> None:
    volume = phantom()
    angles = np.concatenate([np.arange(-90.0, 0.0, 1.0), np.arange(0.0, 90.0, 2.0)])
    made = weighted_back_projection(project(volume, angles, 84), angles, SHAPE[0], SHAPE[2])
    assert correlation(made, volume) > 0.999
    assert float(np.vdot(made, volume) / np.vdot(volume, volume)) == pytest.approx(1, abs=0.01)


def test_windows() -> None:
    ramp, hamming, once, many = (filter_response(256, 128, window, n, 0.5) for window, n in WINDOWS)
    k = np.fft.rfftfreq(256)
    np.testing.assert_allclose(ramp[1:], k[1:], atol=1e-3)
    np.testing.assert_allclose(hamming, ramp * (0.54 + 0.46 * np.cos(2 * np.pi * k)), rtol=1e-5)
    # one iteration is a plain back-projection: every frequency above the lowest with one weight
    np.testing.assert_allclose(once[4:], 1 / 128, rtol=0.02)
    np.testing.assert_allclose(many, ramp, rtol=1e-3, atol=1e-6)
    cut = filter_response(256, 128, "ramp", 1, 0.25)
    assert not cut[k > 0.28].any()
    np.testing.assert_array_equal(cut[k <= 0.25], ramp[k <= 0.25])


def test_options_that_make_no_sense() -> None:
    stack = np.zeros((2, 3, 8), np.float32)
    for refused in (
        partial(weighted_back_projection, stack, [0, 10], 8, 8, cutoff=0),
        partial(weighted_back_projection, stack, [0, 10, 20], 8, 8),
        partial(sirt, stack, [0, 10], 8, 8, 0),
        partial(sirt, stack, [0, 10], 8, 8, 5, relaxation=2.5),
        partial(fourier_inversion, stack, [0, 10], 0, 8),
    ):
        with pytest.raises(InvalidArgument):
            refused()
