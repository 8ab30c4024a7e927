"""Subtomograms for training and encoding, read by shard and handed out in batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fourier import fourier_crop
from cryofleet.progress import Progress
from cryofleet.scratch_array import reserved_array
from services.learning.pose_normalisation import Poses
from services.learning.preparation import Preparation, Scale
from services.learning.training import Batch, generator_for

Read = Callable[[int, int], NDArray[np.float32]]
"""`read(first, count)` gives boxes `[i, z, y, x]` as extracted."""

CHUNK_BYTES = 8 * 2**20
"""Boxes are read and prepared in chunks of about this size."""

MEMORY_LIMIT_BYTES = 512 * 2**20
"""Prepared sets up to this size stay in memory; larger ones are kept in a memory-mapped file."""

Loaded = TypeVar("Loaded")


def chunk_count(box_size: int) -> int:
    """Boxes of a side, as extracted, in a chunk."""
    return max(1, CHUNK_BYTES // (4 * box_size**3))


def loading_bytes(preparation: Preparation) -> int:
    """Memory that loading takes: chunks as read, copies of one while it is prepared, and prepared ones that wait."""
    copies = 16 if preparation.pose_normalisation else 6
    return copies * chunk_count(preparation.box_size) * 4 * preparation.box_size**3


def prepared_chunks(
    read: Read,
    ids: Sequence[int] | NDArray[np.int64],
    preparation: Preparation,
    found_poses: Callable[[Poses], None] | None = None,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """All boxes, prepared, as (first, boxes): the next chunk is loaded while the caller works on one.

    `found_poses` is called, chunk by chunk in their order, with the poses that boxes were normalised from.
    """
    step = chunk_count(preparation.box_size)

    def load(first: int) -> tuple[int, NDArray[np.float32]]:
        count = min(step, len(ids) - first)
        boxes = read(first, count)
        expected = (count, *(preparation.box_size,) * 3)
        if boxes.shape != expected:
            raise InvalidArgument(f"the subtomograms from {first} on have shape {boxes.shape}, {expected} was expected")
        prepared, poses = preparation.with_poses(boxes, ids[first : first + count])
        if poses is not None and found_poses is not None:
            found_poses(poses)
        return first, prepared

    return ahead(load, range(0, len(ids), step))


def measure_scale(read: Read, count: int, preparation: Preparation, progress: Progress) -> Scale:
    """The scale of all voxels of `count` boxes, binned. Raises InvalidArgument where they hold NaN or infinity, or are
    all of one value.
    """
    means, squares = np.empty(count), np.empty(count)
    step = chunk_count(preparation.box_size)
    for first in range(0, count, step):
        boxes = fourier_crop(read(first, min(step, count - first)), preparation.binning)
        stop = first + len(boxes)
        means[first:stop] = boxes.mean(axis=(1, 2, 3), dtype=np.float64)
        squares[first:stop] = boxes.var(axis=(1, 2, 3), dtype=np.float64)
        progress(stop / count, "measuring intensities", subtomograms=stop)
    # A sum of the variances within boxes and between them: no difference of large numbers.
    deviation = math.sqrt(float(squares.mean() + means.var()))
    if not math.isfinite(deviation) or deviation == 0.0:
        raise InvalidArgument(
            f"{preparation.source}: the standard deviation of all boxes is {deviation:g}; finite values are needed, "
            "which are not all the same"
        )
    return Scale(float(means.mean()), deviation)


def load_prepared(
    read: Read,
    ids: Sequence[int] | NDArray[np.int64],
    preparation: Preparation,
    scratch: Path,
    progress: Progress,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> NDArray[np.float32]:
    """All boxes, prepared once: `[i, z, y, x]`, in memory up to the limit, else in a file of `scratch` that is mapped
    into memory.

    Training passes over a set many times and in random order: reading, binning and turning each box again each time
    would cost more than the network. The file is the whole set's size; of memory it takes what the operating system has
    to spare.
    Raises ResourceExhausted where the disk is full.
    """
    side = preparation.prepared_size
    shape = (len(ids), side, side, side)
    size_bytes = 4 * len(ids) * side**3
    prepared: NDArray[np.float32]
    if size_bytes <= memory_limit_bytes:
        prepared = np.empty(shape, np.float32)
    else:
        prepared = reserved_array(scratch / "prepared.float32", shape, np.float32)
    for first, boxes in prepared_chunks(read, ids, preparation):
        prepared[first : first + len(boxes)] = boxes
        done = first + len(boxes)
        progress(done / len(ids), "preparing subtomograms", subtomograms=done)
    return prepared


def split_rows(
    count: int, validation_fraction: float, seed: int, classes: NDArray[np.integer[Any]] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows for training and rows for validation, each in rising order.

    A permutation by the seed; its first round(fraction * n), at least 1 and at most n - 1, are for validation. With
    `classes` (n,) the same is done within each class, and one of a single box is trained on. Raises InvalidArgument
    where either side would be empty.
    """
    if count < 2:
        raise InvalidArgument(f"training needs at least 2 subtomograms, one of them for validation: there is {count}")
    shuffled = np.random.default_rng((seed, 0)).permutation(count)
    groups = [shuffled] if classes is None else [shuffled[classes[shuffled] == each] for each in np.unique(classes)]
    held_back = np.concatenate(
        [group[: min(max(1, round(validation_fraction * len(group))), len(group) - 1)] for group in groups]
    )
    if not len(held_back):
        raise InvalidArgument("no class has 2 subtomograms, of which one would be for validation")
    return np.setdiff1d(shuffled, held_back), np.sort(held_back)


