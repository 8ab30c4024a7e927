"""Which particles are left out of an average, and why.

Three rules, each of them off unless asked for, all within each half set, so that the halves stay alike:

- `lowest_share`: so many of a half set, those of the lowest scores;
- `score_deviations`: whose score is more than so many standard deviations below the median of its half set
  (estimated by the median absolute deviation, so that the bad ones don't hide themselves);
- `signal_deviations`: whose signal is less than so many standard deviations of noise. A tenth of the Fourier components
  is kept out of every alignment, as crystallographers keep reflections for the free R factor (Brünger 1992). There a
  particle X at its pose is set against the average without it as it would be imaged, M:

      signal = sum Re(X M*) / s^2 / sqrt(sum |M|^2 / (2 s^2)),    s^2 the particle's own mean power on each shell.

  Of noise alone it is normal with deviation 1 about 0, however well the pose was fitted to the noise; of a particle it
  is the matched filter's signal-to-noise ratio, sqrt(2 sum SSNR) over the components, SSNR that of the particle.

No more than half of a half set is left out, and two particles stay at least: where more would go, those of the best
scores stay. Particles left out are aligned like the others, and come back once they fit.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

FREE_SHARE = 0.1
"""Of the components, so many are kept out of the alignment where the signal is asked for."""
KEPT, LOWEST, BELOW_MEDIAN, NO_SIGNAL = range(4)
"""Codes of the reasons."""


@dataclass(frozen=True)
class Rejection:
    """The rules; none leaves anything out by default."""

    lowest_share: float = 0.0
    score_deviations: float | None = None
    signal_deviations: float | None = None

    def check(self) -> None:
        """Raise InvalidArgument where a value can't work."""
        if not 0 <= self.lowest_share <= 0.5:
            raise InvalidArgument(f"lowest_share {self.lowest_share:g}: must lie in 0 to 0.5")
        if self.score_deviations is not None and not self.score_deviations > 0:
            raise InvalidArgument(f"score_deviations {self.score_deviations:g}: must be positive")
        if self.signal_deviations is not None and not math.isfinite(self.signal_deviations):
            raise InvalidArgument(f"signal_deviations {self.signal_deviations:g}: must be finite")

    @property
    def active(self) -> bool:
        """Whether any rule is on."""
        return self.lowest_share > 0 or self.score_deviations is not None or self.signal_deviations is not None

    def reason(self, code: int) -> str:
        """Why a particle is left out, in words."""
        return {
            LOWEST: f"among the lowest {100 * self.lowest_share:g}% of scores of its half set",
            BELOW_MEDIAN: f"score more than {self.score_deviations or 0:g} deviations below the median of its half set",
            NO_SIGNAL: f"signal below {self.signal_deviations or 0:g} deviations of noise",
        }[code]


def rejected(
    rules: Rejection, halves: NDArray[np.int32], scores: NDArray[np.float64], signals: NDArray[np.float64]
) -> NDArray[np.int8]:
    """The code of the reason for each particle (n,), KEPT for those that stay.

    `halves` (n,) are 1 or 2, `scores` (n,) the correlations, `signals` (n,) as above.
    """
    codes = np.full(len(halves), KEPT, dtype=np.int8)
    for half in (1, 2):
        mine = np.flatnonzero(halves == half)
        score, found = scores[mine], np.full(len(mine), KEPT, dtype=np.int8)
        if rules.signal_deviations is not None:
            found[signals[mine] < rules.signal_deviations] = NO_SIGNAL
        if rules.score_deviations is not None:
            middle = np.median(score)
            deviation = 1.4826 * np.median(np.abs(score - middle))
            found[score < middle - rules.score_deviations * deviation] = BELOW_MEDIAN
        order = np.argsort(score, kind="stable")
        found[order[: math.floor(rules.lowest_share * len(mine) + 1e-9)]] = LOWEST
        most = max(0, min(len(mine) // 2, len(mine) - 2))
        going = order[found[order] != KEPT]
        found[going[most:]] = KEPT
        codes[mine] = found
    return codes
