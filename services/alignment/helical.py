"""Helical symmetry of averages: finding the axis, rise and twist, measuring and imposing them.

On cylinders about the helix axis a helical operator is a plain translation, by the twist around and by the rise along.
So a volume is unrolled once: its correlation with itself under every rise and twist together is one autocorrelation,
and imposing a symmetry is a phase factor per angular order and an interpolation along the axis alone.

The axis is along z through voxel n//2 of x and y. A positive twist is counter-clockwise seen from +z while z rises: a
right-handed screw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.optimize
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.cylindrical import cylindrical_transform
from cryofleet.numerics.fourier import band_pass, fast_length
from cryofleet.numerics.fsc import shell_index
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import centred_coordinates, soft_sphere, usual_edge_voxels
from cryofleet.numerics.rotations import point_group
from cryofleet.numerics.spectra import SpectrumTable
from cryofleet.progress import Progress, no_progress, part
from services.alignment.band import Band
from services.alignment.symmetry_axes import find_axes

Array = NDArray[np.float32]
Floats = NDArray[np.float64]

Mean = Literal["volume", "radius", "ring"]
"""What is removed before a correlation: the mean of all, of each radius (a plain cylinder then is nothing), or of each
ring of one radius and height (a stack of discs then is nothing)."""

SMALLEST_BOX = 16
NOTHING = 1e-4
"""Of the energy within a cylinder so much counts as nothing; interpolation leaves up to 1e-5 of a plain tube."""
LONGEST_LAG = 0.8
"""Parts further from each other than this share of the length are not compared: too little of them overlaps."""
LARGEST_SCAN = 200_000_000
"""So many values of the autocorrelation are looked up in a scan, a minute's work, and no more."""
REFINED = 24
"""So many peaks of a scan are refined."""
MOST_TURNS = 3
"""Helices that wind so often from a subunit to the next are looked at, for being all that is seen."""
LARGEST_MULTIPLE = 12
"""A peak is tested for being up to so many steps of a smaller symmetry."""
AMBIGUOUS = 0.9
"""What scores at least this share of a candidate can't be told from it."""
AXIS_EVALUATIONS = 120
"""Places of the axis that are tried in each turn of its refinement."""
WIDTH_DROP = 0.1
"""Widths are where a score has fallen by this share."""


@dataclass(frozen=True)
class HelicalSymmetry:
    """From a subunit to the next: `rise_angstrom` further along z, turned by `twist_degrees` about z, counter-clockwise
    seen from +z where positive, which is a right-handed screw. `order` is n of a rotational symmetry Cn about the axis:
    the number of subunits at one height, or of equal strands.

    Raises InvalidArgument: a rise that is not positive, a twist beyond +-180, an order below 1.
    """

    rise_angstrom: float
    twist_degrees: float
    order: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rise_angstrom) and self.rise_angstrom > 0):
            raise InvalidArgument(
                f"rise_angstrom {self.rise_angstrom:g}: must be positive; the twist's sign says the hand"
            )
        if not abs(self.twist_degrees) <= 180:
            raise InvalidArgument(f"twist_degrees {self.twist_degrees:g}: must lie in -180 to 180")
        if self.order < 1:
            raise InvalidArgument(f"order {self.order}: must be at least 1")

    @property
    def hand(self) -> Literal["right", "left", "none"]:
        """Of the helix through consecutive subunits."""
        if abs(self.twist_degrees) in (0.0, 180.0):
            return "none"
        return "right" if self.twist_degrees > 0 else "left"

    @property
    def subunits_per_turn(self) -> float:
        """Of the helix through consecutive subunits; infinite without a twist."""
        return math.inf if self.twist_degrees == 0 else 360.0 / abs(self.twist_degrees)

    @property
    def pitch_angstrom(self) -> float:
        """Length of a turn of the helix through consecutive subunits; infinite without a twist."""
        return self.rise_angstrom * self.subunits_per_turn

    def operator(self, steps: int) -> tuple[Rotation, float]:
        """The rotation about z, and the shift along z in Å after it, onto the subunit `steps` further on."""
        return Rotation.from_euler("z", self.twist_degrees * steps, degrees=True), self.rise_angstrom * steps


