"""Resampling along an axis in Fourier space, to any step."""

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

# Lengths that floating point makes a hair shorter than a whole number of steps count as whole.
_SLACK = 1e-6


def resampled_length(length: int, step: float) -> int:
    """Samples of an axis after resampling: whole steps that fit in it. Raises InvalidArgument where none does."""
    count = int(length / step + _SLACK)
    if count < 1:
        raise InvalidArgument(f"an axis of {length} voxels can't be resampled in steps of {step:g} voxels")
    return count


def resampling_matrix(length: int, step: float) -> NDArray[np.float32]:
    """The matrix (samples, length) that takes an axis to samples at 0, step, 2 step, .. voxels.

    It is the trigonometric interpolation of the axis, taken as periodic, without the frequencies above 0.5 / step
    cycles per voxel; what lies exactly there counts half. The mean is kept, sample i lies at i step. For a whole step
    the voxels at the end that it does not divide are left out, and the product is that of `fourier.fourier_crop`.

    Raises InvalidArgument where the axis is shorter than a step, or the step is not above 0.
    """
    if not step > 0:
        raise InvalidArgument(f"a step of {step:g} voxels: it must be above 0")
    count = resampled_length(length, step)
    used = count * round(step) if abs(step - round(step)) < _SLACK and step >= 1 else length
    # Frequencies are whole cycles over the used length, -highest to highest.
    limit = min(used / 2, used / (2 * step))
    highest = int(limit + _SLACK)
    halved = abs(limit - highest) < _SLACK
    distance = np.arange(count)[:, None] * step - np.arange(used)[None, :]
    # sum of cos(2 pi k distance / used) over whole k, a geometric series
    angle = np.pi * np.mod(distance, used) / used
    sine = np.sin(angle)
    on_voxel = np.abs(sine) < 1e-9
    terms = 2 * highest + 1
    kernel = np.where(on_voxel, terms, np.sin(terms * angle) / np.where(on_voxel, 1.0, sine))
    if halved:
        kernel -= np.cos(2 * highest * angle)
    matrix = np.zeros((count, length), np.float32)
    matrix[:, :used] = kernel / used
    return matrix
