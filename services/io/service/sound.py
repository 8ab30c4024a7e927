"""Volumes whose voxels are all numbers: a user's own file, which nobody ingested, may have others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.volumes import Volume
from services.io.slices import ReadSlab


def sound(voxels: NDArray[np.float32], uri: str) -> NDArray[np.float32]:
    """The same voxels. Raises FailedPrecondition where some are NaN or infinite."""
    # The sum of float32s never overflows a float64.
    if not np.isfinite(voxels.sum(dtype=np.float64)):
        raise FailedPrecondition(f"{uri} has voxels that are NaN or infinite: ingest the file first")
    return voxels


def sound_slabs(volume: Volume) -> ReadSlab:
    """Reads slabs of a volume, each of them `sound`."""
    return lambda first, last: sound(volume.slab(first, last), volume.uri)
