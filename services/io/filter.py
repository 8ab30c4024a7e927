"""Linear filters of whole volumes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

from cryofleet.numerics import fourier
from cryofleet.progress import Progress, no_progress

Slab = NDArray[np.float32]
ReadSlab = Callable[[int, int], Slab]

# A Gaussian is cut off at this many standard deviations, as scipy's is.
_TRUNCATE = 4.0
_BLOCK_BYTES = 64 << 20
# A block, the filter's output and its intermediate array; the reader's own copy.
_BLOCK_COPIES = 4


def gaussian(
    read: ReadSlab,
    shape: tuple[int, int, int],
    sigma_voxels: float,
    write: Callable[[Slab], object],
    progress: Progress = no_progress,
) -> None:
    """Convolves a volume with a Gaussian, slab by slab along z.

    Each slab is read with a halo of the kernel's radius, so that the result equals
    `scipy.ndimage.gaussian_filter(volume, sigma)` (mode "reflect", cut off at 4 sigma) to the last bit.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x) of the volume.
        sigma_voxels: standard deviation.
        write: takes the filtered slabs in order.
        progress: called after each slab.
    """
    depth = shape[0]
    halo, thickness = _blocks(shape, sigma_voxels)
    for start in range(0, depth, thickness):
        stop = min(start + thickness, depth)
        first, last = max(0, start - halo), min(depth, stop + halo)
        smoothed = scipy.ndimage.gaussian_filter(read(first, last), sigma_voxels, truncate=_TRUNCATE)
        write(smoothed[start - first : stop - first])
        progress(stop / depth, "smoothing", sections=float(stop), voxels=float(stop * shape[1] * shape[2]))


def gaussian_memory_bytes(shape: tuple[int, int, int], sigma_voxels: float) -> int:
    """What `gaussian` needs at most."""
    halo, thickness = _blocks(shape, sigma_voxels)
    return _BLOCK_COPIES * 4 * min(shape[0], thickness + 2 * halo) * shape[1] * shape[2]


def _blocks(shape: tuple[int, int, int], sigma_voxels: float) -> tuple[int, int]:
    """Halo and thickness of the slabs. A slab is no thinner than its halo, so that no section is read over 3 times."""
    halo = int(_TRUNCATE * sigma_voxels + 0.5)
    thickness = max(_BLOCK_BYTES // (4 * shape[1] * shape[2]) - 2 * halo, halo, 1)
    return halo, thickness


def band_pass(
    read: ReadSlab,
    shape: tuple[int, int, int],
    voxel_size_angstrom: float,
    low_pass_angstrom: float | None,
    high_pass_angstrom: float | None,
    write: Callable[[Slab], object],
    progress: Progress = no_progress,
    workers: int = 1,
) -> None:
    """Keeps the details of a volume between two limits in Å, in Fourier space.

    All frequencies from 1/high_pass to 1/low_pass are kept whole. Outside, the filter falls to 0 along half a cosine of
    0.05 cycles per voxel (a tenth of Nyquist); below a high-pass limit closer to zero than that, over what there is. A
    high-pass removes the mean. The volume counts as periodic. One half spectrum of it is held in memory: sections are
    transformed as they are read, then columns along z, then sections again as they are written.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x) of the volume.
        voxel_size_angstrom: of the volume.
        low_pass_angstrom: details finer than this are removed; None for no low-pass.
        high_pass_angstrom: gradients coarser than this are removed; None for no high-pass.
        write: takes the filtered slabs in order.
        progress: called after each piece of work.
        workers: threads of the transforms.
    """
    depth, height, width = shape
    profile = fourier.band_profile(voxel_size_angstrom, high_pass_angstrom, low_pass_angstrom)
    spectrum = np.empty((depth, height, width // 2 + 1), np.complex64)
    sections = max(1, _BLOCK_BYTES // (8 * height * spectrum.shape[2]))
    rows = max(1, _BLOCK_BYTES // (8 * depth * spectrum.shape[2]))

    for start in range(0, depth, sections):
        stop = min(start + sections, depth)
        spectrum[start:stop] = scipy.fft.rfftn(read(start, stop), axes=(1, 2), workers=workers)
        progress(0.4 * stop / depth, "transforming")
    kz, ky, kx = fourier.axis_frequencies(shape)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        block = scipy.fft.fft(spectrum[:, start:stop], axis=0, workers=workers)
        block *= profile(np.sqrt(kz * kz + ky[:, start:stop] ** 2 + kx * kx))
        spectrum[:, start:stop] = scipy.fft.ifft(block, axis=0, workers=workers, overwrite_x=True)
        progress(0.4 + 0.2 * stop / height, "filtering")
    for start in range(0, depth, sections):
        stop = min(start + sections, depth)
        write(scipy.fft.irfftn(spectrum[start:stop], (height, width), axes=(1, 2), workers=workers))
        progress(0.6 + 0.4 * stop / depth, "transforming back")


def band_pass_memory_bytes(shape: tuple[int, int, int]) -> int:
    """What `band_pass` needs at most: the half spectrum, and blocks with their transforms and filters."""
    depth, height, width = shape
    block = max(_BLOCK_BYTES, 8 * max(height, depth) * (width // 2 + 1))
    return 8 * depth * height * (width // 2 + 1) + _BLOCK_COPIES * block
