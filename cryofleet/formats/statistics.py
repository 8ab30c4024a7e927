"""Mean, deviation and extremes of numbers that come in pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Statistics:
    """Of a volume's voxels."""

    minimum: float
    maximum: float
    mean: float
    standard_deviation: float


class RunningStatistics:
    """Collects statistics piece by piece, in double precision and without the cancellation of a sum of squares.

    Update of Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = 0.0
        self._squares = 0.0
        self._minimum = math.inf
        self._maximum = -math.inf

    def update(self, values: NDArray[np.generic]) -> None:
        """Takes in another array of real numbers, of any shape."""
        if values.size == 0:
            return
        mean = float(values.mean(dtype=np.float64))
        deviations = values.astype(np.float64)
        deviations -= mean
        squares = float(np.vdot(deviations, deviations))
        total = self.count + values.size
        change = mean - self._mean
        self._squares += squares + change * change * self.count * values.size / total
        self._mean += change * values.size / total
        self.count = total
        self._minimum = min(self._minimum, float(values.min()))
        self._maximum = max(self._maximum, float(values.max()))

    def result(self) -> Statistics:
        """Of all that was taken in, of which there must be some."""
        return Statistics(self._minimum, self._maximum, self._mean, math.sqrt(self._squares / self.count))
