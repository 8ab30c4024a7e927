"""Patches of tomograms whose voxels are labelled, from which a segmentation network learns: as many of each class.

Moebel et al. 2021 (Nature Methods 18:1386-1394) cut patches around particles, with a random shift and as many of each
class. Here a patch is drawn around a random voxel of a class, the background among them, so that what is no list of
particles, a membrane for instance, is met alike. One end of each tomogram is kept for validation: no patch of either
kind shows a voxel of one of the other.

Tomograms and labels are read by slabs, a few times over; memory is that of a slab and of the patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress, part
from services.learning.edss3d import BACKGROUND
from services.learning.tomogram_scale import ReadSlab, slab_sections

Shape = tuple[int, int, int]
MAX_LABELS = 1000
"""Labels that are counted apart: more are particles of their own, and no classes."""


@dataclass(frozen=True)
class LabelledTomogram:
    """A tomogram of `shape` (z, y, x) in the scale of a network, and its voxels' labels, numbers from 0 on; both by
    planes. `labels_name` is what errors call the labels.
    """

    shape: Shape
    read: ReadSlab
    read_labels: ReadSlab
    labels_name: str


@dataclass(frozen=True)
class Places:
    """Where patches begin: `tomograms` (n,) their numbers, `starts` (n, 3) as z, y, x, `held_back` (n,) 1 for those of
    validation, and `classes` (n,) the class that each was drawn for.
    """

    tomograms: NDArray[np.int64]
    starts: NDArray[np.int64]
    held_back: NDArray[np.uint8]
    classes: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.tomograms)


@dataclass(frozen=True)
class Region:
    """The part of a tomogram for training or for validation: voxels `start` to `stop` - 1 of an axis of `[z, y, x]`."""

    axis: int
    start: int
    stop: int

    def of(self, planes: NDArray[Any]) -> NDArray[Any]:
        """That part of planes `[z, y, x]`."""
        return planes[:, self.start : self.stop] if self.axis == 1 else planes[:, :, self.start : self.stop]


def regions(shape: Shape, size: int, validation_fraction: float, name: str) -> tuple[Region, Region]:
    """For training and for validation: the tomogram's longer side in the plane is cut where the fraction, at least a
    patch, is left.

    Raises InvalidArgument where a patch does not fit into each of them.
    """
    axis = 1 if shape[1] >= shape[2] else 2
    side = shape[axis]
    held = max(size, round(validation_fraction * side))
    if size > min(shape) or side - held < size:
        z, y, x = shape
        raise InvalidArgument(
            f"{name}: a tomogram of {x} x {y} x {z} voxels (x, y, z) has no room for patches of {size} voxels, one for "
            "training and one beside it for validation: smaller patches (patch_size_voxels) or larger tomograms are "
            "needed"
        )
    return Region(axis, 0, side - held), Region(axis, side - held, side)


@dataclass(frozen=True)
class LabelCounts:
    """By tomogram, `[region, z, label]`: voxels of each label in each plane of training (0) and validation (1)."""

    counts: tuple[NDArray[np.int64], ...]

    def of_labels(self, region: int) -> NDArray[np.int64]:
        """(labels,): voxels of all tomograms."""
        total: NDArray[np.int64] = np.sum([each[region].sum(axis=0) for each in self.counts], axis=0)
        return total


def count_labels(
    tomograms: Sequence[LabelledTomogram], labels: int, size: int, validation_fraction: float, progress: Progress
) -> LabelCounts:
    """Voxels of labels 0 to `labels` - 1. Raises InvalidArgument for a voxel that is none of these, with its place, and
    as `regions`.
    """
    counts = []
    for number, tomogram in enumerate(tomograms):
        of_regions = regions(tomogram.shape, size, validation_fraction, tomogram.labels_name)
        found = np.zeros((2, tomogram.shape[0], labels), np.int64)
        for first, planes in label_slabs(tomogram, labels):
            for kind, region in enumerate(of_regions):
                for z, plane in enumerate(region.of(planes), start=first):
                    found[kind, z] = np.bincount(plane.reshape(-1), minlength=labels)
            done = (first + len(planes)) / tomogram.shape[0]
            progress((number + done) / len(tomograms), "counting labels", tomograms=number)
        counts.append(found)
    return LabelCounts(tuple(counts))


def label_slabs(tomogram: LabelledTomogram, labels: int) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """All planes `[z, y, x]` as (first, planes). Raises InvalidArgument for a voxel that is no label below `labels`."""
    step = slab_sections(tomogram.shape)
    for first in range(0, tomogram.shape[0], step):
        planes = tomogram.read_labels(first, min(first + step, tomogram.shape[0]))
        known = (planes >= 0) & (planes < labels) & (planes == np.floor(planes))
        if not known.all():
            z, y, x = np.unravel_index(int(np.argmin(known)), known.shape)
            raise InvalidArgument(
                f"{tomogram.labels_name}: the voxel x={x}, y={y}, z={first + z} is {planes[z, y, x]:g}; labels are "
                f"whole numbers, and {labels} of them have a name, 0 to {labels - 1}"
            )
        yield first, planes.astype(np.uint16)


@dataclass(frozen=True)
class Classes:
    """What a network tells apart: `names` with the background first, and `of_label` (labels,), the class of each."""

    names: list[str]
    of_label: NDArray[np.uint8]


def choose_classes(label_names: Sequence[str], wanted: Sequence[str], counts: LabelCounts) -> Classes:
    """The classes `wanted`, in that order, or all named labels that occur; every other label is background, and label 0
    always is. Labels of one name are one class.

    Raises InvalidArgument for a name that no label has, or that none of the training parts has a voxel of, for a class
    without a name, and where no class is left.
    """
    present = counts.of_labels(0)
    available = [name for name in label_names[1:] if name != BACKGROUND]
    for name in wanted:
        if name not in available:
            raise InvalidArgument(f"classes: no label is named {name!r}; there are {', '.join(map(repr, available))}")
        if not present[[number for number, each in enumerate(label_names) if number and each == name]].sum():
            raise InvalidArgument(f"classes: the parts of the tomograms for training have no voxel of {name!r}")
    for number, name in enumerate(label_names):
        if number and present[number] and not name:
            raise InvalidArgument(f"label_names: label {number} occurs and has no name")
    occurring = [name for number, name in enumerate(label_names) if number and present[number] and name != BACKGROUND]
    names = list(dict.fromkeys(wanted or occurring))
    if not names:
        raise InvalidArgument(
            f"the labels hold nothing but the background, {label_names[0]!r}: a network needs a class beside it"
        )
    if len(names) > 254:
        raise InvalidArgument(f"the labels have {len(names)} classes; 254 are possible: choose by classes")
    names.insert(0, BACKGROUND)
    of_label = np.array([names.index(n) if i and n in names else 0 for i, n in enumerate(label_names)], np.uint8)
    return Classes(names, of_label)


def place_patches(
    tomograms: Sequence[LabelledTomogram],
    classes: Classes,
    counts: LabelCounts,
    *,
    size: int,
    patches: int,
    validation_fraction: float,
    seed: int,
    progress: Progress,
) -> Places:
    """About `patches` patches of `size` voxels, as many for each class, of which the fraction is for validation, one of
    each class at least.

    Each holds a random voxel of its class, up to a quarter of a patch from the middle, or further where it is moved
    into its part of the tomogram. A class that has no voxel in any validation part has no patch there.
    """
    labels = len(classes.of_label)
    each = max(2, -(-patches // len(classes.names)))
    held = min(each - 1, max(1, round(validation_fraction * each)))
    random = np.random.default_rng((seed, 7))
    wanted = _drawn_voxels(classes, counts, (each - held, held), random)
    rows: list[tuple[int, int, int, int, int, int]] = []  # tomogram, region, class, z, y, x
    for number, tomogram in enumerate(tomograms):
        of_regions = regions(tomogram.shape, size, validation_fraction, tomogram.labels_name)
        for first, planes in label_slabs(tomogram, labels):
            for z, plane in enumerate(classes.of_label[planes], start=first):
                for kind, region in enumerate(of_regions):
                    offset = (region.start, 0) if region.axis == 1 else (0, region.start)
                    part_of_plane = region.of(plane[None])[0]
                    for name, ranks in wanted.get((number, kind, z), []):
                        found = np.flatnonzero(part_of_plane == name)[ranks]
                        y, x = np.unravel_index(found, part_of_plane.shape)
                        rows += [
                            (number, kind, name, z, int(j) + offset[0], int(i) + offset[1])
                            for j, i in zip(y, x, strict=True)
                        ]
            done = (first + len(planes)) / tomogram.shape[0]
            progress((number + done) / len(tomograms), "placing patches", patches=len(rows))
    starts = np.empty((len(rows), 3), np.int64)
    for row, (number, kind, _, *voxel) in enumerate(rows):
        shape = tomograms[number].shape
        region = regions(shape, size, validation_fraction, tomograms[number].labels_name)[kind]
        low, high = np.zeros(3, np.int64), np.array(shape) - size
        low[region.axis], high[region.axis] = region.start, region.stop - size
        shift = random.integers(-(size // 4), size // 4, 3, endpoint=True)
        starts[row] = np.clip(np.array(voxel) - size // 2 + shift, low, high)
    columns = np.array(rows, np.int64).reshape(-1, 6)
    return Places(columns[:, 0], starts, columns[:, 1].astype(np.uint8), columns[:, 2].astype(np.uint8))


def _drawn_voxels(
    classes: Classes, counts: LabelCounts, numbers: tuple[int, int], random: np.random.Generator
) -> dict[tuple[int, int, int], list[tuple[int, NDArray[np.int64]]]]:
    """By (tomogram, region, z): of which classes which of the plane's voxels are drawn, in their order in the plane.

    `numbers` are how many of each class for training and for validation.
    """
    drawn: dict[tuple[int, int, int], list[tuple[int, NDArray[np.int64]]]] = {}
    for kind, number in enumerate(numbers):
        for name in range(len(classes.names)):
            of_class = classes.of_label == name
            by_plane = [each[kind][:, of_class].sum(axis=1) for each in counts.counts]
            ends = np.cumsum(np.concatenate(by_plane))
            if not ends[-1]:
                continue
            ranks = np.sort(random.integers(ends[-1], size=number))
            at = np.searchsorted(ends, ranks, side="right")
            planes = [(tomogram, z) for tomogram, each in enumerate(by_plane) for z in range(len(each))]
            for plane in np.unique(at):
                within = ranks[at == plane] - (ends[plane - 1] if plane else 0)
                tomogram, z = planes[plane]
                drawn.setdefault((tomogram, kind, z), []).append((name, within))
    return drawn


def cut_patches(
    tomograms: Sequence[LabelledTomogram],
    classes: Classes,
    places: Places,
    boxes: NDArray[np.float32],
    targets: NDArray[np.uint8],
    progress: Progress,
) -> None:
    """Fill `boxes` (n, size, size, size) with the tomograms' values, `targets` of that shape with voxels' classes."""
    size = boxes.shape[1]
    for number, tomogram in enumerate(tomograms):
        rows = np.flatnonzero(places.tomograms == number)
        report = part(progress, number / len(tomograms), (number + 1) / len(tomograms))
        for first, labels in label_slabs(tomogram, len(classes.of_label)):
            last = first + len(labels)
            values = tomogram.read(first, last)
            found = classes.of_label[labels]
            starts = places.starts[rows, 0]
            for row in rows[(starts < last) & (starts + size > first)]:
                z, y, x = places.starts[row]
                low, high = max(z, first), min(z + size, last)
                here = (slice(low - first, high - first), slice(y, y + size), slice(x, x + size))
                boxes[row, low - z : high - z] = values[here]
                targets[row, low - z : high - z] = found[here]
            report(last / tomogram.shape[0], "cutting patches", tomograms=number)
