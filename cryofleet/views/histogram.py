"""A histogram of scores with a threshold, as a small drawing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 48
_WIDTH, _HEIGHT, _FOOT = 260, 96, 16


def histogram_svg(scores: NDArray[np.float64], threshold: float) -> str:
    """SVG of how many picks have which score; those below the threshold are fainter. Holds numbers alone."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return ""
    low, high = float(min(finite.min(), threshold)), float(max(finite.max(), threshold))
    span = max(high - low, 1e-9)
    counts, edges = np.histogram(finite, BINS, (low, low + span))
    # Few good picks must be seen beside many poor ones.
    heights = np.sqrt(counts / max(1, counts.max())) * (_HEIGHT - _FOOT)
    bars = [
        f'<rect x="{_WIDTH * (edge - low) / span:.1f}" y="{_HEIGHT - _FOOT - height:.1f}" '
        f'width="{_WIDTH / BINS - 0.5:.1f}" height="{height:.1f}" opacity="{1 if edge >= threshold else 0.4}"/>'
        for edge, height in zip(edges[:-1], heights, strict=True)
    ]
    at = _WIDTH * (threshold - low) / span
    base = _HEIGHT - 3
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" aria-label="histogram of scores">'
        f'<g fill="#56b4e9">{"".join(bars)}</g>'
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT - _FOOT}" stroke="#d55e00" stroke-width="2"/>'
        f'<g fill="currentColor" font-size="11" font-family="sans-serif"><text x="0" y="{base}">{low:.2g}</text>'
        f'<text x="{_WIDTH / 2}" y="{base}" text-anchor="middle">score (height: root of picks)</text>'
        f'<text x="{_WIDTH}" y="{base}" text-anchor="end">{low + span:.2g}</text></g></svg>'
    )
