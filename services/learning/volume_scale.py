"""The intensity scale of a whole volume: protein positive, mean 0, standard deviation 1.

For networks that take subvolumes in training and whole volumes in use: both are seen on the same scale, which boxes
that are standardised one by one would not be. Outliers count, as they do in the deviation that figures of quality are
stated in; `tomogram_scale` is for those that must not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress, no_progress
from services.learning.preparation import CONSTANT
from services.learning.tomogram_scale import SLAB_BYTES, check_finite, slab_sections

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
ReadSlab = Callable[[int, int], Array]
"""Sections first <= z < last of a volume as (n, y, x)."""

MEASURING_BYTES = 4 * SLAB_BYTES
"""A slab, and its squares in float64."""


@dataclass(frozen=True)
class VolumeScale:
    """`(values - mean) / deviation`; the deviation's sign is that of protein."""

    mean: float
    deviation: float

    def __call__(self, values: Array) -> Array:
        """Values in the scale, a new array."""
        scaled: Array = (values - np.float32(self.mean)) * np.float32(1 / self.deviation)
        return scaled

    def back(self, scaled: Array) -> Array:
        """Values as they were, a new array."""
        values: Array = scaled * np.float32(self.deviation) + np.float32(self.mean)
        return values


def measure_scale(
    read: ReadSlab, shape: Shape, contrast: str, name: str, progress: Progress = no_progress
) -> VolumeScale:
    """The scale of a volume (z, y, x) of contrast "dark" or "light", read slab by slab.

    Raises InvalidArgument, naming the volume, for NaN and infinity, and for a constant volume.
    """
    step = slab_sections(shape)
    sections, means, variances = [], [], []
    largest = 0.0
    for first in range(0, shape[0], step):
        slab = read(first, min(first + step, shape[0]))
        low, high = check_finite(slab, first, name)
        sections.append(len(slab))
        means.append(float(slab.mean(dtype=np.float64)))
        variances.append(float(slab.var(dtype=np.float64)))
        largest = max(largest, abs(low), abs(high))
        progress(min(1.0, (first + step) / shape[0]), "measuring the scale")
    mean = float(np.average(means, weights=sections))
    # The variances within slabs and between them: no difference of large numbers.
    squares = np.array(variances) + np.square(np.array(means) - mean)
    deviation = math.sqrt(float(np.average(squares, weights=sections)))
    if deviation <= CONSTANT * largest:
        raise InvalidArgument(f"{name} is constant, {mean:g} everywhere: there is nothing in it")
    return VolumeScale(mean, -deviation if contrast == "dark" else deviation)
