"""Correction of tilt images for the CTF, with the defocus that changes across a tilted specimen.

The image of a specimen tilted by theta has another defocus in each column u (`ctf.defocus_at`; the tilt axis runs along
v through the image's middle). It is cut into strips parallel to the axis, each of which is corrected at the defocus of
its middle; neighbouring strips overlap by half and are blended linearly, so that no seams show. Strips are so narrow
that the CTF's phase at Nyquist changes by at most `PHASE_STEP` from the middle of one to the next.

    phase flip:  -sign(CTF)
    Wiener:      -CTF / (CTF^2 + 1 / SNR(k)),   SNR(k) = snr exp(-snr_falloff k)

Both keep the image's contrast, protein that is dark stays so: the corrected image is that of the specimen with protein
dark through |CTF|, and through CTF^2 / (CTF^2 + 1 / SNR), nowhere negative.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics import fourier
from cryofleet.numerics.ctf import Ctf, ctf_grid, defocus_at, image_frequencies

Method = Literal["phase_flip", "wiener"]
METHODS: tuple[Method, ...] = get_args(Method)

#: Change of the CTF's phase at Nyquist between the middles of neighbouring strips, radians.
PHASE_STEP = math.pi / 4
#: The least distance between those middles, pixels.
MIN_STRIP = 4
#: SNR of a tilt image where frequencies are low, and the length (Å) over which it falls: exp(-100 Å k) is 1/e at 100 Å
#: and 1/150 at 20 Å.
SNR, SNR_FALLOFF_ANGSTROM = 1000.0, 100.0


def correct_ctf(
    image: NDArray[np.floating[Any]],
    pixel_size_angstrom: float,
    ctf: Ctf,
    tilt_degrees: float = 0.0,
    *,
    method: Method = "phase_flip",
    snr: float = SNR,
    snr_falloff_angstrom: float = SNR_FALLOFF_ANGSTROM,
    strip_pixels: int | None = None,
    workers: int = 1,
) -> NDArray[np.float32]:
    """An image `[v, u]` corrected for its CTF.

    The mean is kept; beyond its edges the image is continued by its reflection, as far as the CTF spreads a point.

    Args:
        image: `[v, u]`, the tilt axis along v through column u // 2.
        pixel_size_angstrom: of the image.
        ctf: of the image, its defocus that at the tilt axis.
        tilt_degrees: what the specimen is turned by about the axis.
        method: see this file's head.
        snr: for Wiener, the power ratio of signal and noise towards zero frequency.
        snr_falloff_angstrom: for Wiener, how fast it falls.
        strip_pixels: distance between the middles of neighbouring strips; by default what `strip_width` says.
        workers: threads for the transforms.

    Raises:
        InvalidArgument: a parameter makes no sense or the image is not one of finite numbers.
    """
    if image.ndim != 2 or min(image.shape) < 2:
        raise InvalidArgument(f"the image has shape {image.shape}, expected [v, u]")
    if not (math.isfinite(pixel_size_angstrom) and pixel_size_angstrom > 0):
        raise InvalidArgument(f"pixel_size_angstrom is {pixel_size_angstrom:g}, it must be positive")
    if not np.isfinite(image).all():
        raise InvalidArgument("the image holds values that are not finite numbers")
    if method not in METHODS:
        raise InvalidArgument(f"unknown CTF correction {method!r}; known are {', '.join(METHODS)}")
    if not (math.isfinite(snr) and snr > 0 and math.isfinite(snr_falloff_angstrom) and snr_falloff_angstrom >= 0):
        raise InvalidArgument(f"snr is {snr:g}, snr_falloff_angstrom {snr_falloff_angstrom:g}: more than 0, from 0")
    if strip_pixels is not None and strip_pixels < 1:
        raise InvalidArgument(f"strip_pixels is {strip_pixels}, it must be at least 1")
    height, width = image.shape
    u = (np.arange(width) - width // 2) * pixel_size_angstrom
    defoci = defocus_at(ctf.defocus_um, tilt_degrees, u)
    step = strip_pixels or strip_width(ctf, pixel_size_angstrom, tilt_degrees, width)
    strips = max(1, math.ceil((width - 1) / step)) if np.ptp(defoci) > 0 else 0
    middles = np.linspace(0, width - 1, strips + 1) if strips else np.array([(width - 1) / 2])
    step = math.ceil((width - 1) / strips) if strips else width

    # reflected margins on all sides, and what fast transforms need
    margin = _margin(ctf.with_defocus(float(np.abs(defoci).max())), pixel_size_angstrom)
    span = fourier.fast_length(min(2 * step + 1, width) + 2 * margin)
    rows = fourier.fast_length(height + 2 * margin)
    mean = float(image.mean())
    padded = np.pad(
        np.asarray(image, np.float32) - np.float32(mean),
        ((margin, rows - height - margin), (margin, span)),
        mode="symmetric",
    )
    corrected = np.zeros(image.shape, np.float32)
    for middle in middles:
        first = max(0, math.ceil(middle - step)) if strips else 0
        last = min(width, math.floor(middle + step) + 1) if strips else width
        columns = np.arange(first, last)
        share = 1 - np.abs(columns - middle) * (strips / (width - 1)) if strips else np.ones(width)
        defocus = float(np.interp(middle, np.arange(width), defoci))
        inverse = correction_grid(
            ctf.with_defocus(defocus),
            (rows, span),
            pixel_size_angstrom,
            method=method,
            snr=snr,
            snr_falloff_angstrom=snr_falloff_angstrom,
        )
        spectrum = scipy.fft.rfft2(padded[:, first : first + span], workers=workers)
        strip = scipy.fft.irfft2(spectrum * inverse, (rows, span), workers=workers)
        inner = strip[margin : margin + height, margin : margin + len(columns)]
        corrected[:, first:last] += inner * np.maximum(share, 0).astype(np.float32)
    return corrected + np.float32(mean)


def correction_grid(
    ctf: Ctf,
    shape: tuple[int, int],
    pixel_size_angstrom: float,
    *,
    method: Method = "phase_flip",
    snr: float = SNR,
    snr_falloff_angstrom: float = SNR_FALLOFF_ANGSTROM,
) -> NDArray[np.float32]:
    """What a spectrum on the half FFT grid of images of `shape` is multiplied by; see this file's head."""
    transfer = ctf_grid(ctf, shape, pixel_size_angstrom)
    if method == "phase_flip":
        return -np.sign(transfer)
    return -transfer / (transfer * transfer + _noise_to_signal(shape, pixel_size_angstrom, snr, snr_falloff_angstrom))


