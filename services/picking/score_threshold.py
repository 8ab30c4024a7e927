"""How many peaks of a map of scores are there by chance, and the threshold that lets so many pass.

Peaks of noise are the largest of many scores in each neighbourhood: of m independent Gaussian scores the largest has
the distribution Phi((u - mu) / sigma)^m. Where a tomogram is crowded, edges, membranes and parts of complexes score
above that by amounts that fall off about exponentially, and each further kind of complex by its own amount. What is
looked for stands above all of these. The distribution of the heights of all separated peaks is therefore taken as

    noise (m, mu, sigma)  +  noise with an exponential tail (tau)  +  up to three Gaussians,

the highest Gaussian being the particles and all else the background. It is fitted by maximum likelihood, the number of
Gaussians by the Bayesian information criterion. Scores of one kind of complex scatter by the noise and 10% or so, hence
no Gaussian is narrower than the noise or wider than `WIDEST` of its mean. The expected number of false positives above
u is the number of peaks times the background's upper tail.
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
from cryofleet.numerics.score_background import Background, Kind, middle_and_width, tail_density

#: Fewer peaks than this do not show a distribution.
LEAST_PEAKS = 50
#: The largest deviation of the scores of one kind of complex, of their mean.
WIDEST = 0.15
#: Gaussians that are tried at most.
_MOST_KINDS = 3
#: Heights are counted in bins of so many of their robust deviations.
_BIN = 0.1


def background(heights: NDArray[np.float64]) -> Background:
    """The distribution that the heights of separated peaks follow.

    Raises FailedPrecondition for fewer than `LEAST_PEAKS` peaks, and for peaks that are all alike.
    """
    if len(heights) < LEAST_PEAKS:
        raise FailedPrecondition(
            f"the scores have {len(heights)} separate peaks, too few to measure their background from: give a threshold"
        )
    x = np.asarray(heights, np.float64)
    centre = float(np.median(x))
    spread = 1.4826 * float(np.median(np.abs(x - centre)))
    if spread <= 0:
        raise FailedPrecondition("most peaks of the scores are equally high: there is no noise to measure")
    bins = np.rint((x - centre) / (_BIN * spread)).astype(np.int64)
    places, counts = np.unique(bins, return_counts=True)
    data = _Data(_BIN * places.astype(np.float64), counts.astype(np.float64), centre / spread)
    best, cost = None, math.inf
    for kinds in range(_MOST_KINDS + 1):
        fitted = _fit(data, kinds)
        fitted_cost = 2 * fitted.fun + len(fitted.x) * math.log(len(x))
        if fitted_cost >= cost:
            break
        best, cost = fitted.x, fitted_cost
    assert best is not None
    p = _parts(best, data.zero)
    found = sorted(
        (Kind(kind.fraction, centre + spread * kind.mean, spread * kind.deviation) for kind in p.kinds),
        key=lambda kind: kind.mean,
    )
    return Background(
        len(x),
        centre + spread * p.mean,
        spread * p.deviation,
        p.maxima,
        p.tail_fraction,
        spread * p.tail,
        tuple(found[:-1]),
        found[-1] if found else None,
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
class _Data:
    """Standardised heights in bins, their counts, and how many deviations the height 0 lies below the median."""

    z: NDArray[np.float64]
    counts: NDArray[np.float64]
    zero: float


@dataclass(frozen=True)
class _Parts:
    mean: float
    deviation: float
    maxima: float
    tail_fraction: float
    tail: float
    kinds: tuple[Kind, ...]


def _parts(q: NDArray[np.float64], zero: float) -> _Parts:
    """Parameters of the mixture from free numbers: those of noise and tail, then weight, height and width of each
    kind.
    """
    own = q[5:].reshape(-1, 3)
    shares: list[float] = np.asarray(scipy.special.softmax(np.array([float(q[3]), *own[:, 0], 0.0]))).tolist()
    mean, deviation, maxima = float(q[0]), math.exp(q[1]), 1 + math.exp(q[2])
    middle, width = middle_and_width(maxima)
    floor = mean + deviation * (middle + 2 * width)
    kinds = []
    for share, (_, above, wide) in zip(shares[1:-1], own, strict=True):
        height = floor + math.exp(above)
        # their scores scatter by the noise at least
        narrowest = width * deviation
        widest = max(WIDEST * (height + zero), 1.1 * narrowest)
        kinds.append(Kind(share, height, narrowest + (widest - narrowest) * float(scipy.special.expit(wide))))
    return _Parts(mean, deviation, maxima, shares[0], math.exp(q[4]), tuple(kinds))


def _fit(data: _Data, kinds: int) -> scipy.optimize.OptimizeResult:
    """The most likely parameters with so many kinds of complexes, from the best of a few beginnings."""
    share_above = np.cumsum(data.counts[::-1])[::-1] / data.counts.sum()

    def height(share: float) -> float:
        """The height above which so large a part of all peaks lies."""
        return float(data.z[min(int(np.searchsorted(-share_above, -share)), len(data.z) - 1)])

    fits = []
    # most peaks are noise, or only some of the lowest
    for noisy in (1.0, 0.3) if kinds else (1.0,):
        middle = height(1 - noisy / 2)
        width = max(middle - height(1 - 0.16 * noisy), 0.3)
        # of 20 numbers the largest has its median 1.8 deviations up and is half as wide
        noise = [middle - 3.6 * width, math.log(2 * width), 3.0, -3.0, math.log(width)]
        for share in (0.1, 0.02, 0.005) if noisy == 1 else (0.6, 0.3):
            # heights above which the share, and several times as many, of all peaks lie
            start = list(noise)
            for step in range(kinds):
                weight = min(share * 3.0**step, 0.9)
                above = height(weight / 2) - middle - 2 * width
                start += [math.log(weight / 0.8), math.log(max(above, 0.3)), 0.0]
            fits.append(_minimise(data, start))
            if kinds == 0:
                break
    return min(fits, key=lambda fit: float(fit.fun))


def _minimise(data: _Data, start: list[float]) -> scipy.optimize.OptimizeResult:
    def cost(q: NDArray[np.float64]) -> float:
        p = _parts(np.clip(q, -30, 30), data.zero)
        u = (data.z - p.mean) / p.deviation
        share = 1 - p.tail_fraction - sum(kind.fraction for kind in p.kinds)
        log_noise = -0.5 * u * u + (p.maxima - 1) * scipy.special.log_ndtr(u)
        density: NDArray[np.float64] = share * p.maxima / math.sqrt(2 * math.pi) * np.exp(log_noise)
        middle, width = middle_and_width(p.maxima)
        scale = p.deviation * width
        density += p.tail_fraction * tail_density((u - middle) / width, p.tail / scale) / width
        density /= p.deviation
        for kind in p.kinds:
            v = (data.z - kind.mean) / kind.deviation
            density += kind.fraction * np.exp(-0.5 * v * v) / (kind.deviation * math.sqrt(2 * math.pi))
        # widths of nothing would be infinitely likely
        penalty = 0.01 * float(np.square(q[1:]).sum())
        return float(-(data.counts * np.log(density + 1e-300)).sum() + penalty)

    return scipy.optimize.minimize(cost, np.array(start), method="L-BFGS-B", options={"maxiter": 120})
