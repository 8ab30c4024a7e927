"""Images of a scene against the formulas of their formation, and their noise against its statistics."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import Cancelled, InvalidArgument
from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics.ctf import Ctf, defocus_at, interaction_constant
from cryofleet.numerics.radiation import remaining_amplitude
from services.simulation.detector import (
    apply_mtf,
    gaussian_series,
    noise_scales,
    poisson_series,
    sinc_mtf,
    tabulated_mtf,
    transmission,
)
from services.simulation.imaging import (
    PHASE_STEP,
    ImagingParameters,
    draw_tilt_series,
    noise_free_series,
    spread_angstrom,
    transfer_grid,
)
from services.simulation.tilt_scheme import TiltScheme, tilt_scheme

SIDE = 96
PIXEL = 6.0


def one_tilt(tilt: float) -> TiltScheme:
    return TiltScheme(np.array([tilt]), np.array([0]))


def drawn(parameters: ImagingParameters, tilt: float = 0.0) -> TiltSeries:
    return draw_tilt_series(one_tilt(tilt), parameters, np.random.default_rng(0))


def grating(cycles: int, amplitude: float = 1.0) -> NDArray[np.float32]:
    """A cosine down the rows with `cycles` half periods: its own reflection at both edges. (1, SIDE, SIDE)."""
    wave = amplitude * np.cos(np.pi * cycles * (np.arange(SIDE) + 0.5) / SIDE)
    return np.repeat(wave[None, :, None], SIDE, axis=2).astype(np.float32)


def amplitudes(image: NDArray[np.float32], cycles: int) -> NDArray[np.float64]:
    """The amplitude of that grating in each column, from the rows away from the edges."""
    rows = slice(SIDE // 6, -SIDE // 6)
    wave = grating(cycles)[0, rows, 0].astype(np.float64)
    return np.asarray(wave @ image[rows] / (wave @ wave))


def frequency(cycles: int) -> float:
    return cycles / (2 * SIDE * PIXEL)


@pytest.mark.parametrize("cycles", [0, 6, 15, 29])
def test_a_grating_has_twice_the_ctf_of_its_phase(cycles: int) -> None:
    parameters = ImagingParameters(pixel_size_angstrom=PIXEL, defocus_um=2.0, dose_per_tilt=4.0, radiation_damage=False)
    image = noise_free_series(grating(cycles, 5.0), drawn(parameters), parameters)[0]
    k = frequency(cycles)
    expected = 2 * float(Ctf(defocus_um=2.0)(k)) * 5.0 * PIXEL * interaction_constant(300)
    if cycles == 0:
        assert image == pytest.approx(np.full((SIDE, SIDE), expected), rel=1e-4)
    # the reflected edge of the padding is continuous, but not without end
    assert amplitudes(image, cycles) == pytest.approx(np.full(SIDE, expected), abs=2e-3 * 5 * PIXEL * 6.5e-4 * 2)


def test_protein_is_dark_and_without_ctf_the_image_is_minus_twice_the_phase() -> None:
    blob = np.zeros((1, SIDE, SIDE), np.float32)
    blob[0, 40:56, 40:56] = 1.0
    parameters = ImagingParameters(pixel_size_angstrom=PIXEL, radiation_damage=False, defocus_um=3)
    dark = noise_free_series(blob, drawn(parameters), parameters)[0]
    assert dark[40:56, 40:56].mean() < 0
    assert dark[44:52, 44:52].mean() < dark[:20].mean()
    plain = ImagingParameters(pixel_size_angstrom=PIXEL, radiation_damage=False, contrast_transfer=False)
    image = noise_free_series(blob, drawn(plain, 35.0), plain)[0]
    assert np.allclose(image, -2 * PIXEL * interaction_constant(300) * blob[0], atol=1e-6)


def test_the_defocus_changes_across_a_tilted_image_as_defocus_at_says() -> None:
    """Each column's contrast is the CTF at its own defocus; with the gradient's other sign it is far off."""
    tilt, cycles = 60.0, 80
    k = cycles / (2 * SIDE)
    parameters = ImagingParameters(pixel_size_angstrom=1, defocus_um=0.5, radiation_damage=False)
    scale = 2 * interaction_constant(300)
    measured = amplitudes(noise_free_series(grating(cycles), drawn(parameters, tilt), parameters)[0], cycles) / scale

    def expected(sign: float) -> NDArray[np.float64]:
        u = sign * (np.arange(SIDE) - SIDE // 2)
        return np.array([float(Ctf(defocus_um=defocus_at(0.5, tilt, at))(k)) for at in u])

    # what the linear blend is off by at Nyquist, and the end of the reflected padding
    off = PHASE_STEP**2 / 8 + 5e-3
    assert np.abs(measured - expected(1)).max() < off
    assert np.abs(measured - expected(-1)).max() > 10 * off


def test_each_tilt_has_its_own_defocus_and_astigmatism() -> None:
    parameters = ImagingParameters(pixel_size_angstrom=PIXEL, defocus_um=2.0, radiation_damage=False)
    own = TiltSeries(
        np.zeros(1),
        defocus_um=np.array([2.3]),
        astigmatism_um=np.array([0.4]),
        astigmatism_angle_degrees=np.array([90.0]),
        phase_shift_degrees=np.array([40.0]),
        voltage_kv=300,
        cs_mm=2.7,
        amplitude_contrast=0.07,
    )
    cycles = 60
    measured = amplitudes(noise_free_series(grating(cycles), own, parameters)[0], cycles)
    # the grating's frequency lies along v, where the defocus is the mean and half the astigmatism
    expected = float(Ctf(defocus_um=2.5, phase_shift_degrees=40)(frequency(cycles)))
    assert measured / (2 * PIXEL * interaction_constant(300)) == pytest.approx(np.full(SIDE, expected), abs=5e-3)


def test_thon_rings_lie_at_the_zeros_of_the_ctf() -> None:
    """The rotationally averaged power of imaged white noise has its minima within a shell of the formula's zeros."""
    side, pixel = 256, 3.0
    parameters = ImagingParameters(pixel_size_angstrom=pixel, defocus_um=2.0, radiation_damage=False)
    scheme = TiltScheme(np.zeros(4), np.arange(4))
    series = draw_tilt_series(scheme, parameters, np.random.default_rng(0))
    phantom = np.random.default_rng(1).standard_normal((4, side, side)).astype(np.float32)
    images = noise_free_series(phantom, series, parameters)
    window = np.hanning(side)[:, None] * np.hanning(side)
    power = (np.abs(np.fft.fft2(images * window)) ** 2).mean(axis=0)
    axis = np.fft.fftfreq(side) * side
    shell = np.rint(np.hypot(axis[:, None], axis)).astype(int)
    average = np.bincount(shell.ravel(), power.ravel()) / np.bincount(shell.ravel())
    zeros = Ctf(defocus_um=2.0).zeros(0.45 / pixel) * side * pixel
    assert len(zeros) >= 8
    for index, zero in enumerate(zeros):
        gap = min(np.diff(zeros)[max(0, index - 1) : index + 1])
        low, high = math.ceil(zero - gap / 2), math.floor(zero + gap / 2)
        found = low + int(np.argmin(average[low : high + 1]))
        assert abs(found - zero) <= 1
        assert average[found] < 0.15 * average[low : high + 1].max()


