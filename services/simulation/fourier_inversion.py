"""Direct Fourier inversion: the images' transforms are laid as central slices into each row's plane, and transformed
back.

A sample at frequency k of the slice at theta stands for the area |k| dk dtheta of the plane, dtheta the image's own
share of the angles. Samples are spread by a Kaiser-Bessel kernel onto a grid of twice the sides, whose transform is
divided out afterwards (O'Sullivan, IEEE Trans. Med. Imaging 4, 200 (1985); Beatty et al. 2005). The missing wedge stays
empty.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray

from cryofleet.numerics.fourier import fast_length
from cryofleet.progress import Progress, no_progress
from services.simulation.projection import (
    PLANE_KERNEL,
    checked_images,
    in_blocks,
    kaiser_bessel_transform,
    slice_matrix,
)
from services.simulation.weighted_back_projection import angular_shares, filter_response

Array = NDArray[np.float32]


def fourier_inversion(
    stack: Array,
    tilt_angles_degrees: ArrayLike,
    depth: int,
    width: int,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Array:
    """The volume `[z, y, x]` of images `[tilt, y, u]`.

    Args:
        stack: projections, sums over voxels along the beam, zero outside of the specimen.
        tilt_angles_degrees: of each image.
        depth: voxels along z.
        width: voxels along x.
        workers: threads; the result does not depend on them.
        progress: told of each block of rows.

    Raises InvalidArgument for angles or sizes that make no sense.
    """
    angles = checked_images(stack, tilt_angles_degrees, depth, width)
    height, pixels = stack.shape[1:]
    # samples as dense as the padded plane's: the line is as long, so that what lies beyond the image counts as nothing
    line = fast_length(2 * max(pixels, width, depth))
    line += line % 2
    half = line // 2
    padded_depth, padded_width = fast_length(2 * depth), fast_length(2 * width)
    matrix = slice_matrix(angles, np.arange(half) / line, padded_depth, padded_width).T.tocsr()
    # of the half lines each sample but the one at 0 stands for its Friedel mate too: the real part below sees to that
    weights = filter_response(line, pixels, "ramp", 1, 0.5)[:half] * angular_shares(angles)[:, None] * (2 / line)
    weights[:, 0] /= 2
    weights *= np.where(np.arange(half) % 2, -1, 1)
    shares = weights.astype(np.float32)[:, :, None]
    z, x = np.arange(depth) - depth // 2, np.arange(width) - width // 2
    apodisation = kaiser_bessel_transform(z / padded_depth, PLANE_KERNEL)[:, None] * kaiser_bessel_transform(
        x / padded_width, PLANE_KERNEL
    )
    # the inverse transform divides by the grid's points
    scale = (padded_depth * padded_width / apodisation).astype(np.float32)[..., None]
    place = np.ix_(z % padded_depth, x % padded_width)
    first = line // 2 - pixels // 2
    volume = np.empty((depth, height, width), np.float32)

    def block(start: int, stop: int) -> None:
        count = stop - start
        lines = np.zeros((len(angles), line, count), np.float32)
        lines[:, first : first + pixels] = stack[:, start:stop].transpose(0, 2, 1)
        slices = scipy.fft.rfft(lines, axis=1)[:, :half] * shares
        plane = (matrix @ slices.reshape(-1, count)).reshape(padded_depth, padded_width, count)
        plane = scipy.fft.ifft2(plane, axes=(0, 1), overwrite_x=True)
        volume[:, start:stop] = (plane[place].real * scale).transpose(0, 2, 1)

    in_blocks(height, block, workers, progress, "inverting")
    return volume
