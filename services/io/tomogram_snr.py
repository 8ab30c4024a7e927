"""The signal-to-noise ratio of a tomogram: variance of signal over variance of noise, unfiltered and unmasked.

From halves with independent noise: they correlate by rho = S / (S + N), so that each has rho / (1 - rho) and their
mean, with half the noise, twice that (Frank & Al-Ali 1975, Nature 256, 376).

From a single tomogram: the noise of a weighted back-projection has the power r g(r) h(k_y), r the distance from the
tilt axis (the ramp), g and h smooth (the detector, interpolation). log g and log h are taken as parabolas of r^2 and
k_y^2 and fitted where details are finest, and there is no signal to speak of; what the tomogram has above them is
signal. Spectra are of boxes, which see the middle of a tomogram; reconstructions have less noise at their border, by a
share that is measured in the finest details. That is a model, so its error is stated with it: at an SNR of 0.01 it says
no more than that the SNR is low.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats.statistics import RunningStatistics
from cryofleet.numerics import welch
from cryofleet.numerics.fourier import axis_frequencies
from cryofleet.numerics.wedge import is_sampled
from cryofleet.progress import Progress, no_progress, part

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
ReadSlab = Callable[[int, int], Array]

BOX = 96
MOST_BOXES = 64
_SLAB_BYTES = 16 << 20
#: The plane is cut into so many times so many columns, whose scatter gives the error.
_COLUMNS = 4
_SHELLS = 48
#: Noise is fitted beyond this, cycles per voxel, and up to where interpolation has left something of it.
_FINE, _FINEST = 0.33, 0.48
_FINEST_ORDER = 6
#: The part of the noise that the model is off by; benchmarks/estimate.py measures it.
MODEL_ERROR = 0.02
#: Towards the wedge's border slices thin out.
_BORDER_DEGREES = 4.0
_LEAST_SIDE = 16


@dataclass(frozen=True)
class TomogramSnr:
    """snr: of the tomogram, of the mean of halves where there were halves, with its standard error.

    snr_of_half, correlation: None without halves. frequency: of shells in cycles per voxel; spectral_snr: signal power
    over noise power in each, NaN where the tomogram has nothing.
    """

    snr: float
    error: float
    snr_of_half: float | None
    correlation: float | None
    frequency: NDArray[np.float64]
    spectral_snr: NDArray[np.float64]


def memory_bytes(shape: Shape) -> int:
    """What either estimate needs at most."""
    depth, height, width = welch.box_shape(shape, BOX)
    sections = 4 * max(_SLAB_BYTES, 4 * shape[1] * shape[2]) * 2
    return sections + 8 * depth * shape[1] * shape[2] + 30 * 4 * depth * height * width


def snr_of_halves(
    even: ReadSlab,
    odd: ReadSlab,
    shape: Shape,
    left_out: ReadSlab | None = None,
    workers: int = 1,
    progress: Progress = no_progress,
) -> TomogramSnr:
    """The SNR of the mean of two half tomograms [z, y, x], read by sections.

    `left_out` gives a mask, above 0.5 where voxels do not count for the SNR; that by shells is of all voxels. Raises
    FailedPrecondition where a half is the same everywhere, or both are equal.
    """
    sums = _column_sums(even, odd, shape, left_out, part(progress, 0.0, 0.5))
    total = sums.sum(axis=0)
    correlation = _correlation(total)
    if correlation >= 1 - 1e-9:
        raise FailedPrecondition("the halves are the same tomogram: their noise must be independent")
    others = np.array([_ratio(_correlation(total - own)) for own in sums if own[0] and total[0] - own[0] > 1])
    error = math.sqrt((len(others) - 1) * float(np.var(others))) if len(others) > 1 else math.nan

    box = welch.box_shape(shape, BOX)
    starts = welch.box_starts(shape, box, MOST_BOXES)
    shells = _shells(box)
    cross, power_a, power_b = np.zeros(_SHELLS), np.zeros(_SHELLS), np.zeros(_SHELLS)
    told = part(progress, 0.5, 1.0)
    pairs = zip(welch.tapered_boxes(even, starts, box, told), welch.tapered_boxes(odd, starts, box), strict=True)
    for a, b in pairs:
        # |a + b|^2 - |a - b|^2 = 4 Re a b*
        both, one, other = welch.power(a + b, workers), welch.power(a, workers), welch.power(b, workers)
        for target, values in ((cross, (both - one - other) / 2), (power_a, one), (power_b, other)):
            target += np.bincount(shells.ravel(), values.ravel().astype(np.float64), _SHELLS + 1)[:_SHELLS]
    product = np.sqrt(power_a * power_b)
    seen = (product > 1e-9 * product.max()) & (cross < product)
    spectral = np.full(_SHELLS, math.nan)
    spectral[seen] = 2 * cross[seen] / (product[seen] - cross[seen])
    return TomogramSnr(2 * _ratio(correlation), 2 * error, _ratio(correlation), correlation, _frequencies(), spectral)


def snr_of_spectrum(
    read: ReadSlab,
    shape: Shape,
    tilt_min_degrees: float,
    tilt_max_degrees: float,
    workers: int = 1,
    progress: Progress = no_progress,
) -> TomogramSnr:
    """The SNR of one unfiltered tomogram [z, y, x] of a weighted back-projection, tilted about y.

    Raises FailedPrecondition where a side is shorter than 16 voxels, the volume is the same everywhere, or its finest
    details were filtered away, so that they tell nothing of noise.
    """
    if min(shape) < _LEAST_SIDE:
        raise FailedPrecondition(f"{shape} voxels (z, y, x): a spectrum needs {_LEAST_SIDE} along each axis")
    box = welch.box_shape(shape, BOX)
    starts = welch.box_starts(shape, box, MOST_BOXES)
    kz, ky, kx = np.broadcast_arrays(*axis_frequencies(box))
    border = _BORDER_DEGREES if tilt_max_degrees - tilt_min_degrees < 180 else 0.0
    radius, k = np.hypot(kx, kz), np.sqrt(kx**2 + ky**2 + kz**2)
    kept = (
        is_sampled(kx, kz, tilt_min_degrees + border, tilt_max_degrees - border)
        & (radius > 1.5 / min(box[0], box[2]))
        & (radius < _FINEST)
        & (np.abs(ky) < _FINEST)
        & (kx > 0)
    )
    r, along, shell = radius[kept].astype(np.float64), ky[kept].astype(np.float64), _shells(box)[kept]
    fitted = k[kept] > _FINE
    terms = np.stack([np.ones_like(r), r**2, r**4, along**2, along**4], axis=1)
    cells = np.unique(
        (r[fitted] * 40).astype(int) * 100 + (np.abs(along[fitted]) * 40).astype(int), return_inverse=True
    )[1]
    all_shells = _shells(box).ravel()
    # Each component stands for its mate too, but for the planes kx = 0 and Nyquist, which hold both.
    copies = np.full(kept.shape, 2.0)
    copies[..., 0] = copies[..., -1] = 1.0
    groups = min(8, len(starts))
    finest = 0.0
    sums = np.zeros((groups, int(np.count_nonzero(kept))))
    by_shell = np.zeros((groups, _SHELLS + 1))
    for number, boxed in enumerate(welch.tapered_boxes(read, starts, box, part(progress, 0.0, 0.7))):
        power = welch.power(boxed, workers)
        # a tapered box ends in nothing
        finest += _finest(boxed) / boxed.size / len(starts)
        sums[number % groups] += power[kept]
        by_shell[number % groups] += np.bincount(all_shells, (power * copies).ravel(), _SHELLS + 1)
    variance, finest_everywhere = _variance(read, shape, part(progress, 0.7, 1.0))
    boxes = np.bincount(np.arange(len(starts)) % groups, minlength=groups)

    def noise(power: NDArray[np.float64]) -> NDArray[np.float64]:
        """The noise's power at each component, by the fit to the finest."""
        count = np.bincount(cells)
        # The mean before the logarithm: that of a single component is biased.
        level = np.bincount(cells, power[fitted] / r[fitted]) / count
        if not (level > 0).all() or level.max() > 1e4 * level.min():
            raise FailedPrecondition(
                "the finest details were filtered away and tell nothing of noise: give the tomogram as reconstructed, "
                "or half tomograms"
            )
        means = np.stack([np.bincount(cells, term[fitted]) / count for term in terms.T], axis=1)
        weight = np.sqrt(count)
        solution = np.linalg.lstsq(means * weight[:, None], np.log(level) * weight, rcond=None)[0]
        found: NDArray[np.float64] = r * np.exp(terms @ solution)
        return found

    total = sums.sum(axis=0)
    if not total.max() > 0:
        raise FailedPrecondition("the tomogram is the same everywhere: there is no spectrum")

    def ratio(power: NDArray[np.float64], shells: NDArray[np.float64], count: int) -> tuple[float, NDArray[np.float64]]:
        """The SNR, and that of each shell."""
        seen, level = (np.bincount(shell, each, _SHELLS + 1)[:_SHELLS] for each in (power, noise(power)))
        spectral = np.full(_SHELLS, math.nan)
        spectral[level > 0] = seen[level > 0] / level[level > 0] - 1
        # What was not looked at, the wedge and its border and the axis, is taken to be as the rest of its shell.
        there = np.flatnonzero(level > 0)
        share = 1 / (1 + np.interp(np.arange(_SHELLS), there, spectral[there]))
        # Boxes see the middle of the volume more than its border, where there is less signal, and a little less noise:
        # signal's variance is that of all voxels less that of noise.
        noise_power = float((shells[:_SHELLS] * share).sum() + shells[_SHELLS]) * finest_everywhere / finest
        return variance * math.prod(box) * count / noise_power - 1, spectral

    snr, spectral = ratio(total, by_shell.sum(axis=0), len(starts))
    others = [
        ratio(total - own, by_shell.sum(axis=0) - shells, len(starts) - int(count))[0]
        for own, shells, count in zip(sums, by_shell, boxes, strict=True)
        if groups > 1
    ]
    scatter = math.sqrt((len(others) - 1) * float(np.var(others))) if others else math.nan
    return TomogramSnr(snr, math.hypot(scatter, MODEL_ERROR * (1 + snr)), None, None, _frequencies(), spectral)


