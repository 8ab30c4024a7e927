"""From the images of a tilt series to a tomogram: prepared image by image, reconstructed by blocks of rows.

The tilt axis is y, so that rows of constant y are problems of their own once the images are prepared, and blocks of
them bound the memory whatever the size of the series. What needs whole images comes first, one image at a time: the
turn of the tilt axis onto y, the correction of the contrast transfer, the dose's weight, binning; and the image's mean
is taken off, as the specimen goes on beyond the field, and an edge from its mean to nothing would streak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics.ctf import image_frequencies
from cryofleet.numerics.radiation import remaining_amplitude
from cryofleet.progress import Progress, no_progress, part
from services.simulation.ctf_correction import SNR, correct_ctf
from services.simulation.fourier_inversion import fourier_inversion
from services.simulation.sirt import sirt
from services.simulation.weighted_back_projection import Window, weighted_back_projection

Array = NDArray[np.float32]
Images = Callable[[int, int], Array]
Method = Literal["weighted_back_projection", "sirt", "fourier"]
CtfCorrection = Literal["none", "phase_flip", "wiener"]

#: Rows that are reconstructed together.
BLOCK_ROWS = 32
#: What preparing takes beside the series, bytes per pixel of one image as it is read: copies, spectra, strips.
PREPARATION_BYTES_PER_PIXEL = 64


@dataclass(frozen=True)
class Preparation:
    """What is done to each image before the reconstruction.

    tilt_axis_degrees: angle of the tilt axis from the images' y axis, counter-clockwise; images that were aligned have
    it along y. align: undo the shifts and turns, and the tilt axis, that the series states. normalise: give
    each image a variance of 1. wiener_snr: of `correct_ctf`.
    """

    binning: int = 1
    ctf_correction: CtfCorrection = "none"
    wiener_snr: float = SNR
    dose_weighting: bool = False
    tilt_axis_degrees: float | None = None
    align: bool = False
    normalise: bool = False


@dataclass(frozen=True)
class Reconstruction:
    """How the prepared images become a volume; `iterations` of SIRT, or imitated by the window "sirt"."""

    method: Method = "weighted_back_projection"
    window: Window = "ramp"
    iterations: int = 20


def binned_shape(shape: tuple[int, int], binning: int) -> tuple[int, int]:
    """The size (y, x) of an image after binning."""
    height, width = (_binned_length(side, binning)[0] for side in shape)
    return height, width


def check_series(series: TiltSeries, options: Preparation, name: str) -> None:
    """Raise FailedPrecondition, naming the file, where the series does not say what the options need."""
    if options.dose_weighting and (series.prior_dose is None or series.voltage_kv is None):
        raise FailedPrecondition(f"{name}: weighting by dose needs each image's dose, which the file does not say")
    if options.align and all(
        known is None for known in (series.shifts_angstrom, series.rotations_degrees, series.tilt_axis_degrees)
    ):
        raise FailedPrecondition(f"{name}: there are no shifts and turns in the file to align the images by")
    if options.ctf_correction != "none":
        try:
            series.ctf(0)
        except FailedPrecondition as error:
            raise FailedPrecondition(f"{name}: {error}; give it with --set defocus_um=...") from None


def prepare_images(
    read: Images,
    shape: tuple[int, int, int],
    series: TiltSeries,
    pixel_size_angstrom: float,
    options: Preparation,
    write: Callable[[int, Array], None],
    workers: int = 1,
    progress: Progress = no_progress,
) -> None:
    """Prepare the images of a series one by one.

    Args:
        read: images first to last, `[image, y, x]`.
        shape: of the series as it is read, (images, y, x).
        series: the images' geometry and optics, one entry for each.
        pixel_size_angstrom: of the images as they are read.
        options: what to do.
        write: gets the number of each image and the image `[y, x]`, with the sides of `binned_shape`.
        workers: threads of the transforms.
        progress: told of each image.
    """
    weights = _dose_weights(series, shape[1:], pixel_size_angstrom) if options.dose_weighting else None
    for index in range(shape[0]):
        progress(index / shape[0], "preparing images", images=index)
        image = read(index, index + 1)[0].astype(np.float32, copy=False)
        image = image - np.float32(image.mean(dtype=np.float64))
        image = _turned(image, series, index, pixel_size_angstrom, options)
        if options.ctf_correction != "none":
            image = correct_ctf(
                image,
                pixel_size_angstrom,
                series.ctf(index),
                float(series.angles_degrees[index]),
                method=options.ctf_correction,
                snr=options.wiener_snr,
                workers=workers,
            )
        if weights is not None:
            spectrum = scipy.fft.rfft2(image, workers=workers)
            spectrum *= weights(index)
            image = scipy.fft.irfft2(spectrum, image.shape, workers=workers, overwrite_x=True)
        image = bin_image(image, options.binning, workers)
        if options.normalise:
            deviation = float(image.std(dtype=np.float64))
            if deviation == 0:
                raise FailedPrecondition(f"image {index} is the same everywhere, which no variance makes 1")
            image = image / np.float32(deviation)
        write(index, image - np.float32(image.mean(dtype=np.float64)))


def reconstruct(
    read_rows: Images,
    tilt_angles_degrees: NDArray[np.float64],
    shape: tuple[int, int, int],
    write_rows: Callable[[int, Array], None],
    options: Reconstruction,
    workers: int = 1,
    progress: Progress = no_progress,
) -> list[float]:
    """Reconstruct prepared images block by block of rows.

    Args:
        read_rows: rows first to last of all images, `[image, row, x]`.
        tilt_angles_degrees: of each image.
        shape: of the tomogram, (z, y, x); y and x are the images'.
        write_rows: gets the first row of each block and the block `[z, row, x]`.
        options: how.
        workers: threads.
        progress: told of the work.

    Returns the relative residuals of SIRT before each iteration, over all rows; nothing for the other methods.
    """
    depth, height, width = shape
    squares: list[float] = []
    total = 0.0
    for first in range(0, height, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, height)
        rows = np.ascontiguousarray(read_rows(first, last), np.float32)
        told = part(progress, first / height, last / height)
        match options.method:
            case "weighted_back_projection":
                block = weighted_back_projection(
                    rows,
                    tilt_angles_degrees,
                    depth,
                    width,
                    window=options.window,
                    sirt_iterations=options.iterations,
                    workers=workers,
                    progress=told,
                )
            case "sirt":
                made = sirt(rows, tilt_angles_degrees, depth, width, options.iterations, workers=workers, progress=told)
                block = made.volume
                power = float(np.square(rows, dtype=np.float64).sum())
                total += power
                squares = [
                    before + power * residual**2
                    for before, residual in zip(squares or [0.0] * len(made.residuals), made.residuals, strict=True)
                ]
            case "fourier":
                block = fourier_inversion(rows, tilt_angles_degrees, depth, width, workers=workers, progress=told)
        write_rows(first, block)
    return [float(np.sqrt(value / total)) if total > 0 else 0.0 for value in squares]


def bin_image(image: Array, binning: int, workers: int = 1) -> Array:
    """An image `[y, x]` binned through the removal of the frequencies above the new Nyquist; its mean is kept.

    The centre, pixel n // 2 of each side, stays the centre: the tilt axis goes through it.
    """
    if binning == 1:
        return image
    (height, top), (width, left) = (_binned_length(side, binning) for side in image.shape)
    cut = image[top : top + height * binning, left : left + width * binning]
    spectrum = scipy.fft.rfft2(cut, workers=workers)
    upper = (height + 1) // 2
    kept = np.concatenate([spectrum[:upper], spectrum[spectrum.shape[0] - (height - upper) :]])[:, : width // 2 + 1]
    binned: Array = scipy.fft.irfft2(kept, (height, width), workers=workers)
    return binned / np.float32(binning**2)


def _binned_length(side: int, binning: int) -> tuple[int, int]:
    """The length of a binned side, and the first pixel of the part that it is made of."""
    length = side // binning
    while length > 0:
        first = side // 2 - binning * (length // 2)
        if first >= 0 and first + length * binning <= side:
            return length, first
        length -= 1
    raise InvalidArgument(f"images of {side} pixels cannot be binned by {binning}")


def _turned(image: Array, series: TiltSeries, index: int, pixel_size_angstrom: float, options: Preparation) -> Array:
    """The image with the tilt axis along y, and aligned where that is asked for.

    The axis leans by an angle counter-clockwise, x to the right and y up: what comes to (u, v) is found at
    R(angle) (u, v) + shift.
    """
    angle = options.tilt_axis_degrees
    if angle is None:
        angle = (series.tilt_axis_degrees or 0.0) if options.align else 0.0
    shift = np.zeros(2)
    if options.align:
        if series.rotations_degrees is not None:
            angle += float(series.rotations_degrees[index])
        if series.shifts_angstrom is not None:
            shift = series.shifts_angstrom[index] / pixel_size_angstrom
    if angle == 0 and not shift.any():
        return image
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    # of (v, u), the order of the array's axes
    matrix = np.array([[cosine, sine], [-sine, cosine]])
    centre = np.array([image.shape[0] // 2, image.shape[1] // 2])
    offset = centre + shift[::-1] - matrix @ centre
    turned: Array = scipy.ndimage.affine_transform(image, matrix, offset, order=3, mode="constant", cval=0.0)
    return turned


def _dose_weights(
    series: TiltSeries, shape: tuple[int, int], pixel_size_angstrom: float
) -> Callable[[int], NDArray[np.float32]]:
    """Weights on the half FFT grid of an image: what the dose left of its signal, over the root mean square of all.

    Optimal for a sum of images with noise of one power, whose power over all images is left as it is (Grant &
    Grigorieff 2015, eq. 9).
    """
    if series.prior_dose is None or series.voltage_kv is None:
        raise FailedPrecondition("weighting by dose needs each image's dose")
    exposure = np.zeros(len(series)) if series.exposure is None else series.exposure
    prior, voltage = series.prior_dose, series.voltage_kv
    k, _ = image_frequencies(shape, pixel_size_angstrom)

    def left(index: int) -> NDArray[np.float64]:
        return remaining_amplitude(k, float(prior[index]), float(exposure[index]), voltage)

    power = np.zeros_like(k)
    for index in range(len(series)):
        power += left(index) ** 2
    scale = 1 / np.sqrt(np.maximum(power / len(series), 1e-30))
    return lambda index: (left(index) * scale).astype(np.float32)


def with_optics(
    series: TiltSeries, defocus_um: float | None, voltage_kv: float, cs_mm: float, amplitude_contrast: float
) -> TiltSeries:
    """The series with given values where it says nothing itself."""
    return series.filled(
        defocus_um=defocus_um, voltage_kv=voltage_kv, cs_mm=cs_mm, amplitude_contrast=amplitude_contrast
    )
