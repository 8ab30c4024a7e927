"""Sharpening an average: undoing the fall of its amplitudes, and no more of it than the half maps bear out.

Amplitudes of an average fall with frequency as exp(B k^2 / 4), B negative, from motion, misalignment and
interpolation, beside what the structure itself does. Sharpening multiplies them by exp(-B k^2 / 4), by
C = sqrt(2 FSC / (1 + FSC)), the expected correlation of the average with the truth, and by a low-pass at the resolution
(Rosenthal & Henderson 2003, J. Mol. Biol. 333:721).

B is given, or fitted to Guinier's plot, the logarithm of the radial amplitude against k^2. For proteins that is
straight only beyond 10 Å, where the positions of atoms are as good as random; below, the particle's shape decides, and
a fit measures shape and B together. Averages from tomograms seldom get there, so the range is always the caller's to
choose, and what was fitted is returned to be judged.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import filter_radially, soft_step
from cryofleet.numerics.fsc import shell_counts, shell_sums

FEWEST_SHELLS = 4
LARGEST_GAIN = 1e4
"""A sharpening by more than this has a wrong B: of single precision nothing would be left."""


@dataclass(frozen=True)
class GuinierFit:
    """The line through Guinier's plot: `b_factor_angstrom2` is four times its slope, negative where amplitudes fall,
    `standard_error_angstrom2` that of B by the scatter of the points, `intercept` the logarithm of the amplitude at 0.
    The plot itself: `inverse_square_angstrom` (1/d^2), `log_amplitude`, of the shells within the range.
    """

    b_factor_angstrom2: float
    standard_error_angstrom2: float
    intercept: float
    inverse_square_angstrom: NDArray[np.float64]
    log_amplitude: NDArray[np.float64]


@dataclass(frozen=True)
class Sharpened:
    """`volume` `[z, y, x]`; the B factor that was undone; the factor by which the amplitude most raised was raised; the
    fit, None where B was given.
    """

    volume: NDArray[np.float32]
    b_factor_angstrom2: float
    largest_gain: float
    fit: GuinierFit | None


def fsc_weight(fsc: NDArray[np.float64]) -> NDArray[np.float64]:
    """C = sqrt(2 FSC / (1 + FSC)) by shells: the correlation of the average of both halves with the truth. 0 where the
    FSC is negative.
    """
    positive = np.clip(fsc, 0.0, 1.0)
    return np.asarray(np.sqrt(2 * positive / (1 + positive)))


def _cube(volume: NDArray[np.float32], fsc: NDArray[np.float64] | None) -> int:
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise InvalidArgument(f"only a cubic average is sharpened, not one of {volume.shape} voxels")
    n = int(volume.shape[0])
    if not np.isfinite(volume).all():
        raise InvalidArgument("the average holds values that are not finite")
    if fsc is not None and fsc.shape != (n // 2 + 1,):
        raise InvalidArgument(f"the FSC has {fsc.shape} values; a box of {n} voxels has shells 0 to {n // 2}")
    return n


def guinier_fit(
    volume: NDArray[np.float32],
    voxel_size_angstrom: float,
    low_resolution_angstrom: float,
    high_resolution_angstrom: float,
    fsc: NDArray[np.float64] | None = None,
) -> GuinierFit:
    """Fit B to the radial amplitudes of an average between two resolutions.

    Amplitudes are the root mean square over each shell, times C where the half maps' FSC is given, which takes the
    noise's share off. Shells count by their components, as the variance of the logarithm goes.

    Args:
        volume: the average of both halves, cubic `[z, y, x]`; masked, where solvent shall not count.
        voxel_size_angstrom: of the average.
        low_resolution_angstrom: coarse end of the range: 10 Å, or what the caller can justify.
        high_resolution_angstrom: fine end: the resolution.
        fsc: of the half maps, by shells 0 to n // 2.

    Raises InvalidArgument where the range is none, holds fewer than four shells, or a shell within it is empty.
    """
    n = _cube(volume, fsc)
    if not 0 < high_resolution_angstrom < low_resolution_angstrom:
        raise InvalidArgument(
            f"a Guinier fit from {low_resolution_angstrom:g} to {high_resolution_angstrom:g} Å: the low resolution "
            "must be the larger number, both positive"
        )
    counts = shell_counts(n)
    amplitude = np.sqrt(shell_sums(np.abs(scipy.fft.rfftn(volume.astype(np.float64))) ** 2, n) / counts)
    if fsc is not None:
        amplitude = amplitude * fsc_weight(fsc)
    frequency = np.arange(n // 2 + 1) / (n * voxel_size_angstrom)
    slack = 1e-6 / (n * voxel_size_angstrom)
    inside = frequency >= 1 / low_resolution_angstrom - slack
    inside &= (frequency <= 1 / high_resolution_angstrom + slack) & (frequency > 0)
    if inside.sum() < FEWEST_SHELLS:
        raise InvalidArgument(
            f"between {low_resolution_angstrom:g} and {high_resolution_angstrom:g} Å this box has {int(inside.sum())} "
            f"shells, a fit needs {FEWEST_SHELLS}: widen the range, or give b_factor_angstrom2"
        )
    if not (amplitude[inside] > 1e-6 * amplitude[1:].max()).all():
        raise InvalidArgument(
            f"a shell between {low_resolution_angstrom:g} and {high_resolution_angstrom:g} Å has no amplitude, or a "
            "negative FSC: end the range before it"
        )
    x, y, weight = frequency[inside] ** 2, np.log(amplitude[inside]), counts[inside]
    centre, level = np.average(x, weights=weight), np.average(y, weights=weight)
    spread = float((weight * (x - centre) ** 2).sum())
    slope = float((weight * (x - centre) * (y - level)).sum()) / spread
    residual = y - level - slope * (x - centre)
    variance = float((weight * residual**2).sum()) / (len(x) - 2)
    return GuinierFit(4 * slope, 4 * math.sqrt(variance / spread), float(level - slope * centre), x, y)


def sharpen(
    volume: NDArray[np.float32],
    voxel_size_angstrom: float,
    resolution_angstrom: float,
    *,
    b_factor_angstrom2: float | None = None,
    fit_from_angstrom: float | None = None,
    fsc: NDArray[np.float64] | None = None,
    workers: int = 1,
) -> Sharpened:
    """Sharpen an average by a B factor, weight it by the FSC, and low-pass it at its resolution (edge of one shell).

    Args:
        volume: the unfiltered average of both halves, cubic `[z, y, x]`.
        voxel_size_angstrom: of the average.
        resolution_angstrom: where it is cut.
        b_factor_angstrom2: negative sharpens, positive blurs.
        fit_from_angstrom: in its stead, the coarse end of the Guinier fit, whose fine end is the resolution.
        fsc: of the half maps, by shells 0 to n // 2; no weighting where left out.
        workers: threads of the transforms.

    Raises InvalidArgument unless exactly one of B and the fit's range is given; where the fit can't be made; where an
    amplitude would be raised by more than 10,000.
    """
    n = _cube(volume, fsc)
    if (b_factor_angstrom2 is None) == (fit_from_angstrom is None):
        raise InvalidArgument(
            "give b_factor_angstrom2, or fit_from_angstrom to have it fitted from there to the resolution; one of the "
            "two"
        )
    if not resolution_angstrom >= 2 * voxel_size_angstrom:
        raise InvalidArgument(
            f"resolution_angstrom is {resolution_angstrom:g}: voxels of {voxel_size_angstrom:g} Å hold "
            f"{2 * voxel_size_angstrom:g} Å at best"
        )
    fit = None
    if fit_from_angstrom is not None:
        fit = guinier_fit(volume, voxel_size_angstrom, fit_from_angstrom, resolution_angstrom, fsc)
        b_factor_angstrom2 = fit.b_factor_angstrom2
    assert b_factor_angstrom2 is not None
    b = b_factor_angstrom2
    shells = np.arange(n // 2 + 1) / n
    weight = np.ones(n // 2 + 1) if fsc is None else fsc_weight(fsc)
    cutoff = voxel_size_angstrom / resolution_angstrom
    largest = -b * (min(cutoff + 1 / n, 0.5) / voxel_size_angstrom) ** 2 / 4
    if largest > math.log(LARGEST_GAIN):
        raise InvalidArgument(
            f"a B factor of {b:g} Å² raises amplitudes at {resolution_angstrom:g} Å by exp({largest:.1f}): give a B "
            "factor closer to 0, or a coarser resolution"
        )

    def profile(frequency: NDArray[np.float32]) -> NDArray[np.float32]:
        inside = soft_step(frequency, cutoff, 1 / n)
        exponent = np.where(inside > 0, -b / 4 * (frequency / voxel_size_angstrom) ** 2, 0)
        return np.asarray(np.exp(exponent) * np.interp(frequency, shells, weight) * inside, dtype=np.float32)

    gains = profile(shells.astype(np.float32))
    return Sharpened(filter_radially(volume, profile, workers), b, float(gains.max()), fit)
