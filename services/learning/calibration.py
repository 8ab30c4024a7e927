"""Probabilities that mean what they say: temperature scaling, and how a classifier's probabilities are judged.

Guo et al. 2017 (On calibration of modern neural networks, ICML): logits are divided by one number, the temperature,
chosen so that boxes that were held back from training are most likely. It changes no box's class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

BINS = 15
"""Of the expected calibration error, as Guo et al. have them."""

TEMPERATURES = (0.05, 20.0)
"""Where the temperature is looked for."""


@dataclass(frozen=True, eq=False)
class ClassFigures:
    """How classes were found.

    `confusion` (classes, classes): rows are true classes, columns those found; `precision`, `recall` and `f1`
    (classes,): 0 where nothing was found, or is there, to take a share of.
    """

    confusion: NDArray[np.int64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    accuracy: float


def probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Calibrated probabilities of logits, both (n, classes)."""
    scaled: NDArray[np.float64] = softmax(logits.astype(np.float64) / temperature, axis=1)
    return scaled.astype(np.float32)


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature that makes the labels (n,) of held-back boxes, of logits (n, classes), most likely.

    As in Platt 1999, the right class is taken as right with probability (n + 1) / (n + 2): where all boxes are found
    right, the likeliest temperature would otherwise be 0, and all probabilities 1.
    """
    values = logits.astype(np.float64)
    n, classes = len(values), values.shape[1]
    doubt = 1 / (n + 2)
    targets = np.full(values.shape, doubt / (classes - 1))
    targets[np.arange(n), labels] = 1 - doubt

    def surprise(log_temperature: float) -> float:
        chances: NDArray[np.float64] = log_softmax(values / math.exp(log_temperature), axis=1)
        return -float(np.sum(targets * chances)) / n

    low, high = np.log(TEMPERATURES)
    # The surprise is convex in 1 / temperature, so it has one minimum.
    found = scipy.optimize.minimize_scalar(surprise, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def expected_calibration_error(chances: NDArray[np.float32], labels: NDArray[np.int64], bins: int = BINS) -> float:
    """The mean over boxes of |accuracy - mean confidence| of their bin; `bins` of equal width over 0 to 1.

    `chances` (n, classes) are probabilities; the confidence is that of the likeliest class.
    """
    confidence = chances.max(axis=1).astype(np.float64)
    right = (chances.argmax(axis=1) == labels).astype(np.float64)
    number = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    # |sum of right - sum of confidence| of a bin is its count times the difference of the means.
    gaps = np.bincount(number, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum()) / len(labels)


def class_figures(found: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> ClassFigures:
    """Of the classes found and the true ones, both (n,), numbered from 0."""
    confusion = np.bincount(labels * classes + found, minlength=classes**2).reshape(classes, classes)
    right = np.diag(confusion).astype(np.float64)
    precision = share(right, confusion.sum(axis=0))
    recall = share(right, confusion.sum(axis=1))
    return ClassFigures(
        confusion=confusion.astype(np.int64),
        precision=precision,
        recall=recall,
        f1=share(2 * precision * recall, precision + recall),
        accuracy=float(right.sum()) / max(1, len(labels)),
    )


def share(part: NDArray[np.float64], whole: NDArray[Any]) -> NDArray[np.float64]:
    """part / whole, 0 where the whole is 0."""
    shares: NDArray[np.float64] = np.divide(part, whole, out=np.zeros(len(part)), where=np.asarray(whole) > 0)
    return shares
