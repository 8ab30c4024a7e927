"""Spherical harmonics at arbitrary directions, and Wigner's d matrices.

Conventions: orthonormal complex Y_lm with the Condon-Shortley phase; D^l_mn(a, b, g) = exp(-i m a) d^l_mn(b) exp(-i n
g) for the active rotation R = Rz(a) Ry(b) Rz(g), so that a rotated function has (R f)_lm = sum_n D^l_mn(R) f_ln.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def spherical_harmonics(directions: NDArray[np.float64], degrees: tuple[int, ...]) -> NDArray[np.complex128]:
    """Y_lm of the given degrees l for m = 0..max(degrees) at unit vectors (x, y, z).

    `directions` is (points, 3); the result is (points, len(degrees), max(degrees) + 1) and zero where m > l. Negative
    m follow from Y_l,-m = (-1)^m conj(Y_lm).
    """
    l_max = max(degrees)
    cosine = np.clip(directions[:, 2], -1.0, 1.0)
    sine = np.hypot(directions[:, 0], directions[:, 1])
    phase = np.ones(len(directions), dtype=np.complex128)
    safe = sine > 0
    turn = np.ones_like(phase)
    turn[safe] = (directions[safe, 0] + 1j * directions[safe, 1]) / sine[safe]
    result = np.zeros((len(directions), len(degrees), l_max + 1), dtype=np.complex128)
    place = {degree: i for i, degree in enumerate(degrees)}
    diagonal = np.full(len(directions), math.sqrt(1 / (4 * math.pi)))
    for m in range(l_max + 1):
        if m > 0:
            diagonal = -math.sqrt((2 * m + 1) / (2 * m)) * sine * diagonal
            phase = phase * turn
        before, current = np.zeros_like(diagonal), diagonal
        for degree in range(m, l_max + 1):
            if degree > m:
                # The usual three-term recursion of the normalised Legendre functions.
                a = math.sqrt((4 * degree**2 - 1) / (degree**2 - m**2))
                b = math.sqrt(((degree - 1) ** 2 - m**2) / (4 * (degree - 1) ** 2 - 1)) if degree > m + 1 else 0.0
                before, current = current, a * (cosine * current - b * before)
            if degree in place:
                result[:, place[degree], m] = current * phase
    return result


@lru_cache(maxsize=256)
def _angular_momentum_y(degree: int) -> NDArray[np.complex128]:
    """Eigenvectors of J_y in the basis |l m>, m = -l..l, as columns in order of the eigenvalues -l..l."""
    m = np.arange(-degree, degree)
    raising = np.sqrt(degree * (degree + 1) - m * (m + 1))
    matrix = np.diag(raising / 2j, -1) - np.diag(raising / 2j, 1)
    vectors: NDArray[np.complex128] = np.linalg.eigh(matrix)[1]
    return vectors


def wigner_d(degree: int, beta: NDArray[np.float64]) -> NDArray[np.float64]:
    """d^l_mn(beta) for all m, n = -l..l, as (angles, 2 l + 1, 2 l + 1), beta in radians.

    From the eigenvectors of J_y, exact to rounding at any l (recursions over l lose digits).
    """
    vectors = _angular_momentum_y(degree)
    phases = np.exp(-1j * np.outer(beta, np.arange(-degree, degree + 1)))
    return np.ascontiguousarray(((vectors * phases[:, None, :]) @ vectors.conj().T).real)
