"""The Fourier shell correlation of an average's half maps, and where it says that the resolution lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bokeh.models import FixedTicker, HoverTool
from bokeh.models.annotations import Span
from bokeh.plotting import figure
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import HALF_MAP_THRESHOLD
from cryofleet.numerics.label_colours import CLASS_COLOURS

# What its annotations allow is less than what it takes.
_figure: Any = figure
LEVELS = (HALF_MAP_THRESHOLD, 0.5)
_CURVES = {"corrected": "fsc", "masked": "masked", "unmasked": "unmasked", "random phases": "randomised"}
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


def fsc_figure(fsc: FscCurves) -> Any:
    """The curves with the levels 0.143 and 0.5, and the resolution at the first."""
    highest = float(fsc.frequency_per_angstrom[-1])
    plot: Any = _figure(
        sizing_mode="stretch_both", min_height=140, tools="", toolbar_location=None, y_range=(-0.2, 1.05),
        x_range=(0.0, highest), x_axis_label="resolution (Å)", y_axis_label="FSC",
    )  # fmt: skip
    ticks = [each for each in _NICE_ANGSTROM if 1 / each <= highest and 1 / each >= 0.12 * highest]
    plot.xaxis.ticker = FixedTicker(ticks=[1 / each for each in ticks])
    plot.xaxis.major_label_overrides = {1 / each: str(each) for each in ticks}
    for number, (name, curve) in enumerate(fsc.curves.items()):
        plot.line(
            "frequency", "fsc", name=name, legend_label=name,
            source={
                "frequency": fsc.frequency_per_angstrom,
                "fsc": np.nan_to_num(curve),
                "angstrom": 1 / np.maximum(fsc.frequency_per_angstrom, 1e-9),
            },
            color=CLASS_COLOURS[(0, 1, 2, 6)[number]],
            width=3 if name == "corrected" else 1.5, line_dash="solid" if number < 2 else "dashed",
        )  # fmt: skip
    for level in LEVELS:
        plot.add_layout(Span(location=level, dimension="width", line_color="#888888", line_dash="dotted"))
        plot.text([0.01 * highest], [level], [f"{level:g}"], text_font_size="11px", text_color="#888888")
    at = fsc.resolution_angstrom or fsc.crossing_angstrom(HALF_MAP_THRESHOLD)
    if at and fsc.crossing_angstrom(HALF_MAP_THRESHOLD):
        plot.add_layout(Span(location=1 / at, dimension="height", line_color=CLASS_COLOURS[5], line_width=1.5))
    plot.add_tools(HoverTool(tooltips=[("", "$name"), ("FSC", "@fsc{0.00}"), ("at", "@angstrom{0.0} Å")]))
    plot.legend.label_text_font_size = "10px"
    plot.legend.background_fill_alpha = 0.5
    plot.legend.spacing = 0
    plot.legend.padding = 2
    return plot
