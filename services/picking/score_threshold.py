"""How many peaks of a map of scores are there by chance, and the threshold that lets so many pass.

Peaks of noise scatter about a mean: the largest of many scores in each neighbourhood. Where a tomogram is crowded,
other complexes, membranes and edges score above that by amounts that fall off about exponentially. What is looked for
stands above both. The distribution of the heights of all separated peaks is therefore taken as a mixture,

    (1 - a - b) N(mu, sigma) + a [N(mu, sigma) + Exp(tau)] + b N(m, s),

noise, structured background (a Gaussian with an exponential tail) and the particles, fitted by maximum likelihood. The
third part is taken as there only where the Bayesian information criterion favours it. The expected number of false
positives above u is then n [(1 - a - b) Q_1(u) + a Q_2(u)], Q being the parts' upper tails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition

#: Fewer peaks than this do not show a distribution.
LEAST_PEAKS = 50
#: More are thinned out evenly for the fit.
MOST_PEAKS = 20_000
#: The particles' mean lies at least so many deviations of the noise above its mean.
_CLEAR = 4.0


@dataclass(frozen=True)
class Background:
    """The fitted distribution of peak heights.

    Attributes:
        peaks: how many there were.
        mean, deviation: of the noise.
        tail_fraction, tail: share and decay length of the structured background's tail.
        particle_fraction, particle_mean, particle_deviation: of the particles; a fraction of 0 where none stand out.
    """

    peaks: int
    mean: float
    deviation: float
    tail_fraction: float
    tail: float
    particle_fraction: float
    particle_mean: float
    particle_deviation: float

    def false_positives(self, threshold: float) -> float:
        """How many peaks of at least this height are expected to be background."""
        noise = 1 - self.tail_fraction - self.particle_fraction
        z = (threshold - self.mean) / self.deviation
        above = noise * scipy.special.ndtr(-z) + self.tail_fraction * _tail_above(z, self.tail / self.deviation)
        return float(self.peaks * above)

    def threshold(self, expected_false_positives: float) -> float:
        """The height above which so many peaks are expected to be background."""
        low, high = self.mean - 10 * self.deviation, self.mean + 10 * self.deviation + 60 * self.tail
        if expected_false_positives >= self.false_positives(low):
            return low
        while self.false_positives(high) > expected_false_positives:
            high += 10 * (self.deviation + self.tail)
        found = scipy.optimize.brentq(lambda u: self.false_positives(u) - expected_false_positives, low, high)
        return float(found)


def background(heights: NDArray[np.float64]) -> Background:
    """The distribution that the heights of separated peaks follow.

    Raises FailedPrecondition for fewer than `LEAST_PEAKS` peaks, and for peaks that are all alike.
    """
    if len(heights) < LEAST_PEAKS:
        raise FailedPrecondition(
            f"the scores have {len(heights)} separate peaks, too few to measure their background from: give a threshold"
        )
    ordered = np.sort(np.asarray(heights, np.float64))
    x = ordered if len(ordered) <= MOST_PEAKS else ordered[:: -(-len(ordered) // MOST_PEAKS)]
    centre = float(np.median(x))
    spread = 1.4826 * float(np.median(np.abs(x - centre)))
    if spread <= 0:
        raise FailedPrecondition("most peaks of the scores are equally high: there is no noise to measure")
    z = (x - centre) / spread
    without = _fit(z, None)
    best, cost = without, 2 * without.fun + 4 * math.log(len(z))
    for share in (0.3, 0.1, 0.03, 0.01, 0.003):
        if share * len(z) < 3:
            continue
        fitted = _fit(z, share)
        if 2 * fitted.fun + 7 * math.log(len(z)) < cost:
            best, cost = fitted, 2 * fitted.fun + 7 * math.log(len(z))
    p = _parts(best.x)
    return Background(
        len(heights),
        centre + spread * p.mean,
        spread * p.deviation,
        p.tail_fraction,
        spread * p.tail,
        p.particle_fraction,
        centre + spread * p.particle_mean,
        spread * p.particle_deviation,
    )


@dataclass(frozen=True)
class Hands:
    """The best peaks of a template and of its mirror image.

    Attributes:
        peaks: how many of each are compared.
        mean, mean_mirrored: their mean heights.
        deviations: the difference of the means over its standard error.
        hand: "as given" or "mirrored" where that is at least 3, "undecided" elsewhere.
    """

    peaks: int
    mean: float
    mean_mirrored: float
    deviations: float
    hand: str


def compare_hands(heights: NDArray[np.float64], mirrored: NDArray[np.float64], count: int) -> Hands:
    """Which hand of a template the data have, by the `count` highest peaks of either (both sorted, highest first)."""
    count = min(count, len(heights), len(mirrored))
    if count < 2:
        return Hands(count, 0.0, 0.0, 0.0, "undecided")
    ours, others = heights[:count], mirrored[:count]
    error = math.sqrt((float(ours.var(ddof=1)) + float(others.var(ddof=1))) / count)
    deviations = float(ours.mean() - others.mean()) / error if error > 0 else 0.0
    hand = "undecided" if abs(deviations) < 3 else ("as given" if deviations > 0 else "mirrored")
    return Hands(count, float(ours.mean()), float(others.mean()), deviations, hand)


@dataclass(frozen=True)
class _Parts:
    mean: float
    deviation: float
    tail_fraction: float
    tail: float
    particle_fraction: float
    particle_mean: float
    particle_deviation: float


def _parts(q: NDArray[np.float64]) -> _Parts:
    """Parameters of the mixture from free numbers."""
    mean, deviation, tail = float(q[0]), math.exp(q[1]), math.exp(q[3])
    if len(q) == 4:
        share = float(scipy.special.expit(q[2]))
        return _Parts(mean, deviation, share, tail, 0.0, mean + _CLEAR * deviation, deviation)
    tail_fraction, particle_fraction, _ = (float(share) for share in scipy.special.softmax([q[2], q[4], 0.0]))
    particle_mean = mean + _CLEAR * deviation + math.exp(q[5])
    return _Parts(mean, deviation, tail_fraction, tail, particle_fraction, particle_mean, math.exp(q[6]))


def _fit(z: NDArray[np.float64], particles: float | None) -> scipy.optimize.OptimizeResult:
    """The most likely parameters for standardised heights; `particles` is the share of particles to begin with."""
    start = [0.0, 0.0, -2.0, 0.0]
    if particles is not None:
        top = z[-max(3, int(particles * len(z))) :]
        start += [math.log(particles / 0.8), math.log(max(float(top.mean()) - _CLEAR, 0.3))]
        start += [math.log(max(float(top.std()), 0.3))]

    def cost(q: NDArray[np.float64]) -> float:
        p = _parts(np.clip(q, -30, 30))
        u = (z - p.mean) / p.deviation
        density = (1 - p.tail_fraction - p.particle_fraction) * np.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
        density += p.tail_fraction * _tail_density(u, p.tail / p.deviation)
        density /= p.deviation
        if p.particle_fraction:
            v = (z - p.particle_mean) / p.particle_deviation
            density += p.particle_fraction * np.exp(-0.5 * v * v) / (p.particle_deviation * math.sqrt(2 * math.pi))
        # widths of nothing would be infinitely likely
        penalty = 0.01 * (q[1] ** 2 + q[3] ** 2) + (0.01 * q[6] ** 2 if len(q) > 4 else 0.0)
        return float(-np.log(density + 1e-300).sum() + penalty)

    return scipy.optimize.minimize(cost, np.array(start), method="L-BFGS-B")


def _tail_density(u: NDArray[np.float64], tail: float) -> NDArray[np.float64]:
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
    return float(scipy.special.ndtr(-u) + tail * _tail_density(np.array([u]), tail)[0])
