"""Points on a plane, with a lasso: the browser draws it, and what lies within is found here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import param
from numpy.typing import NDArray
from panel.custom import JSComponent

MOST_CORNERS = 2000
"""Of a lasso."""


class Scatter(JSComponent):
    """Coloured points, and marks with a number each; a lasso and clicks on marks are told to the owner."""

    points = param.Bytes(b"", doc="x and y of each, float32.")
    kinds = param.Bytes(b"", doc="The place of each point's colour in the palette, uint8.")
    lit = param.Bytes(b"", doc="uint8: 1 for points that stand out, 0 for others; empty for all alike.")
    palette = param.List([], doc="Colours as CSS has them.")
    marks = param.List([], doc="Number, x, y, colour and whether it is chosen, of each mark.")
    across = param.String("", doc="What x is.")
    upward = param.String("", doc="What y is.")

    _esm = Path(__file__).with_name("scatter.js")
    _stylesheets = [Path(__file__).with_name("scatter.css").read_text()]  # noqa: RUF012

    def __init__(
        self,
        on_lasso: Callable[[NDArray[np.float64], bool], None],
        on_mark: Callable[[int, bool], None],
        **params: Any,
    ) -> None:
        """Show nothing yet.

        Args:
            on_lasso: hears of the corners (n, 2) of a lasso, in the points' units, and whether what is in it comes
                beside what is chosen already.
            on_mark: hears of the number of a mark that was clicked at, and the same.
            params: further ones of Panel's.
        """
        super().__init__(**params)
        self._on_lasso, self._on_mark = on_lasso, on_mark

    def fill(self, points: NDArray[np.floating[Any]], across: str, upward: str) -> None:
        """Other points (n, 2), all of the palette's first colour."""
        kinds = bytes(len(points))
        self.param.update(
            points=points.astype("<f4").tobytes(), kinds=kinds, lit=b"", marks=[], across=across, upward=upward
        )

    def _handle_msg(self, data: Any) -> None:
        more = bool(data.get("more"))
        if data.get("type") == "mark":
            self._on_mark(int(data["number"]), more)
            return
        corners = np.array(data["corners"][:MOST_CORNERS], np.float64)
        if corners.ndim == 2 and corners.shape[1] == 2 and len(corners) > 2 and np.isfinite(corners).all():
            self._on_lasso(corners, more)


def within(points: NDArray[np.floating[Any]], corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the points (n, 2) a closed polygon with corners (m, 2) encloses, by the even-odd rule."""
    x, y = points[:, 0].astype(np.float64), points[:, 1].astype(np.float64)
    inside = np.zeros(len(points), np.bool_)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        crosses = (y1 > y) != (y2 > y)
        inside ^= crosses & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside
