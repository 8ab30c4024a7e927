"""Particles of one size, found without a template as peaks of a difference of two Gaussian smoothings.

The filter answers most strongly to bright blobs of one size: for a difference of Gaussians close to the Laplacian of
a Gaussian the response to a ball of radius r is greatest at sigma = r / sqrt(3), hence sigma_1 = diameter / (2
sqrt(3)) and sigma_2 = 1.1 sigma_1 (Lindeberg, Int. J. Comput. Vis. 30 (1998) 79; Voss et al., J. Struct. Biol. 166
(2009) 205).

The Gaussians are those of `scipy.ndimage.gaussian_filter` with its defaults: sampled, cut off at 4 sigma, normalised
to a sum of 1, the volume reflected at its faces (d c b a | a b c d | d c b a). They are applied as products with
banded matrices, one axis after another, which leaves the work to BLAS and is several times faster than a convolution
line by line.

The tomogram is read in slabs, each plane once, and every filtered voxel is computed once and compared with its
neighbours wherever slabs meet, so that tiling neither loses nor doubles a peak. Where planes are so large that they
are cut along y too, each part is read by itself, and the rows beside the cut are computed for both parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress, no_progress, part
from services.picking.slabs import Array, ReadSlab, RollingWindow, Shape, read_memory_bytes

#: A Gaussian is cut off at so many sigmas, as scipy does.
TRUNCATE = 4.0
#: Memory that the tiles are laid out for.
TILE_BYTES = 256 << 20
#: Planes filtered together: at most, and at least (a plane that is too large for these is cut along y).
MAX_DEPTH, MIN_DEPTH = 32, 4
#: Voxels along y or x that one matrix product gives.
BLOCK = 64
#: Planes that filtering, statistics and the search for peaks take for themselves.
SCRATCH_PLANES = 16
#: Peaks are sifted again when so many wait.
SIFT_PEAKS = 1 << 20

_NEIGHBOURS = [offset for offset in product((-1, 0, 1), repeat=3) if offset != (0, 0, 0)]


@dataclass(frozen=True)
class Picks:
    """Peaks of a filtered tomogram, strongest first.

    Attributes:
        positions: int64 `[n, 3]`, (x, y, z) voxels.
        scores: float64 `[n]`, (peak - mean) / standard deviation of the filtered tomogram.
        mean, deviation: of all voxels of the filtered tomogram, protein positive.
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float64]
    mean: float
    deviation: float


@dataclass(frozen=True)
class Tiles:
    """How a volume is cut up: `depth` planes by `rows` rows at a time, and the memory that takes."""

    depth: int
    rows: int
    memory_bytes: int


def sigmas_voxels(
    particle_diameter_angstrom: float, voxel_size_angstrom: float, sigma_ratio: float = 1.1
) -> tuple[float, float]:
    """The two sigmas, in voxels, for particles of a diameter in Å."""
    sigma = particle_diameter_angstrom / voxel_size_angstrom / (2 * math.sqrt(3))
    return sigma, sigma * sigma_ratio


def check_diameter(shape: Shape, voxel_size_angstrom: float, particle_diameter_angstrom: float) -> None:
    """Raises InvalidArgument for particles smaller than two voxels or larger than the tomogram."""
    diameter = particle_diameter_angstrom / voxel_size_angstrom
    if not 2 <= diameter <= min(shape):
        raise InvalidArgument(
            f"particle_diameter_angstrom is {particle_diameter_angstrom:g} Å, {diameter:.3g} voxels of "
            f"{voxel_size_angstrom:g} Å: it must be from 2 voxels to the tomogram's smallest side, {min(shape)} voxels"
        )


def plan_tiles(shape: Shape, sigma: float, budget_bytes: int = TILE_BYTES) -> Tiles:
    """Cut a volume `[z, y, x]` up so that filtering it with Gaussians of up to `sigma` voxels keeps to a memory where
    that is possible.

    The window holds the planes that the Gaussian reaches. It is cut along y, at the price of reading the volume
    once per cut, only until the rows computed twice outweigh the others.
    """
    radius = _radius(sigma)
    rows = shape[1]
    while True:
        plane = 4 * shape[2] * min(shape[1], rows + 2 * (radius + 1))
        depth = min(MAX_DEPTH, shape[0])
        while depth > 1 and _tile_bytes(shape, plane, depth, radius) > budget_bytes:
            depth -= 1
        if depth >= min(MIN_DEPTH, shape[0]) or rows <= max(radius, BLOCK):
            break
        rows = math.ceil(rows / 2)
    depth = max(depth, min(MIN_DEPTH, shape[0]))
    return Tiles(depth, rows, _tile_bytes(shape, plane, depth, radius) + read_memory_bytes(shape))


