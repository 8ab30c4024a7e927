"""Tables of figures on a report's page: any JSON object as tables, and charts of what in it is a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any, TypeGuard

from services.io import figures
from services.io.figures import Line

LONGEST_TABLE, _LONGEST_LIST = 40, 12
#: What tables keep for the charts made of it.
_DRAWN = ("peak_heights", "curve", "confusion_matrix", "surfaces")
#: Columns that others are drawn over.
_ALONG = ("epoch", "iteration", "round", "step", "angle_degrees", "frequency_per_angstrom")
_ABBREVIATIONS = {"ctf", "f1", "fsc", "id", "snr"}
_UNITS = {
    "angstrom": "Å",
    "pixels": "pixels",
    "degrees": "°",
    "seconds": "s",
    "bytes": "B",
    "nm": "nm",
    "voxels": "voxels",
}


@dataclass(frozen=True)
class Figures:
    """A table of figures under its heading: any JSON object."""

    heading: str
    table: Mapping[str, Any]


def figures_section(tables: Sequence[Figures]) -> str:
    """The section of all tables; nothing where there are none."""
    if not tables:
        return ""
    parts = "".join(f"<h3 class='table'>{escape(t.heading)}</h3>{object_tables(t.table)}" for t in tables)
    return f"<section><h2>Figures</h2>{parts}</section>"


def object_tables(table: Mapping[str, Any]) -> str:
    """An object as a table of its single values, and a table or chart of each thing in it that holds several."""
    single = {key: value for key, value in table.items() if _is_single(value)}
    blocks = [_single_values(single)] if single else []
    charts = _curves({key: value for key, value in table.items() if numbers(value)})
    charts += _histogram(table) + _detection_curves(table) + _confusion(table)
    blocks += charts
    blocks += [
        _several_values(key, value)
        for key, value in table.items()
        if value and not _is_single(value) and key not in _DRAWN
    ]
    return f'<div class="pair">{"".join(f"<div>{block}</div>" for block in blocks if block)}</div>'


def _several_values(key: str, value: Mapping[str, Any] | list[Any]) -> str:
    heading = f"<h3>{escape(_words(key))}</h3>"
    if isinstance(value, list):
        rows = [_flat(row) if isinstance(row, Mapping) else {"": row} for row in value]
        charts = _curves(_columns(rows))
        return heading + ("".join(charts) if charts else _grid(rows))
    if all(isinstance(row, Mapping) for row in value.values()):
        return heading + _grid([{"": name, **_flat(row)} for name, row in value.items()])
    charts = _curves({name: column for name, column in value.items() if numbers(column)})
    return heading + ("".join(charts) if charts else _single_values(_flat(value)))


def _histogram(table: Mapping[str, Any]) -> list[str]:
    """How many peaks of a picking's scores are how high, and where its threshold lies."""
    heights = table.get("peak_heights")
    if not isinstance(heights, Mapping):
        return []
    edges, counts = numbers(heights.get("edges")), numbers(heights.get("counts"))
    if len(counts) < 2 or len(edges) != len(counts) + 1:
        return []
    # a step for each bin; a bin without peaks lies on the axis, at half a peak
    x = [edge for pair in pairwise(edges) for edge in pair]
    y = [max(count, 0.5) for count in counts for _ in range(2)]
    threshold = table.get("threshold")
    markers = [(float(threshold), "threshold")] if is_number(threshold) and edges[0] <= threshold <= edges[-1] else []
    return [figures.chart([Line("peaks", x, y)], "score", "peaks", markers=markers, logarithmic=True)]


def _detection_curves(table: Mapping[str, Any]) -> list[str]:
    """Precision over recall, and recall over the false positives, as the threshold falls."""
    curve = table.get("curve")
    if not isinstance(curve, Mapping):
        return []
    recall, precision = numbers(curve.get("recall")), numbers(curve.get("precision"))
    false = numbers(curve.get("false_positives"))
    if not 2 <= len(recall) == len(precision) == len(false):
        return []
    return [
        figures.chart([Line("precision", recall, precision)], "recall", "precision", y_range=(0, 1.02)),
        figures.chart([Line("recall", false, recall)], "false positives", "recall", y_range=(0, 1.02)),
    ]


