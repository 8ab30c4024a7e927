"""Colours of labels, the same wherever labels are drawn."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

#: Of classes, and of the first labels, for they must be told apart by everybody: the seven colours of Okabe & Ito 2008
#: (https://jfly.uni-koeln.de/color/).
CLASS_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
OTHER_CLASSES_COLOUR = "#bbbbbb"
_GOLDEN_ANGLE = 0.381966
"""Of a turn: hues this far apart are never near to those before them."""


def label_colour(label: int) -> str:
    """The colour of a label from 1 on, as #rrggbb, to lie on grey pictures; beyond classes' they go on round the colour
    circle.
    """
    if label <= len(CLASS_COLOURS):
        return CLASS_COLOURS[label - 1]
    red, green, blue = colorsys.hls_to_rgb((label * _GOLDEN_ANGLE) % 1, 0.65, 0.9)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def overlay(grey: NDArray[np.uint8], labels: NDArray[np.integer], opacity: float = 0.5) -> NDArray[np.uint8]:
    """A grey picture [y, x] with its labels' colours over it, as [y, x, rgb]; label 0 leaves the grey as it is."""
    present, places = np.unique(labels, return_inverse=True)
    colours = np.array([rgb(label_colour(int(label))) if label > 0 else (0, 0, 0) for label in present], np.float32)
    weight = np.where(labels > 0, np.float32(opacity), np.float32(0))[..., None]
    mixed = (1 - weight) * grey[..., None] + weight * colours[places.reshape(labels.shape)]
    painted: NDArray[np.uint8] = np.rint(mixed).astype(np.uint8)
    return painted


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of #rrggbb."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
