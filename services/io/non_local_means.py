"""Non-local means: a voxel becomes the mean of those whose surroundings look like its own.

Buades, Coll & Morel 2005, CVPR 2, 60, with the expected distance of two patches of noise taken off, and the sums over
patches by integral images (Darbon et al. 2008, ISBI, 1331), as scikit-image has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from cryofleet.progress import Progress, no_progress
from services.io.bricks import Array, ReadSlab, Shape, by_bricks
from services.io.bricks import memory_bytes as brick_bytes

_COPIES = 8


def non_local_means(
    read: ReadSlab,
    shape: Shape,
    noise_standard_deviation: float,
    patch_radius_voxels: int,
    search_radius_voxels: int,
    strength: float,
    write: Callable[[Array], object],
    progress: Progress = no_progress,
    workers: int = 1,
) -> None:
    """Weights exp(-max(0, D - 2 sigma^2) / (strength sigma)^2), D the mean squared difference of two patches.

    Args:
        read: sections start to stop of the volume, [z, y, x].
        shape: (z, y, x) of the volume.
        noise_standard_deviation: sigma, in the volume's unit.
        patch_radius_voxels: patches are cubes of 2 radius + 1 voxels.
        search_radius_voxels: voxels up to so far away along each axis are looked at; the time goes with its cube.
        strength: how much less alike than noise makes them surroundings may be.
        write: takes the filtered slabs in order.
        progress: called after each brick.
        workers: threads.
    """
    from skimage.restoration import denoise_nl_means  # heavy, and rarely asked for

    filtered = partial(
        denoise_nl_means,
        patch_size=2 * patch_radius_voxels + 1,
        patch_distance=search_radius_voxels,
        h=strength * noise_standard_deviation,
        sigma=noise_standard_deviation,
        fast_mode=True,
    )
    by_bricks(
        read,
        shape,
        patch_radius_voxels + search_radius_voxels + 1,
        lambda brick: np.asarray(filtered(np.ascontiguousarray(brick)), np.float32),
        write,
        progress,
        "comparing patches",
        workers,
    )


def memory_bytes(shape: Shape, patch_radius_voxels: int, search_radius_voxels: int, workers: int = 1) -> int:
    """What `non_local_means` needs at most."""
    return brick_bytes(shape, patch_radius_voxels + search_radius_voxels + 1, _COPIES, workers)
