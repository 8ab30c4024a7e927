"""Circles of picks on a slice, in colours that everybody can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from bokeh.palettes import Viridis256
from numpy.typing import NDArray

from cryofleet.numerics.label_colours import CLASS_COLOURS, OTHER_CLASSES_COLOUR
from cryofleet.views.picks import Picks
from cryofleet.views.slice_pane import Mark

MOST_MARKS = 5000
"""On one slice: the nearest to it."""
COLOUR_BY = ("one colour", "score", "class")
_PLAIN = CLASS_COLOURS[0]
_BY_HAND = CLASS_COLOURS[1]
_FAINTEST = 0.35


def classes(table: pd.DataFrame) -> list[str]:
    """The name of each row's class."""
    if "class_name" in table:
        return [str(name) for name in table["class_name"].fillna("")]
    if "class_id" in table:
        numbers = table["class_id"].astype(float) + 1  # counted from 1 wherever they are shown
        return [f"class {number:.0f}" if np.isfinite(number) else "" for number in numbers]
    return [""] * len(table)


def colours(table: pd.DataFrame, scores: NDArray[np.float64], colour_by: str) -> list[str]:
    """One colour a row: by class, the seventh and further classes alike; by score from dark to bright; or one, and
    another for picks made by hand."""
    if colour_by == "class":
        names = classes(table)
        rank = {name: number for number, name in enumerate(sorted(set(names)))}
        return [CLASS_COLOURS[rank[n]] if rank[n] < len(CLASS_COLOURS) else OTHER_CLASSES_COLOUR for n in names]
    if colour_by == "score" and np.isfinite(scores).any():
        low, high = np.nanpercentile(scores, (2, 98))
        place = np.clip((np.nan_to_num(scores, nan=low) - low) / max(high - low, 1e-12), 0, 1)
        return [Viridis256[60 + round(195 * share)] for share in place.tolist()]
    by_hand = table["editor"].fillna("").ne("") if "editor" in table else [False] * len(table)
    return [_BY_HAND if edited else _PLAIN for edited in by_hand]


def marks_on(
    picks: Picks,
    axis: str,
    position: int,
    planes: int,
    radius_voxels: float,
    colour_of: Sequence[str],
    least_score: float | None = None,
) -> list[Mark]:
    """Circles of the picks whose sphere reaches into a slice, fainter and smaller the further off they are.

    `colour_of` has one colour for each row of the table. A slice has (x, y) as columns and rows along z, (x, z) along y
    and (y, z) along x. Picks made by hand are dashed.
    """
    along = "xyz".index(axis)
    column, row = (number for number in range(3) if number != along)
    positions = picks.positions
    off = np.maximum(0, np.abs(positions[:, along] - position) - (planes - 1) / 2)
    near = np.flatnonzero((off < radius_voxels) & picks.above(least_score))
    near = near[np.argsort(off[near], kind="stable")][:MOST_MARKS]
    chosen = picks.table.iloc[near]
    by_hand = chosen["editor"].fillna("").ne("").to_numpy() if "editor" in chosen else np.zeros(len(near), bool)
    cut = np.sqrt(np.maximum(radius_voxels**2 - off[near] ** 2, 0))
    opacity = 1 - (1 - _FAINTEST) * off[near] / max(radius_voxels, 1e-9)
    return [
        (int(pick), float(x), float(y), float(r), colour, float(faint), bool(edited))
        for pick, x, y, r, colour, faint, edited in zip(
            chosen["id"],
            positions[near, column],
            positions[near, row],
            cut,
            (colour_of[index] for index in near.tolist()),
            opacity,
            by_hand,
            strict=True,
        )
    ]