def test_dose_and_motion_take_the_detail() -> None:
    k = frequency(24)
    scheme = tilt_scheme(-3, 3, 3, "sequential")
    plain = ImagingParameters(
        pixel_size_angstrom=PIXEL, contrast_transfer=False, radiation_damage=False, dose_per_tilt=20.0
    )
    damaged = ImagingParameters(pixel_size_angstrom=PIXEL, contrast_transfer=False, dose_per_tilt=20.0)
    blurred = ImagingParameters(
        pixel_size_angstrom=PIXEL, contrast_transfer=False, radiation_damage=False, blur_angstrom=5.0, b_factor=99.0
    )
    stack = np.repeat(grating(24), 3, axis=0)
    whole, faded, moved = (
        np.array(
            [
                amplitudes(image, 24).mean()
                for image in noise_free_series(
                    stack, draw_tilt_series(scheme, parameters, np.random.default_rng(0)), parameters
                )
            ]
        )
        for parameters in (plain, damaged, blurred)
    )
    expected = [float(remaining_amplitude(k, prior, 20.0)) for prior in (0, 20, 40)]
    assert faded / whole == pytest.approx(expected, rel=3e-3)
    # the b-factor is the CTF's, which is off
    assert moved / whole == pytest.approx([math.exp(-2 * (math.pi * 5 * k) ** 2)] * 3, rel=3e-3)


