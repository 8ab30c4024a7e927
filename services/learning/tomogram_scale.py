"""The intensity scale of a whole tomogram: protein positive, its middle at 0, its spread 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress, no_progress

ReadSlab = Callable[[int, int], NDArray[np.float32]]
"""Sections first <= z < last of a tomogram as (n, y, x)."""

SLAB_BYTES = 16 * 2**20
"""Tomograms are read in slabs of about this size, of one section at least."""
SAMPLES = 2**22
"""The scale is that of about so many voxels, spread evenly over the tomogram."""
LIMIT = 10.0
"""Values further out, gold mostly, are drawn in to this."""


@dataclass(frozen=True)
class Scale:
    """`(values - middle) / spread`, within +-10; the spread's sign is that of protein."""

    middle: float
    spread: float

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values in the scale, a new array."""
        scaled: NDArray[np.float32] = (values - np.float32(self.middle)) * np.float32(1 / self.spread)
        return np.clip(scaled, -LIMIT, LIMIT, out=scaled)


INTENSITY = "the tomogram has median 0, and its percentiles 16 and 84 are 2 apart"
"""What a model's config says of it."""


def scaled(read_slab: ReadSlab, scale: Scale) -> ReadSlab:
    """`read_slab` with its values in the scale."""
    return lambda first, last: scale(read_slab(first, last))


def slab_sections(shape: tuple[int, int, int]) -> int:
    """Sections of a tomogram (z, y, x) that are read at once."""
    return max(1, min(shape[0], SLAB_BYTES // (4 * shape[1] * shape[2])))


def measure_scale(
    read_slab: ReadSlab, shape: tuple[int, int, int], contrast: str, name: str, progress: Progress = no_progress
) -> Scale:
    """The scale of a tomogram (z, y, x) of contrast "dark" or "light": its median, and half the distance of the
    percentiles 16 and 84, which is a Gaussian's standard deviation and which gold and ice leave alone.

    Raises InvalidArgument, naming the tomogram and the section, for NaN and infinity, and for a constant tomogram.
    """
    step = slab_sections(shape)
    stride = max(1, shape[0] * shape[1] * shape[2] // SAMPLES)
    # A stride that divides the rows would see some of the columns alone.
    while math.gcd(stride, shape[2]) > 1:
        stride += 1
    samples: list[NDArray[np.float32]] = []
    lowest, highest = np.inf, -np.inf
    for first in range(0, shape[0], step):
        slab = read_slab(first, min(first + step, shape[0]))
        low, high = check_finite(slab, first, name)
        lowest, highest = min(lowest, low), max(highest, high)
        samples.append(slab.reshape(-1)[::stride].copy())
        progress(min(1.0, (first + step) / shape[0]), "measuring the tomogram's scale")
    if highest - lowest <= 1e-6 * max(abs(highest), abs(lowest)):
        raise InvalidArgument(f"{name} is constant, {highest:g} everywhere: there is nothing in it")
    values = np.concatenate(samples)
    low, middle, high = (float(value) for value in np.percentile(values, (16, 50, 84)))
    spread = (high - low) / 2
    if spread <= 1e-6 * (highest - lowest):
        # Most voxels are of one value: a tomogram that was masked.
        spread = float(values.std(dtype=np.float64)) or highest - lowest
    return Scale(middle, -spread if contrast == "dark" else spread)


def check_finite(slab: NDArray[np.float32], first: int, name: str) -> tuple[float, float]:
    """The lowest and the highest value of sections (n, y, x) from `first` on. Raises InvalidArgument, naming the voxel,
    for NaN and infinity.
    """
    low, high = float(slab.min()), float(slab.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        z, y, x = np.unravel_index(int(np.argmin(np.isfinite(slab))), slab.shape)
        raise InvalidArgument(
            f"{name}: the voxel x={x}, y={y}, z={first + z} is {slab[z, y, x]}; all must be finite numbers"
        )
    return low, high
