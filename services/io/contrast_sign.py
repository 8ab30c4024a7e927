"""Whether protein is dark or light, from the skewness of a tomogram.

What is dense, protein, membranes, gold, fills the smaller part of a specimen, and so the values of a tomogram freed of
its finest noise and of its gradients reach further to that side than to the other: their skewness has its sign. Noise
has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.numerics import welch
from cryofleet.progress import Progress, no_progress

BOX = 112
MOST_BOXES = 48
#: Standard deviations of the Gaussians between which details count: those of complexes and membranes.
_FINE_ANGSTROM, _COARSE_ANGSTROM = 25.0, 120.0
#: The coarse one in voxels reaches no further than this, for the sake of time and of what boxes hold.
_MOST_VOXELS = 16.0
_COPIES = 8


@dataclass(frozen=True)
class Skewness:
    """value: of the band-passed tomogram; error: its standard error, from boxes, NaN of a single one."""

    value: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether it is more than three times its error."""
        return abs(self.value) > 3 * self.error


def memory_bytes(shape: tuple[int, int, int]) -> int:
    """What `estimate_skewness` needs at most."""
    box = welch.box_shape(shape, BOX)
    return 4 * box[0] * shape[1] * shape[2] + _COPIES * 4 * math.prod(box)


def estimate_skewness(
    read: Callable[[int, int], NDArray[np.float32]],
    shape: tuple[int, int, int],
    voxel_size_angstrom: float,
    progress: Progress = no_progress,
) -> Skewness:
    """The skewness of a tomogram [z, y, x], read by sections, between details of 25 and 120 Å (Gaussians).

    Its error is that of a jackknife over up to 48 boxes.
    """
    fine = min(max(_FINE_ANGSTROM / voxel_size_angstrom, 1.0), _MOST_VOXELS / 4)
    coarse = min(max(_COARSE_ANGSTROM / voxel_size_angstrom, 4 * fine), _MOST_VOXELS)
    box = welch.box_shape(shape, BOX)
    starts = welch.box_starts(shape, box, MOST_BOXES)
    moments = np.zeros((len(starts), 4))
    for number, raw in enumerate(welch.cut_boxes(read, starts, box)):
        cut = raw - raw.mean(dtype=np.float64).astype(np.float32)
        band = scipy.ndimage.gaussian_filter(cut, fine, truncate=3) - scipy.ndimage.gaussian_filter(
            cut, coarse, truncate=2
        )
        values = band.ravel().astype(np.float64)
        moments[number] = [values.size, values.sum(), (values**2).sum(), (values**3).sum()]
        progress((number + 1) / len(starts), "measuring skewness")
    total = moments.sum(axis=0)
    others = [_skewness(total - own) for own in moments] if len(moments) > 1 else []
    # Boxes overlap by half, and their neighbours tell the same; so the error is taken twice as large.
    error = 2 * math.sqrt((len(others) - 1) * float(np.var(others))) if others else math.nan
    return Skewness(_skewness(total), error)


def _skewness(moments: NDArray[np.float64]) -> float:
    count, first, second, third = moments
    mean = first / count
    variance = second / count - mean**2
    if not variance > 0:
        return 0.0
    return float((third / count - 3 * mean * second / count + 2 * mean**3) / variance**1.5)
