"""What happens to a subtomogram before a network sees it, in training and in use alike.

Checked, binned by cropping in Fourier space, turned to protein-positive values, its pose normalised where wanted, and
standardised: each box has mean 0 and standard deviation 1. That is the intensity scale of all networks here but the
segmentation network, which is to tell bright structures from faint ones: its boxes share one `Scale`, that of all boxes
of the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import fourier_crop
from services.learning.pose_normalisation import Poses, find_poses, structure_weights, turn_back

CONTRAST = "light"
"""Of prepared boxes: protein is positive, as in density maps."""

CONSTANT = 1e-6
"""A standard deviation below this share of the largest value is rounding: the box is constant."""


@dataclass(frozen=True)
class Scale:
    """The mean and the standard deviation of a set's voxels, binned, in the values as extracted."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Preparation:
    """From boxes `[i, z, y, x]` as extracted to boxes as networks take them.

    `box_size` is the side as extracted, in voxels, which `binning` must divide; `contrast` is "dark" or "light";
    `source` is what errors call the set; `scale` is one for all boxes, each box has its own where it is left out.
    """

    box_size: int
    binning: int
    pose_normalisation: bool
    contrast: str
    source: str = "subtomograms"
    scale: Scale | None = None

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
        return self.with_poses(boxes, ids)[0]

    def with_poses(
        self, boxes: NDArray[np.float32], ids: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], Poses | None]:
        """Prepared boxes and, where poses are normalised, where the structures were in the binned boxes."""
        highest, lowest = boxes.max(axis=(1, 2, 3)), boxes.min(axis=(1, 2, 3))
        finite = np.isfinite(highest) & np.isfinite(lowest)
        if not finite.all():
            particle = ids[int(finite.argmin())]
            raise InvalidArgument(
                f"{self.source}: the box of particle {particle} holds values that are NaN or infinite"
            )
        binned = fourier_crop(boxes, self.binning)
        prepared, deviations = _centre(binned)
        varied = deviations > CONSTANT * np.maximum(np.abs(highest), np.abs(lowest))
        if not varied.all():
            particle = ids[int(varied.argmin())]
            raise InvalidArgument(
                f"{self.source}: the box of particle {particle} is constant, binned by {self.binning}: "
                "there is nothing to learn from it"
            )
        sign = -1 if self.contrast == "dark" else 1
        if self.scale is not None:
            prepared = (binned - np.float32(self.scale.mean)) / np.float32(sign * self.scale.deviation)
        else:
            prepared /= (sign * deviations)[:, None, None, None]
        if not self.pose_normalisation:
            return prepared, None
        poses = find_poses(structure_weights(prepared))
        return standardise(turn_back(prepared, poses)), poses


def standardise(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each box of `[i, z, y, x]` with mean 0 and standard deviation 1; a constant box becomes zero."""
    centred, deviations = _centre(boxes)
    centred /= np.where(deviations > 0, deviations, np.float32(1))[:, None, None, None]
    return centred


def _centre(boxes: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Each box of `[i, z, y, x]` minus its mean, and the standard deviations (n,)."""
    means = boxes.mean(axis=(1, 2, 3), dtype=np.float64)
    centred: NDArray[np.float32] = boxes - means.astype(np.float32)[:, None, None, None]
    flat = centred.reshape(len(centred), -1)
    deviations: NDArray[np.float32] = np.sqrt(np.einsum("iv,iv->i", flat, flat) / flat.shape[1])
    return centred, deviations
