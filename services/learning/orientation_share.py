"""How much points in a space of conformations tell of the particles' orientations, which should be nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

PERMUTATIONS = 199
MAX_PARTICLES = 10_000
"""Of more, as many are taken, evenly."""


def orientation_share(
    points: NDArray[np.float64], rotations: Rotation, seed: int = 0
) -> tuple[float, NDArray[np.float64]]:
    """The share of the wedge orientations' variance that points (n, d) predict, and the shares (199,) that they predict
    when shuffled among the particles.

    What is predicted is where the beam and the tilt axis lie in the average's frame, each as the six products of its
    coordinates, as a wedge is the same from both sides; by least squares from the points' coordinates and squares.
    Shuffled points predict about 2 d / n by chance.
    """
    step = -(-len(points) // MAX_PARTICLES)
    points, rotations = points[::step], rotations[::step]
    beam, axis = (rotations.inv().apply(direction) for direction in ((0, 0, 1), (0, 1, 0)))
    products = [vectors[:, i] * vectors[:, j] for vectors in (beam, axis) for i in range(3) for j in range(i, 3)]
    targets = np.stack(products, axis=1)
    targets -= targets.mean(axis=0)
    centred = points - points.mean(axis=0)
    scaled = centred / np.maximum(centred.std(axis=0), 1e-300)
    features = np.concatenate([np.ones((len(points), 1)), scaled, scaled**2], axis=1)
    # Shuffling the points shuffles the rows of an orthonormal basis of what they can predict.
    left, spread, _ = np.linalg.svd(features, full_matrices=False)
    basis = left[:, spread > 1e-9 * spread[0]]
    total = float((targets**2).sum())

    def share(rows: NDArray[np.float64]) -> float:
        return float(((rows.T @ targets) ** 2).sum() / total) if total > 0 else 0.0

    random = np.random.default_rng((seed, 7))
    shuffled = np.array([share(basis[random.permutation(len(basis))]) for _ in range(PERMUTATIONS)])
    return share(basis), shuffled
