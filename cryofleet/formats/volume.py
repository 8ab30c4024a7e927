"""One way to open a volume file, whatever its format: the content decides, never the name's ending."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cryofleet.formats.volumes.catalogue import open_volume
from cryofleet.progress import Progress, no_progress


class VolumeFile(AbstractContextManager["VolumeFile"], Protocol):
    """A volume that is read slab by slab, so that memory stays bounded."""

    name: str
    """What errors call the file."""
    shape: tuple[int, int, int]
    """(z, y, x)."""
    layer: int
    """Sections that are decoded together."""

    @property
    def voxel_size_angstrom(self) -> tuple[float, float, float] | None:
        """Along x, y and z; None where the file has none that can be meant."""
        ...

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Sections start to stop along z, [z, y, x]."""
        ...

    def close(self) -> None: ...


def open_volume_file(path: Path, name: str, scratch: Path, progress: Progress = no_progress) -> VolumeFile:
    """Opens a volume of any format of `cryofleet.formats.volumes.catalogue`.

    Args:
        path: the file or, for OME-Zarr, the folder.
        name: the user's name for it, which errors and some of MRC's conventions go by.
        scratch: a folder for the unpacked content of a gzipped file.
        progress: of the unpacking.

    Raises:
        InvalidArgument: the file is damaged, truncated, or of no known format; the message says what was found.
        FailedPrecondition: it is readable but does not hold one volume.
    """
    return open_volume(path, name, scratch, progress)[1]
