"""Weighted back-projection: each image filtered by a ramp, smeared back along the beam, and summed.

    f(x, z) = sum over tilts of dtheta_i  (P_i * h)(x cos(theta_i) + z sin(theta_i)),   H(k) = |k| W(k)

which is the inverse of the projection for a series dense over 180 degrees (Radermacher, in Frank (ed.), Electron
Tomography (2006), ch. 8), so that values come back in the volume's own unit. dtheta_i is the image's own share of the
angles. The ramp is the transform of its band-limited kernel, which keeps its mean right (Kak & Slaney, Principles of
Computerized Tomographic Imaging (1988), eq. 61).

The window "sirt" imitates n iterations of a Landweber scheme, of which SIRT is one: after n steps a component whose
eigenvalue under back-projection of the projection is lambda is recovered to 1 - (1 - tau lambda)^n, and lambda falls as
1 / |k|. With the largest step that converges, W(k) = 1 - (1 - k_1 / |k|)^n, k_1 the lowest frequency of the line
(compare Wolf, Lubk & Lichte, Ultramicroscopy 136, 15 (2014)).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import fast_length, soft_step
from cryofleet.progress import Progress, no_progress, part
from services.simulation.projection import back_project, checked_images

Array = NDArray[np.float32]
Window = Literal["ramp", "hamming", "sirt"]
#: Width of the edge at the cutoff, cycles per pixel.
CUTOFF_EDGE = 0.02


def weighted_back_projection(
    stack: Array,
    tilt_angles_degrees: ArrayLike,
    depth: int,
    width: int,
    *,
    window: Window = "ramp",
    sirt_iterations: int = 20,
    cutoff: float = 0.5,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Array:
    """The volume `[z, y, x]` of images `[tilt, y, u]`.

    Args:
        stack: projections, sums over voxels along the beam, zero outside of the specimen.
        tilt_angles_degrees: of each image.
        depth: voxels along z.
        width: voxels along x.
        window: "ramp", "hamming" (0.54 + 0.46 cos(2 pi k)) or "sirt"; see this file's head.
        sirt_iterations: n, for "sirt".
        cutoff: frequencies above it, cycles per pixel, are left out, with a soft edge.
        workers: threads; the result does not depend on them.
        progress: told of the work.

    Raises InvalidArgument for angles, sizes or options that make no sense.
    """
    angles = checked_images(stack, tilt_angles_degrees, depth, width)
    line = fast_length(2 * stack.shape[2])
    response = filter_response(line, stack.shape[2], window, sirt_iterations, cutoff)
    shares = angular_shares(angles)
    weighted = np.empty(stack.shape, np.float32)
    for index, image in enumerate(stack):
        spectrum = scipy.fft.rfft(image, line, axis=1, workers=workers)
        spectrum *= response * np.float32(shares[index])
        weighted[index] = scipy.fft.irfft(spectrum, line, axis=1, workers=workers)[:, : stack.shape[2]]
        progress(0.2 * (index + 1) / len(stack), "weighting")
    return back_project(weighted, angles, depth, width, workers, part(progress, 0.2, 1.0))


def filter_response(line: int, width: int, window: Window, sirt_iterations: int, cutoff: float) -> Array:
    """|k| W(k) on the half FFT grid of a line that holds images of `width` pixels."""
    if window not in get_args(Window):
        raise InvalidArgument(f"window is {window!r}, it must be one of {', '.join(get_args(Window))}")
    if sirt_iterations < 1 or not 0 < cutoff <= 1:
        raise InvalidArgument(f"sirt_iterations {sirt_iterations} and cutoff {cutoff:g} must be positive")
    n = np.fft.fftfreq(line, 1 / line)
    kernel = np.zeros(line)
    kernel[0] = 0.25
    odd = n.astype(np.int64) % 2 == 1
    kernel[odd] = -1 / (np.pi * n[odd]) ** 2
    response: NDArray[np.float64] = scipy.fft.rfft(kernel).real
    k = np.fft.rfftfreq(line)
    if window == "hamming":
        response = response * (0.54 + 0.46 * np.cos(2 * np.pi * k))
    elif window == "sirt":
        lowest = 1 / width
        response = response * (1 - (1 - np.minimum(1, lowest / np.maximum(k, lowest))) ** sirt_iterations)
    if cutoff < 0.5:
        response = response * soft_step(k.astype(np.float32), cutoff, CUTOFF_EDGE)
    return np.asarray(response, np.float32)


def angular_shares(angles_degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of the angles (radians) that each image stands for: half of the way to the next on either side.

    The missing wedge is nobody's: the gap around -90 / +90 counts as no more than the step beside it.
    """
    order = np.argsort(angles_degrees, kind="stable")
    ascending = np.radians(angles_degrees[order])
    if len(ascending) == 1:
        return np.array([np.pi])
    steps = np.diff(ascending)
    around = np.pi - (ascending[-1] - ascending[0])
    # both ends of the range may be one direction, or neighbours across it
    below, above = min(around, steps[0]), min(around, steps[-1])
    shares = 0.5 * (np.concatenate([[below], steps]) + np.concatenate([steps, [above]]))
    result = np.empty(len(shares))
    result[order] = shares
    return result