def memory_bytes(
    shape: Shape,
    voxel_size_angstrom: float,
    particle_diameter_angstrom: float,
    sigma_ratio: float = 1.1,
    threshold: float = 3.0,
) -> int:
    """What `difference_of_gaussians` takes at most.

    Beside the tiles these are the peaks that may turn out to pass the threshold. Filtered noise has 1.1 maxima per
    cube of the diameter's side (Bardeen et al., Astrophys. J. 304 (1986) 15, eq. 4.11b), and no two maxima touch; a
    threshold well above 0 keeps a few of them.
    """
    check_diameter(shape, voxel_size_angstrom, particle_diameter_angstrom)
    diameter = particle_diameter_angstrom / voxel_size_angstrom
    peaks = math.prod(shape) / max(8.0, diameter**3 / 2)
    kept = 0.25 if threshold >= 2 else 1.0
    sigma = sigmas_voxels(particle_diameter_angstrom, voxel_size_angstrom, sigma_ratio)[1]
    return plan_tiles(shape, sigma).memory_bytes + int(100 * kept * peaks)


def difference_of_gaussians(
    read_slab: ReadSlab,
    shape: Shape,
    voxel_size_angstrom: float,
    particle_diameter_angstrom: float,
    *,
    contrast: str,
    sigma_ratio: float = 1.1,
    threshold: float = 3.0,
    min_distance_angstrom: float | None = None,
    max_picks: int = 0,
    progress: Progress = no_progress,
    tile_bytes: int = TILE_BYTES,
) -> Picks:
    """Pick the particles of a tomogram `[z, y, x]`.

    A peak is a voxel with all its 26 neighbours in the tomogram (never one on a face, where the reflected volume
    would decide), not below any of them and above those that come before it in z, y, x order: of two equal neighbours
    the first is the peak.

    Args:
        read_slab: reads planes of the tomogram.
        shape: of the tomogram.
        voxel_size_angstrom: of the tomogram.
        particle_diameter_angstrom: sets the Gaussians; from two voxels to the tomogram's smallest side.
        contrast: "dark" where protein is negative, "light" where it is positive.
        sigma_ratio: the larger sigma over the smaller, above 1.
        threshold: least score of a pick.
        min_distance_angstrom: of two picks nearer than this the stronger stays (of equal ones the first in z, y, x
            order); the diameter where None.
        max_picks: keep the strongest so many; 0 for all.
        progress: told how far the work is.
        tile_bytes: memory the tiles are laid out for.

    Raises:
        InvalidArgument: a diameter or ratio that can't work.
        FailedPrecondition: voxels that are not finite, or a constant tomogram.
    """
    check_diameter(shape, voxel_size_angstrom, particle_diameter_angstrom)
    if sigma_ratio <= 1:
        raise InvalidArgument(f"sigma_ratio is {sigma_ratio:g}, it must be above 1")
    if contrast not in ("dark", "light"):
        raise InvalidArgument(f"contrast is {contrast!r}, it must be 'dark' or 'light'")
    sigmas = sigmas_voxels(particle_diameter_angstrom, voxel_size_angstrom, sigma_ratio)
    peaks = _find_peaks(
        read_slab, shape, sigmas, -1 if contrast == "dark" else 1, threshold, part(progress, 0, 0.95), tile_bytes
    )
    scores = (peaks.values.astype(np.float64) - peaks.mean) / peaks.deviation
    above = scores >= threshold
    z, y, x = np.unravel_index(peaks.indices[above], shape)
    positions = np.stack([x, y, z], axis=1).astype(np.int64)
    if min_distance_angstrom is None:
        min_distance_angstrom = particle_diameter_angstrom
    kept = suppress(
        positions,
        scores[above],
        min_distance_angstrom / voxel_size_angstrom,
        max_picks,
        part(progress, 0.95, 1),
    )
    return Picks(positions[kept], scores[above][kept], peaks.mean, peaks.deviation)