def test_alignment_errors_are_as_recorded() -> None:
    v, u = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    blob = -np.exp(-((u - 20) ** 2 + v**2) / 18)[None].astype(np.float32)
    parameters = ImagingParameters(pixel_size_angstrom=PIXEL, contrast_transfer=False, radiation_damage=False)
    series = TiltSeries(
        np.array([0.0]), shifts_angstrom=np.array([[4.5 * PIXEL, -7 * PIXEL]]), rotations_degrees=np.array([30.0])
    )
    image = noise_free_series(blob, series, parameters)[0]
    total = image.sum()
    assert (image * u).sum() / total == pytest.approx(20 * math.cos(math.radians(30)) + 4.5, abs=0.02)
    assert (image * v).sum() / total == pytest.approx(20 * math.sin(math.radians(30)) - 7, abs=0.02)


def test_the_transfer_of_a_particle_on_the_axis_is_the_whole_imaging() -> None:
    """What `subtomograms` multiplies spectra by gives what the images of a series show, the turn apart."""
    v, u = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    blob = np.exp(-(u**2 + (v - 3) ** 2) / 18)[None].astype(np.float32)
    parameters = ImagingParameters(
        pixel_size_angstrom=PIXEL, shift_error_angstrom=9, blur_angstrom=4, b_factor=50, defocus_spread_um=0.3
    )
    series = drawn(parameters)
    transfer = transfer_grid(series, 0, parameters, (SIDE, SIDE))
    direct = np.fft.irfft2(np.fft.rfft2(blob[0]) * transfer, (SIDE, SIDE))
    image = noise_free_series(blob, series, parameters)[0]
    assert np.abs(image - direct).max() < 1e-3 * np.abs(direct).max()
    assert spread_angstrom(series, parameters) > 16


def test_draws_have_their_spread_and_do_not_depend_on_each_other() -> None:
    scheme = tilt_scheme(-60, 60, 0.25)
    parameters = ImagingParameters(
        pixel_size_angstrom=5, defocus_um=4, defocus_spread_um=0.2, shift_error_angstrom=7, rotation_error_degrees=0.5
    )
    series = draw_tilt_series(scheme, parameters, np.random.default_rng(8))
    assert series.defocus_um is not None
    assert series.shifts_angstrom is not None
    assert series.rotations_degrees is not None
    # 481 draws: a standard deviation is known to 3.2%, a mean to 4.6% of it
    assert series.defocus_um.mean() == pytest.approx(4, abs=0.2 * 0.18)
    assert series.defocus_um.std() == pytest.approx(0.2, rel=0.13)
    assert series.shifts_angstrom.std(axis=0) == pytest.approx([7, 7], rel=0.13)
    assert series.rotations_degrees.std() == pytest.approx(0.5, rel=0.13)
    only_shifts = ImagingParameters(pixel_size_angstrom=5, defocus_um=4, shift_error_angstrom=7)
    other = draw_tilt_series(scheme, only_shifts, np.random.default_rng(8))
    assert np.array_equal(other.shifts_angstrom, series.shifts_angstrom)  # type: ignore[arg-type]
    assert set(other.defocus_um) == {4.0}  # type: ignore[arg-type]
    assert TiltSeries.from_json(series.to_json(), "a").to_mapping() == series.to_mapping()


