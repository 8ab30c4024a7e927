"""How close a volume is to the truth: PSNR and SSIM, slab by slab.

PSNR = 10 log10(peak^2 / mean squared error). SSIM after Wang, Bovik, Sheikh & Simoncelli 2004, IEEE Trans. Image
Process. 13, 600: with means, variances and covariance over a cube of 7 voxels about each voxel, (2 m_a m_b + C1)
(2 cov + C2) / ((m_a^2 + m_b^2 + C1) (var_a + var_b + C2)), C1 = (0.01 L)^2, C2 = (0.03 L)^2, L the range of the data;
unbiased variances, and the mean over all voxels whose cube lies within the volume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

ReadSlab = Callable[[int, int], NDArray[np.floating[Any]]]

WINDOW = 7
_SLAB_BYTES = 16 << 20


def psnr(first: ReadSlab, second: ReadSlab, shape: tuple[int, int, int], peak: float) -> float:
    """Peak signal-to-noise ratio in dB of two volumes of `shape` (z, y, x), read by sections; infinite where equal."""
    total = 0.0
    step = max(1, _SLAB_BYTES // (8 * shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        difference = np.asarray(first(start, stop), np.float64) - second(start, stop)
        total += float(np.vdot(difference, difference))
    mean = total / math.prod(shape)
    return 10 * math.log10(peak**2 / mean) if mean > 0 else math.inf


def ssim(first: ReadSlab, second: ReadSlab, shape: tuple[int, int, int], data_range: float = 1.0) -> float:
    """Mean structural similarity of two volumes of `shape` (z, y, x), read by sections.

    Raises InvalidArgument where a side is shorter than the window of 7 voxels.
    """
    if min(shape) < WINDOW:
        raise InvalidArgument(f"volumes of {shape} voxels (z, y, x): SSIM needs {WINDOW} along each axis")
    pad = WINDOW // 2
    count = WINDOW**3
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    total = 0.0
    step = max(1, _SLAB_BYTES // (8 * shape[1] * shape[2]))
    for start in range(pad, shape[0] - pad, step):
        stop = min(start + step, shape[0] - pad)
        a, b = (np.asarray(read(start - pad, stop + pad), np.float64) for read in (first, second))

        def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
            means: NDArray[np.float64] = scipy.ndimage.uniform_filter(values, WINDOW)[pad:-pad, pad:-pad, pad:-pad]
            return means

        mean_a, mean_b = smoothed(a), smoothed(b)
        unbiased = count / (count - 1)
        variance_a = unbiased * (smoothed(a * a) - mean_a**2)
        variance_b = unbiased * (smoothed(b * b) - mean_b**2)
        covariance = unbiased * (smoothed(a * b) - mean_a * mean_b)
        similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
        total += float(similarity.sum())
    return total / math.prod(side - 2 * pad for side in shape)
