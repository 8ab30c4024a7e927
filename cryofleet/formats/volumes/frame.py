"""Where a volume's voxels lie, and a volume in its frame as readers give it and writers take it.

With i = (i_x, i_y, i_z) a voxel's index from 0, a the voxel size and o the origin, its centre lies at o + a i, in Å.
`docs/formats.md` says what each format holds of this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.progress import Progress, no_progress

if TYPE_CHECKING:
    from cryofleet.formats.frames import CentreRule, Handedness

Sizes = tuple[float, float, float]
Shape = tuple[int, int, int]
ReadSlab = Callable[[int, int], NDArray[np.float32]]

SLAB_BYTES = 16 << 20
"""Of the float32 sections that are worked on at a time, where a format's layers are not thicker."""
LAYER_BYTES = 128 << 20
"""Thicker layers are decoded once for each of their slabs, so that memory stays bounded."""
MAX_SIDE = 65535
LARGEST_SECTION_BYTES = 1 << 30
"""In float32, of formats whose empty parts take no room in the file."""
_PLAIN_SECTION_BYTES = 64 << 20
_COMPRESSION_LIMIT = 1032

_NOTE = re.compile(r"cryofleet (?:frame|contrast=).*")
_NOTE_ITEM = re.compile(r"\b(voxel|handedness|binning)=([\w.+-]+)")


@dataclass(frozen=True)
class VolumeFrame:
    """The frame of a volume; what is None is not known."""

    voxel_size_angstrom: Sizes | None = None
    """Along x, y and z."""
    origin_angstrom: Sizes | None = None
    """(x, y, z) of the first voxel's centre; None where the format has no place for it."""
    centre: CentreRule = "floor(size/2)"
    """The voxel that rotations and boxes are centred on, from the first; one rule in all of Cryofleet."""
    binning: float | None = None
    """How many pixels of the unbinned data a voxel's side spans."""
    handedness: Handedness = "right"
    """Right is the sample as it is; left is its mirror image along z."""

    def __post_init__(self) -> None:
        sizes = self.voxel_size_angstrom
        if sizes is not None and not all(math.isfinite(size) and size > 0 for size in sizes):
            raise InvalidArgument(f"a voxel of {sizes} Å: its sides must be above 0")
        if self.origin_angstrom is not None and not all(math.isfinite(each) for each in self.origin_angstrom):
            raise InvalidArgument(f"the origin is {self.origin_angstrom}; it must be finite numbers")
        if self.binning is not None and not (math.isfinite(self.binning) and self.binning > 0):
            raise InvalidArgument(f"the binning is {self.binning}; it must be above 0")
        if self.handedness not in ("right", "left"):
            raise InvalidArgument(f"unknown handedness {self.handedness!r}; known are right, left")

    @property
    def one_voxel_size(self) -> float | None:
        """The mean of the three sides; None where it is not known."""
        return None if self.voxel_size_angstrom is None else math.fsum(self.voxel_size_angstrom) / 3

    def note(self) -> str:
        """What formats have no field for, as a line of text; empty where there is nothing to say."""
        said = []
        if self.voxel_size_angstrom == (1.0, 1.0, 1.0):
            # in MRC files 1 Å is what programs write that do not know
            said.append("voxel=1")
        if self.handedness != "right":
            said.append(f"handedness={self.handedness}")
        if self.binning is not None:
            said.append(f"binning={self.binning:.9g}")
        return f"cryofleet frame {' '.join(said)}" if said else ""

    def with_note(self, texts: Sequence[str]) -> VolumeFrame:
        """The frame with what `note` wrote among the texts; what makes no sense there is ignored."""
        found = {
            name: value for text in texts for note in _NOTE.findall(text) for name, value in _NOTE_ITEM.findall(note)
        }
        frame = self
        if frame.voxel_size_angstrom is None and found.get("voxel") == "1":
            frame = replace(frame, voxel_size_angstrom=(1.0, 1.0, 1.0))
        if found.get("handedness") == "left":
            frame = replace(frame, handedness="left")
        try:
            return replace(frame, binning=float(found["binning"])) if "binning" in found else frame
        except (ValueError, InvalidArgument):
            return frame


@dataclass(frozen=True)
class VolumeData:
    """A volume, or a stack of images, that is read slab by slab."""

    name: str
    """What errors call it."""
    shape: Shape
    """(z, y, x); of a stack (images, y, x)."""
    read: ReadSlab
    """Sections start to stop, float32 [z, y, x]."""
    frame: VolumeFrame = VolumeFrame()
    kind: Literal["volume", "stack"] = "volume"
    labels: tuple[str, ...] = ()
    """Lines of text that go with it."""
    stored_as: str = "float32"
    """The type of the stored numbers; empty where nothing says."""
    layer: int = 1
    """Sections that are stored, and hence decoded, together."""
    warnings: tuple[str, ...] = ()

    def slabs(
        self, progress: Progress = no_progress, phase: str = "", thickness: int | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """The volume in order, in slabs of at most `thickness` sections, or of about SLAB_BYTES."""
        depth = self.shape[0]
        if thickness is None:
            thickness = self.thickness()
        for start in range(0, depth, thickness):
            progress(start / depth, phase)
            yield self.read(start, min(start + thickness, depth))
        progress(1.0, phase)

    def thickness(self) -> int:
        """See `slab_thickness`."""
        return slab_thickness(self.shape, self.layer)

    def mirrored(self) -> VolumeData:
        """The mirror image along z, of the other handedness; the origin stays the first voxel's.

        Raises FailedPrecondition for a stack of images.
        """
        if self.kind == "stack":
            raise FailedPrecondition(f"{self.name}: a stack of images has no handedness")
        depth = self.shape[0]

        def read(start: int, stop: int) -> NDArray[np.float32]:
            return np.ascontiguousarray(self.read(depth - stop, depth - start)[::-1])

        other: Handedness = "left" if self.frame.handedness == "right" else "right"
        return replace(self, read=read, frame=replace(self.frame, handedness=other))


def slab_thickness(shape: Shape, layer: int = 1, slab_bytes: int = SLAB_BYTES) -> int:
    """Sections of a slab of about `slab_bytes`, in whole layers where one takes no more than LAYER_BYTES."""
    section = 4 * shape[1] * shape[2]
    if layer * section > LAYER_BYTES:
        return max(1, LAYER_BYTES // section)
    return max(1, slab_bytes // section // layer) * layer


def check_sparse_shape(shape: Sequence[int], stored_bytes: int, name: str) -> None:
    """Checks a size that a header states and its file need not bear out, since empty parts take no room.

    Raises InvalidArgument: a side is beyond MAX_SIDE, a section beyond LARGEST_SECTION_BYTES, or beyond what the stored
    bytes can be unpacked to.
    """
    said = " x ".join(str(side) for side in reversed(shape))
    if len(shape) != 3 or not all(1 <= side <= MAX_SIDE for side in shape):
        raise InvalidArgument(f"{name}: the header's size is {said} voxels (x, y, z); sides are 1 to {MAX_SIDE}")
    section = 4 * shape[1] * shape[2]
    limit = min(LARGEST_SECTION_BYTES, max(_PLAIN_SECTION_BYTES, _COMPRESSION_LIMIT * stored_bytes))
    if section > limit:
        raise InvalidArgument(
            f"{name}: the header says {said} voxels (x, y, z); a section would take {section} bytes, "
            f"and what is stored allows {limit}"
        )