def _variance(read: ReadSlab, shape: Shape, progress: Progress) -> tuple[float, float]:
    """Of all voxels, and how much there is of the finest details."""
    running, finest = RunningStatistics(), 0.0
    step = max(1, _SLAB_BYTES // (4 * shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        slab = read(start, min(start + step, shape[0]))
        running.update(slab)
        finest += _finest(slab) / (shape[0] * (shape[1] - _FINEST_ORDER) * shape[2])
        progress(start / shape[0], "measuring variance")
    return running.result().standard_deviation ** 2, finest


def _finest(voxels: Array) -> float:
    """The sum of the squares of differences of a high order along y: of the finest details, which are noise."""
    return float(np.sum(np.square(np.diff(voxels, _FINEST_ORDER, axis=1)), dtype=np.float64))


def _ratio(correlation: float) -> float:
    return correlation / (1 - correlation)


def _correlation(sums: NDArray[np.float64]) -> float:
    count, a, b, aa, bb, ab = sums
    variance_a, variance_b = aa - a * a / count, bb - b * b / count
    if not (variance_a > 0 and variance_b > 0):
        raise FailedPrecondition("a half tomogram is the same everywhere")
    return float((ab - a * b / count) / math.sqrt(variance_a * variance_b))


def _column_sums(
    even: ReadSlab, odd: ReadSlab, shape: Shape, left_out: ReadSlab | None, progress: Progress
) -> NDArray[np.float64]:
    """(columns, 6): count, and sums of a, b, a a, b b, a b, over the voxels of each column that count."""
    step = max(1, _SLAB_BYTES // (4 * shape[1] * shape[2]))
    edges = [np.linspace(0, side, _COLUMNS + 1).round().astype(int) for side in shape[1:]]
    sums = np.zeros((_COLUMNS**2, 6))
    offset: tuple[float, float] | None = None
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        a, b = even(start, stop), odd(start, stop)
        mask = None if left_out is None else left_out(start, stop) <= 0.5
        if offset is None:
            # near the mean, so that squares do not cancel
            offset = float(a.mean(dtype=np.float64)), float(b.mean(dtype=np.float64))
        for number, (i, j) in enumerate(itertools.product(range(_COLUMNS), range(_COLUMNS))):
            place = (slice(None), slice(edges[0][i], edges[0][i + 1]), slice(edges[1][j], edges[1][j + 1]))
            kept = [half[place] if mask is None else half[place][mask[place]] for half in (a, b)]
            u, v = (half.ravel().astype(np.float64) - mean for half, mean in zip(kept, offset, strict=True))
            sums[number] += (u.size, u.sum(), v.sum(), u @ u, v @ v, u @ v)
        progress(stop / shape[0], "comparing halves", sections=float(stop))
    if not sums[:, 0].sum() > 1:
        raise InvalidArgument("the mask leaves every voxel out")
    return sums


def _shells(box: Shape) -> NDArray[np.int64]:
    """The shell of each component of a half spectrum, of width 0.5 / 48 cycles per voxel; the corners in one beyond."""
    kz, ky, kx = axis_frequencies(box)
    k = np.sqrt(kz**2 + ky**2 + kx**2)
    shells: NDArray[np.int64] = np.minimum((k * (2 * _SHELLS)).astype(np.int64), _SHELLS)
    return shells


def _frequencies() -> NDArray[np.float64]:
    return (np.arange(_SHELLS) + 0.5) / (2 * _SHELLS)
