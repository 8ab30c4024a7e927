"""Tilt range and tilt axis of a tomogram, from its own spectrum.

What a tilt series has not seen is missing from the spectrum, signal and noise alike, in a wedge about the plane that
the tilt axis and the beam span; so there is something to see at any signal-to-noise ratio. Power is averaged over
tapered boxes and gathered, about each axis that is tried, by the distance from the axis and the angle
atan2(kz, k_perpendicular).
At each distance there are two levels, that of what was sampled and that of what was not; the range and the axis that
make the power most likely (each component exponentially distributed) are taken, and each limit is then where the power
falls through the middle of its levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import scipy.optimize
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.numerics import welch
from cryofleet.numerics.fourier import axis_frequencies
from cryofleet.progress import Progress, no_progress, part

BOX = 96
MOST_BOXES = 64
#: Parts of the tomogram whose estimates give the standard errors.
GROUPS = 8
#: Components so far from the axis and along it are looked at, cycles per voxel: all turns about z stay on the grid.
_NEAREST, _FARTHEST, _ALONG = 0.08, 0.4, 0.3
_RINGS = 16
_BIN_DEGREES = 1.0
_BINS = 180
#: Slices of the tilt series stand apart in fine detail; smoothed so, they don't.
_SMOOTHING_DEGREES = 1.5
#: Bins that the edge of the range is blurred over, and of the level inside it that counts.
_SKIRT, _NEAR = 5, 10
#: Added to the power of each ring, of its mean: leakage is too small to be told from nothing.
_FLOOR = 0.1
#: The least missing part that is told from none, and the least sampled one.
_LEAST_DEGREES = 4.0
#: A wedge that is less empty than this is none: filters and thin slabs vary the power about the axis by tenths too.
_LEAST_DEPTH = 0.5
#: How well the fall of the power tells the outermost tilt, where the step is known; benchmarks/estimate.py measures it.
MODEL_ERROR_DEGREES = 0.5
_LEAST_SIDE = 16


@dataclass(frozen=True)
class Wedge:
    """Angles in degrees, with standard errors. `axis` is that of the tilt axis from y, counter-clockwise seen from +z.

    depth: 1 less the power in the wedge over that outside. angles, power: the profile, power by folded angle over the
    mean of what was sampled. found: whether there is a wedge; the angles mean nothing otherwise.
    """

    found: bool
    tilt_min: float
    tilt_max: float
    axis: float
    tilt_min_error: float
    tilt_max_error: float
    axis_error: float
    depth: float
    angles: NDArray[np.float64]
    power: NDArray[np.float64]


def memory_bytes(shape: tuple[int, int, int]) -> int:
    """What `estimate_wedge` needs at most: sections of a box's depth, spectra of groups, frequencies."""
    depth, height, width = welch.box_shape(shape, BOX)
    return 4 * depth * shape[1] * shape[2] + (GROUPS + 24) * 4 * depth * height * width


