"""IMOD's .xf: how each image of a stack is laid onto the aligned one, a line of six numbers an image.

A11 A12 A21 A22 DX DY: the point x of an image lies in the aligned one at A (x - c) + d + c, c the middle of the image,
shifts in its pixels (bio3d.colorado.edu/imod, "xftools"). Images are in the order of the stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.formats.tilt_series import MAX_BYTES, MAX_TILTS

_FIELDS = 6


@dataclass(frozen=True, eq=False)
class ImageTransforms:
    """(n, 2, 2) matrices that act on (x, y), and (n, 2) shifts in pixels after them."""

    matrices: NDArray[np.float64]
    shifts_pixels: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.matrices)

    def rotations_degrees(self) -> NDArray[np.float64]:
        """(n,) by how much each turns its image, x towards y."""
        a = self.matrices
        return np.rad2deg(np.arctan2(a[:, 1, 0] - a[:, 0, 1], a[:, 0, 0] + a[:, 1, 1]))


def read_xf(data: bytes, name: str) -> ImageTransforms:
    """The transforms of a .xf; blank lines count for nothing.

    Raises InvalidArgument that names the file and the line.
    """
    if len(data) > MAX_BYTES:
        raise InvalidArgument(f"{name}: {len(data)} bytes; a .xf has at most {MAX_BYTES}")
    rows: list[list[float]] = []
    for number, line in enumerate(data.decode("utf-8-sig", errors="replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            row = [float(word) for word in words]
        except ValueError:
            row = []
        if len(row) != _FIELDS or not np.isfinite(row).all():
            raise InvalidArgument(
                f"{name}, line {number}: {line[:60]!r}; expected six finite numbers: A11 A12 A21 A22 DX DY"
            )
        if len(rows) == MAX_TILTS:
            raise InvalidArgument(f"{name}, line {number}: more than {MAX_TILTS} images")
        rows.append(row)
    if not rows:
        raise InvalidArgument(f"{name}: no line of six numbers in the file")
    values = np.array(rows)
    return ImageTransforms(values[:, :4].reshape(-1, 2, 2), values[:, 4:])
