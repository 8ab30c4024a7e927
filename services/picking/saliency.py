"""Particles found without a template as what stands out from a tomogram's background: its saliency.

After Zhou et al. (saliency detection in tomograms for particle picking, as in AITom): the tomogram is cut into
super-voxels; each is described by features of its density and of the answers of Gabor filters; robust PCA splits the
matrix of all features into one of low rank, the background, which repeats itself, and a sparse one, what does not.
The norm of a super-voxel's row in the sparse matrix is its saliency.

1. The tomogram is brought to about 10 voxels per particle diameter by Fourier cropping: the reduced grid.
2. Super-voxels: SLIC (Achanta et al., IEEE TPAMI 34 (2012) 2274) of the smoothed density.
3. Features, each averaged over the super-voxel: density and its deviation within the super-voxel; differences of
   Gaussians, centre less surround, of several sizes about the particle's; and the energy of Gabor filters (Gabor, J.
   IEE 93 (1946) 429) of several wavelengths: its mean and its maximum over directions spread evenly over the sphere,
   which turn with nothing. Each feature is standardised by its median and median absolute deviation, and limited.
4. Robust PCA (`robust_pca`). All features are larger at particles than in the background, so only what the sparse
   matrix has above 0 counts, and only of super-voxels that are denser than their like: holes stand out as much as
   particles, but nobody looks for them.
5. Saliency is spread over the voxels of each super-voxel, smoothed, and its peaks are the picks.

Super-voxels and features are made block by block, with a halo that the filters reach into, so that the memory is a few
blocks beside the volumes themselves. Nothing is random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.segmentation import slic

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.numerics.fourier import CHUNK_VOXELS, fourier_crop
from cryofleet.progress import Progress, no_progress, part
from services.picking.difference_of_gaussians import _maxima, check_diameter, suppress
from services.picking.robust_pca import COPIES, robust_pca
from services.picking.slabs import Array, Shape

#: Voxels per particle diameter that the tomogram is brought near.
WORKING_DIAMETER = 10.0
#: Least particle, in voxels: a smaller one does not fill a super-voxel with what tells it from noise.
MIN_DIAMETER = 4.0
#: Sides of a block, voxels of the reduced grid; the halo comes on top.
BLOCK = 128
#: The halo in diameters: more than 3 sigma of the widest filter.
HALO = 1.6
#: Densities are limited to this multiple of the way from the median to the 0.5th and 99.5th percentile (of noise: 3.9
#: deviations), so that gold does not hide all else.
CLIP = 1.5
#: Voxels, evenly spaced, that the limits are taken from at most.
SAMPLE = 1 << 20
#: Side of a super-voxel in diameters, where the caller does not say; and the least one, in voxels.
SUPERVOXEL_SIZE, MIN_SIZE = 0.3, 1.5
#: Sigma of the smoothing before SLIC and statistics, and of that of the saliency, in diameters.
SMOOTHING, SALIENCY_SMOOTHING = 0.2, 0.12
#: The differences of Gaussians: diameters of the balls they answer to, in diameters; surround over centre.
DOG_SIZES = (0.5, 0.75, 1.0)
SURROUND = 1.6
#: Wavelengths of the Gabor filters, in diameters. A particle is about half a wave of the longest; longer ones tell
#: crowded particles from each other no more, shorter ones see little but noise.
WAVELENGTHS = (1.6, 1.0)
#: Standardised features are limited to so many deviations: a membrane or a bead is to stand out no more than a
#: particle.
FEATURE_LIMIT = 4.0
#: Super-voxels that robust PCA takes at once; more are dealt out to as many groups as it takes, like cards.
MAX_ROWS = 1 << 19
#: Sigma of a Gabor filter's envelope over its wavelength: so short that neighbours in a crowd stay apart.
ENVELOPE = 0.3
#: Memory per voxel of a block with its halo, and per voxel of its inner part (SLIC's labels and their sorting).
BLOCK_BYTES, CORE_BYTES = 48, 96

#: How many features a super-voxel has, and which of them tell particles from holes: those of `_describe_block`.
FEATURES = 2 + len(DOG_SIZES) + 2 * len(WAVELENGTHS)
DENSITY_COLUMNS = [0, *range(2, 2 + len(DOG_SIZES))]


@dataclass(frozen=True)
class Saliency:
    """What stands out in a tomogram, and where.

    Attributes:
        saliency: float32 `[z, y, x]`, 0 or more, on the reduced grid: its voxel p is the tomogram's voxel `factor` p.
            `enlarge` brings it to the tomogram's grid.
        factor: of the reduction, so many voxels of the tomogram to one on each axis.
        suppressed: float32 `[z, y, x]`, the tomogram with its background pressed towards the mean: mean + w (tomogram
            - mean), w = min(1, saliency / saliency that a pick needs). What could be picked is untouched.
        positions: int64 `[n, 3]`, (x, y, z) voxels of the picks, strongest first.
        scores: float64 `[n]`, (peak - mean) / standard deviation of the saliency inside the mask.
        supervoxels: how many there are inside the mask.
        rank: of the background's feature matrix.
        mean, deviation: of the saliency inside the mask.
    """

    saliency: Array
    factor: int
    suppressed: Array
    positions: NDArray[np.int64]
    scores: NDArray[np.float64]
    supervoxels: int
    rank: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class _Plan:
    """The reduced grid: `factor` voxels of the tomogram to one; lengths in its voxels."""

    factor: int
    shape: Shape
    diameter: float
    supervoxel_size: float
    halo: int

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        """The inner parts of the blocks, of about equal sides."""
        sides = []
        for side in self.shape:
            count = math.ceil(side / BLOCK)
            edges = [round(index * side / count) for index in range(count + 1)]
            sides.append([slice(first, last) for first, last in pairwise(edges)])
        yield from product(*sides)

    def padded(self, side: int) -> int:
        """The length that `side` voxels of a block have with their halo."""
        return int(scipy.fft.next_fast_len(side + 2 * self.halo))


def _plan(
    shape: Shape, voxel_size_angstrom: float, particle_diameter_angstrom: float, supervoxel_size_voxels: float | None
) -> _Plan:
    check_diameter(shape, voxel_size_angstrom, particle_diameter_angstrom)
    diameter = particle_diameter_angstrom / voxel_size_angstrom
    if diameter < MIN_DIAMETER:
        raise InvalidArgument(
            f"particle_diameter_angstrom is {particle_diameter_angstrom:g} Å, {diameter:.3g} voxels of "
            f"{voxel_size_angstrom:g} Å: saliency needs at least {MIN_DIAMETER:g} voxels"
        )
    factor = max(1, round(diameter / WORKING_DIAMETER))
    working = diameter / factor
    size = max(MIN_SIZE, SUPERVOXEL_SIZE * working)
    if supervoxel_size_voxels is not None:
        size = supervoxel_size_voxels / factor
    if not MIN_SIZE <= size <= working:
        raise InvalidArgument(
            f"supervoxel_size_voxels is {size * factor:g}, it must be from {MIN_SIZE * factor:g} voxels to the "
            f"particle's diameter, {diameter:.3g} voxels"
        )
    cropped = (shape[0] // factor, shape[1] // factor, shape[2] // factor)
    return _Plan(factor, cropped, working, size, math.ceil(HALO * working))


def memory_bytes(
    shape: Shape,
    voxel_size_angstrom: float,
    particle_diameter_angstrom: float,
    supervoxel_size_voxels: float | None = None,
) -> int:
    """What `saliency` takes at most beside the tomogram and mask that it is given, its result included."""
    plan = _plan(shape, voxel_size_angstrom, particle_diameter_angstrom, supervoxel_size_voxels)
    voxels, working = math.prod(shape), math.prod(plan.shape)
    cores = [min(BLOCK, side) for side in plan.shape]
    blocks = BLOCK_BYTES * math.prod(plan.padded(side) for side in cores) + CORE_BYTES * math.prod(cores)
    # SLIC may leave more pieces than asked for, but none of less than half the size
    supervoxels = 2 * working / plan.supervoxel_size**3 + 1000
    matrix = 4 * FEATURES * supervoxels
    group = 8 * FEATURES * min(supervoxels, MAX_ROWS)
    # cropping holds the axis before and the one it makes
    cropping = 4 * (voxels // plan.factor + voxels // plan.factor**2) + 32 * CHUNK_VOXELS if plan.factor > 1 else 0
    labels = 4 * working
    segmenting = 4 * working * (plan.factor > 1) + labels + blocks + 2 * matrix
    decomposing = labels + 2 * matrix + (COPIES + 2) * group
    planes = 64 * shape[1] * shape[2]
    # peaks do not touch, and few reach a threshold above the mean
    finishing = labels + 4 * voxels + 64 * working / plan.diameter**3 * 8 + planes
    return int(max(cropping, segmenting, decomposing, finishing)) + (16 << 20)


def saliency(
    tomogram: Array,
    voxel_size_angstrom: float,
    particle_diameter_angstrom: float,
    *,
    contrast: str,
    supervoxel_size_voxels: float | None = None,
    compactness: float = 1.0,
    sparsity_weight: float = 0.7,
    threshold: float = 2.0,
    min_distance_angstrom: float | None = None,
    max_picks: int = 0,
    mask: NDArray[np.bool_] | None = None,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Saliency:
    """The saliency of a tomogram `[z, y, x]`, its picks, and the tomogram with its background suppressed.

    Args:
        tomogram: float32 `[z, y, x]`.
        voxel_size_angstrom: of the tomogram.
        particle_diameter_angstrom: sets all sizes; from 4 voxels to the tomogram's smallest side.
        contrast: "dark" where protein is negative, "light" where it is positive.
        supervoxel_size_voxels: side of a cube of a super-voxel's mean volume, voxels of the tomogram; three
            tenths of the diameter where None.
        compactness: of the super-voxels: the difference in density, in deviations of the smoothed tomogram, that
            counts as much as a distance of `supervoxel_size_voxels`. Large: nearly cubes.
        sparsity_weight: robust PCA's lambda as a multiple of 1 / sqrt(longer side). Larger: less is salient. Noise is
            dense, and with as few features as here it fills the low-rank part at 1; below about 0.5 that part is empty.
        threshold: least score of a pick, in deviations of the saliency above its mean.
        min_distance_angstrom: of two picks nearer than this the stronger stays; the diameter where None.
        max_picks: keep the strongest so many; 0 for all.
        mask: bool `[z, y, x]`; outside it nothing is salient, and it counts in no statistics.
        workers: threads of the transforms.
        progress: told how far the work is.

    Raises:
        InvalidArgument: an option that can't work.
        FailedPrecondition: voxels that are not finite, a constant tomogram, or a mask that leaves nothing.
    """
    shape: Shape = (tomogram.shape[0], tomogram.shape[1], tomogram.shape[2])
    if contrast not in ("dark", "light"):
        raise InvalidArgument(f"contrast is {contrast!r}, it must be 'dark' or 'light'")
    if not compactness > 0 or not sparsity_weight > 0:
        raise InvalidArgument(
            f"compactness is {compactness:g} and sparsity_weight {sparsity_weight:g}, both must be positive"
        )
    if max_picks < 0:
        raise InvalidArgument(f"max_picks is {max_picks}, it must be 0 (all) or more")
    if mask is not None and mask.shape != shape:
        raise InvalidArgument(f"the mask has shape {mask.shape}, the tomogram {shape}")
    plan = _plan(shape, voxel_size_angstrom, particle_diameter_angstrom, supervoxel_size_voxels)
    mean = _mean(tomogram)

    progress(0, "binning")
    working = fourier_crop(tomogram, plan.factor, workers)
    inside = None if mask is None else mask[tuple(slice(0, n * plan.factor, plan.factor) for n in plan.shape)]
    labels, features, kept = _describe(
        working, plan, -1.0 if contrast == "dark" else 1.0, compactness, inside, workers, part(progress, 0.02, 0.75)
    )
    del working
    if not kept.any():
        raise FailedPrecondition("the mask leaves no super-voxel to look at")
    features = features[kept]
    _standardise(features)
    of_supervoxel = np.zeros(len(kept), np.float32)
    of_supervoxel[kept], rank = _row_saliency(features, sparsity_weight, part(progress, 0.75, 0.85))
    del features

    # each label gives way to its saliency, in the same memory
    salient = labels.view(np.float32)
    for z in range(plan.shape[0]):
        salient[z] = of_supervoxel[labels[z]]
    gaussian_filter(salient, SALIENCY_SMOOTHING * plan.diameter, output=salient, mode="nearest")
    if inside is not None:
        salient *= inside
    average, deviation = _masked_statistics(salient, inside)
    if deviation == 0:
        raise FailedPrecondition("nothing stands out in the tomogram: its saliency is the same everywhere")
    progress(0.9, "finding peaks", supervoxels=int(kept.sum()))
    needed = average + threshold * deviation
    positions, values = _peaks(salient, inside, needed, plan.factor)
    scores = (values.astype(np.float64) - average) / deviation
    if min_distance_angstrom is None:
        min_distance_angstrom = particle_diameter_angstrom
    chosen = suppress(positions, scores, min_distance_angstrom / voxel_size_angstrom, max_picks)
    suppressed = _suppressed(tomogram, salient, plan.factor, mean, needed, part(progress, 0.92, 1))
    return Saliency(
        salient,
        plan.factor,
        suppressed,
        positions[chosen],
        scores[chosen],
        int(kept.sum()),
        rank,
        average,
        deviation,
    )


def enlarge(volume: Array, factor: int, shape: Shape) -> Array:
    """A volume on the reduced grid brought to a tomogram's grid of `shape` by linear interpolation."""
    enlarged = np.empty(shape, np.float32)
    for z, plane in enumerate(_enlarged_planes(volume, factor, shape)):
        enlarged[z] = plane
    return enlarged