def preview(
    read_slab: ReadSlab,
    shape: Shape,
    z_first: int,
    z_count: int,
    voxel_size_angstrom: float,
    particle_diameter_angstrom: float,
    *,
    contrast: str,
    sigma_ratio: float = 1.1,
    threshold: float = 3.0,
    min_distance_angstrom: float | None = None,
    max_picks: int = 0,
    progress: Progress = no_progress,
    tile_bytes: int = TILE_BYTES,
) -> Picks:
    """Pick the particles of the planes `z_first` to `z_first + z_count - 1` alone, to try parameters out.

    The planes that the filter reaches are read too, so that responses and local maxima are those of the whole
    tomogram. Mean and deviation, hence scores, are of the planes read. A chain of overlapping peaks that reaches
    beyond these planes may be resolved differently in the whole. Positions are those of the whole tomogram; the other
    arguments are those of `difference_of_gaussians`.

    Raises:
        InvalidArgument: planes outside the tomogram, or a diameter or ratio that can't work.
        FailedPrecondition: voxels that are not finite, or constant planes.
    """
    check_diameter(shape, voxel_size_angstrom, particle_diameter_angstrom)
    if z_first < 0 or z_count < 1 or z_first + z_count > shape[0]:
        raise InvalidArgument(f"z_first is {z_first}, z_count {z_count}: the tomogram has planes 0 to {shape[0] - 1}")
    # a peak is compared with its neighbouring planes
    halo = _radius(sigmas_voxels(particle_diameter_angstrom, voxel_size_angstrom, sigma_ratio)[1]) + 1
    low, high = max(0, z_first - halo), min(shape[0], z_first + z_count + halo)
    picks = difference_of_gaussians(
        lambda z0, z1: read_slab(low + z0, low + z1),
        (high - low, shape[1], shape[2]),
        voxel_size_angstrom,
        particle_diameter_angstrom,
        contrast=contrast,
        sigma_ratio=sigma_ratio,
        threshold=threshold,
        min_distance_angstrom=min_distance_angstrom,
        progress=progress,
        tile_bytes=tile_bytes,
    )
    positions = picks.positions + np.array([0, 0, low])
    inside = np.flatnonzero((positions[:, 2] >= z_first) & (positions[:, 2] < z_first + z_count))
    inside = inside[: max_picks or len(inside)]
    return Picks(positions[inside], picks.scores[inside], picks.mean, picks.deviation)


def suppress(
    positions: NDArray[np.integer[Any]] | NDArray[np.float64],
    scores: NDArray[np.float64],
    min_distance_voxels: float,
    max_picks: int = 0,
    progress: Progress = no_progress,
) -> NDArray[np.int64]:
    """Greedy non-maximum suppression: which of the peaks stay, strongest first.

    Peaks are taken in the order of falling scores, equal ones in that of z, y, x; each that stays removes those
    nearer to it than `min_distance_voxels`.

    Args:
        positions: `[n, 3]`, (x, y, z) voxels.
        scores: `[n]`.
        min_distance_voxels: peaks exactly so far apart both stay.
        max_picks: stop at so many; 0 for all.
        progress: told how far the work is.
    """
    order = np.lexsort((positions[:, 0], positions[:, 1], positions[:, 2], -scores))
    limit = max_picks or len(order)
    if min_distance_voxels <= 0 or len(order) == 0:
        return order[:limit]
    sorted_positions = positions[order]
    tree = KDTree(sorted_positions)
    # the tree finds what is at most so far away; squared distances of voxels are whole numbers, so this excludes the
    # limit alone
    reach = min_distance_voxels * (1 - 1e-9)
    free = np.ones(len(order), np.bool_)
    kept: list[int] = []
    for rank, position in enumerate(sorted_positions):
        if rank % 1000 == 0:
            progress(rank / len(order), "separating peaks", picks=len(kept))
        if not free[rank]:
            continue
        kept.append(rank)
        if len(kept) == limit:
            break
        free[tree.query_ball_point(position, reach)] = False
    return order[kept]


@dataclass(frozen=True)
class _Peaks:
    """Local maxima of a filtered tomogram: flat indices and values, with the mean and deviation of all voxels."""

    indices: NDArray[np.int64]
    values: Array
    mean: float
    deviation: float