def _confusion(table: Mapping[str, Any]) -> list[str]:
    """A matrix of counts, each cell the darker, the larger its share of its row."""
    matrix = table.get("confusion_matrix")
    if not isinstance(matrix, Mapping) or not isinstance(matrix.get("counts"), list):
        return []
    rows, columns = (matrix.get(f"{side}_names", matrix.get("names")) for side in ("row", "column"))
    counts = [numbers(row) for row in matrix["counts"]]
    if not isinstance(rows, list) or not isinstance(columns, list) or not counts or len(counts) != len(rows):
        return []
    if any(len(row) != len(columns) for row in counts):
        return []
    down, across = escape(str(matrix.get("rows", "rows"))), escape(str(matrix.get("columns", "columns")))
    head = "".join(f'<th scope="col" class="n">{escape(_text(name))}</th>' for name in columns[:LONGEST_TABLE])
    body = ""
    for name, row in list(zip(rows, counts, strict=True))[:LONGEST_TABLE]:
        whole = sum(row) or 1
        cells = "".join(
            # At most so dark that the count can be read on it.
            f'<td class="n" style="--part:{55 * max(count, 0) / whole:.1f}%" title="{percent(count / whole)}">'
            f"{count:,.0f}</td>"
            for count in row[:LONGEST_TABLE]
        )
        body += f'<tr><th scope="row">{escape(_text(name))}</th>{cells}</tr>'
    grid = (
        f'<table class="confusion"><caption>Rows: {down}; columns: {across}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    rest = left_out(max(len(rows), len(columns)))
    return [f'<h3>Confusion matrix</h3><div class="scroll">{grid}</div>{rest}']


def _curves(columns: Mapping[str, Sequence[float]]) -> list[str]:
    """Line charts of columns that go along with an epoch or iteration: one of the losses, one of each other unit."""
    along = next((name for name in _ALONG if name in columns), None)
    if along is None:
        return []
    x = [float(value) for value in columns[along]]
    groups: dict[str, list[Line]] = {}
    for name, values in columns.items():
        if name == along or len(values) != len(x) or len(x) < 2 or name.endswith("seconds"):
            continue
        group = "loss" if "loss" in name else name
        groups.setdefault(group, []).append(Line(_words(name), x, [float(value) for value in values]))
    charts = []
    for group, lines in groups.items():
        values = [y for line in lines for y in line.y]
        logarithmic = min(values) > 0 and max(values) > 20 * min(values)
        label = "loss" if group == "loss" else _words(group)
        charts.append(figures.chart(lines[:8], _words(along), label, logarithmic=logarithmic))
    return charts


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The columns that have a number in every row."""
    columns = {name: numbers([row.get(name) for row in rows]) for name in rows[0]}
    return {name: column for name, column in columns.items() if column}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, their keys joined by a space."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key} ")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _single_values(values: Mapping[str, Any]) -> str:
    errors = {key: _error_of(key) for key in values if _error_of(key) in values}
    shown = {key: value for key, value in values.items() if key not in errors.values()}
    rows = "".join(
        f'<tr><th scope="row">{escape(_words(key))}</th>{_cell(value, values.get(errors.get(key, "")))}</tr>'
        for key, value in list(shown.items())[:LONGEST_TABLE]
    )
    return f"<table><tbody>{rows}</tbody></table>{left_out(len(shown))}"


def _error_of(key: str) -> str:
    """What the error of a figure is called: thickness_error_angstrom of thickness_angstrom."""
    words = key.split("_")
    place = len(words) - (len(words) > 1 and words[-1] in _UNITS)
    return "_".join([*words[:place], "error", *words[place:]])


def _with_error(value: float, error: float) -> str:
    """Both to the second digit of the error."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{_text(value)} ± {_text(error)}"
    digits = 1 - math.floor(math.log10(error))
    if not -3 < digits < 9:
        return f"{value:.4g} ± {error:.2g}"
    return f"{round(value, digits):,.{max(0, digits)}f} ± {round(error, digits):,.{max(0, digits)}f}"


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name: all(is_number(row.get(name, 0)) for row in rows) for name in names}
    head = "".join(f"<th{' class=n' if numeric[name] else ''}>{escape(_words(name))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(_cell(row.get(name, "")) for name in names) + "</tr>" for row in rows[:LONGEST_TABLE]
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>{left_out(len(rows))}'


def left_out(count: int) -> str:
    """What stands below the first rows of a list, where it has more of them."""
    return f'<p class="note">and {count - LONGEST_TABLE:,} more</p>' if count > LONGEST_TABLE else ""


def percent(share: float) -> str:
    """A share of 1 as a percentage."""
    return f"{100 * share:.1f}%" if share >= 0.001 else "under 0.1%"


def _cell(value: object, error: object = None) -> str:
    text = _with_error(value, error) if is_number(value) and is_number(error) else _text(value)
    return f"<td{' class=n' if is_number(value) else ''}>{escape(text)}</td>"


def _text(value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}" if math.isfinite(value) else "–"
        case list() if len(value) > _LONGEST_LIST and numbers(value):
            return f"{len(value):,} values from {_text(min(value))} to {_text(max(value))}"
        case list():
            return ", ".join(_text(item) for item in value[:_LONGEST_LIST]) + ", …" * (len(value) > _LONGEST_LIST)
        case _:
            return str(value)[:200]


def _words(key: str) -> str:
    """A field's name as a reader's words, its unit in brackets."""
    words = [word.upper() if word in _ABBREVIATIONS else word for word in key.replace("_", " ").split()]
    if len(words) > 1 and words[-1] in _UNITS:
        return f"{' '.join(words[:-1])} ({_UNITS[words[-1]]})"
    return " ".join(words)


def _is_single(value: object) -> bool:
    """Whether a value goes on one line: a number, a text, or a list of such."""
    if isinstance(value, list):
        return not any(isinstance(item, (Mapping, list)) for item in value)
    return not isinstance(value, Mapping)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON object is a number, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers(value: Any) -> list[float]:
    """A list of finite numbers as it is; anything else as an empty one."""
    if isinstance(value, list) and all(is_number(item) and math.isfinite(item) for item in value):
        return [float(item) for item in value]
    return []