def estimate_wedge(
    read: Callable[[int, int], NDArray[np.float32]],
    shape: tuple[int, int, int],
    tilt_step_degrees: float = 2.0,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Wedge:
    """The missing wedge of a tomogram [z, y, x], read by sections.

    The outermost slices of a tilt series reach half a step beyond the outermost tilts, where there are no others to
    share the spectrum with; that is taken off.

    Raises FailedPrecondition where a side is shorter than 16 voxels or there is no power.
    """
    if min(shape) < _LEAST_SIDE:
        raise FailedPrecondition(f"{shape} voxels (z, y, x): a wedge is seen with {_LEAST_SIDE} along each axis")
    box = welch.box_shape(shape, BOX)
    starts = welch.box_starts(shape, box, MOST_BOXES)
    groups = min(GROUPS, len(starts))
    grid = _Grid(box)
    sums = np.zeros((groups, grid.size))
    for number, boxed in enumerate(welch.tapered_boxes(read, starts, box, part(progress, 0.0, 0.6))):
        sums[number % groups] += grid.chosen(welch.power(boxed, workers))
    total = sums.sum(axis=0)
    if not total.max() > 0:
        raise FailedPrecondition("the tomogram is the same everywhere: there is no spectrum to see a wedge in")

    coarse = np.arange(-90.0, 90.0, 3.0)
    scores = []
    for number, axis in enumerate(coarse):
        scores.append(_search(grid.gathered(total, axis))[0])
        progress(0.6 + 0.25 * number / len(coarse), "trying axes")
    near = float(coarse[int(np.argmax(scores))])
    axis = _refined_axis(grid, total, near)
    told = part(progress, 0.85, 1.0)
    low, high, depth, angles, power = _limits(grid.gathered(total, axis))
    others = []
    for group in range(groups if groups > 1 else 0):
        left = total - sums[group]
        own = _refined_axis(grid, left, axis)
        others.append((*_limits(grid.gathered(left, own))[:2], own))
        told((group + 1) / groups, "measuring errors")
    # delete-one jackknife
    spread = np.sqrt((len(others) - 1) * np.var(np.array(others), axis=0)) if others else np.full(3, float("nan"))
    return Wedge(
        found=depth >= _LEAST_DEPTH,
        tilt_min=low + tilt_step_degrees / 2,
        tilt_max=high - tilt_step_degrees / 2,
        axis=(axis + 90) % 180 - 90,
        tilt_min_error=math.hypot(float(spread[0]), MODEL_ERROR_DEGREES),
        tilt_max_error=math.hypot(float(spread[1]), MODEL_ERROR_DEGREES),
        axis_error=float(spread[2]),
        depth=depth,
        angles=angles,
        power=power,
    )


class _Grid:
    """The components of a box's half spectrum that are looked at."""

    def __init__(self, box: tuple[int, int, int]) -> None:
        kz, ky, kx = np.broadcast_arrays(*axis_frequencies(box))
        # Half of a real volume's components are the other half's mates; those of kx = 0 and Nyquist stand there twice.
        self._kept = (np.hypot(kx, ky) < math.hypot(_FARTHEST, _ALONG)) & (np.abs(kz) < _FARTHEST) & (kx > 0)
        self.kz, self.ky, self.kx = (k[self._kept].astype(np.float64) for k in (kz, ky, kx))
        self.size = self.kz.size

    def chosen(self, power: NDArray[np.float32]) -> NDArray[np.float32]:
        kept: NDArray[np.float32] = power[self._kept]
        return kept

    def gathered(self, power: NDArray[np.float64], axis_degrees: float) -> NDArray[np.float64]:
        """(2, rings, bins): counts and sums of power, by distance from the axis and by angle."""
        cosine, sine = math.cos(math.radians(axis_degrees)), math.sin(math.radians(axis_degrees))
        across = self.kx * cosine + self.ky * sine
        along = self.ky * cosine - self.kx * sine
        radius = np.hypot(across, self.kz)
        kept = (radius >= _NEAREST) & (radius < _FARTHEST) & (np.abs(along) < _ALONG)
        across, height, radius = across[kept], self.kz[kept], radius[kept]
        angle = np.degrees(np.arctan2(np.where(across < 0, -height, height), np.abs(across)))
        ring = ((radius - _NEAREST) / (_FARTHEST - _NEAREST) * _RINGS).astype(int)
        place = np.clip(((angle + 90) / _BIN_DEGREES).astype(int), 0, _BINS - 1)
        index = ring * _BINS + place
        size = _RINGS * _BINS
        counts = np.bincount(index, minlength=size)
        sums = np.bincount(index, power[kept], minlength=size)
        return np.stack([counts, sums]).reshape(2, _RINGS, _BINS).astype(np.float64)


def _search(gathered: NDArray[np.float64]) -> tuple[float, int, int]:
    """The highest log-likelihood of two levels over that of one, and the first sampled bin and that after the last."""
    counts, sums = gathered
    sums = sums + _FLOOR * counts * sums.sum(axis=1, keepdims=True) / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    counts, sums = (np.concatenate([np.zeros((_RINGS, 1)), np.cumsum(each, axis=1)], axis=1) for each in (counts, sums))
    least = math.ceil(_LEAST_DEGREES / _BIN_DEGREES)
    low, high = np.triu_indices(_BINS + 1, least)
    inside = high - low <= _BINS - least
    low, high = low[inside], high[inside]

    def term(count: NDArray[np.float64], total: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = np.maximum(total, 1e-300) / np.maximum(count, 1)
        return -count * np.log(mean)

    n_in, s_in = counts[:, high] - counts[:, low], sums[:, high] - sums[:, low]
    n_out, s_out = counts[:, -1:] - n_in, sums[:, -1:] - s_in
    gain = term(n_in, s_in) + term(n_out, s_out) - term(counts[:, -1:], sums[:, -1:])
    # a wedge is where power is missing
    gain[s_in * n_out < s_out * n_in] *= -1
    score = gain.sum(axis=0)
    best = int(np.argmax(score))
    return float(score[best]), int(low[best]), int(high[best])


def _refined_axis(grid: _Grid, power: NDArray[np.float64], near: float) -> float:
    found = scipy.optimize.minimize_scalar(
        lambda axis: -_search(grid.gathered(power, axis))[0],
        bounds=(near - 4, near + 4),
        method="bounded",
        options={"xatol": 0.1},
    )
    return float(found.x)


def _limits(
    gathered: NDArray[np.float64],
) -> tuple[float, float, float, NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest tilt, the wedge's depth, and power by angle."""
    _, first, last = _search(gathered)
    counts, sums = gathered
    inside = np.zeros(_BINS, bool)
    inside[first:last] = True
    levels = sums[:, inside].sum(axis=1) / np.maximum(counts[:, inside].sum(axis=1), 1)
    seen = levels > 0
    relative = (sums[seen] / levels[seen, None]).sum(axis=0) / np.maximum(counts[seen].sum(axis=0), 1)
    angles = np.linspace(-90, 90, _BINS, endpoint=False, dtype=np.float64) + _BIN_DEGREES / 2
    empty = counts[seen].sum(axis=0) == 0
    relative[empty] = np.interp(angles[empty], angles[~empty], relative[~empty])
    missing = float(relative[~inside].mean())
    smoothed = scipy.ndimage.gaussian_filter1d(relative, _SMOOTHING_DEGREES / _BIN_DEGREES, mode="wrap")
    low, high = _crossing(smoothed, first, -1, missing), _crossing(smoothed, last - 1, 1, missing)
    low, high = (-90 + (place + 0.5) * _BIN_DEGREES for place in (low, high))
    return low, high, 1 - missing, angles, relative


def _crossing(power: NDArray[np.float64], edge: int, outwards: int, missing: float) -> float:
    """Where smoothed power falls through the middle between what it is near the edge and `missing`, in bins."""
    near = np.clip(edge - outwards * np.arange(_SKIRT, _SKIRT + _NEAR), 0, _BINS)
    middle = (float(power[np.minimum(near, _BINS - 1)].mean()) + missing) / 2
    place = edge - outwards * _SKIRT
    while 0 <= place + outwards < _BINS and power[place + outwards] >= middle:
        place += outwards
    beyond = place + outwards
    if not 0 <= beyond < _BINS or power[place] <= power[beyond]:
        return float(place)
    return place + outwards * float((power[place] - middle) / (power[place] - power[beyond]))
