"""Codes on their first two principal components, to be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 20_000
"""A picture shows no more, and the table of one can be sent to a browser."""

COMPONENTS = 2


@dataclass(frozen=True)
class Embedding:
    """Principal components of n codes of d numbers.

    Attributes:
        mean: (d,) of the codes.
        axes: (2, d), unit vectors; the largest entry of each is positive, so that the same codes give the same
            picture.
        explained: (2,), each one's share of the codes' variance; 0 where the codes do not vary.
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    explained: NDArray[np.float64]

    def points(self, codes: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, 2) coordinates of codes (n, d), in their units."""
        points: NDArray[np.float64] = (codes - self.mean) @ self.axes.T
        return points


def principal_components(codes: NDArray[np.float32]) -> Embedding:
    """The first two principal components of all codes (n, d), from their covariance matrix in float64."""
    mean = codes.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((codes.shape[1],) * 2)
    step = 65536
    for first in range(0, len(codes), step):
        centred = codes[first : first + step] - mean
        covariance += centred.T @ centred
    covariance /= len(codes)
    variances, vectors = np.linalg.eigh(covariance)
    axes = vectors[:, ::-1][:, :COMPONENTS].T
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(COMPONENTS), largest])[:, None]
    total = float(variances.clip(0).sum())
    explained = variances[::-1][:COMPONENTS].clip(0) / total if total > 0 else np.zeros(COMPONENTS)
    return Embedding(mean, axes, explained)


def sampled_rows(count: int, most: int = MAX_POINTS) -> NDArray[np.int64]:
    """At most so many of `count` rows, evenly spaced: row floor(i * count / most); all where there are no more."""
    if count <= most:
        return np.arange(count)
    return np.arange(most) * count // most
