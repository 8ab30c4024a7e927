"""One way to open a volume file, whatever its format: the content decides, never the name's ending."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.formats import mrc, tiff
from cryofleet.progress import Progress, no_progress


class VolumeFile(AbstractContextManager["VolumeFile"], Protocol):
    """A volume that is read slab by slab, so that memory stays bounded."""

    name: str
    """What errors call the file."""
    shape: tuple[int, int, int]
    """(z, y, x)."""
    voxel_size_angstrom: tuple[float, float, float] | None
    """Along x, y and z; None where the file has none that can be meant."""

    def slab(self, start: int, stop: int) -> NDArray[np.float32]:
        """Sections start to stop along z, [z, y, x]."""
        ...

    def close(self) -> None: ...


def open_volume_file(path: Path, name: str, scratch: Path, progress: Progress = no_progress) -> VolumeFile:
    """Opens an MRC file, plain or gzipped, or a TIFF stack.

    Args:
        path: the file.
        name: the user's name for it, which errors and some of MRC's conventions go by.
        scratch: a folder for the unpacked content of a gzipped file.
        progress: of the unpacking.

    Raises:
        InvalidArgument: the file is damaged, truncated, or of no known format; the message says what was found.
        FailedPrecondition: it is readable but does not hold one volume.
    """
    with path.open("rb") as file:
        head = file.read(mrc.HEADER_BYTES)
    if tiff.is_tiff(head):
        return tiff.TiffVolume(path, name)
    if mrc.is_gzip(head):
        unpacked = scratch / "unpacked.mrc"
        mrc.unpack_gzip(path, unpacked, name, progress)
        return mrc.MrcVolume(unpacked, name)
    if not head:
        raise InvalidArgument(f"{name}: {mrc.describe(head)}")
    return mrc.MrcVolume(path, name)
