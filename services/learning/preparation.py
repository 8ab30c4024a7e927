"""What happens to a subtomogram before a network sees it, in training and in use alike.

Checked, binned by cropping in Fourier space, turned to protein-positive values, its pose normalised where wanted, and
standardised: each box has mean 0 and standard deviation 1. That is the intensity scale of all networks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import fourier_crop
from services.learning.pose_normalisation import normalise_poses

CONTRAST = "light"
"""Of prepared boxes: protein is positive, as in density maps."""

CONSTANT = 1e-6
"""A standard deviation below this share of the largest value is rounding: the box is constant."""


@dataclass(frozen=True)
class Preparation:
    """From boxes `[i, z, y, x]` as extracted to boxes as networks take them.

    `box_size` is the side as extracted, in voxels, which `binning` must divide; `contrast` is "dark" or "light";
    `source` is what errors call the set.
    """

    box_size: int
    binning: int
    pose_normalisation: bool
    contrast: str
    source: str = "subtomograms"

    def __post_init__(self) -> None:
        if self.box_size % self.binning:
            raise InvalidArgument(
                f"binning: boxes of {self.box_size} voxels can't be binned by {self.binning}, it must divide them"
            )
        if self.contrast not in ("dark", "light"):
            raise InvalidArgument(f"{self.source}: the contrast is {self.contrast!r}, it must be 'dark' or 'light'")

    @property
    def prepared_size(self) -> int:
        """Side of the prepared boxes in voxels."""
        return self.box_size // self.binning

    def __call__(self, boxes: NDArray[np.float32], ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Prepared boxes. InvalidArgument names the particle, by `ids`, whose box is constant or holds NaN or
        infinity.
        """
        finite = np.isfinite(boxes).all(axis=(1, 2, 3))
        if not finite.all():
            raise InvalidArgument(
                f"{self.source}: the box of particle {ids[int(finite.argmin())]} holds values that are NaN or infinite"
            )
        largest = np.abs(boxes).max(axis=(1, 2, 3))
        prepared = fourier_crop(boxes, self.binning)
        varied = prepared.std(axis=(1, 2, 3), dtype=np.float64) > CONSTANT * largest
        if not varied.all():
            particle = ids[int(varied.argmin())]
            raise InvalidArgument(
                f"{self.source}: the box of particle {particle} is constant, binned by {self.binning}: "
                "there is nothing to learn from it"
            )
        if self.contrast == "dark":
            prepared = -prepared
        if self.pose_normalisation:
            prepared = normalise_poses(prepared)
        return standardise(prepared)


def standardise(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each box of `[i, z, y, x]` with mean 0 and standard deviation 1; a constant box becomes zero."""
    centred = boxes - boxes.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64)
    deviation = centred.std(axis=(1, 2, 3), keepdims=True)
    standard: NDArray[np.float32] = (centred / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    return standard
