"""The Fourier shell correlation of an average's half maps, and where it says that the resolution lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import HALF_MAP_THRESHOLD
from cryofleet.numerics.label_colours import CLASS_COLOURS

LEVELS = (HALF_MAP_THRESHOLD, 0.5)
_CURVES = {"corrected": "fsc", "masked": "masked", "unmasked": "unmasked", "random phases": "randomised"}
_WIDTH, _HEIGHT = 380, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 372, 22, 250
_LEAST = -0.2
_LEAST_APART = 26
_PLAIN = 'fill="currentColor" stroke="none"'
_FONT = 'font-size="12" font-family="sans-serif"'
_NICE_ANGSTROM = (200, 100, 60, 40, 30, 20, 15, 10, 8, 6, 5, 4, 3)


@dataclass(frozen=True, eq=False)
class FscCurves:
    """Curves by name, over spatial frequencies in 1/Å; the first is corrected for what the mask adds."""

    frequency_per_angstrom: NDArray[np.float64]
    curves: Mapping[str, NDArray[np.float64]]
    resolution_angstrom: float | None = None
    """As the run states it, at 0.143; None where the curve never falls that far."""
    remarks: tuple[str, ...] = field(default=())

    def crossing_angstrom(self, level: float) -> float | None:
        """Where the corrected curve first falls below a level, between its points; None where it does not."""
        frequency, curve = self.frequency_per_angstrom, self.curves["corrected"]
        falls = np.flatnonzero((curve[:-1] >= level) & (curve[1:] < level))
        if not len(falls):
            return None
        first = int(falls[0])
        share = (curve[first] - level) / (curve[first] - curve[first + 1])
        crossing = frequency[first] + share * (frequency[first + 1] - frequency[first])
        return 1 / float(crossing) if crossing > 0 else None

    def summary(self) -> str:
        """The resolution in words."""
        named = []
        for level in LEVELS:
            at = self.crossing_angstrom(level)
            if level == HALF_MAP_THRESHOLD and at is not None and self.resolution_angstrom:
                at = self.resolution_angstrom
            finest = 1 / float(self.frequency_per_angstrom[-1])
            named.append(f"{at:.1f} Å at {level:g}" if at else f"never below {level:g}, up to {finest:.1f} Å")
        return "\n".join(["Resolution: " + "; ".join(named), *self.remarks])


def fsc_curves(table: Mapping[str, Any], uri: str) -> FscCurves:
    """The curves of a table as the alignment service writes it. Raises InvalidArgument naming it."""
    try:
        frequency = np.asarray(table["frequency_per_angstrom"], np.float64)
        curves = {
            name: np.asarray(table[key if key in table else f"fsc_{key}"], np.float64)
            for name, key in _CURVES.items()
            if key in table or f"fsc_{key}" in table
        }
        stated = table.get("resolution_angstrom")
        resolution = None if stated is None else float(stated)
    except (KeyError, TypeError, ValueError):
        raise InvalidArgument(f"{uri} holds no FSC: it must have frequency_per_angstrom and fsc, in numbers") from None
    shapes = {frequency.shape, *(curve.shape for curve in curves.values())}
    if "corrected" not in curves or len(shapes) != 1 or frequency.ndim != 1 or len(frequency) < 2:
        raise InvalidArgument(f"{uri} holds no FSC: frequency_per_angstrom and fsc must be as long, two at least")
    if not (np.isfinite(frequency).all() and (np.diff(frequency) > 0).all() and frequency[0] >= 0):
        raise InvalidArgument(f"{uri} holds no FSC: its frequencies must rise from 0 on")
    remarks = []
    joined = table.get("halves_joined_below_angstrom")
    if isinstance(joined, (int, float)) and math.isfinite(joined) and joined > 0:
        remarks.append(f"Halves were aligned together up to {joined:.0f} Å.")
    if isinstance(table.get("remark"), str):
        remarks.append(str(table["remark"]))
    usable = resolution if resolution is not None and math.isfinite(resolution) and resolution > 0 else None
    return FscCurves(frequency, curves, usable, tuple(remarks))


def fsc_svg(fsc: FscCurves) -> str:
    """The curves with the levels 0.143 and 0.5, and the resolution at the first, as a drawing. Holds numbers alone."""
    highest = float(fsc.frequency_per_angstrom[-1])
    wide, high = _RIGHT - _LEFT, _BOTTOM - _TOP

    def across(frequency: float) -> float:
        return _LEFT + wide * frequency / highest

    def down(value: float) -> float:
        return _BOTTOM - high * (min(max(value, _LEAST), 1.0) - _LEAST) / (1.0 - _LEAST)

    grid, words, lines, legend = [], [], [], []
    for level in (0.0, *LEVELS, 1.0):
        y, dash = down(level), ' stroke-dasharray="2 3"' if level in LEVELS else ""
        grid.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}"{dash}/>')
        words.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{level:g}</text>')
    last = -math.inf
    for each in _NICE_ANGSTROM:
        x = across(1 / each)
        if x <= _RIGHT and x - last >= _LEAST_APART:
            last = x
            grid.append(f'<path d="M{x:.1f} {_TOP}V{_BOTTOM}"/>')
            words.append(f'<text x="{x:.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{each}</text>')
    at = fsc.resolution_angstrom or fsc.crossing_angstrom(HALF_MAP_THRESHOLD)
    if at and fsc.crossing_angstrom(HALF_MAP_THRESHOLD):
        x = across(1 / at)
        lines.append(
            f'<path d="M{x:.1f} {_TOP}V{_BOTTOM}" stroke="{CLASS_COLOURS[5]}"><title>{at:.1f} Å at 0.143</title></path>'
        )
    x = 8
    for number, (name, curve) in enumerate(fsc.curves.items()):
        points = " ".join(
            f"{across(frequency):.1f},{down(value):.1f}"
            for frequency, value in zip(fsc.frequency_per_angstrom.tolist(), np.nan_to_num(curve).tolist(), strict=True)
        )
        style = f'stroke="{CLASS_COLOURS[(0, 1, 2, 6)[number]]}" stroke-width="{3 if number == 0 else 1.5}"' + (
            "" if number < 2 else ' stroke-dasharray="5 4"'
        )
        # The corrected one over the others.
        lines.insert(0, f'<polyline points="{points}" {style}><title>{name}</title></polyline>')
        legend.append(f'<path d="M{x} 7h16" {style}/><text x="{x + 20}" y="11" {_PLAIN}>{name}</text>')
        x += 30 + round(6.3 * len(name))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" height="100%" role="img" aria-label="FSC">'
        f'<g stroke="#888888" stroke-opacity="0.5" fill="none">{"".join(grid)}</g>'
        f'<g fill="none" stroke-width="1.5">{"".join(lines)}</g>'
        f'<g fill="none" {_FONT}>{"".join(legend)}</g>'
        f"<g {_PLAIN} {_FONT}>{''.join(words)}"
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">resolution (Å)</text>'
        f'<text transform="translate(11 {(_TOP + _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">FSC</text></g></svg>'
    )
