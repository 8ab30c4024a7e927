"""Classes and labels are told apart on the screen by people with each kind of colour blindness too."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab

from cryofleet.numerics.label_colours import CLASS_COLOURS, label_colour, rgb

# Machado, Oliveira and Fernandes 2009, IEEE TVCG 15, 1291: of full severity, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
LEAST = 10.0
"""CIEDE2000; of two colours side by side, a difference of 2.3 is just noticed (Mahy et al. 1994)."""


def seen(colours: tuple[str, ...], vision: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB of colours as somebody sees them."""
    values = np.array([rgb(colour) for colour in colours]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    shown = np.clip(linear @ vision.T, 0, 1)
    encoded = np.where(shown <= 0.0031308, shown * 12.92, 1.055 * shown ** (1 / 2.4) - 0.055)
    return np.asarray(rgb2lab(encoded[None])[0], np.float64)


def least_difference(colours: tuple[str, ...], kind: str) -> float:
    lab = seen(colours, VISION[kind])
    pairs = combinations(lab, 2)
    return min(float(deltaE_ciede2000(one, other)) for one, other in pairs)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", VISION)
def test_seven_classes_and_seven_labels_are_told_apart(kind: str) -> None:
    assert len(CLASS_COLOURS) == 7
    assert least_difference(CLASS_COLOURS, kind) > LEAST
    assert least_difference(tuple(label_colour(label) for label in range(1, 8)), kind) > LEAST


@pytest.mark.parametrize("kind", VISION)
def test_picks_made_by_hand_and_those_found_are_told_apart(kind: str) -> None:
    assert least_difference(CLASS_COLOURS[:2], kind) > 4 * LEAST


def test_blue_and_violet_would_not_pass() -> None:
    blue_and_violet = ("#36c5ff", "#bd93ff")
    assert least_difference(blue_and_violet, "normal") > 2 * LEAST
    assert least_difference(blue_and_violet, "deuteranopia") < LEAST