def _mean(tomogram: Array) -> float:
    """The mean of a tomogram that there is something to pick from."""
    total, low, high = 0.0, math.inf, -math.inf
    for z, plane in enumerate(tomogram):
        if not np.isfinite(plane).all():
            raise FailedPrecondition(f"the tomogram has voxels that are not finite (NaN or infinity) in its plane {z}")
        total += float(plane.sum(dtype=np.float64))
        low, high = min(low, float(plane.min())), max(high, float(plane.max()))
    if low == high:
        raise FailedPrecondition("the tomogram is constant, there is nothing to pick")
    return total / tomogram.size


def _limits(volume: Array) -> tuple[np.float32, np.float32, np.float32]:
    """Between which densities the features see, see `CLIP`, and the median."""
    sample = volume.reshape(-1)[:: math.ceil(volume.size / SAMPLE)]
    low, middle, high = np.percentile(sample, (0.5, 50, 99.5))
    if not low < high:
        # nearly all is one density, and what is not must be what is looked for
        return volume.min(), np.float32(middle), volume.max()
    below, above = middle - CLIP * (middle - low), middle + CLIP * (high - middle)
    return np.float32(below), np.float32(middle), np.float32(above)


def _masked_statistics(volume: Array, mask: NDArray[np.bool_] | None) -> tuple[float, float]:
    total, squares, count = 0.0, 0.0, 0
    for z, plane in enumerate(volume):
        values = (plane.ravel() if mask is None else plane[mask[z]]).astype(np.float64)
        total, squares, count = total + float(values.sum()), squares + float(values @ values), count + len(values)
    mean = total / count
    return mean, math.sqrt(max(0.0, squares / count - mean * mean))


