"""Volumes that are arrays, read and written as methods want it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]


def noise(*shape: int, seed: int = 0, mean: float = 2.0) -> Volume:
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


def reader(array: Volume) -> Callable[[int, int], Volume]:
    return lambda first, last: array[first:last].copy()


def collected(run: Callable[[Callable[[Volume], object]], object]) -> Volume:
    slabs: list[Volume] = []
    run(slabs.append)
    return np.concatenate(slabs)
