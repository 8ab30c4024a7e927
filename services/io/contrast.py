"""The values of a volume: inverted, standardised, or given the distribution of another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition
from cryofleet.formats.statistics import RunningStatistics, Statistics
from cryofleet.progress import Progress, no_progress, part

Array = NDArray[np.float32]
Shape = tuple[int, int, int]
ReadSlab = Callable[[int, int], Array]

SLAB_BYTES = 32 << 20
#: Bins between the least and the largest value of a volume; a value within one is placed linearly.
BINS = 1 << 20
_COPIES = 8


@dataclass(frozen=True)
class Distribution:
    """How values spread: `share` of them lie below each of the `edges`, which rise evenly."""

    edges: NDArray[np.float64]
    share: NDArray[np.float64]


def statistics_of(read: ReadSlab, shape: Shape, progress: Progress = no_progress) -> Statistics:
    """Mean, deviation and range of a volume. Raises FailedPrecondition where all voxels are equal."""
    running = RunningStatistics()
    for start, stop in _slabs(shape):
        running.update(read(start, stop))
        progress(stop / shape[0], "measuring")
    found = running.result()
    if found.minimum == found.maximum:
        raise FailedPrecondition(f"all voxels are {found.minimum:g}: there is no contrast to adjust")
    return found


def distribution(read: ReadSlab, shape: Shape, found: Statistics, progress: Progress = no_progress) -> Distribution:
    """The distribution of a volume's values, of which `found` are the statistics."""
    edges = np.linspace(found.minimum, found.maximum, BINS + 1)
    counts = np.zeros(BINS, np.int64)
    for start, stop in _slabs(shape):
        counts += np.histogram(read(start, stop), BINS, (found.minimum, found.maximum))[0]
        progress(stop / shape[0], "measuring")
    share = np.concatenate([[0.0], np.cumsum(counts)])
    return Distribution(edges, share / share[-1])


def inverted(source: Distribution) -> Distribution:
    """That of the values' negatives."""
    return Distribution(-source.edges[::-1], 1 - source.share[::-1])


def adjust(
    read: ReadSlab, shape: Shape, change: Callable[[Array], Array], write: Callable[[Array], object], progress: Progress
) -> None:
    """Writes the volume with all values changed."""
    for start, stop in _slabs(shape):
        write(change(read(start, stop)))
        progress(stop / shape[0], "adjusting", sections=float(stop))


def linear(factor: float, mean: float, new_mean: float) -> Callable[[Array], Array]:
    """value -> factor (value - mean) + new_mean."""
    return lambda values: (values - np.float32(mean)) * np.float32(factor) + np.float32(new_mean)


def matched(source: Distribution, reference: Distribution) -> Callable[[Array], Array]:
    """The rising function that gives values of the source's distribution that of the reference."""
    # Empty bins of the reference would be flat, which no function inverts.
    rises = np.concatenate([[True], np.diff(reference.share) > 0])
    values = np.interp(source.share, reference.share[rises], reference.edges[rises])
    return lambda voxels: np.interp(voxels, source.edges, values).astype(np.float32)


def memory_bytes(shape: Shape) -> int:
    """What each of these needs at most."""
    return _COPIES * max(SLAB_BYTES, 4 * shape[1] * shape[2]) + 10 * 8 * BINS


def match_histogram(
    read: ReadSlab,
    shape: Shape,
    read_reference: ReadSlab,
    reference_shape: Shape,
    sign: int,
    write: Callable[[Array], object],
    progress: Progress = no_progress,
) -> None:
    """Gives a volume, times `sign`, the distribution of another's values, keeping their order."""
    of_volume = statistics_of(read, shape, part(progress, 0.0, 0.2))
    own = distribution(read, shape, of_volume, part(progress, 0.2, 0.4))
    of_reference = statistics_of(read_reference, reference_shape, part(progress, 0.4, 0.5))
    wanted = distribution(read_reference, reference_shape, of_reference, part(progress, 0.5, 0.6))
    change = matched(own if sign > 0 else inverted(own), wanted)
    adjust(read, shape, lambda voxels: change(sign * voxels), write, part(progress, 0.6, 1.0))


def _slabs(shape: Shape) -> list[tuple[int, int]]:
    step = max(1, SLAB_BYTES // (4 * shape[1] * shape[2]))
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
