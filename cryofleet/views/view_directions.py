"""From which sides the beam saw an average: the particles' directions of view, on a map of equal areas."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import LinearColorMapper
from bokeh.models.annotations import ColorBar
from bokeh.palettes import Viridis256
from bokeh.plotting import figure
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

# What its annotations allow is less than what it takes.
_figure: Any = figure
_WIDE = 2 * np.sqrt(2.0)
_HIGH = np.sqrt(2.0)
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


def directions_figure(directions: NDArray[np.float64]) -> Any:
    """The map, with circles of latitude and longitude each 30 degrees."""
    counts = counts_on_map(directions)
    plot: Any = _figure(sizing_mode="stretch_both", min_height=140, tools="", toolbar_location=None, match_aspect=True)
    plot.axis.visible = False
    plot.grid.visible = False
    colours = LinearColorMapper(
        palette=list(Viridis256), low=0, high=max(1.0, float(np.nanmax(counts))), nan_color="rgba(0, 0, 0, 0)"
    )
    plot.image([counts], x=-_WIDE, y=-_HIGH, dw=2 * _WIDE, dh=2 * _HIGH, color_mapper=colours)
    degrees = np.radians(np.arange(-180, 181, 5))
    for fixed in np.radians(np.arange(-60, 61, 30)):
        plot.line(*mollweide(_unit(degrees, np.full_like(degrees, fixed))), color="#aaaaaa", width=0.5)
    for fixed in np.radians(np.arange(-180, 181, 30)):
        latitudes = degrees[np.abs(degrees) <= np.pi / 2]
        # The rim itself would lie on its other side by rounding.
        longitude = np.clip(fixed, -np.pi + 1e-9, np.pi - 1e-9)
        plot.line(*mollweide(_unit(np.full_like(latitudes, longitude), latitudes)), color="#aaaaaa", width=0.5)
    plot.add_layout(ColorBar(color_mapper=colours, width=10, padding=2, title=None), "right")
    return plot


def _unit(longitude: NDArray[np.float64], latitude: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1
    )
