"""How many peaks of a map of scores are there by chance above a threshold, by the distribution of their heights.

services/picking/score_threshold.py fits it, and says why it has these parts: noise, noise with an exponential tail, and
Gaussians, of which the highest are the particles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument


@dataclass(frozen=True)
class Kind:
    """One Gaussian: the scores of one kind of complex."""

    fraction: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class Background:
    """The fitted distribution of peak heights.

    Attributes:
        peaks: how many there were.
        mean, deviation, maxima: mu, sigma and m of the noise.
        tail_fraction, tail: share and decay length of the exponential tail.
        others: further kinds of complexes, which are background.
        particles: those looked for; None where nothing stands out.
    """

    peaks: int
    mean: float
    deviation: float
    maxima: float
    tail_fraction: float
    tail: float
    others: tuple[Kind, ...]
    particles: Kind | None

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Background:
        """The one that a result of the picking service states. Raises InvalidArgument."""
        try:
            mean, deviation, maxima, tail_fraction, tail = (
                float(table[name]) for name in ("mean", "deviation", "maxima", "tail_fraction", "tail")
            )
            others = tuple(_kind(kind) for kind in table["others"])
            particles = None if table["particles"] is None else _kind(table["particles"])
            made = cls(int(table["peaks"]), mean, deviation, maxima, tail_fraction, tail, others, particles)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InvalidArgument("this is no background of scores, as picking.PickPeaks states it") from None
        finite = all(map(math.isfinite, (mean, deviation, maxima, tail_fraction, tail)))
        if not finite or min(deviation, tail) <= 0 or maxima < 1:
            raise InvalidArgument("the background of the scores has numbers that no distribution has")
        return made

    @property
    def particles_expected(self) -> float:
        """How many of the peaks are particles."""
        return 0.0 if self.particles is None else self.particles.fraction * self.peaks

    def false_positives(self, threshold: float) -> float:
        """How many peaks of at least this height are expected to be background."""
        kinds = [*self.others, *([] if self.particles is None else [self.particles])]
        noise = 1 - self.tail_fraction - sum(kind.fraction for kind in kinds)
        z = (threshold - self.mean) / self.deviation
        above = -noise * math.expm1(self.maxima * float(scipy.special.log_ndtr(z)))
        middle, width = middle_and_width(self.maxima)
        above += self.tail_fraction * _tail_above((z - middle) / width, self.tail / (self.deviation * width))
        return self.peaks * above + self.others_above(threshold)

    def others_above(self, threshold: float) -> float:
        """How many of these are of further kinds of complexes: no errors where any kind is looked for."""
        shares = (
            kind.fraction * float(scipy.special.ndtr((kind.mean - threshold) / kind.deviation)) for kind in self.others
        )
        return self.peaks * sum(shares)

    def threshold(self, expected_false_positives: float) -> float:
        """The height above which so many peaks are expected to be background."""
        low, high = self.mean - 10 * self.deviation, self.mean + 20 * self.deviation + 60 * self.tail
        if expected_false_positives >= self.false_positives(low):
            return low
        while self.false_positives(high) > expected_false_positives:
            high += 10 * (self.deviation + self.tail)
        found = scipy.optimize.brentq(lambda u: self.false_positives(u) - expected_false_positives, low, high)
        return float(found)


def middle_and_width(maxima: float) -> tuple[float, float]:
    """Median and half the width of the middle 68% of the largest of so many standard Gaussian numbers."""
    low, middle, high = (float(scipy.special.ndtri(share ** (1 / maxima))) for share in (0.16, 0.5, 0.84))
    return middle, (high - low) / 2


def tail_density(u: NDArray[np.float64], tail: float) -> NDArray[np.float64]:
    """Density of a standard Gaussian plus an exponential of mean `tail`."""
    # exp(1 / (2 t^2) - u / t) erfc((1 / t - u) / sqrt 2) / (2 t), by the scaled erfc where that would overflow
    y = (1 / tail - u) / math.sqrt(2)
    gaussian = np.exp(-0.5 * u * u)
    scaled = gaussian * scipy.special.erfcx(np.maximum(y, 0))
    direct = np.exp(np.minimum(0.5 / tail**2 - u / tail, 700)) * scipy.special.erfc(np.minimum(y, 0))
    result: NDArray[np.float64] = np.where(y > 0, scaled, direct) / (2 * tail)
    return result


def _tail_above(u: float, tail: float) -> float:
    """Probability that a standard Gaussian plus an exponential of mean `tail` is above u."""
    return float(scipy.special.ndtr(-u) + tail * tail_density(np.array([u]), tail)[0])


def _kind(table: Mapping[str, Any]) -> Kind:
    """Raises ValueError for numbers that no Gaussian has."""
    kind = Kind(float(table["fraction"]), float(table["mean"]), float(table["deviation"]))
    if not (0 <= kind.fraction <= 1 and math.isfinite(kind.mean) and 0 < kind.deviation < math.inf):
        raise ValueError
    return kind
