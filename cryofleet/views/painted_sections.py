"""What somebody paints on a tomogram's sections, feature by feature, with undo."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cryofleet.errors import InvalidArgument

Labels = NDArray[np.uint8]
NOT_LOOKED_AT, FEATURE, NOT_FEATURE = 0, 1, 2
"""What a voxel is, as masks that are painted hold it."""
MOST_BYTES, MOST_SECTIONS = 32 << 20, 1000
"""Of a painting, compressed."""
MOST_UNDONE = 200
MOST_POINTS = 20_000
LARGEST_RADIUS = 500.0
_GREYS = np.array([128, 255, 0], np.uint8)
"""Of a picture: what was not looked at, the feature, and not the feature."""


@dataclass(frozen=True)
class _Change:
    """A rectangle of a section before and after a stroke, compressed."""

    feature: str
    section: int
    rows: slice
    columns: slice
    before: bytes
    after: bytes


class PaintedSections:
    """Painted sections of a tomogram of `shape` (z, y, x), by the names of features."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        # Compressed: what is painted is mostly uniform, and one visitor of many must not fill the memory.
        self._sections: dict[tuple[str, int], bytes] = {}
        self._counts: dict[tuple[str, int], NDArray[np.int64]] = {}
        self._done: list[_Change] = []
        self._undone: list[_Change] = []
        self.edits = 0
        """Raised by all that changes something."""

    @property
    def features(self) -> list[str]:
        """Those of which something is painted, in the order that they were begun."""
        return list(dict.fromkeys(name for (name, _), counts in self._counts.items() if counts[1:].any()))

    def sections(self, feature: str) -> list[int]:
        """The sections, rising, on which something of a feature is painted."""
        return sorted(z for (name, z), counts in self._counts.items() if name == feature and counts[1:].any())

    def section(self, feature: str, z: int) -> Labels:
        """What is painted on a section `[y, x]`."""
        packed = self._sections.get((feature, z))
        if packed is None:
            return np.zeros(self.shape[1:], np.uint8)
        return np.frombuffer(bytearray(zlib.decompress(packed)), np.uint8).reshape(self.shape[1:])

    def counts(self, feature: str) -> tuple[int, int]:
        """How many voxels are painted as the feature, and as not the feature."""
        total = sum((counts for (name, _), counts in self._counts.items() if name == feature), np.zeros(3, np.int64))
        return int(total[FEATURE]), int(total[NOT_FEATURE])

    def stroke(self, feature: str, z: int, points: Sequence[Sequence[float]], radius: float, value: int) -> None:
        """Paint all voxels of a section whose centres are within `radius` of a line through `points`, and at least the
        voxels that the points are in.

        Args:
            feature: its name.
            z: the section.
            points: column and row of each, in voxels, voxel centres at whole numbers.
            radius: in voxels.
            value: FEATURE, NOT_FEATURE, or NOT_LOOKED_AT, which erases.

        Raises InvalidArgument for what can't be, and where sections would take too much memory.
        """
        line = np.array(points, np.float64)
        if line.ndim != 2 or line.shape[1] != 2 or not 0 < len(line) <= MOST_POINTS or not np.isfinite(line).all():
            raise InvalidArgument(f"a stroke has 1 to {MOST_POINTS:,} points of a column and a row each")
        if not 0 <= z < self.shape[0] or value not in (NOT_LOOKED_AT, FEATURE, NOT_FEATURE):
            raise InvalidArgument(f"there is no section {z}, or no brush {value}")
        if not 0 <= radius <= LARGEST_RADIUS:
            raise InvalidArgument(f"a brush has a radius of 0 to {LARGEST_RADIUS:g} voxels")
        sides = np.array([self.shape[2], self.shape[1]])
        low = np.maximum(np.floor(line.min(axis=0) - radius), 0).astype(int)
        high = np.minimum(np.ceil(line.max(axis=0) + radius) + 1, sides).astype(int)
        if (low >= high).any():
            return  # beside the section
        rows, columns = slice(low[1], high[1]), slice(low[0], high[0])
        touched = _near(line, radius, rows, columns)
        labels = self.section(feature, z)
        before = labels[rows, columns]
        after = np.where(touched, np.uint8(value), before)
        if np.array_equal(before, after):
            return
        change = _Change(feature, z, rows, columns, _packed(before), _packed(after))
        labels[rows, columns] = after
        self.load(feature, z, labels)
        self._done.append(change)
        del self._done[:-MOST_UNDONE]
        self._undone.clear()

    def undo(self) -> tuple[str, int] | None:
        """Take the last stroke back; its feature and section."""
        return self._again(self._done, self._undone, lambda change: change.before)

    def redo(self) -> tuple[str, int] | None:
        """Paint once more what was undone last; its feature and section."""
        return self._again(self._undone, self._done, lambda change: change.after)

    def load(self, feature: str, z: int, labels: Labels) -> None:
        """A section `[y, x]` in place of what is there; it can't be undone. Raises InvalidArgument where all sections
        together would take too much memory.
        """
        packed = _packed(labels)
        kept = sum(len(each) for key, each in self._sections.items() if key != (feature, z))
        if kept + len(packed) > MOST_BYTES or len({*self._sections, (feature, z)}) > MOST_SECTIONS:
            raise InvalidArgument(
                f"{len(self._sections)} sections are painted, in {kept:,} bytes: no more than {MOST_SECTIONS}, in "
                f"{MOST_BYTES:,}, are kept at once"
            )
        self._sections[feature, z] = packed
        self._counts[feature, z] = np.bincount(labels.ravel(), minlength=3)
        self.edits += 1

    def _again(
        self, taken: list[_Change], kept: list[_Change], which: Callable[[_Change], bytes]
    ) -> tuple[str, int] | None:
        if not taken:
            return None
        change = taken.pop()
        kept.append(change)
        shape = (change.rows.stop - change.rows.start, change.columns.stop - change.columns.start)
        labels = self.section(change.feature, change.section)
        labels[change.rows, change.columns] = np.frombuffer(zlib.decompress(which(change)), np.uint8).reshape(shape)
        self.load(change.feature, change.section, labels)
        return change.feature, change.section


