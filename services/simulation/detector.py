"""What the detector records: electrons counted or Gaussian noise, seen through its modulation transfer.

Images are contrasts: the counts over their mean, less 1. Every image is recorded as two halves of its dose with noise
of their own, and is the mean of the two, so that keeping the halves (for noise-to-noise methods) changes nothing. Each
tilt draws from a generator of its own: the result does not depend on how many threads work.

The transfer acts on counts, so on signal and noise alike. Ice and specimen of thickness t scatter electrons out of the
zero-loss image: exp(-t / (Lambda cos theta)) of them are left at the tilt theta, Lambda being the inelastic mean free
path, and noise relative to the signal grows by the root of what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress, no_progress

#: The modulation transfer as a function of the frequency, in fractions of Nyquist.
Mtf = Callable[[NDArray[np.float64]], NDArray[np.float64]]
#: A slab seen edge-on is infinitely thick; a real one is not, and counts as at this tilt beyond it.
THICKNESS_LIMIT_DEGREES = 80.0


def sinc_mtf(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """The transfer of square pixels, sin(x) / x with x = pi w / 2, w the fraction of Nyquist: 0.64 at Nyquist."""
    return np.asarray(np.sinc(frequency / 2), np.float64)


def tabulated_mtf(frequencies: NDArray[np.float64], values: NDArray[np.float64]) -> Mtf:
    """A measured transfer, linear between the entries of a table and constant outside.

    Args:
        frequencies: fractions of Nyquist, ascending.
        values: the transfer there, 1 for none.

    Raises InvalidArgument for a table that is none.
    """
    known, transfer = np.array(frequencies, np.float64), np.array(values, np.float64)
    if known.ndim != 1 or known.shape != transfer.shape or not len(known):
        raise InvalidArgument(f"an MTF needs as many frequencies as values, got {known.shape} and {transfer.shape}")
    if not (np.isfinite(known).all() and np.isfinite(transfer).all() and (np.diff(known) > 0).all()):
        raise InvalidArgument("an MTF's frequencies must ascend, and its numbers be finite")
    return lambda frequency: np.asarray(np.interp(frequency, known, transfer), np.float64)


def mtf_grid(shape: tuple[int, int], mtf: Mtf | None) -> NDArray[np.float32]:
    """The transfer on the half FFT grid of images of `shape` (y, x); 1 for None."""
    height, width = shape
    w = 2 * np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    return (np.ones_like(w) if mtf is None else mtf(w)).astype(np.float32)


def apply_mtf(images: NDArray[np.float32], mtf: Mtf | None, workers: int = 1) -> NDArray[np.float32]:
    """Images `[..., y, x]` as the detector passes them; they are taken as periodic, and None passes all."""
    if mtf is None:
        return images
    height, width = images.shape[-2:]
    # SciPy's types know of double precision alone; single stays single
    spectrum: Any = scipy.fft.rfft2(np.asarray(images, np.float32), workers=workers)
    spectrum *= mtf_grid((height, width), mtf)
    passed: NDArray[np.float32] = scipy.fft.irfft2(spectrum, (height, width), workers=workers, overwrite_x=True)
    return passed


def transmission(
    tilt_angles_degrees: NDArray[np.float64], thickness_angstrom: float, mean_free_path_angstrom: float
) -> NDArray[np.float64]:
    """The fraction of electrons left at each tilt, exp(-t / (Lambda cos theta)); theta counts up to
    `THICKNESS_LIMIT_DEGREES`."""
    if not (thickness_angstrom >= 0 and math.isfinite(thickness_angstrom)):
        raise InvalidArgument(f"ice_thickness_angstrom is {thickness_angstrom:g}, it must not be negative")
    if not mean_free_path_angstrom > 0:
        raise InvalidArgument(f"mean_free_path_angstrom is {mean_free_path_angstrom:g}, it must be positive")
    tilt = np.minimum(np.abs(np.asarray(tilt_angles_degrees, np.float64)), THICKNESS_LIMIT_DEGREES)
    return np.asarray(np.exp(-thickness_angstrom / (mean_free_path_angstrom * np.cos(np.radians(tilt)))))


def noise_scales(
    tilt_angles_degrees: NDArray[np.float64], thickness_angstrom: float, mean_free_path_angstrom: float
) -> NDArray[np.float64]:
    """How many times the noise of an untilted image each tilt has: the root of the untilted transmission over its
    own."""
    own = transmission(tilt_angles_degrees, thickness_angstrom, mean_free_path_angstrom)
    untilted = transmission(np.zeros(1), thickness_angstrom, mean_free_path_angstrom)
    return np.asarray(np.sqrt(untilted / own))


@dataclass(frozen=True)
class Recorded:
    """A recorded series (n, y, x) float32, contrast; and its two halves of the dose, where they were asked for."""

    images: NDArray[np.float32]
    even: NDArray[np.float32] | None = None
    odd: NDArray[np.float32] | None = None


def gaussian_series(
    contrast: NDArray[np.float32],
    sigmas: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    mtf: Mtf | None = sinc_mtf,
    halves: bool = False,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Recorded:
    """White Gaussian noise before the detector.

    Args:
        contrast: (n, y, x), from `imaging.noise_free_series`.
        sigmas: (n,) standard deviation of each image's noise before the detector, which passes it as it does the
            image; the halves have sqrt(2) times as much.
        rng: spawns one generator for each tilt.
        mtf: the detector's transfer.
        halves: keep the halves too.
        workers: tilts worked on at once.
        progress: told of each.
    """
    sigmas = np.asarray(sigmas, np.float64)
    _check(contrast, sigmas, "sigmas")
    if not (np.isfinite(sigmas).all() and (sigmas >= 0).all()):
        raise InvalidArgument("sigmas must be finite numbers, not negative")

    def half(index: int, own: np.random.Generator) -> NDArray[np.float32]:
        noise = own.standard_normal(contrast.shape[1:], dtype=np.float32)
        noise *= np.float32(math.sqrt(2) * sigmas[index])
        noise += contrast[index]
        return noise

    return _record(contrast, half, rng, mtf, halves, workers, progress)


def poisson_series(
    contrast: NDArray[np.float32],
    electrons: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    mtf: Mtf | None = sinc_mtf,
    halves: bool = False,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Recorded:
    """Electrons counted, each pixel by itself, then spread by the detector.

    Args:
        contrast: (n, y, x), from `imaging.noise_free_series`; below -1 there are no electrons at all.
        electrons: (n,) expected in a pixel of plain ice: dose times pixel area times transmission.
        rng: spawns one generator for each tilt.
        mtf: the detector's transfer.
        halves: keep the halves too, of half the electrons each.
        workers: tilts worked on at once.
        progress: told of each.

    Raises InvalidArgument where no electrons are expected.
    """
    electrons = np.asarray(electrons, np.float64)
    _check(contrast, electrons, "electrons")
    if not (np.isfinite(electrons).all() and (electrons > 1e-9).all() and (electrons < 1e15).all()):
        raise InvalidArgument(
            f"{electrons.min():.3g} to {electrons.max():.3g} electrons in a pixel: the dose is out of range, "
            "or the specimen too thick for any to pass"
        )

    def half(index: int, own: np.random.Generator) -> NDArray[np.float32]:
        mean = electrons[index] / 2
        expected = np.maximum(contrast[index].astype(np.float64) + 1, 0)
        counts = own.poisson(expected * mean)
        relative: NDArray[np.float32] = (counts / mean - 1).astype(np.float32)
        return relative

    return _record(contrast, half, rng, mtf, halves, workers, progress)


def _check(contrast: NDArray[np.float32], values: NDArray[np.float64], name: str) -> None:
    if contrast.ndim != 3 or values.shape != contrast.shape[:1]:
        raise InvalidArgument(
            f"images of shape {contrast.shape} and {name} of shape {values.shape}: expected (n, y, x) and (n,)"
        )


def _record(
    contrast: NDArray[np.float32],
    half: Callable[[int, np.random.Generator], NDArray[np.float32]],
    rng: np.random.Generator,
    mtf: Mtf | None,
    halves: bool,
    workers: int,
    progress: Progress,
) -> Recorded:
    count = len(contrast)
    images = np.empty(contrast.shape, np.float32)
    even = np.empty_like(images) if halves else None
    odd = np.empty_like(images) if halves else None

    def record(index: int, own: np.random.Generator) -> None:
        first = apply_mtf(half(index, own), mtf)
        second = apply_mtf(half(index, own), mtf)
        if even is not None and odd is not None:
            even[index], odd[index] = first, second
        first += second
        first *= np.float32(0.5)
        images[index] = first

    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(record, index, own) for index, own in enumerate(rng.spawn(count))]
        try:
            for index, future in enumerate(futures):
                future.result()
                progress((index + 1) / count, "recording", tilt=float(index))
        finally:
            # told to stop: the tilts not begun are left
            for future in futures:
                future.cancel()
    return Recorded(images, even, odd)