class ArrayBatches:
    """Batches of prepared boxes and of what belongs to them, in an order that is a function of seed and epoch alone.

    `arrays` have the boxes as first dimension: "boxes" (n, z, y, x) or (n, y, x) float32, which get a channel, and
    others that are handed out under their names, whole numbers as int64. `change` is applied to batches for training,
    on the device, with a generator that follows from seed, epoch and batch.

    Arrays named in `unpaired` belong to none of the boxes: they have rows of their own, for training and for
    validation, and an order of their own. An epoch is as long as the longest; those that are shorter repeat.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]],
        training_rows: NDArray[np.int64],
        validation_rows: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        change: Callable[[Batch, torch.Generator], Batch] | None = None,
        unpaired: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]] | None = None,
    ) -> None:
        self._arrays = arrays
        self.training_rows = training_rows
        self.validation_rows = validation_rows
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self._change = change
        self._unpaired = dict(unpaired or {})

    @property
    def training_batches(self) -> int:
        """Batches in an epoch; the last may be smaller."""
        return -(-self._longest_training // self._batch_size)

    @property
    def _longest_training(self) -> int:
        return max(len(self.training_rows), *(len(rows) for rows, _ in self._unpaired.values()), 0)

    def training(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0, from `first_batch` on."""
        order = self._shuffled(self.training_rows, epoch)
        others = {
            name: self._shuffled(rows, epoch, number)
            for number, (name, (rows, _)) in enumerate(self._unpaired.items(), start=1)
        }
        batches = self._batches(order, others, first_batch)
        for position, batch in enumerate(batches, start=first_batch):
            if self._change is None:
                yield batch
            else:
                yield self._change(batch, generator_for(self._seed, 5, epoch, position))

    def validation(self) -> Iterator[Batch]:
        """The boxes held back, always in the same order and as they are."""
        return self._batches(self.validation_rows, {name: rows for name, (_, rows) in self._unpaired.items()})

    def _shuffled(self, rows: NDArray[np.int64], *numbers: int) -> NDArray[np.int64]:
        """The rows in an order that follows from seed and numbers, and again in others until an epoch is full."""
        rng = np.random.default_rng((self._seed, 1, *numbers))
        count = self._longest_training
        return np.concatenate([rng.permutation(rows) for _ in range(0, count, len(rows))])[:count]

    def _batches(
        self, rows: NDArray[np.int64], others: Mapping[str, NDArray[np.int64]], first_batch: int = 0
    ) -> Iterator[Batch]:
        count = max(len(rows), *(len(each) for each in others.values()), 0)
        rows_of = {name: np.resize(others.get(name, rows), count) for name in self._arrays}

        def load(first: int) -> Batch:
            # Sorted within the batch, so that a mapped file is read forwards; a batch has no order.
            chosen = {name: np.sort(each[first : first + self._batch_size]) for name, each in rows_of.items()}
            return {
                name: self._tensor(name, np.take(array, chosen[name], axis=0)) for name, array in self._arrays.items()
            }

        return ahead(load, range(first_batch * self._batch_size, count, self._batch_size))

    def _tensor(self, name: str, values: NDArray[Any]) -> Tensor:
        if np.issubdtype(values.dtype, np.integer):
            values = values.astype(np.int64)
        tensor = torch.from_numpy(values).to(self._device)
        return tensor[:, None] if name == "boxes" else tensor


def ahead(load: Callable[[int], Loaded], arguments: Iterable[int], depth: int = 2) -> Iterator[Loaded]:
    """`map(load, arguments)` by a thread that keeps up to `depth` results ready; what `load` raises comes out here."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="load-ahead") as thread:
        waiting: deque[Future[Loaded]] = deque()
        try:
            for argument in arguments:
                waiting.append(thread.submit(load, argument))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
