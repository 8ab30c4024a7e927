"""Tubes: their axis, their wall unrolled, and its helical lattice by Bessel order.

A helical structure's Fourier transform lies on layer lines, each a sum of Bessel functions whose orders are the numbers
of starts of its helices (Cochran, Crick and Vand, Acta Cryst. 5, 581, 1952). Unrolled on cylinders about the axis, the
orders become whole numbers of waves around, which a two-dimensional Fourier transform tells apart.

Orders are of exp(i (2 pi q z - h phi)), phi counter-clockwise seen from the axis's end: at q > 0 a positive order is a
right-handed helix, in the volume's own hand. Turning the axis round changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal
from scipy.interpolate import CubicSpline

from cryofleet.errors import InvalidArgument

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Frames:
    """Points at equal steps along an axis, (n, 3) in (x, y, z) voxels, and a right-handed frame carried along them."""

    points: Floats
    tangents: Floats
    first: Floats
    second: Floats


def frames_along(axis: NDArray[np.floating], step: float) -> Frames:
    """Frames at equal steps of arc length along an axis, without a twist of their own (parallel transport).

    Args:
        axis: (n, 3), points on the axis in their order, (x, y, z) in voxels; at least two.
        step: in voxels.

    Raises:
        InvalidArgument: fewer than two points, points that coincide, or a step that is not positive.
    """
    given = np.asarray(axis, np.float64)
    if given.ndim != 2 or given.shape[1] != 3 or len(given) < 2:
        raise InvalidArgument(f"axis is {given.shape}: give at least two points as rows of x, y, z")
    pieces = np.linalg.norm(np.diff(given, axis=0), axis=1)
    if step <= 0 or np.any(pieces == 0):
        raise InvalidArgument("axis needs a positive step and points that differ from their neighbours")
    length = np.concatenate([[0.0], np.cumsum(pieces)])
    curve = CubicSpline(length, given)
    at = np.arange(0, length[-1] + 1e-9, step)
    tangents = curve(at, 1)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    across = np.eye(3)[np.argmin(np.abs(tangents[0]))]
    first = np.empty_like(tangents)
    for number, tangent in enumerate(tangents):
        across = across - (across @ tangent) * tangent
        across = across / np.linalg.norm(across)
        first[number] = across
    return Frames(curve(at), tangents, first, np.cross(tangents, first))


def _sample(coefficients: NDArray[np.floating], positions: Floats, fill: float) -> Floats:
    values = ndimage.map_coordinates(
        coefficients, np.moveaxis(positions[..., ::-1], -1, 0), order=3, prefilter=False, mode="constant", cval=fill
    )
    return np.asarray(values, np.float64)


def _ring(radius: float, thickness: float, half: int) -> Floats:
    """A ring less its mean, of unit norm, on a square of 2 half + 1."""
    across = np.arange(-half, half + 1)
    distance = np.hypot(across[:, None], across)
    inside = distance <= radius + 3 * thickness
    ring = np.exp(-0.5 * ((distance - radius) / thickness) ** 2)
    ring = np.where(inside, ring - ring[inside].mean(), 0.0)
    return np.asarray(ring / np.linalg.norm(ring), np.float64)


def _peak(score: Floats) -> tuple[Floats, float]:
    """The highest place of a map, between its pixels by a parabola along each axis, and its height."""
    place = [int(i) for i in np.unravel_index(int(np.argmax(score)), score.shape)]
    found = np.array(place, np.float64)
    for axis, at in enumerate(place):
        if 0 < at < score.shape[axis] - 1:
            line = np.moveaxis(score, axis, -1)[tuple(int(i) for n, i in enumerate(place) if n != axis)][
                at - 1 : at + 2
            ]
            bend = line[0] - 2 * line[1] + line[2]
            found[axis] += 0.5 * (line[0] - line[2]) / bend if bend < 0 else 0.0
    return found, float(score.max())


def _robust_polynomial(at: Floats, places: Floats, weights: Floats, degree: int) -> Floats:
    """Coefficients (degree + 1, columns) that places far off the curve do not pull (iterated Tukey weights)."""
    basis = np.asarray(np.polynomial.polynomial.polyvander(at, degree), np.float64)
    tukey = np.ones(len(at))
    fit: Floats = np.zeros((degree + 1, places.shape[1]))
    for _ in range(20):
        root = np.sqrt(weights * tukey)[:, None]
        fit = np.asarray(np.linalg.lstsq(basis * root, places * root, rcond=None)[0], np.float64)
        miss = np.linalg.norm(places - basis @ fit, axis=1)
        scale = max(1.4826 * float(np.median(miss)), 0.05)
        tukey = np.clip(1 - (miss / (4.7 * scale)) ** 2, 0, None) ** 2
    return np.asarray(fit, np.float64)


def trace_axis(
    volume: NDArray[np.floating],
    radius: float,
    *,
    along: str = "y",
    thickness: float = 2.0,
    slab: int = 16,
    degree: int = 3,
) -> Floats:
    """The axis of the one tube in a volume, protein bright.

    Sections of the tube are matched with a ring; the places are joined by a polynomial that ignores outliers. Sections
    are first taken across an axis of the array and then, twice, across the curve found. The ring and the missing
    wedge's blur are both symmetric about the centre, so the wedge does not move the centre.

    Args:
        volume: (z, y, x).
        radius: of the middle of the wall, voxels; right to about a fifth.
        along: the array's axis the tube runs along, to within about 20 degrees.
        thickness: Gaussian sigma of the ring, voxels.
        slab: sections averaged for one place, voxels.
        degree: of the polynomials.

    Returns:
        (n, 3): a point a voxel of the array's axis, (x, y, z) in voxels.

    Raises:
        InvalidArgument: `along` is not x, y or z, or the volume holds too few slabs for the degree.
    """
    if along not in ("x", "y", "z"):
        raise InvalidArgument(f"along is {along!r}: it must be x, y or z")
    axis = "xyz".index(along)
    others = [other for other in range(3) if other != axis]
    array = np.asarray(volume, np.float64)
    array = array - array.mean()
    length = array.shape[2 - axis]
    centres = np.arange(slab / 2, length - slab / 2 + 1e-9, slab / 2) - 0.5
    if len(centres) < degree + 2:
        raise InvalidArgument(f"volume is {length} voxels along {along}: too short for slabs of {slab} voxels")
    half = int(np.ceil(radius + 3 * thickness))
    ring = _ring(radius, thickness, half)

    places, weights = np.empty((len(centres), 2)), np.empty(len(centres))
    for number, centre in enumerate(centres):
        start = round(centre + 0.5 - slab / 2)
        section = np.moveaxis(array, 2 - axis, 0)[start : start + slab].mean(axis=0)
        # remaining array axes run from the later coordinate to the earlier one
        found, height = _peak(signal.fftconvolve(section, ring, mode="same"))
        places[number], weights[number] = found[::-1], max(height, 1e-9)
    fit = _robust_polynomial(centres / length, places, weights, min(degree, 1))

    coefficients = ndimage.spline_filter(array, order=3, output=np.float64)
    every = np.arange(length, dtype=np.float64)

    def curve(fit: Floats) -> Floats:
        points = np.empty((length, 3))
        points[:, axis] = every
        points[:, others] = np.polynomial.polynomial.polyvander(every / length, len(fit) - 1) @ fit
        return points

    reach = max(4, int(np.ceil(radius / 2)))
    grid = np.arange(-half - reach, half + reach + 1, dtype=np.float64)
    for _ in range(2):
        frames = frames_along(curve(fit), 1.0)
        step_places, step_at, step_weights = [], [], []
        for start in range(0, len(frames.points) - slab + 1, slab // 2):
            rows = slice(start, start + slab)
            positions = (
                frames.points[rows, None, None]
                + grid[None, :, None, None] * frames.first[rows, None, None]
                + grid[None, None, :, None] * frames.second[rows, None, None]
            )
            section = _sample(coefficients, positions, 0.0).mean(axis=0)
            found, height = _peak(signal.fftconvolve(section, ring, mode="valid"))
            shift = found - reach
            middle = (frames.points[rows].mean(axis=0)) + shift @ np.stack(
                [frames.first[rows].mean(axis=0), frames.second[rows].mean(axis=0)]
            )
            step_at.append(middle[axis])
            step_places.append(middle[others])
            step_weights.append(max(height, 1e-9))
        fit = _robust_polynomial(np.array(step_at) / length, np.array(step_places), np.array(step_weights), degree)
    return curve(fit)


def cylindrical_transform(
    volume: NDArray[np.floating],
    axis: NDArray[np.floating],
    radii: NDArray[np.floating],
    n_angles: int,
    step: float = 1.0,
) -> NDArray[np.float32]:
    """Unroll a volume about a curved axis, by cubic splines.

    Args:
        volume: (z, y, x).
        axis: (n, 3), points on the axis, (x, y, z) in voxels.
        radii: in voxels.
        n_angles: equally spaced, counter-clockwise seen from the axis's end.
        step: along the axis, voxels.

    Returns:
        (radius, axial, angle); the volume's mean where a point lies outside it.

    Raises:
        InvalidArgument: as `frames_along`; a radius below 0; no angles.
    """
    distances = np.asarray(radii, np.float64)
    if n_angles < 1 or distances.ndim != 1 or np.any(distances < 0):
        raise InvalidArgument("a cylindrical transform needs radii of at least 0 and at least one angle")
    frames = frames_along(axis, step)
    angles = 2 * np.pi * np.arange(n_angles) / n_angles
    outward = np.cos(angles)[:, None] * frames.first[:, None, :] + np.sin(angles)[:, None] * frames.second[:, None, :]
    array = np.asarray(volume, np.float64)
    coefficients = ndimage.spline_filter(array, order=3, output=np.float64)
    mean = float(array.mean())
    unrolled = np.empty((len(distances), *outward.shape[:2]), np.float32)
    for number, radius in enumerate(distances):
        unrolled[number] = _sample(coefficients, frames.points[:, None, :] + radius * outward, mean)
    return unrolled


@dataclass(frozen=True)
class CylindricalSpectrum:
    """Power by axial frequency and Bessel order.

    power is (frequency, order); axial_frequency in 1/unit of the step, from 0 up; orders whole numbers, ascending.
    """

    power: Floats
    axial_frequency: Floats
    orders: NDArray[np.int64]

    def line(self, frequency: float) -> Floats:
        """Power by order at the sampled axial frequency nearest to one."""
        return np.asarray(self.power[int(np.argmin(np.abs(self.axial_frequency - frequency)))], np.float64)

    def at(self, order: int, frequency: float) -> float:
        return float(self.line(frequency)[int(np.flatnonzero(self.orders == order)[0])])


def cylindrical_spectrum(
    unrolled: NDArray[np.floating], step: float = 1.0, radii: NDArray[np.floating] | None = None
) -> CylindricalSpectrum:
    """Power of an unrolled wall, integrated over its radii.

    Each radius loses its mean and takes a Hann window along the axis, then its squared Fourier transform is summed, so
    that densities of opposite sign at different radii do not cancel.

    Args:
        unrolled: (radius, axial, angle).
        step: along the axis, in the unit whose inverse the frequencies shall have.
        radii: weights of the radii (their circumference); equal where not given.
    """
    walls = np.asarray(unrolled, np.float64)
    walls = walls - walls.mean(axis=(1, 2), keepdims=True)
    length, n_angles = walls.shape[1:]
    window = np.hanning(length + 2)[1:-1]
    weights = np.ones(len(walls)) if radii is None else np.asarray(radii, np.float64)
    # exp(-i h phi) is the inverse transform's sign, so orders run the other way from numpy's frequencies
    transformed = np.fft.fft(np.fft.ifft(walls * window[:, None], axis=2), axis=1)[:, : length // 2 + 1]
    power = np.einsum("r,rqh->qh", weights / weights.sum(), np.abs(transformed) ** 2)
    orders = np.round(np.fft.fftfreq(n_angles) * n_angles).astype(np.int64)
    return CylindricalSpectrum(
        np.fft.fftshift(power, axes=1), np.arange(length // 2 + 1) / (length * step), np.fft.fftshift(orders)
    )