def _find_peaks(
    read_slab: ReadSlab,
    shape: Shape,
    sigmas: tuple[float, float],
    sign: int,
    threshold: float,
    progress: Progress,
    tile_bytes: int,
) -> _Peaks:
    """All local maxima that may pass the threshold.

    The deviation is known at the end only, but the squares summed so far bound it from below; a peak under the bound
    is dropped at once, so that noise does not pile up. The mean of the filtered tomogram is 0 but for rounding, as a
    reflected Gaussian keeps the sum, for which the bound leaves 1%.
    """
    voxels = math.prod(shape)
    offset = np.float32(0)

    def read(z0: int, z1: int) -> Array:
        slab = read_slab(z0, z1)
        if not np.isfinite(slab).all():
            raise FailedPrecondition(
                f"the tomogram has voxels that are not finite (NaN or infinity) in its planes {z0} to {z1 - 1}"
            )
        return slab - offset

    # smoothing a large offset would cost the small difference its digits
    offset = read(shape[0] // 2, shape[0] // 2 + 1).mean(dtype=np.float64).astype(np.float32)
    indices: list[NDArray[np.int64]] = []
    values: list[Array] = []
    waiting, sift_at = 0, SIFT_PEAKS
    count, total, squares, bound = 0, 0.0, 0.0, -math.inf
    for z, first_row, rows, planes in _filtered(read, shape, sigmas, sign, tile_bytes):
        middle = planes[1, rows].astype(np.float64).ravel()
        count += middle.size
        total += float(middle.sum())
        squares += float(middle @ middle)
        if threshold >= 1:
            bound = 0.99 * threshold * math.sqrt(max(0.0, squares - total * total / count) / voxels)
        if 0 < z < shape[0] - 1:
            found = _maxima(planes, rows, bound)
            values.append(planes[1].ravel()[found])
            indices.append(found + (z * shape[1] + first_row) * shape[2])
            waiting += len(found)
        if waiting > sift_at:
            index, value = np.concatenate(indices), np.concatenate(values)
            strong = value >= bound
            indices, values = [index[strong]], [value[strong]]
            waiting = len(indices[0])
            sift_at = 2 * waiting + SIFT_PEAKS
        del planes  # they would keep the tile's memory while that of the next is taken
        progress(count / voxels, "filtering", peaks=waiting, voxels=count)
    mean = total / voxels
    deviation = math.sqrt(max(0.0, squares / voxels - mean * mean))
    if deviation == 0:
        raise FailedPrecondition("the tomogram is constant, there is nothing to pick")
    none = np.empty(0, np.int64)
    return _Peaks(np.concatenate([none, *indices]), np.concatenate([none.astype(np.float32), *values]), mean, deviation)


def _filtered(
    read_slab: ReadSlab, shape: Shape, sigmas: tuple[float, float], sign: int, tile_bytes: int
) -> Iterator[tuple[int, int, slice, Array]]:
    """Filter a volume tile by tile and give each of its planes, with those before and after it.

    Yields:
        z: the plane's index.
        first_row: the row of the volume that is row 0 of `planes`.
        rows: which rows of `planes` belong to this tile; the others are its neighbours'.
        planes: float32 `[3, y, x]`, the filtered planes z - 1, z, z + 1 (on the first and last plane only 0, 1 and 1,
            2 mean something); overwritten later.
    """
    tiles = plan_tiles(shape, sigmas[1], tile_bytes)
    for y0 in range(0, shape[1], tiles.rows):
        y1 = min(y0 + tiles.rows, shape[1])
        yield from _filtered_rows(read_slab, shape, sigmas, sign, tiles.depth, (y0, y1))


def _filtered_rows(
    read_slab: ReadSlab, shape: Shape, sigmas: tuple[float, float], sign: int, depth: int, own_rows: tuple[int, int]
) -> Iterator[tuple[int, int, slice, Array]]:
    """`_filtered` of the rows y0 to y1 - 1, from the first plane to the last."""
    radius = _radius(sigmas[1])
    first, last = max(own_rows[0] - 1, 0), min(own_rows[1] + 1, shape[1])
    own = slice(own_rows[0] - first, own_rows[1] - first)
    low, high = max(first - radius, 0), min(last + radius, shape[1])
    lines = [_blocks(shape[1], sigma, first, last) for sigma in sigmas]
    columns = [_blocks(shape[2], sigma, 0, shape[2]) for sigma in sigmas]
    window = RollingWindow(read_slab, shape, min(shape[0], depth + 2 * radius), (low, high))
    smooth_z: Array = np.empty((2, depth, high - low, shape[2]), np.float32)
    smooth_y: Array = np.empty((last - first, shape[2]), np.float32)
    wider: Array = np.empty((last - first, shape[2]), np.float32)
    # two planes of the tile before, then this tile's
    result: Array = np.zeros((depth + 2, last - first, shape[2]), np.float32)
    for z0 in range(0, shape[0], depth):
        z1 = min(z0 + depth, shape[0])
        window.advance(max(0, z0 - radius), min(shape[0], z1 + radius))
        for sigma, smooth in zip(sigmas, smooth_z, strict=True):
            start, matrix = _band(shape[0], sigma, z0, z1)
            weights = np.zeros((z1 - z0, len(window.planes)), np.float32)
            weights[:, window.slots(start, start + matrix.shape[1])] = sign * matrix
            planes = window.planes.reshape(len(window.planes), -1)
            np.matmul(weights, planes, out=smooth[: z1 - z0].reshape(z1 - z0, -1))
        for z in range(z0, z1):
            narrower = result[z - z0 + 2]
            for smooth, out, line, column in zip(smooth_z, (narrower, wider), lines, columns, strict=True):
                for inside, outside, matrix in line:
                    source = smooth[z - z0, inside.start - low : inside.stop - low]
                    np.matmul(matrix, source, out=smooth_y[outside.start - first : outside.stop - first])
                for inside, outside, matrix in column:
                    np.matmul(smooth_y[:, inside], matrix.T, out=out[:, outside])
            narrower -= wider
            if z > 0:
                yield z - 1, first, own, result[z - z0 : z - z0 + 3]
        result[:2] = result[z1 - z0 : z1 - z0 + 2]
    yield shape[0] - 1, first, own, result[:3]


def _maxima(planes: Array, rows: slice, bound: float) -> NDArray[np.int64]:
    """Flat indices into the middle one of three planes `[3, y, x]` of its local maxima of at least `bound` in `rows`.

    Few voxels pass the bound and half of the rest fall with each comparison, so this looks at the survivors only.
    """
    _, height, width = planes.shape
    first, last = max(rows.start, 1), min(rows.stop, height - 1)
    values = planes.ravel()
    row, column = np.nonzero(planes[1, first:last, 1:-1] >= bound)
    found: NDArray[np.int64] = (height + row + first) * width + column + 1
    for dz, dy, dx in _NEIGHBOURS:
        here, there = values[found], values[found + (dz * height + dy) * width + dx]
        # the offsets come in z, y, x order: those before (0, 0, 0) lead to voxels before this one
        found = found[here > there] if (dz, dy, dx) < (0, 0, 0) else found[here >= there]
    found -= height * width
    return found


def _radius(sigma: float) -> int:
    return int(TRUNCATE * sigma + 0.5)


def _band(length: int, sigma: float, first: int, last: int) -> tuple[int, Array]:
    """Rows `first` to `last` of the matrix that smooths a reflected line of `length` voxels, without the columns that
    are 0.

    Returns:
        start: the line's voxel that the first column stands for.
        matrix: float32 `[last - first, columns]`.
    """
    radius = _radius(sigma)
    reach = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (reach / sigma) ** 2)
    weights /= weights.sum()
    source = (np.arange(first, last)[:, None] + reach) % (2 * length)
    source = np.where(source < length, source, 2 * length - 1 - source)
    start = int(source.min())
    matrix = np.zeros((last - first, int(source.max()) + 1 - start))
    np.add.at(matrix, (np.arange(last - first)[:, None], source - start), weights)
    return start, matrix.astype(np.float32)


def _blocks(length: int, sigma: float, first: int, last: int) -> list[tuple[slice, slice, Array]]:
    """The voxels `first` to `last` of a smoothed line in blocks: which voxels go in, which come out, and the matrix
    between.
    """
    blocks = []
    for begin in range(first, last, BLOCK):
        end = min(begin + BLOCK, last)
        start, matrix = _band(length, sigma, begin, end)
        blocks.append((slice(start, start + matrix.shape[1]), slice(begin, end), matrix))
    return blocks


def _tile_bytes(shape: Shape, plane_bytes: int, depth: int, radius: int) -> int:
    window = min(shape[0], depth + 2 * radius)
    return plane_bytes * (window + 3 * depth + 2 + SCRATCH_PLANES)