@dataclass(frozen=True)
class Cylinder:
    """The part of a box that is looked at: about z, between two radii, and along z the central share of the box.

    An average of segments in random orientations is known within the sphere that fits into its box, so that long parts
    and large radii exclude each other: (central_fraction n/2)^2 + outer^2 <= (n/2)^2 in voxels. An outer radius of None
    is the largest that the box holds, n//2 - 2 voxels.
    """

    outer_radius_angstrom: float | None = None
    inner_radius_angstrom: float = 0.0
    central_fraction: float = 0.6

    def radii_voxels(self, box_size: int, voxel_size_angstrom: float) -> tuple[float, float]:
        """Inner and outer radius. Raises InvalidArgument where the cylinder is empty or larger than the box."""
        largest = box_size // 2 - 2
        inner = self.inner_radius_angstrom / voxel_size_angstrom
        outer = largest if self.outer_radius_angstrom is None else self.outer_radius_angstrom / voxel_size_angstrom
        if not 0 <= inner <= outer - 1:
            raise InvalidArgument(
                f"inner_radius_angstrom {self.inner_radius_angstrom:g}: must be at least 0 and a voxel less than the "
                f"outer radius of {outer * voxel_size_angstrom:g} Å"
            )
        if outer > largest + 1e-9:
            raise InvalidArgument(
                f"outer_radius_angstrom {self.outer_radius_angstrom:g}: the box of {box_size} voxels holds "
                f"{largest * voxel_size_angstrom:g}"
            )
        return inner, float(outer)

    def slices(self, box_size: int) -> tuple[int, int]:
        """First and last z that belong to it. Raises InvalidArgument for a fraction outside (0, 1], or under 8
        slices."""
        if not 0 < self.central_fraction <= 1:
            raise InvalidArgument(f"central_fraction {self.central_fraction:g}: must lie in 0 to 1")
        half = self.central_fraction * box_size / 2
        first = max(0, math.ceil(box_size // 2 - half))
        last = min(box_size - 1, math.floor(box_size // 2 + half))
        if last - first < 7:
            raise InvalidArgument(
                f"central_fraction {self.central_fraction:g}: leaves fewer than 8 of {box_size} slices"
            )
        return first, last


WHOLE = Cylinder()


def _checked(volume: NDArray[np.floating], voxel_size_angstrom: float) -> Array:
    if volume.ndim != 3 or len(set(volume.shape)) != 1 or volume.shape[0] < SMALLEST_BOX:
        raise InvalidArgument(f"volume is {volume.shape}: must be a cube of at least {SMALLEST_BOX} voxels a side")
    if not np.isfinite(volume).all():
        raise InvalidArgument("volume has values that are not finite")
    if volume.min() == volume.max():
        raise InvalidArgument("volume is constant: it has no structure to look at")
    if not (math.isfinite(voxel_size_angstrom) and voxel_size_angstrom > 0):
        raise InvalidArgument(f"voxel_size_angstrom {voxel_size_angstrom:g}: must be positive")
    return np.asarray(volume, dtype=np.float32)


def _angles(outer_voxels: float, per_voxel: float = 2.0) -> int:
    """An even number of angles, so many a voxel of the outermost circle; one is the volume's own sampling."""
    return 2 * fast_length(math.ceil(math.pi * per_voxel * outer_voxels))


@dataclass(frozen=True, eq=False)
class Axis:
    """Where a filament lies in a volume: `rotation` takes z onto its axis, `shift_voxels` (3,) (x, y, z), applied after
    it, the box's centre onto a point of it. Only the shift's part at right angles to the axis counts."""

    rotation: Rotation
    shift_voxels: Floats

    @property
    def direction(self) -> Floats:
        """(x, y, z), of length 1."""
        return np.asarray(self.rotation.apply([0.0, 0.0, 1.0]), dtype=np.float64)


def _along(direction: Floats, place: Floats) -> Axis:
    """The axis in a direction, or the opposite if that is nearer to +z, by the smallest rotation and shift."""
    direction = direction if direction[2] >= 0 else -direction
    across = np.cross([0.0, 0.0, 1.0], direction)
    length = float(np.linalg.norm(across))
    rotation = Rotation.from_rotvec(across / max(length, 1e-12) * math.atan2(length, float(direction[2])))
    return Axis(rotation, np.asarray(place - direction * (place @ direction), dtype=np.float64))


ALONG_Z = Axis(Rotation.identity(), np.zeros(3))


def _unrolled(volume: Array, radii: Floats, first: int, last: int, angles: int, axis: Axis = ALONG_Z) -> Array:
    """The volume on cylinders: (radius, z along the axis from `first` to `last`, angle counter-clockwise; from +x for
    an axis along z)."""
    centre = volume.shape[0] // 2
    along = np.array([first, last])[:, None] - centre
    return cylindrical_transform(volume, centre + axis.shift_voxels + along * axis.direction, radii, angles)


def _wall(
    volume: Array, cylinder: Cylinder, voxel: float, removed: Mean, axis: Axis = ALONG_Z
) -> tuple[Floats, Floats, float]:
    """The unrolled cylinder less the mean, each radius times the root of its circumference; the radii in voxels; and
    the energy that counts as nothing, such as interpolation leaves of a plain tube."""
    inner, outer = cylinder.radii_voxels(volume.shape[0], voxel)
    radii = np.arange(inner + 0.5, outer + 1e-9)
    first, last = cylinder.slices(volume.shape[0])
    values = _unrolled(volume, radii, first, last, _angles(outer, 1.5), axis).astype(np.float64)
    values -= np.average(values.mean(axis=(1, 2)), weights=radii)
    nothing = NOTHING * float((values**2).sum(axis=(1, 2)) @ radii)
    if removed != "volume":
        values -= values.mean(axis=(1, 2) if removed == "radius" else 2, keepdims=True)
    values *= np.sqrt(radii)[:, None, None]
    return values, radii, nothing


def _lowest(
    misfit: Callable[[Floats], float], simplex: Floats, tolerance: float, evaluations: int, enough: float = 1e-7
) -> Floats:
    """Where a smooth function is lowest near a simplex, to within a tolerance and `enough` in value (Nelder and
    Mead)."""
    found = scipy.optimize.minimize(
        misfit,
        simplex[0],
        method="Nelder-Mead",
        options={"initial_simplex": simplex, "xatol": tolerance, "fatol": enough, "maxfev": evaluations},
    )
    return np.asarray(found.x, dtype=np.float64)


# Measuring


def rotational_correlation(
    volume: NDArray[np.floating],
    order: int,
    voxel_size_angstrom: float,
    cylinder: Cylinder = WHOLE,
    removed: Mean = "radius",
) -> float:
    """Mean pairwise correlation of a volume with its rotations by multiples of 360/order degrees about its axis.

    It is 1 for a volume of that symmetry and -1/(order - 1) for one that has nothing of it. Of P_n, the power in
    angular order n, the mean over all pairs of different rotations is (order S - 1) / (order - 1), S being the share of
    the orders that `order` divides: no rotation is carried out.

    The "17-fold correlation" of tobacco mosaic virus of Zeng and others (FAML, section 3.2.3) is this with order 17,
    mask and mean unstated. With `removed="volume"` the radial density profile, which has every symmetry, is most of it.
    A helix is not invariant under rotation alone: where rings are removed too, one of 49 subunits in 3 turns has no
    17-fold symmetry but that of the helices of 17 starts. `helical_correlation` measures what is there.

    Args:
        volume: cube `[z, y, x]`, the axis along z through voxel n//2.
        order: of the rotation, 2 or more.
        voxel_size_angstrom: of the volume.
        cylinder: the voxels that are compared, with a hard edge.
        removed: the mean that is taken off first.

    Raises InvalidArgument: an order below 2, a volume that is no cube or constant, a cylinder it doesn't hold.
    """
    if order < 2:
        raise InvalidArgument(f"order {order}: must be at least 2")
    wall, _, nothing = _wall(_checked(volume, voxel_size_angstrom), cylinder, voxel_size_angstrom, removed)
    spectrum = np.abs(np.fft.rfft(wall, axis=2)) ** 2
    power = spectrum.sum(axis=(0, 1))
    power[1:-1] *= 2
    total = power.sum()
    return float((order * power[::order].sum() - total) / ((order - 1) * (total + nothing * wall.shape[2])))


class _Filtered:
    """A volume of a given voxel size, band-passed; `finest` is the finest detail left, Å."""

    def __init__(
        self,
        volume: NDArray[np.floating],
        voxel_size_angstrom: float,
        low_pass_angstrom: float | None,
        high_pass_angstrom: float | None,
    ) -> None:
        checked = _checked(volume, voxel_size_angstrom)
        self.voxel = voxel_size_angstrom
        self.finest = 3 * voxel_size_angstrom if low_pass_angstrom is None else low_pass_angstrom
        self.volume = band_pass(checked, high_pass_angstrom, self.finest, voxel_size_angstrom)


class _Correlogram:
    """The correlation of a volume with itself, turned about z and moved along z, for every turn and move.

    correlation(dz, dphi) compares what lies in the cylinder with what of it lies dz higher and dphi further round,
    normalised by the power of the parts that overlap. With an order it is the mean over the rotations of Cn.
    """

    def __init__(
        self,
        filtered: _Filtered,
        order: int,
        cylinder: Cylinder,
        axis: Axis = ALONG_Z,
    ) -> None:
        wall, radii, nothing = _wall(filtered.volume, cylinder, filtered.voxel, "radius", axis)
        length, angles = wall.shape[1:]
        # Zeros behind the wall, so that its ends are not compared across the transform's period.
        spectrum = np.fft.fft(np.fft.rfft(wall, axis=2), 2 * length, axis=1)
        power = (spectrum.real**2 + spectrum.imag**2).sum(axis=0)
        power[:, np.arange(angles // 2 + 1) % order != 0] = 0
        products = np.fft.irfft(np.fft.ifft(power, axis=0), angles, axis=1)[:length]
        energy = (wall**2).sum(axis=(0, 2)) + nothing / length
        reach = max(3, math.floor(LONGEST_LAG * length))
        # Of the lower and the upper part that overlap at each lag.
        lower, upper = np.cumsum(energy)[::-1][:reach], np.cumsum(energy[::-1])[::-1][:reach]
        values = products[:reach] / np.sqrt(lower * upper)[:, None]
        # Symmetric about no lag, so that the spline is smooth there.
        mirrored = np.roll(values[:0:-1, ::-1], 1, axis=1)
        whole = scipy.ndimage.spline_filter1d(np.concatenate([mirrored, values]), 3, axis=0, mode="mirror")
        self._coefficients = scipy.ndimage.spline_filter1d(whole, 3, axis=1, mode="grid-wrap")
        self._origin = reach - 1
        self._angles = angles
        self._voxel = filtered.voxel
        self.order = order
        self.finest = filtered.finest
        self.length = (reach - 2) * filtered.voxel
        weights = (wall**2).sum(axis=(1, 2))
        self.radius = float(np.sqrt((weights * radii**2).sum() / weights.sum())) * filtered.voxel

    def at(self, dz_angstrom: Floats, turn_degrees: Floats) -> Floats:
        """Correlations at lags, of any shape; |dz| at most `length`."""
        rows = dz_angstrom / self._voxel + self._origin
        columns = turn_degrees * (self._angles / 360.0)
        values = scipy.ndimage.map_coordinates(
            self._coefficients, [rows, columns], order=3, prefilter=False, mode="grid-wrap"
        )
        return np.asarray(values, dtype=np.float64)

    def _mean(self, steps: Floats, rise: Floats, twist: Floats) -> Floats:
        """Mean correlation over the operator's multiples, weighted by the length that is compared.

        Lags shorter than the finest detail are left out, where anything resembles itself.
        """
        dz, turn = steps * rise[..., None], steps * twist[..., None]
        section = 360.0 / self.order
        nearest = turn - section * np.rint(turn / section)
        distance = np.hypot(dz, 2 * self.radius * np.sin(np.radians(nearest) / 2))
        weights = np.clip(self.length - dz, 0, None) * np.clip(2 * (distance / self.finest - 1), 0, 1)
        total = weights.sum(axis=-1)
        values = (weights * self.at(np.minimum(dz, self.length), turn)).sum(axis=-1)
        return np.where(total > 0, values / np.maximum(total, 1e-12), -1.0)

    def score(self, rise_angstrom: Floats, twist_degrees: Floats) -> Floats:
        """Of rises and twists of one shape: the mean correlation over all multiples of the operator."""
        steps = np.arange(1.0, max(1.0, self.length / float(rise_angstrom.min())) + 1)
        return self._mean(steps, rise_angstrom, twist_degrees)

    def one(self, rise_angstrom: float, twist_degrees: float) -> float:
        """The score of one operator."""
        return float(self.score(np.array([rise_angstrom]), np.array([twist_degrees]))[0])

    def between(self, rise_angstrom: float, twist_degrees: float, parts: int = 8) -> float:
        """The mean correlation all along the line of an operator, not at its multiples alone."""
        steps = np.arange(1.0, max(1.0, self.length / rise_angstrom) * parts + 1) / parts
        return float(self._mean(steps, np.array([rise_angstrom]), np.array([twist_degrees]))[0])

    def line(self, rise_angstrom: float, twist_degrees: float) -> tuple[float, float]:
        """The best mean along any of the helices through an operator, and the twist of that one, which may be more than
        a turn."""
        turns = [twist_degrees + m * 360.0 / self.order for m in range(-MOST_TURNS, MOST_TURNS + 1)]
        return max((self.between(rise_angstrom, turn), turn) for turn in turns)

    def added(self, rise_angstrom: float, twist_degrees: float, multiple: int) -> float:
        """The mean over those multiples of an operator that are none of its `multiple`-th."""
        steps = np.arange(1.0, max(1.0, self.length / rise_angstrom) + 1)
        return float(self._mean(steps[steps % multiple != 0], np.array([rise_angstrom]), np.array([twist_degrees]))[0])

    def steps_of(self, rise_angstrom: float) -> tuple[float, float]:
        """Steps of a scan at a rise, Å and degrees: the furthest multiple moves by a third of the finest detail."""
        furthest = max(1.0, self.length / rise_angstrom)
        move = self.finest / 3 / furthest
        return move, math.degrees(move / self.radius)


def helical_correlation(
    volume: NDArray[np.floating],
    symmetry: HelicalSymmetry,
    voxel_size_angstrom: float,
    cylinder: Cylinder = WHOLE,
    *,
    low_pass_angstrom: float | None = None,
    high_pass_angstrom: float | None = None,
) -> float:
    """The correlation of a volume with itself under the multiples of a helical operator, on average.

    Multiples up to 0.8 of the cylinder's length count, by the length that is compared; not those that move a subunit by
    less than the finest detail. The mean of each radius is removed: a plain cylinder has nothing to correlate.
    Arguments and errors as `find`.
    """
    filtered = _Filtered(volume, voxel_size_angstrom, low_pass_angstrom, high_pass_angstrom)
    correlogram = _Correlogram(filtered, symmetry.order, cylinder)
    return correlogram.one(symmetry.rise_angstrom, symmetry.twist_degrees)


# Finding


@dataclass(frozen=True)
class Candidate:
    """A helical symmetry that a volume may have.

    score: mean correlation under its operator's multiples (`helical_correlation`). mirror_score: of the opposite twist.
    line_score: of all points, not only subunits, along the best of the helices through its subunits; close to `score`
    that helix's turns are seen, but not the subunits in them. line_pitch_angstrom: of that helix. rise_width_angstrom,
    twist_width_degrees: how far one may move, the other following, until the score has lost a tenth; infinite where it
    doesn't fall.
    """

    symmetry: HelicalSymmetry
    score: float
    mirror_score: float
    line_score: float
    line_pitch_angstrom: float
    rise_width_angstrom: float
    twist_width_degrees: float

    @cached_property
    def ambiguities(self) -> tuple[str, ...]:
        """What the volume leaves open, in words; the hand of the volume itself is taken as right."""
        found = []
        if self.score <= 0:
            return ("no helix: nothing correlates",)
        if self.mirror_score >= AMBIGUOUS * self.score and self.symmetry.hand != "none":
            found.append(f"hand: a twist of {-self.symmetry.twist_degrees:.2f} degrees scores {self.mirror_score:.3f}")
        if self.line_score >= AMBIGUOUS * self.score:
            found.append(
                f"subunits: only turns of {self.line_pitch_angstrom:.1f} Å are seen, any rise and twist of that pitch "
                "will do"
            )
        return tuple(found)


def _wrapped(twist_degrees: float, order: int) -> float:
    """The equal twist of the smallest modulus: Cn leaves it open by 360/n."""
    section = 360.0 / order
    return twist_degrees - section * round(twist_degrees / section)


def _scan(
    correlogram: _Correlogram, rises: tuple[float, float], twists: tuple[float, float], progress: Progress
) -> Iterator[tuple[float, float, float]]:
    """(score, rise, twist) of the peaks along the twist, for all rises that need a row of their own."""
    grid = [rises[0]]
    while grid[-1] < rises[1]:
        grid.append(min(rises[1], grid[-1] + correlogram.steps_of(grid[-1])[0]))
    width = twists[1] - twists[0]
    counts = [2 + math.ceil(width / correlogram.steps_of(rise)[1]) for rise in grid]
    lookups = sum(count * correlogram.length / rise for count, rise in zip(counts, grid, strict=True))
    if lookups > LARGEST_SCAN:
        raise InvalidArgument(
            f"rises from {rises[0]:g} to {rises[1]:g} Å and twists from {twists[0]:g} to {twists[1]:g} degrees are "
            f"too many to scan ({lookups:.1g} correlations, at most {LARGEST_SCAN:.1g}): give narrower ranges, a "
            "larger smallest rise or a coarser low-pass"
        )
    for row, (rise, count) in enumerate(zip(grid, counts, strict=True)):
        progress(row / len(grid), "scanning", rise_angstrom=rise)
        turns = np.linspace(twists[0], twists[1], count)
        scores = correlogram.score(np.full(count, rise), turns)
        padded = np.concatenate([[-2.0], scores, [-2.0]])
        for peak in np.flatnonzero((scores >= padded[:-2]) & (scores > padded[2:])):
            yield float(scores[peak]), rise, float(turns[peak])


def _climbed(
    correlogram: _Correlogram, rise: float, twist: float, rises: tuple[float, float], twists: tuple[float, float]
) -> tuple[float, float, float]:
    """(score, rise, twist) of the peak above a point, within the ranges."""
    by_rise, by_twist = correlogram.steps_of(rise)

    def bounded(at: Floats) -> tuple[float, float]:
        return (
            float(np.clip(rise + at[0] * by_rise, *rises)),
            float(np.clip(twist + at[1] * by_twist, *twists)),
        )

    simplex = np.array([[-0.5, -0.5], [0.7, 0.0], [0.0, 0.7]])
    best = bounded(_lowest(lambda at: -correlogram.one(*bounded(at)), simplex, 1e-3, 200))
    return (correlogram.one(*best), *best)


def _reduced(
    correlogram: _Correlogram, peak: tuple[float, float, float], rises: tuple[float, float], twists: tuple[float, float]
) -> tuple[float, float, float]:
    """The smallest operator in the ranges of which a peak is a multiple.

    An operator's multiples correlate as well as it does, so the smaller one is right where the subunits it adds do so
    too: nearly as well as the peak, and by more than half of what the peak has beyond the mean between subunits.
    """
    score, rise, twist = peak
    for multiple in range(LARGEST_MULTIPLE, 1, -1):
        if rise / multiple < rises[0]:
            continue
        best: tuple[float, float, float] | None = None
        for turns in range(multiple):
            part_twist = _wrapped((twist + turns * 360.0 / correlogram.order) / multiple, correlogram.order)
            if not twists[0] <= part_twist <= twists[1]:
                continue
            line, _ = correlogram.line(rise / multiple, part_twist)
            added = correlogram.added(rise / multiple, part_twist, multiple)
            if added < AMBIGUOUS * score or added - line <= 0.5 * (score - line):
                continue
            climbed = _climbed(correlogram, rise / multiple, part_twist, rises, twists)
            if best is None or climbed[0] > best[0]:
                best = climbed
        if best is not None:
            return _reduced(correlogram, best, rises, twists)
    return peak


def _adds_nothing(
    correlogram: _Correlogram, peak: tuple[float, float, float], other: tuple[float, float, float]
) -> bool:
    """Whether a peak is a multiple of a better one, or just another point of its turns."""
    score, rise, twist = peak
    by_rise, by_twist = correlogram.steps_of(rise)
    count = max(1, round(rise / other[1]))
    turn = _wrapped(twist - count * other[2], correlogram.order)
    if abs(rise - count * other[1]) <= 2 * by_rise and abs(turn) <= 2 * by_twist:
        return True
    line, turn = correlogram.line(other[1], other[2])
    between = _wrapped(twist - rise / other[1] * turn, correlogram.order)
    return abs(between) <= 2 * by_twist and line >= AMBIGUOUS * score


def _widths(correlogram: _Correlogram, score: float, rise: float, twist: float) -> tuple[float, float]:
    """How far rise and twist may move, the other following, by the curvature of the score."""
    steps = correlogram.steps_of(rise)
    around = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], dtype=np.float64) * 0.5
    values = correlogram.score(rise + around[:, 0] * steps[0], twist + around[:, 1] * steps[1])
    i, j = around.T
    terms = np.stack([np.ones(9), i, j, i * i / 2, i * j, j * j / 2], axis=1)
    *_, ii, ij, jj = np.linalg.lstsq(terms, values, rcond=None)[0]
    determinant = ii * jj - ij * ij
    if ii >= 0 or determinant <= 1e-6 * ii * ii:
        return math.inf, math.inf
    drop = 2 * WIDTH_DROP * abs(score)
    return steps[0] * math.sqrt(drop * -jj / determinant), steps[1] * math.sqrt(drop * -ii / determinant)


def _search(
    correlogram: _Correlogram,
    rises: tuple[float, float],
    twists: tuple[float, float],
    count: int,
    progress: Progress,
) -> tuple[Candidate, ...]:
    if not 0 < rises[0] <= rises[1] or not math.isfinite(rises[1]):
        raise InvalidArgument(f"rises from {rises[0]:g} to {rises[1]:g} Å: must be positive and in rising order")
    if rises[1] > correlogram.length / 2:
        raise InvalidArgument(
            f"a rise of {rises[1]:g} Å can't be seen in {correlogram.length:g} Å of a filament: at most "
            f"{correlogram.length / 2:g}, or a larger central_fraction"
        )
    if not -180 <= twists[0] <= twists[1] <= 180:
        raise InvalidArgument(
            f"twists from {twists[0]:g} to {twists[1]:g} degrees: must lie in -180 to 180 and in rising order"
        )
    peaks = sorted(_scan(correlogram, rises, twists, part(progress, 0.0, 0.7)), reverse=True)
    climbed: list[tuple[float, float, float]] = []
    starts: list[tuple[float, float]] = []
    for _, rise, twist in peaks:
        by_rise, by_twist = correlogram.steps_of(rise)
        if any(abs(rise - r) <= 3 * by_rise and abs(twist - t) <= 3 * by_twist for r, t in starts):
            continue
        progress(0.7 + 0.3 * len(starts) / REFINED, "refining")
        starts.append((rise, twist))
        climbed.append(_climbed(correlogram, rise, twist, rises, twists))
        if len(starts) == REFINED or (count == 1 and len(starts) == REFINED // 3):
            break
    # Where the score rises on beyond a range there is no peak.
    inside = [peak for peak in climbed if rises[0] < peak[1] < rises[1]]
    climbed = sorted(inside or climbed, reverse=True)
    kept: list[tuple[float, float, float]] = []
    for peak in climbed:
        if len(kept) == count or (kept and peak[0] <= 0):
            break
        if any(_adds_nothing(correlogram, peak, other) for other in kept):
            continue
        smallest = _reduced(correlogram, peak, rises, twists)
        if not any(_adds_nothing(correlogram, smallest, other) for other in kept):
            kept.append(smallest)
    progress(1.0, "refining")
    return tuple(_candidate(correlogram, peak) for peak in kept)


def _candidate(correlogram: _Correlogram, peak: tuple[float, float, float]) -> Candidate:
    score, rise, twist = peak
    line, turn = correlogram.line(rise, twist)
    return Candidate(
        HelicalSymmetry(rise, twist, correlogram.order),
        score,
        correlogram.one(rise, -twist),
        line,
        math.inf if turn == 0 else 360.0 * rise / abs(turn),
        *_widths(correlogram, score, rise, twist),
    )


def find(
    volume: NDArray[np.floating],
    rise_range_angstrom: tuple[float, float],
    twist_range_degrees: tuple[float, float],
    voxel_size_angstrom: float,
    cylinder: Cylinder = WHOLE,
    *,
    order: int = 1,
    low_pass_angstrom: float | None = None,
    high_pass_angstrom: float | None = None,
    count: int = 5,
    progress: Progress = no_progress,
) -> tuple[Candidate, ...]:
    """The helical symmetries that a volume may have, the best first.

    Every rise and twist in the ranges is looked at, in steps that no peak fits between; the best peaks are refined. Of
    operators that are multiples of one another the smallest is given of which all multiples are seen.

    Args:
        volume: cube `[z, y, x]` of either contrast, the axis along z through voxel n//2 (`find_axis`, `upright`).
        rise_range_angstrom: smallest and largest; the largest is at most 0.4 of the cylinder's length.
        twist_range_degrees: smallest and largest, positive for a right-handed screw.
        voxel_size_angstrom: of the volume.
        cylinder: what is looked at: the filament, without its surroundings and what lies at its ends.
        order: n of the rotational symmetry Cn about the axis. Where it is left at 1 for a helix that has one, twists
            that differ by 360/n score the same.
        low_pass_angstrom: finest detail compared; three voxels where left out. Subunits that are not resolved there
            leave the rise open along their turns: see `Candidate.ambiguities`.
        high_pass_angstrom: coarsest detail compared; no limit where left out.
        count: candidates at most.
        progress: told of the scan.

    Raises InvalidArgument: a volume that is no cube, or constant; ranges that are empty, too wide to scan, or beyond
        what the cylinder holds; an order below 1.
    """
    if order < 1:
        raise InvalidArgument(f"order {order}: must be at least 1")
    if count < 1:
        raise InvalidArgument(f"count {count}: must be at least 1")
    filtered = _Filtered(volume, voxel_size_angstrom, low_pass_angstrom, high_pass_angstrom)
    correlogram = _Correlogram(filtered, order, cylinder)
    return _search(correlogram, rise_range_angstrom, twist_range_degrees, count, progress)


def refine(
    volume: NDArray[np.floating],
    start: HelicalSymmetry,
    voxel_size_angstrom: float,
    cylinder: Cylinder = WHOLE,
    *,
    rise_search_angstrom: float | None = None,
    twist_search_degrees: float = 5.0,
    low_pass_angstrom: float | None = None,
    high_pass_angstrom: float | None = None,
    progress: Progress = no_progress,
) -> Candidate:
    """The rise and twist near `start` under which a volume correlates best with itself.

    The whole of both ranges is scanned before the best is refined, so the result does not depend on where in them the
    start lies. The rise is looked for within `rise_search_angstrom` of the start's, a tenth of it where left out.
    Everything else as `find`.
    """
    around = 0.1 if rise_search_angstrom is None else rise_search_angstrom / start.rise_angstrom
    if around < 0 or twist_search_degrees < 0:
        raise InvalidArgument(
            f"search ranges of {around * start.rise_angstrom:g} Å and {twist_search_degrees:g} degrees: must not be "
            "negative"
        )
    filtered = _Filtered(volume, voxel_size_angstrom, low_pass_angstrom, high_pass_angstrom)
    return _near(_Correlogram(filtered, start.order, cylinder), start, around, twist_search_degrees, progress)


def _near(
    correlogram: _Correlogram, start: HelicalSymmetry, rise_share: float, twist_degrees: float, progress: Progress
) -> Candidate:
    """The best within a share of a rise and so many degrees of a twist."""
    rises = (start.rise_angstrom * max(1 - rise_share, 1e-3), start.rise_angstrom * (1 + rise_share))
    twists = (max(-180.0, start.twist_degrees - twist_degrees), min(180.0, start.twist_degrees + twist_degrees))
    return _search(correlogram, rises, twists, 1, progress)[0]


# Imposing


@dataclass(frozen=True, eq=False)
class Symmetrised:
    """volume: `[z, y, x]`, 0 outside the cylinder's radii. coverage: `[z, y, x]`, how many subunits' densities were
    averaged there, 0 outside; a subunit near the end of the cylinder counts in part.
    """

    volume: Array
    coverage: Array


def _mixing(
    symmetry: HelicalSymmetry, rise_voxels: float, box_size: int, cylinder: Cylinder
) -> tuple[Floats, Floats, Floats]:
    """Steps (k,), and weights (k, z out, z in) of spline coefficients along z with their sums (z out,).

    Slice z takes, k steps on, what lies at z - k rise, if that is within the cylinder; its ends fade over two voxels or
    a quarter of it, so that no seam is left where the number of subunits changes.
    """
    first, last = cylinder.slices(box_size)
    if rise_voxels > last - first - 1:
        raise InvalidArgument(
            f"rise_angstrom {symmetry.rise_angstrom:g}: larger than the {last - first} voxels of the box that are "
            "used; some of it would have no subunit to take density from"
        )
    furthest = math.ceil((box_size - 1) / rise_voxels)
    steps = np.arange(-furthest, furthest + 1, dtype=np.float64)
    source = np.arange(box_size) - steps[:, None] * rise_voxels
    # Full where a rise's length is left within the soft ends, so that every slice has at least one whole subunit.
    edge = max(0.0, min(2.0, (last - first) / 4, (last - first - rise_voxels) / 2))
    depth = np.minimum(source - first, last - source)
    share = np.clip((depth + 1e-9) / edge, 0, 1) if edge > 0 else np.ones_like(depth)
    weights = np.where(depth >= -1e-9, 0.5 - 0.5 * np.cos(np.pi * share), 0.0)
    mixing = np.zeros((len(steps), box_size, box_size))
    k, z = np.nonzero(weights > 0)
    base = np.floor(source[k, z]).astype(np.int64)
    t = source[k, z] - base
    cubic = ((1 - t) ** 3 / 6, 2 / 3 - t**2 + t**3 / 2, 2 / 3 - (1 - t) ** 2 + (1 - t) ** 3 / 2, t**3 / 6)
    for offset, values in zip((-1, 0, 1, 2), cubic, strict=True):
        # The spline is mirrored at the ends of the box.
        row = np.abs(base + offset)
        row = np.where(row > box_size - 1, 2 * (box_size - 1) - row, row)
        np.add.at(mixing, (k, z, row), values * weights[k, z])
    used = weights.any(axis=1)
    return steps[used], mixing[used], weights.sum(axis=0)


def _rolled(
    walls: Floats, spacing: float, box_size: int, inner: float, outer: float
) -> tuple[Array, NDArray[np.bool_]]:
    """The inverse of `_unrolled`: a cube of walls (radius from 0 at `spacing`, z, angle), and its cylinder `[y, x]`."""
    angles = walls.shape[2]
    r = centred_coordinates(box_size).astype(np.float64)
    radius = np.hypot(r[:, None], r)
    within = (radius >= inner - 1e-9) & (radius <= outer + 1e-9)
    y, x = np.nonzero(within)
    # Beyond the axis lies the other side.
    before = min(8, len(walls) - 1)
    beyond = np.roll(walls[before:0:-1], angles // 2, axis=2)
    whole = np.concatenate([beyond, walls])
    whole = scipy.ndimage.spline_filter1d(whole, 3, axis=0, mode="mirror")
    whole = scipy.ndimage.spline_filter1d(whole, 3, axis=2, mode="grid-wrap")
    at = [radius[y, x] / spacing + before, np.arctan2(r[y], r[x]) * (angles / (2 * math.pi))]
    volume = np.zeros((box_size,) * 3, dtype=np.float32)
    for z in range(box_size):
        volume[z, y, x] = scipy.ndimage.map_coordinates(whole[:, z], at, order=3, prefilter=False, mode="grid-wrap")
    return volume, within


def symmetrise(
    volume: NDArray[np.floating],
    symmetry: HelicalSymmetry,
    voxel_size_angstrom: float,
    cylinder: Cylinder = WHOLE,
) -> Symmetrised:
    """A volume averaged over its subunits, filling the box.

    Every voxel of the result is the mean over the operators that bring it from within the cylinder: nothing from
    outside the central part of the box or beyond its outer radius is used. Cubic splines to and from cylinders of twice
    the volume's sampling; turns are exact.

    Args:
        volume: cube `[z, y, x]`, the axis along z through voxel n//2.
        symmetry: that is imposed.
        voxel_size_angstrom: of the volume.
        cylinder: what the density is taken from along z, and the radii that are filled.

    Raises InvalidArgument: a volume that is no cube, a cylinder it doesn't hold, a rise longer than its central part.
    """
    checked = _checked(volume, voxel_size_angstrom)
    n = checked.shape[0]
    inner, outer = cylinder.radii_voxels(n, voxel_size_angstrom)
    steps, mixing, counts = _mixing(symmetry, symmetry.rise_angstrom / voxel_size_angstrom, n, cylinder)
    spacing = 0.5
    # Two nodes more than the cylinder, for the splines.
    radii = np.arange(0.0, outer + 2 * spacing + 1e-9, spacing)
    angles = _angles(outer)
    walls = scipy.ndimage.spline_filter1d(_unrolled(checked, radii, 0, n - 1, angles), 3, axis=1, mode="mirror")
    spectra = np.fft.rfft(walls, axis=2)
    mixed = np.zeros_like(spectra)
    flat = mixing.reshape(len(steps), -1)
    for n_fold in range(0, spectra.shape[2], symmetry.order):
        phases = np.exp(-1j * np.radians(symmetry.twist_degrees) * n_fold * steps)
        weights = (phases.real @ flat + 1j * (phases.imag @ flat)).reshape(n, n)
        mixed[:, :, n_fold] = spectra[:, :, n_fold] @ weights.T
    mixed /= counts[:, None]
    result, within = _rolled(np.fft.irfft(mixed, angles, axis=2), spacing, n, inner, outer)
    coverage = np.where(within, counts[:, None, None] * symmetry.order, 0.0)
    return Symmetrised(result, coverage.astype(np.float32))


# The axis


def _whitened(volume: Array, cycles: float) -> Array:
    """A volume with the same mean power in every shell up to so many cycles per box: the coarsest, which the box and
    its mask shape more than the filament does, would outweigh the others."""
    spectrum = scipy.fft.rfftn(volume)
    shells = shell_index(volume.shape[0])
    power = np.abs(spectrum) ** 2
    mean = np.bincount(shells.ravel(), power.ravel()) / np.bincount(shells.ravel())
    shell = np.arange(len(mean))
    kept = (shell > 0) & (shell <= cycles)
    scale = np.where(kept, 1 / np.sqrt(np.maximum(mean, 1e-12 * mean.max())), 0.0)
    spectrum *= scale[shells]
    return np.asarray(scipy.fft.irfftn(spectrum, volume.shape), dtype=np.float32)


def find_axis(volume: NDArray[np.floating], *, cycles: float = 6.0, protein_sign: float = 1.0) -> Axis:
    """Where the axis of a filament lies in a volume.

    Looked for is the axis about which the volume's transform has the most power left when it is averaged round it, up
    to `cycles` per box, all shells counting alike: first over all directions about the centre of mass, then direction
    and place together. The axis has no sense here, and any turn about it or move along it is the same: the direction
    that is nearer to +z is given, by the smallest rotation to it, and the shift at right angles to it. `upright` undoes
    it, and `refine_axis` improves on it once the helix is known.

    A filament that winds less than about twice through the box is no cylinder in it, and its axis may be found ten or
    twenty degrees off.

    Args:
        volume: cube `[z, y, x]`, longer along the filament than the filament is wide, or hollow.
        cycles: finest detail looked at, cycles per box.
        protein_sign: of the density, for its centre of mass: -1 in dark contrast.

    Raises InvalidArgument: a volume that is no cube, or constant.
    """
    checked = _checked(volume, 1.0) * np.float32(protein_sign)
    n = checked.shape[0]
    edge = usual_edge_voxels(n)
    mask = soft_sphere(n, n / 2 - edge, edge)
    checked = (checked - np.float32(np.average(checked, weights=mask > 0.5))) * mask
    mass = np.maximum(checked - 0.25 * checked.max(), 0).astype(np.float64)
    r = centred_coordinates(n).astype(np.float64)
    centre = np.array([(mass.sum(axis=axes) * r).sum() for axes in ((0, 1), (0, 2), (1, 2))]) / mass.sum()
    k_max = min(cycles, n / 4)
    # So many turns that no wave around the filament below k_max, as wide as half the box, is taken for its mean.
    turns = point_group(f"C{2 * math.ceil(math.pi * k_max / 4) + 5}")
    whitened = _whitened(checked, k_max + 1)
    coarse = find_axes(transform_volume(whitened, Rotation.identity(), -centre), k_max, turns)

    band = Band(n, 1.0, k_max, None, "cpu")
    table = SpectrumTable(torch.from_numpy(whitened[None]), band.k_max + 0.5)
    around = np.einsum("gij,kj->gki", turns.as_matrix(), band.points.numpy().astype(np.float64))

    def placed(at: Floats) -> tuple[Rotation, Floats]:
        rotation = coarse * Rotation.from_rotvec([*np.radians(at[:2]), 0.0])
        return rotation, centre + rotation.apply([at[2], at[3], 0.0])

    def left(at: Floats) -> float:
        rotation, place = placed(at)
        points = around @ rotation.as_matrix().T
        values = table.sample(torch.from_numpy(points.astype(np.float32))[None])[0].numpy()
        moved = values * np.exp(2j * np.pi / n * (points @ place))
        return float((np.abs(moved.mean(axis=0)) ** 2).sum())

    whole = left(np.zeros(4))
    simplex = np.concatenate([np.full((1, 4), -0.3), np.diag([2.0, 2.0, 1.0, 1.0])])
    rotation, place = placed(_lowest(lambda at: -left(at) / whole, simplex, 0.01, 400))
    return _along(np.asarray(rotation.apply([0.0, 0.0, 1.0])), place)


def refine_axis(
    volume: NDArray[np.floating],
    start: Axis,
    symmetry: HelicalSymmetry,
    voxel_size_angstrom: float,
    cylinder: Cylinder = WHOLE,
    *,
    low_pass_angstrom: float | None = None,
    high_pass_angstrom: float | None = None,
    progress: Progress = no_progress,
) -> tuple[Axis, Candidate]:
    """The axis near `start` about which a volume is most nearly a helix, and its rise and twist.

    Axis and helix are refined in turn, the helix within a tenth of its rise and 5 degrees of its twist. The cylinder
    lies about the axis, so that it must be within the box there. The axis is returned with the sense of +z.
    Everything else as `find`.
    """
    filtered = _Filtered(volume, voxel_size_angstrom, low_pass_angstrom, high_pass_angstrom)

    def placed(at: Floats) -> Axis:
        rotation = start.rotation * Rotation.from_rotvec([*np.radians(at[:2]), 0.0])
        return Axis(rotation, start.shift_voxels + rotation.apply([at[2], at[3], 0.0]))

    def best(at: Floats, about: HelicalSymmetry, report: Progress) -> Candidate:
        return _near(_Correlogram(filtered, about.order, cylinder, placed(at)), about, 0.1, 5.0, report)

    at = np.zeros(4)
    found = best(at, symmetry, part(progress, 0.0, 0.1))
    for turn, size in enumerate((1.0, 0.3)):
        report = part(progress, 0.1 + 0.45 * turn, 0.55 + 0.45 * turn)
        helix = found.symmetry
        calls = 0

        def misfit(at: Floats, helix: HelicalSymmetry = helix, report: Progress = report) -> float:
            nonlocal calls
            calls += 1
            report(min(1.0, calls / AXIS_EVALUATIONS), "refining the axis")
            correlogram = _Correlogram(filtered, helix.order, cylinder, placed(at))
            return -correlogram.one(helix.rise_angstrom, helix.twist_degrees)

        simplex = at + size * np.concatenate([np.full((1, 4), -0.1), np.diag([1.0, 1.0, 0.5, 0.5])])
        at = _lowest(misfit, simplex, 0.05, AXIS_EVALUATIONS, 1e-4)
        found = best(at, helix, no_progress)
    axis = placed(at)
    return _along(axis.direction, axis.shift_voxels), found


def upright(volume: NDArray[np.floating], axis: Axis) -> Array:
    """A volume `[z, y, x]` turned and moved so that its axis lies along z through voxel n//2.

    Of particles at poses (R, t) whose average has the axis (Q, s), the poses in the new frame are (R Q, t + R s).
    """
    back = axis.rotation.inv()
    return transform_volume(np.asarray(volume, dtype=np.float32), back, -back.apply(axis.shift_voxels))