def strip_width(ctf: Ctf, pixel_size_angstrom: float, tilt_degrees: float, width: int) -> int:
    """Pixels between the middles of neighbouring strips: over them, pi lambda d(defocus) k^2 at Nyquist changes by
    `PHASE_STEP`. At most the image's width."""
    per_micrometre = math.pi * ctf.wavelength_angstrom * 1e4 * (0.5 / pixel_size_angstrom) ** 2
    per_pixel = per_micrometre * abs(defocus_at(0.0, tilt_degrees, pixel_size_angstrom))
    return max(MIN_STRIP, int(PHASE_STEP / max(per_pixel, PHASE_STEP / width)))


def _margin(ctf: Ctf, pixel_size_angstrom: float) -> int:
    """Pixels that the CTF spreads a point over: the slope of chi at Nyquist over 2 pi, lambda defocus k."""
    nyquist = 0.5 / pixel_size_angstrom
    spread = ctf.wavelength_angstrom * abs(ctf.defocus_um) * 1e4 * nyquist
    return max(16, math.ceil(1.5 * spread / pixel_size_angstrom))


def _noise_to_signal(
    shape: tuple[int, int], pixel_size_angstrom: float, snr: float, falloff_angstrom: float
) -> NDArray[np.float32]:
    """1 / SNR(k), bounded so that it stays a number in single precision."""
    frequency, _ = image_frequencies(shape, pixel_size_angstrom)
    return np.exp(np.minimum(falloff_angstrom * frequency - math.log(snr), 60.0)).astype(np.float32)