def test_threads_change_nothing() -> None:
    rng = np.random.default_rng(2)
    scheme = tilt_scheme(-60, 60, 30)
    parameters = ImagingParameters(pixel_size_angstrom=PIXEL, shift_error_angstrom=3, rotation_error_degrees=1)
    series = draw_tilt_series(scheme, parameters, rng)
    stack = rng.standard_normal((5, 30, 42)).astype(np.float32)
    one, two = (noise_free_series(stack, series, parameters, workers=workers) for workers in (1, 2))
    assert one.tobytes() == two.tobytes()
    for record, level in ((gaussian_series, 0.5), (poisson_series, 9.0)):
        levels = np.full(5, level)
        alone = record(one, levels, np.random.default_rng(3), workers=1)
        shared = record(one, levels, np.random.default_rng(3), workers=3, halves=True)
        assert alone.images.tobytes() == shared.images.tobytes()
        assert alone.even is None
        assert not np.array_equal(record(one, levels, np.random.default_rng(4)).images, alone.images)


PIXELS = 3 * 128 * 128


@pytest.mark.parametrize("electrons", [0.7, 12.0, 400.0])
def test_the_variance_of_counts_is_their_mean(electrons: float) -> None:
    contrast = np.full((3, 128, 128), 0.2, np.float32)
    recorded = poisson_series(contrast, np.full(3, electrons), np.random.default_rng(6), mtf=None, halves=True)
    counts = (recorded.images.astype(np.float64) + 1) * electrons
    expected = 1.2 * electrons
    assert counts.mean() == pytest.approx(expected, abs=4 * math.sqrt(expected / PIXELS))
    # the variance of a Poisson variable's variance: (2 + 1 / mean) mean^2 / n
    assert counts.var() == pytest.approx(expected, rel=4 * math.sqrt((2 + 1 / expected) / PIXELS))
    assert np.abs(counts - np.rint(counts)).max() < 1e-3
    _check_halves(recorded.images, recorded.even, recorded.odd, contrast)


def test_gaussian_noise_has_each_image_s_sigma() -> None:
    contrast = np.random.default_rng(0).standard_normal((3, 128, 128)).astype(np.float32)
    sigmas = np.array([0.5, 1.0, 4.0])
    recorded = gaussian_series(contrast, sigmas, np.random.default_rng(7), mtf=None, halves=True)
    noise = recorded.images - contrast
    assert noise.std(axis=(1, 2)) == pytest.approx(sigmas, rel=4 / math.sqrt(2 * 128 * 128))
    assert np.abs(noise.mean(axis=(1, 2)) / sigmas).max() < 4 / 128
    _check_halves(recorded.images, recorded.even, recorded.odd, contrast)


def _check_halves(
    images: NDArray[np.float32],
    even: NDArray[np.float32] | None,
    odd: NDArray[np.float32] | None,
    contrast: NDArray[np.float32],
) -> None:
    """Their mean is the whole; their noise is independent and has twice the variance."""
    assert even is not None
    assert odd is not None
    assert np.array_equal(images, np.float32(0.5) * (even + odd))
    for index in range(3):
        first, second = (even[index] - contrast[index]).ravel(), (odd[index] - contrast[index]).ravel()
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 128
        assert first.var() == pytest.approx(2 * (images[index] - contrast[index]).var(), rel=0.08)


def test_the_detector_passes_signal_and_noise_alike() -> None:
    contrast = 0.3 * np.random.default_rng(1).standard_normal((3, 128, 128)).astype(np.float32)
    silent = gaussian_series(contrast, np.zeros(3), np.random.default_rng(0)).images
    assert np.allclose(silent, apply_mtf(contrast, sinc_mtf), atol=1e-6)
    w = 2 * np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))
    power = (np.sinc(w / 2) ** 2).mean()
    flat = np.zeros_like(contrast)
    for images in (
        gaussian_series(flat, np.full(3, 0.1), np.random.default_rng(2)).images,
        poisson_series(flat, np.full(3, 100.0), np.random.default_rng(2)).images,
    ):
        assert images.var() == pytest.approx(0.01 * power, rel=4 * math.sqrt(3 / PIXELS))


