"""One way to open a stack of images, a tilt series say, whatever its format: the content decides, never the name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats import mrc, tiff
from cryofleet.progress import Progress, no_progress

_ANISOTROPY_LIMIT = 0.01


class _Sections(AbstractContextManager["_Sections"], Protocol):
    shape: tuple[int, int, int]

    def slab(self, start: int, stop: int) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


class ImageStack:
    """Images [y, x] of one size, read a few at a time."""

    def __init__(self, sections: _Sections, name: str, pixel_size_angstrom: tuple[float, float] | None) -> None:
        self._sections = sections
        self.name = name
        """What errors call the file."""
        self.shape = sections.shape
        """(images, y, x)."""
        self._pixel_size = pixel_size_angstrom

    def pixel_size(self, given_angstrom: float | None = None) -> float:
        """The pixel size in Å: the given one, or else the file's.

        Raises FailedPrecondition: the file has none, or sides that differ by more than 1%.
        """
        if given_angstrom is not None:
            return given_angstrom
        advice = "give it with --set pixel_size_angstrom=..."
        if self._pixel_size is None:
            raise FailedPrecondition(f"{self.name}: the file does not say its pixel size: {advice}")
        x, y = self._pixel_size
        if max(x, y) / min(x, y) > 1 + _ANISOTROPY_LIMIT:
            raise FailedPrecondition(f"{self.name}: the file says a pixel of {x:.4g} x {y:.4g} Å (x, y): {advice}")
        # headers hold the cell in float32: its seventh digit is noise
        return round((x + y) / 2, 5)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Images start to stop, float32 [image, y, x].

        Raises FailedPrecondition where one holds a value that is not a finite number; it names the image and pixel.
        """
        images = self._sections.slab(start, stop)
        finite = np.isfinite(images)
        if not finite.all():
            image, y, x = np.unravel_index(int(np.argmin(finite)), finite.shape)
            raise FailedPrecondition(
                f"{self.name}: image {start + image} holds {images[image, y, x]} at pixel x={x}, y={y}; "
                "pixels must be finite numbers"
            )
        return images

    def close(self) -> None:
        self._sections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_image_stack(path: Path, name: str, scratch: Path, progress: Progress = no_progress) -> ImageStack:
    """Opens an MRC stack, plain or gzipped, or a TIFF stack.

    Args:
        path: the file.
        name: the user's name for it, which errors go by.
        scratch: a folder for the unpacked content of a gzipped file.
        progress: of the unpacking.

    Raises:
        InvalidArgument: the file is damaged, truncated, or of no known format; the message says what was found.
        FailedPrecondition: it is readable but holds no stack of images.
    """
    with path.open("rb") as file:
        head = file.read(mrc.HEADER_BYTES)
    if tiff.is_tiff(head):
        volume = tiff.TiffVolume(path, name)
        sizes = volume.voxel_size_angstrom
        return ImageStack(volume, name, None if sizes is None else sizes[:2])
    if not head:
        raise InvalidArgument(f"{name}: {mrc.describe(head)}")
    if mrc.is_gzip(head):
        unpacked = scratch / f"{path.name}.unpacked"
        mrc.unpack_gzip(path, unpacked, name, progress)
        path = unpacked
    images = mrc.MrcImages(path, name)
    return ImageStack(images, name, images.pixel_size_angstrom)
