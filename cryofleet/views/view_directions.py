"""From which sides the beam saw an average: the particles' directions of view, on a map of equal areas."""

from __future__ import annotations

import numpy as np
from bokeh.palettes import Viridis256
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

_WIDE = 2 * np.sqrt(2.0)
_HIGH = np.sqrt(2.0)
_MAP_WIDTH, _TOP = 340, 12
_NEWTON_STEPS = 12
_CELL_PARTICLES = 4
"""So many would lie in a cell if directions were evenly spread, where there are enough."""


def view_directions(rotations: Rotation) -> NDArray[np.float64]:
    """Directions `(n, 3)` of the beam, which runs along z in the tomogram, in the frame of the average.

    `rotations` take the average onto the particles.
    """
    return np.asarray(rotations.inv().apply([0.0, 0.0, 1.0]), np.float64).reshape(-1, 3)


def mollweide(directions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where unit vectors `(n, 3)` lie on Mollweide's map of the sphere of radius 1, which keeps areas: x within
    2 sqrt(2), y within sqrt(2), the direction z at the top (Snyder 1987, USGS Prof. Paper 1395, 249).
    """
    longitude = np.arctan2(directions[:, 1], directions[:, 0])
    latitude = np.arcsin(np.clip(directions[:, 2], -1, 1))
    # 2 t + sin 2t = pi sin(latitude), by Newton's method for 2 t; at the poles t is the latitude.
    wanted = np.pi * np.sin(latitude)
    double = latitude.copy()
    for _ in range(_NEWTON_STEPS):
        slope = 1 + np.cos(double)
        double = np.where(slope > 1e-9, double - (double + np.sin(double) - wanted) / np.maximum(slope, 1e-9), double)
    angle = np.clip(double / 2, -np.pi / 2, np.pi / 2)
    return _WIDE / np.pi * longitude * np.cos(angle), _HIGH * np.sin(angle)


def counts_on_map(directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many directions lie in each cell of the map `[row, column]`, from its lower left; NaN outside of it.

    Cells are squares of one area on the sphere; there are the fewer the fewer directions there are.
    """
    rows = int(np.clip(np.sqrt(len(directions) / (_CELL_PARTICLES * np.pi / 2)), 8, 36)) // 2 * 2
    x, y = mollweide(directions)
    counts, _, _ = np.histogram2d(y, x, (rows, 2 * rows), ((-_HIGH, _HIGH), (-_WIDE, _WIDE)))
    row, column = np.mgrid[:rows, : 2 * rows]
    inside = ((2 * row + 1) / rows - 1) ** 2 + ((2 * column + 1) / (2 * rows) - 1) ** 2 <= 1
    return np.where(inside | (counts > 0), counts, np.nan)


def directions_svg(directions: NDArray[np.float64]) -> str:
    """The map, with circles of latitude and longitude each 30 degrees, as a drawing. Holds numbers alone."""
    counts = counts_on_map(directions)
    rows, columns = counts.shape
    most = max(1, int(np.nanmax(counts)))
    side = _MAP_WIDTH / columns

    def colour(share: float) -> str:
        return str(Viridis256[round(255 * share)])

    cells = [
        f'<rect x="{side * column:.2f}" y="{_TOP + side * (rows - 1 - row):.2f}" width="{side + 0.3:.2f}" '
        f'height="{side + 0.3:.2f}" fill="{colour(counts[row, column] / most)}">'
        f"<title>{counts[row, column]:.0f}</title></rect>"
        for row in range(rows)
        for column in range(columns)
        if np.isfinite(counts[row, column])
    ]
    degrees = np.radians(np.arange(-180, 181, 5))
    lines = [_unit(degrees, np.full_like(degrees, fixed)) for fixed in np.radians(np.arange(-60, 61, 30))]
    latitudes = degrees[np.abs(degrees) <= np.pi / 2]
    for fixed in np.radians(np.arange(-180, 181, 30)):
        # The rim itself would lie on its other side by rounding.
        longitude = np.clip(fixed, -np.pi + 1e-9, np.pi - 1e-9)
        lines.append(_unit(np.full_like(latitudes, longitude), latitudes))
    drawn = []
    for line in lines:
        x, y = mollweide(line)
        places = zip((x + _WIDE) / (2 * _WIDE) * _MAP_WIDTH, _TOP + (_HIGH - y) / (2 * _WIDE) * _MAP_WIDTH, strict=True)
        drawn.append(f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>')
    left, high = _MAP_WIDTH + 14, _MAP_WIDTH / 2
    stops = [f'<stop offset="{share}" stop-color="{colour(1 - share)}"/>' for share in np.linspace(0, 1, 9)]
    ends = ((most, _TOP + 11.0), (0, _TOP + high))
    words = [f'<text x="{left + 14}" y="{y:.1f}">{value}</text>' for value, y in ends]
    return (
        f'<svg viewBox="0 0 {_MAP_WIDTH + 50} {_MAP_WIDTH / 2 + 2 * _TOP}" width="100%" height="100%" role="img" '
        f'aria-label="directions of view"><defs><linearGradient id="viridis" x2="0" y2="1">{"".join(stops)}'
        f"</linearGradient></defs>{''.join(cells)}"
        f'<g fill="none" stroke="#aaaaaa" stroke-width="0.5">{"".join(drawn)}</g>'
        f'<rect x="{left}" y="{_TOP}" width="10" height="{high}" fill="url(#viridis)"/>'
        f'<g fill="currentColor" font-size="12" font-family="sans-serif">{"".join(words)}</g></svg>'
    )


def _unit(longitude: NDArray[np.float64], latitude: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1
    )