def _near(line: NDArray[np.float64], radius: float, rows: slice, columns: slice) -> NDArray[np.bool_]:
    """Which voxels of a rectangle are within a radius of a line of points."""
    touched = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.bool_)
    for start, end in zip(line, np.concatenate([line[1:], line[-1:]]), strict=True):
        # Only the rectangle around each piece of the line is looked at.
        low = np.floor(np.minimum(start, end) - radius).astype(int) - (columns.start, rows.start)
        high = np.ceil(np.maximum(start, end) + radius).astype(int) + 1 - (columns.start, rows.start)
        part = np.s_[max(0, low[1]) : max(0, high[1]), max(0, low[0]) : max(0, high[0])]
        patch = touched[part]
        if not patch.size:
            continue
        y = np.arange(patch.shape[0])[:, None] + max(0, low[1]) + rows.start
        x = np.arange(patch.shape[1])[None, :] + max(0, low[0]) + columns.start
        along = end - start
        share = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(float(along @ along), 1e-12)
        share = np.clip(share, 0, 1)
        distance = np.hypot(x - start[0] - share * along[0], y - start[1] - share * along[1])
        patch |= distance <= max(radius, 0.5)
    at = np.rint(line).astype(int) - (columns.start, rows.start)
    inside = (at >= 0).all(axis=1) & (at[:, 0] < touched.shape[1]) & (at[:, 1] < touched.shape[0])
    touched[at[inside, 1], at[inside, 0]] = True
    return touched


def _packed(labels: Labels) -> bytes:
    return zlib.compress(np.ascontiguousarray(labels).tobytes(), 1)


def to_png(labels: Labels) -> bytes:
    """A painted section as a picture: white the feature, black not, grey what was not looked at."""
    buffer = io.BytesIO()
    Image.fromarray(_GREYS[labels]).save(buffer, "PNG")
    return buffer.getvalue()


def from_png(data: bytes, name: str, shape: tuple[int, int]) -> Labels:
    """A section (y, x) of such a picture. Raises InvalidArgument, naming it, for another size and what is no PNG."""
    try:
        # The size is compared before anything is decoded.
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            warnings.simplefilter("ignore")
            if image.size != (shape[1], shape[0]) or image.mode != "L":
                raise InvalidArgument(
                    f"{name} is a picture of {image.size[0]} x {image.size[1]} pixels, mode {image.mode}; one of "
                    f"{shape[1]} x {shape[0]} in grey is needed, as the tomogram's sections"
                )
            grey = np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InvalidArgument(f"{name} is a damaged PNG picture: {error}") from None
    labels = np.full(shape, NOT_LOOKED_AT, np.uint8)
    for value in (FEATURE, NOT_FEATURE):
        labels[grey == _GREYS[value]] = value
    return labels
