"""Rotating and shifting volumes in real space, by splines."""

from typing import Literal

import numpy as np
import scipy.ndimage
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation


def transform_volume(
    volume: NDArray[np.float32],
    rotation: Rotation,
    shift_voxels: ArrayLike = (0.0, 0.0, 0.0),
    order: Literal[0, 1, 2, 3, 4, 5] = 3,
) -> NDArray[np.float32]:
    """Rotate `volume` `[z, y, x]` about its centre c (voxel n//2), then shift it: out(r) = volume(R^-1 (r - c - t) +
    c).

    `shift_voxels` is t as (x, y, z). Interpolation is by splines of `order`; what comes from outside the box is 0.
    """
    centre = np.array([n // 2 for n in volume.shape], dtype=np.float64)
    shift = np.asarray(shift_voxels, dtype=np.float64)[::-1]
    inverse = rotation.inv().as_matrix()[::-1, ::-1]
    offset = centre - inverse @ (centre + shift)
    result = scipy.ndimage.affine_transform(
        volume.astype(np.float32, copy=False), inverse, offset=offset, order=order, mode="grid-constant", cval=0.0
    )
    return np.asarray(result, dtype=np.float32)
