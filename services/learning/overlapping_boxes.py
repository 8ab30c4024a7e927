"""A classifier of boxes over a whole tomogram: boxes that overlap by half, their probabilities joined smoothly.

Each box's probabilities count for its voxels by a window that is largest in the box's middle,

    w(i) = sin^2(pi (i + 1/2) / n),   i = 0 .. n - 1,   along each axis,

so that a class does not change at a box's face. Two windows half a box apart sum to 1; elsewhere (at the volume's
faces, where the last boxes overlap by more) the sum is divided by. As the window is a product of one of each axis,
nothing but the boxes' own probabilities is held, and planes are made of them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress
from services.learning.overlap_tile import CONSTANT, Array, ReadSlab, Shape
from services.learning.preparation import standardise


def starts(side: int, box: int) -> NDArray[np.int64]:
    """First voxels of the boxes along an axis: half a box apart, the last at the end.

    Raises InvalidArgument where the axis is shorter than a box.
    """
    if side < box:
        raise InvalidArgument(f"the tomogram has a side of {side} voxels, and the network takes boxes of {box}")
    firsts = np.arange(0, side - box + 1, max(1, box // 2))
    return firsts if firsts[-1] == side - box else np.append(firsts, side - box)


def window_matrix(side: int, box: int) -> NDArray[np.float64]:
    """(side, boxes): how much each box of an axis counts for each voxel."""
    window = np.sin(np.pi * (np.arange(box) + 0.5) / box) ** 2
    firsts = starts(side, box)
    weights = np.zeros((side, len(firsts)))
    for number, first in enumerate(firsts):
        weights[first : first + box, number] = window
    return weights


def classify_boxes(
    predict: Callable[[Array], NDArray[np.floating]],
    read: ReadSlab,
    shape: Shape,
    box: int,
    classes: int,
    batch: int,
    progress: Progress,
) -> Array:
    """Probabilities `[class, z, y, x]` on the grid of boxes; all zero for a constant box, which belongs to no class.

    Args:
        predict: probabilities (n, classes) of standardised boxes `[i, z, y, x]`, protein positive.
        read: reads planes of the tomogram.
        shape: of the tomogram, (z, y, x).
        box: side of the boxes.
        classes: their number.
        batch: boxes that are predicted at once.
        progress: called after each batch.
    """
    z_starts, y_starts, x_starts = (starts(side, box) for side in shape)
    grid: Array = np.zeros((classes, len(z_starts), len(y_starts), len(x_starts)), np.float32)
    places = [(j, k) for j in range(len(y_starts)) for k in range(len(x_starts))]
    for i, z in enumerate(z_starts):
        planes = read(int(z), int(z) + box)
        for first in range(0, len(places), batch):
            chosen = places[first : first + batch]
            boxes = np.stack(
                [planes[:, y_starts[j] : y_starts[j] + box, x_starts[k] : x_starts[k] + box] for j, k in chosen]
            )
            varied = boxes.std(axis=(1, 2, 3)) > CONSTANT * np.abs(boxes).max(axis=(1, 2, 3))
            found = predict(standardise(boxes)) * varied[:, None]
            for (j, k), probabilities in zip(chosen, found, strict=True):
                grid[:, i, j, k] = probabilities
            done = (i + min(1.0, (first + batch) / len(places))) / len(z_starts)
            progress(done, "classifying boxes", boxes=i * len(places) + first + len(chosen))
    return grid


def planes(grid: Array, shape: Shape, box: int) -> Iterator[Array]:
    """The voxels' probabilities `[class, y, x]` plane by plane; all zero where only constant boxes are.

    `grid` is what `classify_boxes` gives for a tomogram of that shape.
    """
    z_weights, y_weights, x_weights = (window_matrix(side, box) for side in shape)
    present = (grid.sum(axis=0) > 0).astype(np.float64)
    for weights in z_weights:
        used = np.flatnonzero(weights)
        summed = np.einsum("i,cijk->cjk", weights[used], grid[:, used])
        total = np.einsum("i,ijk->jk", weights[used], present[used])
        probabilities = y_weights @ summed @ x_weights.T
        counted = y_weights @ total @ x_weights.T
        joined = np.zeros(probabilities.shape, np.float32)
        np.divide(probabilities, counted, out=joined, where=counted > 0, casting="same_kind")
        yield joined


def memory_bytes(shape: Shape, box: int, classes: int, batch: int) -> int:
    """Memory of both steps beside what `predict` takes: planes as read, a batch and its copies, the grid, a plane."""
    boxes = int(np.prod([len(starts(side, box)) for side in shape]))
    slab = 2 * 4 * box * shape[1] * shape[2] + 4 * 4 * batch * box**3
    return slab + 16 * classes * boxes + 40 * classes * shape[1] * shape[2]
