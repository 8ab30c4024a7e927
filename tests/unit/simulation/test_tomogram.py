"""Images are prepared as asked: turned, aligned, binned, weighted; and blocks of rows join without seams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.tilt_series import TiltSeries
from services.simulation import tomogram
from services.simulation.projection import project
from services.simulation.tomogram import Preparation, Reconstruction
from services.simulation.weighted_back_projection import weighted_back_projection
from tests.unit.simulation.test_projection import gaussians, rendered

ANGLES = np.arange(-60.0, 61.0, 3.0)
SHAPE = (24, 70, 64)


def phantom() -> NDArray[np.float32]:
    centres, width = gaussians(SHAPE, 2.0, 12)
    return rendered(SHAPE, centres, width)


def prepared(
    images: NDArray[np.float32], series: TiltSeries, pixel: float = 10.0, **options: Any
) -> NDArray[np.float32]:
    preparation = Preparation(**options)
    out = np.empty((len(images), *tomogram.binned_shape(images.shape[1:], preparation.binning)), np.float32)
    tomogram.prepare_images(lambda i, j: images[i:j], images.shape, series, pixel, preparation, out.__setitem__)
    return out


def reconstructed(
    stack: NDArray[np.float32], depth: int, options: Reconstruction
) -> tuple[NDArray[np.float32], list[float]]:
    out = np.empty((depth, *stack.shape[1:]), np.float32)

    def write(first: int, block: NDArray[np.float32]) -> None:
        out[:, first : first + block.shape[1]] = block

    residuals = tomogram.reconstruct(lambda i, j: stack[:, i:j], ANGLES, out.shape, write, options)
    return out, residuals


def correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_blocks_of_rows_join_without_a_seam() -> None:
    stack = project(phantom(), ANGLES)
    out, residuals = reconstructed(stack, SHAPE[0], Reconstruction())
    np.testing.assert_array_equal(out, weighted_back_projection(stack, ANGLES, SHAPE[0], SHAPE[2]))
    assert residuals == []
    _, residuals = reconstructed(stack, SHAPE[0], Reconstruction("sirt", iterations=5))
    assert len(residuals) == 5
    assert residuals == sorted(residuals, reverse=True)


def test_a_leaning_tilt_axis_is_turned_upright() -> None:
    """The whole stack is turned counter-clockwise, x to the right and y up, as a camera that is turned would."""
    stack = project(phantom(), ANGLES)
    angle = 12.0
    leaning = np.stack([scipy.ndimage.rotate(image, -angle, reshape=False, order=3) for image in stack])
    # by definition: the axis (0, 1) has become (-sin, cos) in (x, y)
    marker = np.zeros(SHAPE[1:], np.float32)
    marker[60, 32] = 1
    _, u = np.unravel_index(int(np.argmax(scipy.ndimage.rotate(marker, -angle, reshape=False, order=1))), marker.shape)
    assert u - 32 == pytest.approx(-25 * np.sin(np.radians(angle)), abs=1)
    upright = prepared(leaning, TiltSeries(ANGLES), tilt_axis_degrees=angle)
    inner = np.s_[:, 15:55, 15:49]
    assert correlation(upright[inner], stack[inner]) > 0.99
    wrong = prepared(leaning, TiltSeries(ANGLES), tilt_axis_degrees=-angle)
    assert correlation(wrong[inner], stack[inner]) < 0.8
    # what the file says of the axis is of the images as they were recorded: undone on demand alone
    stated = TiltSeries(ANGLES, tilt_axis_degrees=angle)
    np.testing.assert_array_equal(prepared(leaning, stated, align=True), upright)
    np.testing.assert_array_equal(prepared(leaning, stated), prepared(leaning, TiltSeries(ANGLES)))


def test_images_are_aligned_by_what_the_series_states() -> None:
    stack = project(phantom(), ANGLES)
    shifts = np.random.default_rng(0).uniform(-3, 3, (len(ANGLES), 2))
    moved = np.stack([scipy.ndimage.shift(image, (v, u), order=3) for image, (u, v) in zip(stack, shifts, strict=True)])
    series = TiltSeries(ANGLES, shifts_angstrom=shifts * 10.0)
    inner = np.s_[:, 8:-8, 8:-8]
    assert correlation(prepared(moved, series, align=True)[inner], stack[inner]) > 0.999
    assert correlation(prepared(moved, series)[inner], stack[inner]) < 0.95


@pytest.mark.parametrize("binning", [2, 3])
def test_binning_keeps_the_tilt_axis_in_the_middle(binning: int) -> None:
    shape = (30, 61, 66)
    centres, width = gaussians(shape, 3.5, 8)
    stack = project(rendered(shape, centres, width), ANGLES)
    binned = prepared(stack, TiltSeries(ANGLES), binning=binning)
    made, _ = reconstructed(binned, 10, Reconstruction())
    small = (10, *binned.shape[1:])
    truth = rendered(small, centres / binning, width / binning)
    smeared = weighted_back_projection(project(truth, ANGLES), ANGLES, *made.shape[::2])
    assert correlation(made, smeared) > 0.99


def test_means_and_variances() -> None:
    images = np.random.default_rng(0).normal(5, 2, (3, 16, 20)).astype(np.float32)
    series = TiltSeries(np.array([-10.0, 0, 10]))
    np.testing.assert_allclose(prepared(images, series).mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(prepared(images, series, normalise=True).std(axis=(1, 2)), 1, atol=1e-4)
    with pytest.raises(FailedPrecondition, match="image 1 is the same everywhere"):
        prepared(np.stack([images[0], np.ones((16, 20), np.float32), images[2]]), series, normalise=True)


def test_dose_weights_fade_late_images_and_keep_the_power() -> None:
    images = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    series = TiltSeries(
        np.array([0.0, 3.0]), exposure=np.array([3.0, 3.0]), prior_dose=np.array([0.0, 90.0]), voltage_kv=300
    )
    weighted = prepared(images, series, 4.0, dose_weighting=True)
    k = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None, :]) / 4.0
    gains = np.abs(np.fft.fft2(weighted)) / np.abs(np.fft.fft2(images))
    fine = (k > 0.08) & (k < 0.1)
    assert gains[1][fine].mean() < 0.3 < gains[0][fine].mean()
    # the sum over the images of the squared weights is their number
    np.testing.assert_allclose((gains[:, fine] ** 2).mean(), 1, rtol=1e-3)
    coarse = (k > 0) & (k < 0.01)
    assert gains[1][coarse].mean() > gains[1][fine].mean()


def test_what_the_series_must_say() -> None:
    bare = TiltSeries(ANGLES)
    with pytest.raises(FailedPrecondition, match=r"mine\.tlt.*dose"):
        tomogram.check_series(bare, Preparation(dose_weighting=True), "mine.tlt")
    with pytest.raises(FailedPrecondition, match=r"mine\.tlt.*defocus_um"):
        tomogram.check_series(bare, Preparation(ctf_correction="phase_flip"), "mine.tlt")
    with pytest.raises(FailedPrecondition, match=r"mine\.tlt.*shifts"):
        tomogram.check_series(bare, Preparation(align=True), "mine.tlt")
    known = tomogram.with_optics(bare, 3.0, 300.0, 2.7, 0.07)
    tomogram.check_series(known, Preparation(ctf_correction="phase_flip"), "mine.tlt")
    # what the file says stands
    other = tomogram.with_optics(replace(known, cs_mm=1.4), 4.0, 200.0, 2.7, 0.1)
    assert (other.cs_mm, other.voltage_kv) == (1.4, 300.0)
    assert float(np.mean(other.ctf(0).defocus_um)) == 3.0


def test_images_too_small_to_be_binned() -> None:
    with pytest.raises(InvalidArgument, match="cannot be binned by 8"):
        tomogram.binned_shape((6, 64), 8)
