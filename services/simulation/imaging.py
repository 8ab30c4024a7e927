"""From projections of a scene to the images that reach the detector.

A thin specimen shifts the phase of the electrons by sigma times the integral of its potential along the beam. To first
order (weak phase) the image is 1 + 2 CTF * phase, convolved; what is kept here is the contrast, the image less 1, with
protein dark. Not modelled: the second order, multiple scattering, and the change of defocus through the specimen's own
thickness. Gold is no weak phase object; its contrast comes out too strong, which `detector` cuts off at no electrons.

Each image is filtered in Fourier space by, in this order: the error of alignment (a turn by cubic splines before, a
shift), radiation damage by the dose, the blur of motion, and the CTF. Across a tilted image the defocus changes
(`ctf.defocus_at`): it is filtered at a few defoci and each column is a linear blend of the nearest two. Edges are
continued by reflection as far as the CTF spreads, so that nothing wraps around.
"""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics import fourier
from cryofleet.numerics.ctf import Ctf, ctf_grid, defocus_at, interaction_constant, radial_frequency
from cryofleet.numerics.radiation import remaining_amplitude
from cryofleet.progress import Progress, no_progress
from services.simulation.tilt_scheme import TiltScheme

#: Two neighbouring defoci differ by so much of the CTF's phase at Nyquist, radians: a linear blend is then off by at
#: most its square over 8, 3%, there, and by far less at the frequencies that a tomogram shows.
PHASE_STEP = 0.5
#: A gradient that changes the phase by less than this at Nyquist is none.
NO_GRADIENT = 0.05
#: Peak memory of the imaging, for each pixel of an image and of what is put around it, which is at most as much again
#: as the image on either side and for most microscopes a few pixels (`spread_angstrom`).
BYTES_PER_PIXEL = 56


@dataclass(frozen=True, kw_only=True)
class ImagingParameters:
    """How the images of a series are formed.

    The first eight are as `Ctf` has them. defocus_spread_um: standard deviation of each tilt's own defocus.
    contrast_transfer: without it the image is that of a perfect phase plate, -2 phase (CTF = -1 everywhere).
    dose_per_tilt: e/Å^2 of each image. radiation_damage: whether detail fades with dose. blur_angstrom: standard
    deviation, in each direction, of motion during an exposure. shift_error_angstrom, rotation_error_degrees: standard
    deviations of what an alignment left, in each direction and in the image's plane.

    Raises InvalidArgument that names the value that cannot be.
    """

    pixel_size_angstrom: float
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.07
    defocus_um: float = 3.0
    astigmatism_um: float = 0.0
    astigmatism_angle_degrees: float = 0.0
    phase_shift_degrees: float = 0.0
    b_factor: float = 0.0
    defocus_spread_um: float = 0.0
    contrast_transfer: bool = True
    dose_per_tilt: float = 3.0
    radiation_damage: bool = True
    blur_angstrom: float = 0.0
    shift_error_angstrom: float = 0.0
    rotation_error_degrees: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value):
                raise InvalidArgument(f"{field.name} is {value}, it must be a finite number")
        for name in ("pixel_size_angstrom", "dose_per_tilt"):
            if getattr(self, name) <= 0:
                raise InvalidArgument(f"{name} is {getattr(self, name):g}, it must be positive")
        for name in ("defocus_spread_um", "blur_angstrom", "shift_error_angstrom", "rotation_error_degrees"):
            if getattr(self, name) < 0:
                raise InvalidArgument(f"{name} is {getattr(self, name):g}, it must not be negative")
        self.ctf()

    def ctf(self) -> Ctf:
        """The transfer function at the mean defocus."""
        return Ctf(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Ctf)})


def draw_tilt_series(scheme: TiltScheme, parameters: ImagingParameters, rng: np.random.Generator) -> TiltSeries:
    """The truth of each image of a series: angle, order, dose, and its own draw of defocus and of alignment error.

    As many numbers are drawn whatever is switched on, so that one switch does not change what another one gives.
    """
    count = len(scheme)
    defocus, shifts, rotations = rng.standard_normal(count), rng.standard_normal((count, 2)), rng.standard_normal(count)
    return TiltSeries(
        scheme.angles_degrees,
        acquisition_order=scheme.acquisition_order,
        exposure=np.full(count, parameters.dose_per_tilt),
        prior_dose=scheme.prior_dose(parameters.dose_per_tilt),
        defocus_um=parameters.defocus_um + parameters.defocus_spread_um * defocus,
        astigmatism_um=np.full(count, parameters.astigmatism_um),
        astigmatism_angle_degrees=np.full(count, parameters.astigmatism_angle_degrees),
        phase_shift_degrees=np.full(count, parameters.phase_shift_degrees),
        # + 0.0: no minus zeros where there is no error
        shifts_angstrom=parameters.shift_error_angstrom * shifts + 0.0,
        rotations_degrees=parameters.rotation_error_degrees * rotations + 0.0,
        tilt_axis_degrees=0.0,
        pixel_size_angstrom=parameters.pixel_size_angstrom,
        voltage_kv=parameters.voltage_kv,
        cs_mm=parameters.cs_mm,
        amplitude_contrast=parameters.amplitude_contrast,
    )