def _describe(
    working: Array,
    plan: _Plan,
    sign: float,
    compactness: float,
    mask: NDArray[np.bool_] | None,
    workers: int,
    progress: Progress,
) -> tuple[NDArray[np.int32], Array, NDArray[np.bool_]]:
    """Super-voxels and their features, protein positive.

    Returns:
        labels: int32 `[z, y, x]`, each voxel's super-voxel.
        features: float32 `[super-voxels, FEATURES]`.
        kept: which super-voxels lie in the mask by more than half.
    """
    low, middle, high = _limits(working)
    labels = np.empty(plan.shape, np.int32)
    features: list[Array] = []
    kept: list[NDArray[np.bool_]] = []
    first = 0
    blocks = list(plan.blocks())
    for index, block in enumerate(blocks):
        told = part(progress, index / len(blocks), (index + 1) / len(blocks))
        told(0, "features", supervoxels=first)
        padded = working[np.ix_(*(_reflected(cut, plan, side) for cut, side in zip(block, plan.shape, strict=True)))]
        np.clip(padded, low, high, out=padded)
        padded -= middle
        padded *= np.float32(sign) / (high - low)
        spectrum = scipy.fft.fftn(padded, workers=workers, overwrite_x=True).astype(np.complex64, copy=False)
        del padded
        filters = _Filters(spectrum, tuple(cut.stop - cut.start for cut in block), plan.halo, workers)
        del spectrum
        own, described = _describe_block(filters, plan, compactness, told)
        count = len(described)
        if mask is None:
            kept.append(np.ones(count, np.bool_))
        else:
            share = np.bincount(own.ravel(), mask[block].ravel(), count) / np.bincount(own.ravel(), minlength=count)
            kept.append(share > 0.5)
        features.append(described.astype(np.float32))
        labels[block] = own + first
        first += count
    return labels, np.concatenate(features), np.concatenate(kept)


