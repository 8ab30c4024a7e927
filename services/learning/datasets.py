"""Subtomograms for training and encoding, read by shard and handed out in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryofleet.errors import InvalidArgument
from cryofleet.progress import Progress
from cryofleet.scratch_array import reserved_array
from services.learning.preparation import Preparation

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
    read: Read, ids: Sequence[int] | NDArray[np.int64], preparation: Preparation
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """All boxes, prepared, as (first, boxes): the next chunk is loaded while the caller works on one."""
    step = chunk_count(preparation.box_size)

    def load(first: int) -> tuple[int, NDArray[np.float32]]:
        count = min(step, len(ids) - first)
        boxes = read(first, count)
        expected = (count, *(preparation.box_size,) * 3)
        if boxes.shape != expected:
            raise InvalidArgument(f"the subtomograms from {first} on have shape {boxes.shape}, {expected} was expected")
        return first, preparation(boxes, ids[first : first + count])

    return ahead(load, range(0, len(ids), step))


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


class BoxBatches:
    """Batches of prepared boxes, in an order that is a function of the seed and the epoch alone.

    The split: a permutation by the seed; its first round(fraction * n), at least 1 and at most n - 1, are for
    validation. InvalidArgument for fewer than 2 boxes.
    """

    def __init__(
        self,
        boxes: NDArray[np.float32],
        *,
        batch_size: int,
        validation_fraction: float,
        seed: int,
        device: torch.device,
    ) -> None:
        if len(boxes) < 2:
            raise InvalidArgument(
                f"training needs at least 2 subtomograms, one of them for validation: there is {len(boxes)}"
            )
        self._boxes = boxes
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        shuffled = np.random.default_rng((seed, 0)).permutation(len(boxes))
        held_back = min(max(1, round(validation_fraction * len(boxes))), len(boxes) - 1)
        self.validation_rows = np.sort(shuffled[:held_back])
        self.training_rows = np.sort(shuffled[held_back:])

    @property
    def training_batches(self) -> int:
        """Batches in an epoch; the last may be smaller."""
        return -(-len(self.training_rows) // self._batch_size)

    def training(self, epoch: int, first_batch: int) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch, counted from 0, from `first_batch` on; each is one tensor (batch, 1, n, n, n)."""
        order = np.random.default_rng((self._seed, 1, epoch)).permutation(self.training_rows)
        return self._batches(order[first_batch * self._batch_size :])

    def validation(self) -> Iterator[tuple[Tensor, ...]]:
        """The boxes held back, always in the same order."""
        return self._batches(self.validation_rows)

    def _batches(self, rows: NDArray[np.int64]) -> Iterator[tuple[Tensor, ...]]:
        def load(first: int) -> tuple[Tensor, ...]:
            # Sorted within the batch, so that a mapped file is read forwards; a batch has no order.
            chosen = np.sort(rows[first : first + self._batch_size])
            return (torch.from_numpy(np.take(self._boxes, chosen, axis=0))[:, None].to(self._device),)

        return ahead(load, range(0, len(rows), self._batch_size))


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