def noise_free_series(
    projections: NDArray[np.floating[Any]],
    series: TiltSeries,
    parameters: ImagingParameters,
    workers: int = 1,
    progress: Progress = no_progress,
) -> NDArray[np.float32]:
    """The contrast of each image before the detector, protein dark.

    Args:
        projections: (n, y, u), sums of the potential above ice (V) over voxels along the beam, as `projection.project`
            gives; the tilt axis at u // 2.
        series: the images' truth, from `draw_tilt_series`.
        parameters: the rest.
        workers: images worked on at once, `BYTES_PER_PIXEL` each; the result does not depend on them.
        progress: told of each image.

    Returns:
        (n, y, u) float32: the image less 1, where 1 is what ice alone gives.
    """
    if projections.ndim != 3 or len(projections) != len(series):
        raise InvalidArgument(
            f"projections have shape {projections.shape}, expected (n, y, u) with n = {len(series)} tilts"
        )
    contrast = np.empty(projections.shape, np.float32)

    def form(index: int) -> None:
        contrast[index] = noise_free_image(projections[index], series, index, parameters)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(form, index) for index in range(len(series))]
        try:
            for index, future in enumerate(futures):
                future.result()
                progress((index + 1) / len(series), "imaging", tilt=float(index))
        finally:
            # told to stop: the images not begun are left
            for future in futures:
                future.cancel()
    return contrast


