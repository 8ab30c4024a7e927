"""The slab of ice, or the lamella, in a tomogram: its two surfaces and its thickness.

Above and below the specimen a tomogram has noise alone. Between details of 30 and 120 Å, where a specimen has most of
its power, the variance of each section is measured in columns across the field; in each column it steps up at one
surface and down at the other. Planes through the steps of all columns, those that don't agree left out, are the
surfaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.progress import Progress, no_progress

#: Standard deviations of the Gaussians between which details count.
_FINE_ANGSTROM, _COARSE_ANGSTROM = 15.0, 50.0
_LEAST_SECTIONS = 12
#: Sections outside either surface without which no surface is seen.
_OUTSIDE = 3
_LEAST_CONTRAST = 0.1
#: Matter thins out towards a surface: it ends where so much is left of the variance that the inside has more.
_END = 0.15
_LEAST_SHARE = 0.5
_REJECTED = 3.0
_SLAB_BYTES = 32 << 20


@dataclass(frozen=True)
class Plane:
    """z = centre + slope_x (x - c_x) + slope_y (y - c_y) in voxels, c voxel n // 2 of each side."""

    centre: float
    slope_x: float
    slope_y: float

    def at(self, x: NDArray[np.float64], y: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.float64]:
        """z of positions in the plane of a volume of that shape."""
        return self.centre + self.slope_x * (x - shape[2] // 2) + self.slope_y * (y - shape[1] // 2)


@dataclass(frozen=True)
class IceSlab:
    """The surfaces of lower and higher z.

    columns: (n, 4), x and y of each column's centre, and z of its own two surfaces; agree: which of them fit the
    planes. thickness, thickness_error: along the normal, voxels. contrast: variance inside over outside, less 1.
    """

    found: bool
    bottom: Plane
    top: Plane
    thickness: float
    thickness_error: float
    contrast: float
    columns: NDArray[np.float64]
    agree: NDArray[np.bool_]


def memory_bytes(shape: tuple[int, int, int]) -> int:
    """What `find_slab` needs at most."""
    return 6 * max(_SLAB_BYTES, 4 * shape[1] * shape[2])


def find_slab(
    read: Callable[[int, int], NDArray[np.float32]],
    shape: tuple[int, int, int],
    voxel_size_angstrom: float,
    patch_voxels: float | None = None,
    progress: Progress = no_progress,
) -> IceSlab:
    """The slab in a tomogram [z, y, x], read by sections.

    Args:
        read: sections start to stop.
        shape: of the tomogram.
        voxel_size_angstrom: of the tomogram.
        patch_voxels: side of a column; an eighth of the shorter side of the field where left out.
        progress: called as sections are measured.

    Raises FailedPrecondition where there are fewer than 12 sections, or fewer than 4 columns.
    """
    depth, height, width = shape
    if depth < _LEAST_SECTIONS:
        raise FailedPrecondition(f"{depth} sections: {_LEAST_SECTIONS} are needed to see the surfaces of a slab")
    patch = patch_voxels or min(height, width) / 8
    counts = [max(1, round(side / patch)) for side in (height, width)]
    if counts[0] * counts[1] < 4:
        raise FailedPrecondition(f"columns of {patch:.0f} voxels: {counts[0] * counts[1]} fit, 4 are needed")
    edges = [
        np.linspace(0, side, count + 1).round().astype(int) for side, count in zip((height, width), counts, strict=True)
    ]
    power = _section_power(read, shape, voxel_size_angstrom, edges, progress)
    level = np.log(np.maximum(power, 1e-12 * max(float(power.max()), 1e-300)))
    # each column's neighbours help it: surfaces are smooth
    level = scipy.ndimage.gaussian_filter(level, (1.0, 0.5, 0.5), mode="nearest")

    low, high, inside, outside = _steps(level.mean(axis=(1, 2)))
    contrast = math.exp(inside - outside) - 1
    centres = [(edge[:-1] + edge[1:] - 1) / 2 for edge in edges]
    columns = []
    for i, j in np.ndindex(counts[0], counts[1]):
        own_low, own_high, _, _ = _steps(level[:, i, j])
        columns.append((centres[1][j], centres[0][i], own_low, own_high))
    table = np.array(columns)
    (bottom, fits_bottom, scatter_bottom), (top, fits_top, scatter_top) = (
        _plane(table[:, 0], table[:, 1], table[:, column], shape) for column in (2, 3)
    )
    agree = fits_bottom & fits_top
    below = _reach(level, table, agree, bottom.at(table[:, 0], table[:, 1], shape), -1, inside, outside)
    above = _reach(level, table, agree, top.at(table[:, 0], table[:, 1], shape), 1, inside, outside)
    bottom, top = replace(bottom, centre=bottom.centre - below), replace(top, centre=top.centre + above)
    slope = math.hypot((bottom.slope_x + top.slope_x) / 2, (bottom.slope_y + top.slope_y) / 2)
    cosine = 1 / math.sqrt(1 + slope**2)
    used = max(1, int(agree.sum()))
    # How far it is from the step to where matter ends says how well the end is known.
    scatter = math.hypot(scatter_bottom, scatter_top) / math.sqrt(used)
    error = math.hypot(scatter, below / 2, above / 2, 0.5) * cosine
    low, high = bottom.centre, top.centre
    enough = low >= _OUTSIDE and high <= depth - 1 - _OUTSIDE and high > low
    return IceSlab(
        found=enough and contrast >= _LEAST_CONTRAST and float(agree.mean()) >= _LEAST_SHARE,
        bottom=bottom,
        top=top,
        thickness=(top.centre - bottom.centre) * cosine,
        thickness_error=error,
        contrast=contrast,
        columns=table,
        agree=agree,
    )


def write_mask(
    slab: IceSlab,
    shape: tuple[int, int, int],
    write: Callable[[NDArray[np.float32]], object],
    progress: Progress = no_progress,
) -> None:
    """Writes 1 between the planes and 0 elsewhere, section by section."""
    y, x = np.indices(shape[1:]).astype(np.float64)
    low, high = slab.bottom.at(x, y, shape), slab.top.at(x, y, shape)
    for z in range(shape[0]):
        write(((low <= z) & (z <= high)).astype(np.float32)[None])
        progress((z + 1) / shape[0], "writing the mask")


def _section_power(
    read: Callable[[int, int], NDArray[np.float32]],
    shape: tuple[int, int, int],
    voxel_size_angstrom: float,
    edges: list[NDArray[np.int64]],
    progress: Progress,
) -> NDArray[np.float64]:
    """Mean square of the band-passed sections in each column, (z, y, x of columns)."""
    fine = max(_FINE_ANGSTROM / voxel_size_angstrom, 0.7)
    coarse = max(_COARSE_ANGSTROM / voxel_size_angstrom, 2 * fine)
    power = np.empty((shape[0], len(edges[0]) - 1, len(edges[1]) - 1))
    areas = np.outer(np.diff(edges[0]), np.diff(edges[1]))
    step = max(1, _SLAB_BYTES // (4 * shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        slab = read(start, stop)
        band = scipy.ndimage.gaussian_filter(slab, (0, fine, fine)) - scipy.ndimage.gaussian_filter(
            slab, (0, coarse, coarse), truncate=3
        )
        np.square(band, out=band)
        rows = np.add.reduceat(band, edges[0][:-1], axis=1, dtype=np.float64)
        power[start:stop] = np.add.reduceat(rows, edges[1][:-1], axis=2) / areas
        progress(stop / shape[0], "measuring sections", sections=float(stop))
    return power


def _steps(level: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Where a profile steps up and down, in sections, and its levels inside and outside.

    Of all pairs the one whose two levels leave the least squares, then each place where the profile passes through the
    middle of the levels.
    """
    depth = len(level)
    sums = np.concatenate([[0.0], np.cumsum(level)])
    low, high = np.triu_indices(depth + 1, 2)
    proper = high - low < depth
    low, high = low[proper], high[proper]
    inside_count = high - low
    inside = (sums[high] - sums[low]) / inside_count
    outside = (sums[-1] - sums[high] + sums[low]) / (depth - inside_count)
    explained = np.where(inside > outside, inside_count * inside**2 + (depth - inside_count) * outside**2, -np.inf)
    if not np.isfinite(explained).any():
        return 0.0, float(depth - 1), float(level.mean()), float(level.mean())
    best = int(np.argmax(explained))
    first, last = int(low[best]), int(high[best])
    levels = float(inside[best]), float(outside[best])
    return first - 0.5, last - 0.5, *levels


def _reach(
    level: NDArray[np.float64],
    columns: NDArray[np.float64],
    agree: NDArray[np.bool_],
    surface: NDArray[np.float64],
    outwards: int,
    inside: float,
    outside: float,
) -> float:
    """How far beyond the steps matter reaches, in sections: by the mean profile of the columns, each from its step."""
    depth = len(level)
    profiles = level.reshape(depth, -1)
    end = math.log(math.exp(outside) + _END * (math.exp(inside) - math.exp(outside)))
    before = end + 1.0
    for distance in range(depth):
        places = surface[agree] + outwards * distance
        there = (places >= 0) & (places <= depth - 1)
        if not there.any():
            return float(distance)
        lower = np.floor(places[there]).astype(int)
        share = places[there] - lower
        own = profiles[:, agree][:, there]
        column = np.arange(own.shape[1])
        values = own[lower, column] * (1 - share) + own[np.minimum(lower + 1, depth - 1), column] * share
        now = float(values.mean())
        if now < end:
            return max(0.0, distance - (end - now) / (before - now)) if distance else 0.0
        before = now
    return float(depth)


def _plane(
    x: NDArray[np.float64], y: NDArray[np.float64], z: NDArray[np.float64], shape: tuple[int, int, int]
) -> tuple[Plane, NDArray[np.bool_], float]:
    """The plane through most of the points, which of them it fits, and their standard deviation about it."""
    terms = np.stack([np.ones_like(x), x - shape[2] // 2, y - shape[1] // 2], axis=1)
    kept = np.abs(z - np.median(z)) <= max(3 * 1.4826 * float(np.median(np.abs(z - np.median(z)))), 0.2 * shape[0])
    solution: NDArray[np.float64] = np.zeros(3)
    scatter = 0.0
    for _ in range(10):
        if kept.sum() < 4:
            break
        solution = np.asarray(np.linalg.lstsq(terms[kept], z[kept], rcond=None)[0], np.float64)
        off = np.abs(z - terms @ solution)
        scatter = 1.4826 * float(np.median(off[kept]))
        again = off <= _REJECTED * max(scatter, 1.0)
        if (again == kept).all():
            break
        kept = again
    return Plane(*(float(value) for value in solution)), kept, scatter
