"""The connected parts of features in a label volume that comes slab by slab.

Each slab is labelled alone; a part that goes on in the next slab is a fragment of each, and fragments that touch are
joined at the end. So memory is that of one slab and of a few numbers for each fragment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cryofleet.errors import FailedPrecondition

MAX_FRAGMENTS = 1_000_000
"""More are noise, and no list of particles."""
FRAGMENT_BYTES = 300
"""Of a fragment's numbers, and of joining them."""


@dataclass(frozen=True)
class Parts:
    """Parts in the order of their feature, then of size, the largest first.

    `labels` (n,): the feature of each; `voxels` (n,): its volume; `centres` (n, 3): mean x, y, z of its voxels;
    `scores` (n,): mean of its voxels' scores; `starts` and `stops` (n, 3): the box that it fills, first z, y, x and
    those behind the last.
    """

    labels: NDArray[np.int64]
    voxels: NDArray[np.int64]
    centres: NDArray[np.float64]
    scores: NDArray[np.float64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def diameters_angstrom(self, voxel_size_angstrom: float) -> NDArray[np.float64]:
        """Those of spheres of the parts' volumes."""
        diameters: NDArray[np.float64] = np.cbrt(6 / np.pi * self.voxels) * voxel_size_angstrom
        return diameters

    def at_least(self, diameter_angstrom: float, voxel_size_angstrom: float) -> Parts:
        """Those whose volume is at least that of a sphere of this diameter."""
        kept = self.diameters_angstrom(voxel_size_angstrom) >= diameter_angstrom - 1e-9
        return self.chosen(kept)

    def chosen(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> Parts:
        """Those of a mask or of an order."""
        return Parts(
            self.labels[which],
            self.voxels[which],
            self.centres[which],
            self.scores[which],
            self.starts[which],
            self.stops[which],
        )


class ConnectedParts:
    """Gathers the parts of labels 1 to `features`; voxels are connected by their faces."""

    def __init__(self, features: int) -> None:
        self._features = features
        self._count = 0
        #: By fragment: its label, voxels, sums of x, y and z, and of the score, and the box that it fills.
        self._numbers: list[NDArray[np.float64]] = []
        self._joints: list[NDArray[np.int64]] = []
        self._planes = 0
        #: Fragments of the last section added, from 1 on; 0 for none.
        self._last: NDArray[np.int64] | None = None
        self._last_labels: NDArray[np.uint8] | None = None

    def add(self, labels: NDArray[np.uint8], scores: NDArray[np.float32] | None = None) -> None:
        """The next sections, both `[z, y, x]`; all scores are 1 where none are given.

        Raises FailedPrecondition where the features fall into more fragments than `MAX_FRAGMENTS`.
        """
        fragments = np.zeros(labels.shape, np.int32)
        base = self._count
        found = 0
        for label in range(1, self._features + 1):
            inside = labels == label
            if not inside.any():
                continue
            of_label, count = scipy.ndimage.label(inside)
            numbers = np.zeros((count, 12))
            z, y, x = np.nonzero(of_label)
            rows = of_label[z, y, x] - 1
            numbers[:, 0] = label
            numbers[:, 1] = np.bincount(rows, minlength=count)
            for column, values in enumerate((x, y, z + self._planes), start=2):
                numbers[:, column] = np.bincount(rows, weights=values, minlength=count)
            weights = None if scores is None else scores[z, y, x]
            numbers[:, 5] = np.bincount(rows, weights=weights, minlength=count)
            boxes = scipy.ndimage.find_objects(of_label)
            numbers[:, 6:9] = [[side.start for side in box] for box in boxes]
            numbers[:, 9:12] = [[side.stop for side in box] for box in boxes]
            numbers[:, [6, 9]] += self._planes
            self._numbers.append(numbers)
            fragments[z, y, x] = rows + found + 1
            found += count
        self._count += found
        if self._count > MAX_FRAGMENTS:
            raise FailedPrecondition(
                f"the labels fall into more than {MAX_FRAGMENTS} parts, as noise does: a higher threshold or a network "
                "trained on more patches may help; annotating with picks=false makes no particles"
            )
        if self._last is not None and self._last_labels is not None:
            touching = (self._last_labels == labels[0]) & (labels[0] > 0)
            pairs = np.stack([self._last[touching] - 1, fragments[0][touching].astype(np.int64) - 1 + base], axis=1)
            self._joints.append(np.unique(pairs, axis=0))
        last = fragments[-1].astype(np.int64)
        self._last = np.where(last > 0, last + base, 0)
        self._last_labels = labels[-1].copy()
        self._planes += len(labels)

    def parts(self) -> Parts:
        """The parts of all sections added."""
        numbers = np.concatenate(self._numbers) if self._numbers else np.zeros((0, 12))
        joints = np.concatenate(self._joints) if self._joints else np.zeros((0, 2), np.int64)
        if not len(numbers):
            none = np.zeros(0, np.int64)
            return Parts(none, none, np.zeros((0, 3)), np.zeros(0), none.reshape(0, 3), none.reshape(0, 3))
        graph = coo_array((np.ones(len(joints), np.int8), (joints[:, 0], joints[:, 1])), shape=(len(numbers),) * 2)
        count, part_of = connected_components(graph, directed=False)
        sums = np.stack([np.bincount(part_of, weights=column, minlength=count) for column in numbers[:, 1:6].T], axis=1)
        labels = np.zeros(count, np.int64)
        labels[part_of] = numbers[:, 0].astype(np.int64)
        starts, stops = np.full((count, 3), np.inf), np.zeros((count, 3))
        np.minimum.at(starts, part_of, numbers[:, 6:9])
        np.maximum.at(stops, part_of, numbers[:, 9:12])
        order = np.lexsort((-sums[:, 0], labels))
        sums = sums[order]
        return Parts(
            labels=labels[order],
            voxels=sums[:, 0].astype(np.int64),
            centres=sums[:, 1:4] / sums[:, :1],
            scores=sums[:, 4] / sums[:, 0],
            starts=starts[order].astype(np.int64),
            stops=stops[order].astype(np.int64),
        )


def typical_voxels(volumes: Sequence[Parts], features: int) -> NDArray[np.int64]:
    """(features + 1,): of labels 0 to `features`, the size of the part that the middle one of their voxels lies in.

    Unlike the middle one of the parts' sizes it is not moved by crumbs. 0 for a label without parts, and for 0.
    """
    typical = np.zeros(features + 1, np.int64)
    for label in range(1, features + 1):
        sizes = np.sort(np.concatenate([parts.voxels[parts.labels == label] for parts in volumes]))
        if len(sizes):
            sums = np.cumsum(sizes)
            typical[label] = sizes[np.searchsorted(sums, (sums[-1] + 1) // 2)]
    return typical


def memory_bytes(slab_voxels: int, voxels: int) -> int:
    """What gathering the parts of a volume takes, in slabs of so many voxels: places of a slab's voxels as int64, and
    the fragments.
    """
    return 60 * slab_voxels + FRAGMENT_BYTES * min(MAX_FRAGMENTS, voxels)