def _reflected(cut: slice, plan: _Plan, side: int) -> NDArray[np.int64]:
    """Voxels of one axis that a block with its halo takes; beyond the faces the volume is reflected."""
    start = cut.start - plan.halo
    index = np.arange(start, start + plan.padded(cut.stop - cut.start)) % (2 * side)
    return np.where(index < side, index, 2 * side - 1 - index)


class _Filters:
    """A block's transform and the filters that are applied to it, one at a time."""

    def __init__(self, spectrum: NDArray[np.complex64], core: tuple[int, ...], halo: int, workers: int) -> None:
        self._spectrum = spectrum
        self._core = tuple(slice(halo, halo + side) for side in core)
        self._workers = workers
        self._axes = tuple(np.fft.fftfreq(side).astype(np.float32) for side in spectrum.shape)

    def _separable(self, centre: NDArray[np.float64], sigma: float) -> NDArray[np.complex64]:
        """The block convolved with a Gaussian of `sigma` voxels times a plane wave of frequency `centre` (kz, ky,
        kx)."""
        width = np.float32(2 * math.pi**2 * sigma**2)
        z, y, x = (
            np.exp(-width * (axis - np.float32(k)) ** 2) for axis, k in zip(self._axes, centre.tolist(), strict=True)
        )
        product = self._spectrum * z[:, None, None]
        product *= y[:, None]
        product *= x
        filtered: NDArray[np.complex64] = scipy.fft.ifftn(product, workers=self._workers, overwrite_x=True)
        return filtered[self._core]

    def gaussian(self, sigma: float) -> Array:
        return self._separable(np.zeros(3), sigma).real.copy()

    def gabor_energy(
        self, wavelength: float, directions: NDArray[np.float64], progress: Progress
    ) -> tuple[Array, Array]:
        """Mean and maximum over directions of the magnitude of the answer to complex Gabor filters."""
        total = np.zeros([cut.stop - cut.start for cut in self._core], np.float32)
        greatest = np.zeros_like(total)
        for index, direction in enumerate(directions):
            progress(index / len(directions), "features")
            energy = np.abs(self._separable(direction / wavelength, ENVELOPE * wavelength))
            total += energy
            np.maximum(greatest, energy, out=greatest)
        total /= np.float32(len(directions))
        return total, greatest