def test_transfers_are_their_tables() -> None:
    assert sinc_mtf(np.array([0.0, 1.0])) == pytest.approx([1, 2 / math.pi])
    table = tabulated_mtf(np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.8, 0.3]))
    assert table(np.array([0, 0.25, 0.75, 2])) == pytest.approx([1, 0.9, 0.55, 0.3])
    # half a Nyquist is a period of four pixels
    wave = np.cos(np.pi / 2 * np.arange(64)).astype(np.float32)
    image = np.repeat(wave[None], 64, axis=0)
    assert apply_mtf(image, table) == pytest.approx(0.8 * image, abs=1e-6)
    assert apply_mtf(image, None) is image
    for frequencies, values in (([0, 0.5], [1]), ([0.5, 0], [1, 1]), ([], []), ([0, math.nan], [1, 1])):
        with pytest.raises(InvalidArgument, match="MTF"):
            tabulated_mtf(np.array(frequencies), np.array(values))


def test_thick_ice_dims_the_beam_with_the_tilt() -> None:
    angles = np.array([0.0, 60.0, -60.0, 80.0, 90.0])
    left = transmission(angles, 3000, 3000)
    assert left[:3] == pytest.approx(np.exp([-1, -2, -2]))
    assert left[4] == left[3] > 0
    assert noise_scales(angles[:2], 3000, 3000) == pytest.approx([1, math.exp(0.5)])
    assert noise_scales(angles, 0, 3000) == pytest.approx(np.ones(5))
    # as counted electrons have it
    counted = poisson_series(np.zeros((2, 128, 128), np.float32), 50 * left[:2], np.random.default_rng(1)).images
    assert counted[1].std() / counted[0].std() == pytest.approx(math.exp(0.5), rel=0.03)
    for thickness, path in ((-1.0, 3000.0), (100.0, 0.0), (math.nan, 3000.0)):
        with pytest.raises(InvalidArgument, match="angstrom is"):
            transmission(angles, thickness, path)


def test_no_pixel_has_fewer_than_no_electrons() -> None:
    gold = np.full((1, 16, 16), -3.0, np.float32)
    images = poisson_series(gold, np.array([20.0]), np.random.default_rng(0), mtf=None).images
    assert np.array_equal(images, np.full((1, 16, 16), -1.0, np.float32))


def test_bad_input_is_named() -> None:
    for field, value in (("pixel_size_angstrom", 0), ("dose_per_tilt", 0), ("blur_angstrom", -1), ("cs_mm", -1)):
        with pytest.raises(InvalidArgument, match=field):
            ImagingParameters(**{"pixel_size_angstrom": 1.0, field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="defocus_um is nan"):
        ImagingParameters(pixel_size_angstrom=1, defocus_um=math.nan)
    parameters = ImagingParameters(pixel_size_angstrom=1)
    with pytest.raises(InvalidArgument, match=r"expected \(n, y, u\) with n = 1"):
        noise_free_series(np.zeros((2, 8, 8)), drawn(parameters), parameters)
    flat = np.zeros((2, 8, 8), np.float32)
    with pytest.raises(InvalidArgument, match="sigmas of shape"):
        gaussian_series(flat, np.ones(3), np.random.default_rng(0))
    with pytest.raises(InvalidArgument, match="sigmas must be"):
        gaussian_series(flat, np.array([1.0, -1]), np.random.default_rng(0))
    with pytest.raises(InvalidArgument, match="too thick"):
        poisson_series(flat, np.array([1.0, 0.0]), np.random.default_rng(0))


def test_recording_stops_when_told() -> None:
    def stop(fraction: float, phase: str = "", **counters: float) -> None:
        raise Cancelled("no longer wanted")

    with pytest.raises(Cancelled):
        gaussian_series(np.zeros((40, 8, 8), np.float32), np.ones(40), np.random.default_rng(0), progress=stop)