def noise_free_image(
    projection: NDArray[np.floating[Any]],
    series: TiltSeries,
    index: int,
    parameters: ImagingParameters,
    workers: int = 1,
) -> NDArray[np.float32]:
    """One image `[y, u]` of `noise_free_series`: number `index` of the series."""
    pixel = parameters.pixel_size_angstrom
    phase = np.asarray(projection, np.float32) * np.float32(pixel * interaction_constant(parameters.voltage_kv))
    height, width = phase.shape
    shift_u, shift_v = (0.0, 0.0) if series.shifts_angstrom is None else map(float, series.shifts_angstrom[index])
    if series.rotations_degrees is not None and series.rotations_degrees[index]:
        phase = _turned(phase, float(series.rotations_degrees[index]))

    nodes, position = np.zeros(0), np.zeros(width)
    ctf = parameters.ctf()
    if parameters.contrast_transfer:
        ctf = dataclasses.replace(series.ctf(index), b_factor=parameters.b_factor)
        u = (np.arange(width) - width // 2) * pixel - shift_u
        defoci = defocus_at(ctf.defocus_um, float(series.angles_degrees[index]), u)
        nodes, position = _nodes(defoci, ctf, pixel)
    reach = max(_spread_angstrom(ctf.with_defocus(defocus), pixel) for defocus in [*nodes, ctf.defocus_um])
    reach += math.hypot(shift_u, shift_v) + 4 * parameters.blur_angstrom
    margin = min(math.ceil(reach / pixel) + 2, max(height, width))
    sides = (fourier.fast_length(height + 2 * margin), fourier.fast_length(width + 2 * margin))
    padding = [(margin, side - length - margin) for side, length in zip(sides, phase.shape, strict=True)]
    spectrum = scipy.fft.rfft2(np.pad(phase, padding, mode="symmetric"), workers=workers)
    spectrum *= envelope_grid(series, index, parameters, sides)

    window = np.s_[margin : margin + height, margin : margin + width]
    if not parameters.contrast_transfer:
        contrast: NDArray[np.float32] = -scipy.fft.irfft2(spectrum, sides, workers=workers)[window]
        return np.ascontiguousarray(contrast)
    image = np.zeros((height, width), np.float32)
    for node, defocus in enumerate(nodes):
        filtered = scipy.fft.irfft2(
            spectrum * ctf_grid(ctf.with_defocus(float(defocus)), sides, pixel), sides, workers=workers
        )
        weight = np.clip(1 - np.abs(position - node), 0, 1).astype(np.float32)
        image += weight * filtered[window]
    return image


def envelope_grid(
    series: TiltSeries, index: int, parameters: ImagingParameters, shape: tuple[int, int]
) -> NDArray[np.complex64]:
    """What an image's phase is multiplied by on its half FFT grid, the CTF apart: 2, and what damage, blur and the
    alignment's shift make of it."""
    pixel = parameters.pixel_size_angstrom
    k = radial_frequency(shape, pixel)
    envelope = np.full(k.shape, 2.0)
    if parameters.blur_angstrom:
        envelope *= np.exp(-2 * (math.pi * parameters.blur_angstrom * k) ** 2)
    if parameters.radiation_damage and series.prior_dose is not None and series.exposure is not None:
        envelope *= remaining_amplitude(
            k, float(series.prior_dose[index]), float(series.exposure[index]), parameters.voltage_kv
        )
    grid = envelope.astype(np.complex64)
    if series.shifts_angstrom is not None and series.shifts_angstrom[index].any():
        shift_u, shift_v = map(float, series.shifts_angstrom[index])
        ky = np.fft.fftfreq(shape[0], pixel)[:, None]
        kx = np.fft.rfftfreq(shape[1], pixel)[None, :]
        grid *= np.exp(-2j * np.pi * (kx * shift_u + ky * shift_v)).astype(np.complex64)
    return grid


def transfer_grid(
    series: TiltSeries, index: int, parameters: ImagingParameters, shape: tuple[int, int]
) -> NDArray[np.complex64]:
    """What turns the projection (V, summed over voxels) of a particle on the tilt axis into contrast, on the half FFT
    grid of its image: without a gradient of the defocus, and without the alignment's turn."""
    grid = envelope_grid(series, index, parameters, shape)
    grid *= np.float32(parameters.pixel_size_angstrom * interaction_constant(parameters.voltage_kv))
    if not parameters.contrast_transfer:
        return -grid
    ctf = dataclasses.replace(series.ctf(index), b_factor=parameters.b_factor)
    grid *= ctf_grid(ctf, shape, parameters.pixel_size_angstrom)
    return grid


def spread_angstrom(series: TiltSeries, parameters: ImagingParameters) -> float:
    """How far the images of a series spread a point on the tilt axis."""
    spread = 4 * parameters.blur_angstrom
    if series.shifts_angstrom is not None:
        spread += float(np.hypot(*series.shifts_angstrom.T).max())
    if parameters.contrast_transfer:
        spread += max(
            _spread_angstrom(series.ctf(index), parameters.pixel_size_angstrom) for index in range(len(series))
        )
    return spread


def _nodes(
    defoci: NDArray[np.float64], ctf: Ctf, pixel_size_angstrom: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Defoci (µm) to filter at, evenly spaced; and for each column, between which of them it lies: 0.5 is halfway from
    the first to the second."""
    low, high = float(defoci.min()), float(defoci.max())
    nyquist = 0.5 / pixel_size_angstrom
    change = abs(float(ctf.with_defocus(high).chi(nyquist) - ctf.with_defocus(low).chi(nyquist)))
    if change < NO_GRADIENT:
        return np.array([0.5 * (low + high)]), np.zeros(len(defoci))
    steps = math.ceil(change / PHASE_STEP)
    return np.linspace(low, high, steps + 1), (defoci - low) / (high - low) * steps


def _spread_angstrom(ctf: Ctf, pixel_size_angstrom: float) -> float:
    """How far the CTF spreads the image of a point: the largest d chi / d k over 2 pi up to Nyquist."""
    k = np.linspace(0, 0.5 / pixel_size_angstrom, 200)
    return float(np.abs(np.gradient(ctf.chi(k), k)).max() / (2 * math.pi))


def _turned(image: NDArray[np.float32], degrees: float) -> NDArray[np.float32]:
    """The image `[y, u]` turned about its centre, u towards v, by cubic splines; what comes in from outside is as its
    edge."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # from output to input, on (v, u)
    matrix = np.array([[cosine, -sine], [sine, cosine]])
    centre = np.array(image.shape) // 2
    turned: NDArray[np.float32] = scipy.ndimage.affine_transform(
        image, matrix, centre - matrix @ centre, order=3, mode="nearest"
    )
    return turned
