"""What an expectation step tells the maximisation: sums that can be added up over any split of the particles."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.alignment.array_files import Arrays


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over particles, each in one of two half sets, of K classes.

    `sums` complex128 and `weights` float64 (2, K, components): of P w X and P w^2 in the reference's frame;
    `responsibilities` (2, K): of P; `residuals` (shells,): of P |X - w R A|^2, and `observed` (shells,) of how many
    components; `displacements` (K, 3): of P R^-1 t in voxels; `class_evidence` (K,): of log P(X | class), but for a
    constant; `squared_shift`: of P |t|^2 in voxels^2; `log_evidence`: of log P(X); `score`: of the best constrained
    correlation; `changed`: particles whose best pose or class is another; `count`: particles.
    """

    sums: NDArray[np.complex128]
    weights: NDArray[np.float64]
    responsibilities: NDArray[np.float64]
    residuals: NDArray[np.float64]
    observed: NDArray[np.float64]
    displacements: NDArray[np.float64]
    class_evidence: NDArray[np.float64]
    squared_shift: float
    log_evidence: float
    score: float
    changed: float
    count: float

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def to_arrays(self) -> Arrays:
        """As plain arrays."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any]) -> "Statistics":
        """What `to_arrays` gave."""
        values: dict[str, Any] = {f.name: arrays[f.name] for f in fields(Statistics)}
        for name in ("squared_shift", "log_evidence", "score", "changed", "count"):
            values[name] = float(values[name])
        return Statistics(**values)


@dataclass(frozen=True, eq=False)
class Posterior:
    """The poses that n particles are likely in, at most P each: `classes` (n, P), `quaternions` (n, P, 4), `shifts`
    (n, P, 3) in voxels, `weights` (n, P) of sum 1 over all poses and classes, the likeliest first.
    """

    classes: NDArray[np.int16]
    quaternions: NDArray[np.float32]
    shifts: NDArray[np.float32]
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.classes)

    def rows(self, chosen: NDArray[np.int64] | slice) -> "Posterior":
        """That of some of the particles."""
        return Posterior(self.classes[chosen], self.quaternions[chosen], self.shifts[chosen], self.weights[chosen])

    def responsibilities(self, count: int) -> NDArray[np.float64]:
        """The share of each of `count` classes in each particle, (n, count)."""
        shares = [np.where(self.classes == k, self.weights, 0).sum(axis=1) for k in range(count)]
        return np.stack(shares, axis=1).astype(np.float64)

    def to_arrays(self) -> Arrays:
        """As plain arrays."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any]) -> "Posterior":
        """What `to_arrays` gave."""
        return Posterior(**{f.name: arrays[f.name] for f in fields(Posterior)})

    @staticmethod
    def together(parts: "list[Posterior]") -> "Posterior":
        """Those of consecutive parts of a set."""
        width = max(part.classes.shape[1] for part in parts)

        def padded(array: NDArray[Any]) -> NDArray[Any]:
            filling = [(0, 0), (0, width - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
            return np.pad(array, filling, mode="edge" if array.ndim > 2 else "constant")

        return Posterior(
            **{f.name: np.concatenate([padded(getattr(part, f.name)) for part in parts]) for f in fields(Posterior)}
        )
