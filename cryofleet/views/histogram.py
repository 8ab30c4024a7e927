"""A histogram of scores with a threshold, and what of it is expected to be background, as a small drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.numerics.score_background import Background

BINS = 48
_WIDTH, _HEIGHT, _FOOT = 260, 96, 16


@dataclass(frozen=True, eq=False)
class Histogram:
    """`counts` (n,) of scores between `edges` (n + 1,), which rise."""

    counts: NDArray[np.float64]
    edges: NDArray[np.float64]

    @classmethod
    def of(cls, scores: NDArray[np.float64], threshold: float) -> Histogram | None:
        """Of all finite scores, as wide as to hold the threshold; None where there are none."""
        finite = scores[np.isfinite(scores)]
        if not len(finite):
            return None
        low, high = float(min(finite.min(), threshold)), float(max(finite.max(), threshold))
        counts, edges = np.histogram(finite, BINS, (low, low + max(high - low, 1e-9)))
        return cls(counts.astype(np.float64), edges)

    @classmethod
    def of_search(cls, table: Mapping[str, Any]) -> Histogram | None:
        """Of all peaks of a template search, as its table has them; None where that has none."""
        try:
            counts = np.asarray(table["peak_heights"]["counts"], np.float64)
            edges = np.asarray(table["peak_heights"]["edges"], np.float64)
        except (KeyError, TypeError, ValueError):
            return None
        fits = counts.ndim == 1 and len(counts) > 0 and edges.shape == (len(counts) + 1,)
        sound = fits and np.isfinite(counts).all() and np.isfinite(edges).all() and (np.diff(edges) > 0).all()
        return cls(counts, edges) if sound and (counts >= 0).all() else None


def histogram_svg(histogram: Histogram | None, threshold: float, background: Background | None = None) -> str:
    """SVG of how many picks have which score; those below the threshold are fainter. Holds numbers alone.

    A line shows how many of each bar are expected to be of the background.
    """
    if histogram is None:
        return ""
    counts, edges = histogram.counts, histogram.edges
    low, high = float(min(edges[0], threshold)), float(max(edges[-1], threshold))
    span = high - low
    # Few good picks must be seen beside many poor ones.
    scale = (_HEIGHT - _FOOT) / np.sqrt(max(1.0, float(counts.max())))
    places = _WIDTH * (edges - low) / span
    bars = [
        f'<rect x="{place:.1f}" y="{_HEIGHT - _FOOT - height:.1f}" width="{max(wide - 0.5, 0.5):.1f}" '
        f'height="{height:.1f}" opacity="{1 if edge >= threshold else 0.4}"/>'
        for place, wide, height, edge in zip(places, np.diff(places), scale * np.sqrt(counts), edges, strict=False)
    ]
    line = ""
    if background is not None:
        above = np.array([background.false_positives(float(edge)) for edge in edges])
        heights = np.minimum(scale * np.sqrt(np.maximum(above[:-1] - above[1:], 0)), _HEIGHT - _FOOT)
        middles = (places[:-1] + places[1:]) / 2
        points = " ".join(f"{x:.1f},{_HEIGHT - _FOOT - y:.1f}" for x, y in zip(middles, heights, strict=True))
        line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    at = _WIDTH * (threshold - low) / span
    base = _HEIGHT - 3
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" aria-label="histogram of scores">'
        f'<g fill="#56b4e9">{"".join(bars)}</g>{line}'
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT - _FOOT}" stroke="#d55e00" stroke-width="2"/>'
        f'<g fill="currentColor" font-size="11" font-family="sans-serif"><text x="0" y="{base}">{low:.2g}</text>'
        f'<text x="{_WIDTH / 2}" y="{base}" text-anchor="middle">score (height: root of picks)</text>'
        f'<text x="{_WIDTH}" y="{base}" text-anchor="end">{high:.2g}</text></g></svg>'
    )
