"""A matrix split into one of low rank and a sparse one: robust principal component analysis.

Principal component pursuit (Candès, Li, Ma and Wright, J. ACM 58 (2011) 11, eq. 1.1): minimise

    ||L||_* + lambda ||S||_1   subject to   L + S = D,

the sum of L's singular values and that of S's absolute entries. It is solved with the inexact augmented Lagrange
multipliers of Lin, Chen and Ma (arXiv:1009.5055, algorithm 5): L and S in turn by shrinkage, then the multiplier Y,
with a penalty mu that grows geometrically.

The singular values are shrunk through the eigenvectors of the Gram matrix of the shorter side, so that a matrix of
many rows and few columns costs little more than reading it. That resolves singular values down to 1e-8 of the largest,
below anything that survives the shrinkage before the tolerance is reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, Internal, InvalidArgument
from cryofleet.progress import Progress, no_progress

Matrix = NDArray[np.float64]

#: The penalty grows by this factor in each iteration (Lin et al.: 1.1 to 1.6).
PENALTY_GROWTH = 1.3
#: Copies of the matrix that `robust_pca` holds at once: low rank, sparse, multiplier and three that come and go.
COPIES = 6


@dataclass(frozen=True)
class Decomposition:
    """D = low_rank + sparse.

    Attributes:
        low_rank, sparse: float64, of the matrix's shape.
        rank: of `low_rank`.
        iterations: until convergence.
        residual: ||D - low_rank - sparse|| / ||D||, Frobenius norms.
    """

    low_rank: Matrix
    sparse: Matrix
    rank: int
    iterations: int
    residual: float


def robust_pca(
    matrix: Matrix,
    *,
    sparsity_weight: float | None = None,
    tolerance: float = 1e-7,
    max_iterations: int = 500,
    progress: Progress = no_progress,
) -> Decomposition:
    """Split a matrix `[rows, columns]` into a low-rank and a sparse one.

    Args:
        matrix: finite, any shape.
        sparsity_weight: lambda, what an entry of the sparse matrix costs; 1 / sqrt(longer side) where None, which
            needs no tuning where the sparse entries lie at random (Candès et al., theorem 1.1). Larger: sparser.
        tolerance: the residual to stop at.
        max_iterations: to give up after.
        progress: told of each iteration.

    Raises:
        InvalidArgument: no matrix, or a weight or tolerance that is not positive.
        FailedPrecondition: entries that are not finite.
        Internal: no convergence within `max_iterations`.
    """
    if matrix.ndim != 2 or matrix.size == 0:
        raise InvalidArgument(f"robust PCA takes a matrix of rows and columns, not an array of shape {matrix.shape}")
    if sparsity_weight is None:
        sparsity_weight = 1 / math.sqrt(max(matrix.shape))
    if not sparsity_weight > 0 or not tolerance > 0:
        raise InvalidArgument(
            f"sparsity_weight is {sparsity_weight:g} and tolerance {tolerance:g}, both must be positive"
        )
    if not np.isfinite(matrix).all():
        raise FailedPrecondition("robust PCA: the matrix has entries that are not finite (NaN or infinity)")
    data = np.asarray(matrix, np.float64)
    norm = float(np.linalg.norm(data))
    if norm == 0:
        return Decomposition(np.zeros_like(data), np.zeros_like(data), 0, 0, 0.0)

    spectral = math.sqrt(float(np.linalg.eigvalsh(_gram(data))[-1]))
    penalty = 1.25 / spectral
    # the dual start: D scaled into the unit ball of the norm dual to the objective
    multiplier = data / max(spectral, float(np.abs(data).max()) / sparsity_weight)
    sparse = np.zeros_like(data)
    first_residual = 1.0
    for iteration in range(1, max_iterations + 1):
        scaled = multiplier / penalty
        scaled += data
        low_rank, rank = _shrink_singular_values(scaled - sparse, 1 / penalty)
        scaled -= low_rank
        sparse = _shrink(scaled, sparsity_weight / penalty)
        error = data - low_rank
        error -= sparse
        residual = float(np.linalg.norm(error)) / norm
        if residual < tolerance:
            return Decomposition(low_rank, sparse, rank, iteration, residual)
        error *= penalty
        multiplier += error
        penalty *= PENALTY_GROWTH
        if iteration == 1:
            first_residual = max(residual, 2 * tolerance)
        # the residual falls about geometrically
        done = math.log(first_residual / residual) / math.log(first_residual / tolerance)
        progress(min(1.0, max(0.0, done)), "robust PCA", iterations=iteration, rank=rank)
    raise Internal(
        f"robust PCA: residual {residual:.2g} after {max_iterations} iterations, {tolerance:g} was asked for"
    )


def _gram(matrix: Matrix) -> Matrix:
    """The product of a matrix with itself over its longer side."""
    return matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T


def _shrink_singular_values(matrix: Matrix, by: float) -> tuple[Matrix, int]:
    """The matrix with its singular values s turned into max(s - by, 0), and how many are left."""
    squares, vectors = np.linalg.eigh(_gram(matrix))
    values = np.sqrt(np.maximum(squares, 0))
    left = values > by
    kept = vectors[:, left]
    projection = (kept * (1 - by / values[left])) @ kept.T
    shrunk: Matrix = matrix @ projection if matrix.shape[0] >= matrix.shape[1] else projection @ matrix
    return shrunk, int(left.sum())


def _shrink(matrix: Matrix, by: float) -> Matrix:
    """The matrix with its entries drawn towards 0 by `by`."""
    # clipping leaves what shrinking takes away
    return matrix - np.clip(matrix, -by, by)
