"""Real ribosomes as a measure of subtomograms: a mask for their half maps, and what it does by itself."""

from __future__ import annotations

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.numerics import fourier, masks


def molecular_mask(average: NDArray[np.float32], voxel_size: float) -> NDArray[np.float32]:
    """The average at 40 Å, its largest piece that encloses the ribosome's volume (2.4 MDa of 1.2 Å^3 each), with a
    raised cosine of 24 Å around it."""
    low = fourier.low_pass(average, 40.0, voxel_size) * masks.soft_sphere(len(average), 0.34 * len(average), 2)
    voxels = round(2.4e6 * 1.2 / voxel_size**3)
    pieces, count = scipy.ndimage.label(low > np.sort(low.ravel())[-voxels])
    sizes = scipy.ndimage.sum(pieces > 0, pieces, np.arange(1, count + 1))
    inside = scipy.ndimage.binary_fill_holes(pieces == 1 + int(np.argmax(sizes)))
    distance = scipy.ndimage.distance_transform_edt(~inside).astype(np.float32)
    return fourier.soft_step(distance, 0.0, 24.0 / voxel_size)


def randomised(volume: NDArray[np.float32], cutoff: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """The volume with random phases above a frequency, cycles per voxel."""
    spectrum = fourier.forward(volume)
    noise = fourier.forward(rng.standard_normal(volume.shape).astype(np.float32))
    beyond = fourier.radial_frequency(volume.shape) > cutoff
    spectrum[beyond] = np.abs(spectrum[beyond]) * np.exp(1j * np.angle(noise[beyond]))
    return fourier.inverse(spectrum, volume.shape)