def _directions() -> NDArray[np.float64]:
    """Unit vectors `[10, 3]` along the axes through the vertices of a regular dodecahedron, which are 42 degrees
    apart: as far as a Gabor filter of this envelope sees."""
    golden = (1 + math.sqrt(5)) / 2
    corners = [(1, sign_y, sign_x) for sign_y, sign_x in product((1, -1), repeat=2)]
    edges = [np.roll((0, 1 / golden, sign * golden), shift).tolist() for shift, sign in product(range(3), (1, -1))]
    axes: NDArray[np.float64] = np.array([*corners, *edges]) / math.sqrt(3)
    return axes


def _describe_block(
    filters: _Filters, plan: _Plan, compactness: float, progress: Progress
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The super-voxels of a block, numbered from 0, and their features."""
    density = filters.gaussian(SMOOTHING * plan.diameter)
    own = _supervoxels(density, plan, compactness)
    flat = own.ravel()
    sizes = np.bincount(flat).astype(np.float64)

    def average(values: Array) -> NDArray[np.float64]:
        return np.bincount(flat, values.ravel()) / sizes

    means = average(density)
    spread = np.sqrt(np.maximum(average(np.square(density)) - means**2, 0))
    columns = [means, spread]
    del density
    for size in DOG_SIZES:
        sigma = size * plan.diameter / (2 * math.sqrt(3))
        contrast = filters.gaussian(sigma)
        contrast -= filters.gaussian(SURROUND * sigma)
        columns.append(average(contrast))
    directions = _directions()
    for index, wavelength in enumerate(WAVELENGTHS):
        told = part(progress, (index + 1) / (len(WAVELENGTHS) + 1), (index + 2) / (len(WAVELENGTHS) + 1))
        for energy in filters.gabor_energy(wavelength * plan.diameter, directions, told):
            columns.append(average(energy))  # noqa: PERF401
    return own, np.stack(columns, axis=1)


def _supervoxels(density: Array, plan: _Plan, compactness: float) -> NDArray[np.int64]:
    """SLIC super-voxels, numbered from 0."""
    extent = float(density.max() - density.min())
    count = max(1, round(density.size / plan.supervoxel_size**3))
    if count == 1 or extent == 0:
        return np.zeros(density.shape, np.int64)
    # slic brings the block's range to 1, so a compactness in deviations is scaled with it
    scale = float(density.std(dtype=np.float64)) / extent
    own: NDArray[np.int64] = slic(
        density,
        n_segments=count,
        compactness=max(compactness * scale, 1e-6),
        max_num_iter=5,
        channel_axis=None,
        start_label=0,
    )
    # numbers without voxels would be rows without features
    numbers: NDArray[np.int64] = np.unique(own, return_inverse=True)[1].reshape(own.shape)
    return numbers


def _standardise(features: Array) -> None:
    """Each column, in place: less its median, over its deviation as the median absolute deviation of a normal one tells
    it, limited."""
    for column in features.T:
        column -= np.median(column)
        scale, deviation = 1.4826 * float(np.median(np.abs(column))), float(column.std(dtype=np.float64))
        # of a tomogram that is empty by more than half the median tells nothing
        if scale < 1e-3 * deviation:
            scale = deviation
        if scale > 0:
            column /= np.float32(scale)
        np.clip(column, -FEATURE_LIMIT, FEATURE_LIMIT, out=column)


def _row_saliency(features: Array, sparsity_weight: float, progress: Progress) -> tuple[Array, int]:
    """The saliency `[n]` of rows of features, and the background's rank.

    It is the norm of what a row has above 0 in the sparse matrix, where its density features are above 0 in sum, 0
    elsewhere: a Gabor filter alone answers to a hole as to a particle. The weight of entries depends on the number of
    rows, so groups are of one size, give or take a row.
    """
    salient = np.empty(len(features), np.float32)
    groups = math.ceil(len(features) / MAX_ROWS)
    rank = 0
    for group in range(groups):
        rows = features[group::groups].astype(np.float64)
        weight = sparsity_weight / math.sqrt(max(rows.shape))
        told = part(progress, group / groups, (group + 1) / groups)
        found = robust_pca(rows, sparsity_weight=weight, tolerance=1e-6, progress=told)
        denser = found.sparse[:, DENSITY_COLUMNS].sum(axis=1) > 0
        salient[group::groups] = np.linalg.norm(np.maximum(found.sparse, 0), axis=1) * denser
        rank = max(rank, found.rank)
    return salient, rank


def _peaks(
    salient: Array, mask: NDArray[np.bool_] | None, least: float, factor: int
) -> tuple[NDArray[np.int64], Array]:
    """Local maxima inside the mask: int64 `[n, 3]` (x, y, z) on the tomogram's grid, and their values."""
    height, width = salient.shape[1:]
    positions, values = [np.empty((0, 3), np.int64)], [np.empty(0, np.float32)]
    for z in range(1, len(salient) - 1):
        y, x = np.divmod(_maxima(salient[z - 1 : z + 2], slice(0, height), least), width)
        if mask is not None:
            inside = mask[z, y, x]
            y, x = y[inside], x[inside]
        positions.append(np.stack([x, y, np.full_like(x, z)], axis=1) * factor)
        values.append(salient[z, y, x])
    return np.concatenate(positions), np.concatenate(values)


def _suppressed(tomogram: Array, salient: Array, factor: int, mean: float, needed: float, progress: Progress) -> Array:
    """The tomogram with its background pressed towards the mean; see `Saliency`."""
    shape: Shape = (tomogram.shape[0], tomogram.shape[1], tomogram.shape[2])
    suppressed = np.empty(shape, np.float32)
    for z, plane in enumerate(_enlarged_planes(salient, factor, shape)):
        progress(z / len(tomogram), "suppressing background")
        # where even no saliency is enough for a pick there is no background
        weight = np.clip(plane / np.float32(needed), 0, 1) if needed > 0 else np.float32(1)
        suppressed[z] = np.float32(mean) + weight * (tomogram[z] - np.float32(mean))
    return suppressed


def _enlarged_planes(volume: Array, factor: int, shape: Shape) -> Iterator[Array]:
    (z0, z1, tz), (y0, y1, ty), (x0, x1, tx) = (
        _between(side, reduced, factor) for side, reduced in zip(shape, volume.shape, strict=True)
    )
    for z in range(shape[0]):
        plane = volume[z0[z]] + tz[z] * (volume[z1[z]] - volume[z0[z]])
        plane = plane[y0] + ty[:, None] * (plane[y1] - plane[y0])
        yield plane[:, x0] + tx * (plane[:, x1] - plane[:, x0])


def _between(side: int, working: int, factor: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """For each voxel of an axis the reduced grid's voxels before and after it, and how far between them it lies."""
    place = np.minimum(np.arange(side) / factor, working - 1)
    before = np.minimum(place.astype(np.int64), working - 1)
    return before, np.minimum(before + 1, working - 1), (place - before).astype(np.float32)
