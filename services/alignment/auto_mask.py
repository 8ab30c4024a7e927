"""A soft mask from an average itself."""

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import low_pass
from cryofleet.numerics.masks import radius_grid, soft_dilation

LOW_PASS_CYCLES = 8.0
"""Low-pass in cycles per box where none is given: a sixteenth of the box is the finest detail of a mask."""
LARGEST_SHARE = 0.75
"""A mask that takes more of the sphere that fits the box than this has found no particle."""
LEAST_SEPARATION = 0.68
"""Otsu's separability, the variance between the two classes over that of all, that tells a particle from noise. Noise
alone, cut in half, has 2/pi = 0.637, with a deviation of some 0.01 for the few hundred independent values left by the
low-pass; two clean classes have 1."""
NOISE_DEVIATIONS = 3.0
PEAK_DEVIATIONS = 5.0
"""A particle too small or too noisy for that is cut at so many deviations of the background, if its peak reaches the
second number. The thousand independent values of noise alone reach 3.3 as a rule, and 5 once in two thousand averages.
"""
_BINS = 512


@dataclass(frozen=True)
class AutoMask:
    """`mask` `[z, y, x]`, 0 to 1; the `threshold` of the low-passed density it came from; the share of the box that it
    takes; `low_pass_angstrom` that was applied.
    """

    mask: NDArray[np.float32]
    threshold: float
    share: float
    low_pass_angstrom: float


def otsu(values: NDArray[np.float32]) -> tuple[float, float]:
    """The threshold that splits values into the two classes furthest apart (Otsu 1979), and the separability, the
    variance between the classes over that of all; 0 for values that are all the same.
    """
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return low, 0.0
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    share = np.cumsum(counts) / values.size
    moment = np.cumsum(counts * centres) / values.size
    mean = moment[-1]
    spread = float((counts * (centres - mean) ** 2).sum() / values.size)
    inner = (share > 0) & (share < 1)
    between = np.zeros(_BINS)
    between[inner] = (mean * share[inner] - moment[inner]) ** 2 / (share[inner] * (1 - share[inner]))
    best = between.max()
    # Between two clean classes every threshold is as good: take the middle.
    equal = np.flatnonzero(between >= best * (1 - 1e-9))
    return float((edges[equal[0] + 1] + edges[equal[-1] + 1]) / 2), float(best / spread)


def _threshold(values: NDArray[np.float32], resolution_angstrom: float) -> float:
    """Otsu's where it tells two classes; else some deviations above the background, by median and median deviation."""
    threshold, separation = otsu(values)
    if separation >= LEAST_SEPARATION:
        return threshold
    background = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - background)))
    if (float(values.max()) - background) >= PEAK_DEVIATIONS * deviation:
        return background + NOISE_DEVIATIONS * deviation
    raise InvalidArgument(
        f"no particle stands out of the noise at {resolution_angstrom:g} Å (separability {separation:.2f}, noise alone "
        f"has {2 / math.pi:.2f}): give a coarser low_pass_angstrom or a threshold_sigma, or use a sphere"
    )


def auto_mask(
    volume: NDArray[np.float32],
    voxel_size_angstrom: float,
    *,
    low_pass_angstrom: float | None = None,
    threshold_sigma: float | None = None,
    dilation_voxels: float | None = None,
    edge_voxels: float | None = None,
) -> AutoMask:
    """A soft mask around the particle in an average.

    The average is low-passed and cut at a threshold within the sphere that fits the box: by Otsu's criterion where none
    is given, or three deviations above the background where that does not tell a particle from noise. The largest
    connected part is kept (by faces), grown, and given a cosine edge. What a particle has of separate parts that the
    low-pass does not join is lost.

    Args:
        volume: the average, cubic `[z, y, x]`, protein positive.
        voxel_size_angstrom: of the average.
        low_pass_angstrom: detail that the mask follows; an eighth of the box where left out.
        threshold_sigma: threshold in standard deviations of the low-passed average within the sphere, from its mean.
        dilation_voxels: how much the particle is grown; 1/32 of the box, at least 2, where left out.
        edge_voxels: width of the edge beyond that; 1/12 of the box, at least 4, where left out.

    Raises InvalidArgument where the volume is no cube, constant or not finite; where nothing lies above the threshold;
    where no particle stands out of the noise; where the mask takes more than three quarters of the
    sphere.
    """
    if volume.ndim != 3 or len(set(volume.shape)) != 1:
        raise InvalidArgument(f"a mask is made from a cubic average, not from {volume.shape} voxels")
    if not np.isfinite(volume).all():
        raise InvalidArgument("the average to mask holds values that are not finite")
    n = volume.shape[0]
    resolution = n * voxel_size_angstrom / LOW_PASS_CYCLES if low_pass_angstrom is None else low_pass_angstrom
    dilation = max(2.0, n / 32) if dilation_voxels is None else dilation_voxels
    edge = max(4.0, n / 12) if edge_voxels is None else edge_voxels
    smooth = low_pass(volume, resolution, voxel_size_angstrom, edge=1 / n)
    sphere = radius_grid(n) <= n / 2 - 1
    values = smooth[sphere]
    deviation = float(values.std())
    if not deviation > 1e-6 * float(np.abs(values).max()):
        raise InvalidArgument("the average is constant: there is nothing to make a mask of")
    if threshold_sigma is None:
        threshold = _threshold(values, resolution)
    else:
        threshold = float(values.mean()) + threshold_sigma * deviation
    labels, count = scipy.ndimage.label(sphere & (smooth > threshold))
    if count == 0:
        raise InvalidArgument(
            f"nothing in the average lies {threshold_sigma:g} standard deviations above its mean: lower threshold_sigma"
        )
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    mask = soft_dilation(labels == int(np.argmax(sizes)), dilation, edge)
    if float(mask[sphere].mean()) > LARGEST_SHARE:
        raise InvalidArgument(
            f"the mask would take {float(mask[sphere].mean()):.0%} of the box's sphere: the particle fills its box, or "
            "the threshold lies within the noise; give a higher threshold_sigma, a larger box or use a sphere"
        )
    return AutoMask(mask, threshold, float(mask.mean()), resolution)
