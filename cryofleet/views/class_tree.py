"""How particles went from class to class, step by step or round by round, as a drawing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.label_colours import CLASS_COLOURS, OTHER_CLASSES_COLOUR
from cryofleet.particles import Particles

NO_CLASS = -1
_SHOWN = 12
"""Classes of a level; the smaller ones are drawn together."""
_OTHERS = 1 << 30
_WIDTH, _HEIGHT, _HEAD, _BAR, _GAP = 380, 250, 16, 10, 5
_NAMED_LEVELS = 4


@dataclass(frozen=True)
class Level:
    """Particles by class at one step: `counts` by class number, from 0; what is in none is left out."""

    name: str
    counts: Mapping[int, float]


@dataclass(frozen=True)
class ClassTree:
    """Levels in order; `flows[i]` says how many particles went from a class of level i to one of the next."""

    levels: tuple[Level, ...]
    flows: tuple[Mapping[tuple[int, int], float], ...] = field(default=())

    @property
    def worth_drawing(self) -> bool:
        """Whether any level has more than one class."""
        return len(self.levels) > 0 and any(len(level.counts) > 1 for level in self.levels)


def classes_of_tables(tables: Sequence[Particles], one_each: bool) -> dict[int, NDArray[np.int64]]:
    """Ids of the particles of each class: of one table by its column class_id, or of a table for each class."""
    if one_each:
        named = enumerate(table.table["id"].to_numpy(np.int64) for table in tables)
        return {number: ids for number, ids in named if len(ids)}
    [table] = tables
    ids = table.table["id"].to_numpy(np.int64)
    if "class_id" not in table.table:
        return {0: ids}
    numbers = table.table["class_id"].to_numpy(np.int64)
    return {int(number): ids[numbers == number] for number in np.unique(numbers[numbers >= 0])}


def tree_of_steps(steps: Sequence[tuple[str, Mapping[int, NDArray[np.int64]]]]) -> ClassTree:
    """From the ids of each class at each step. A step that left all classes as they were is left out."""
    kept: list[tuple[str, Mapping[int, NDArray[np.int64]]]] = []
    for name, classes in steps:
        if classes and not (kept and _same(kept[-1][1], classes)):
            kept.append((name, classes))
    levels = tuple(Level(name, {number: float(len(ids)) for number, ids in sorted(c.items())}) for name, c in kept)
    flows = tuple(
        {
            (source, target): float(len(both))
            for source, ids in before.items()
            for target, others in after.items()
            if len(both := np.intersect1d(ids, others))
        }
        for (_, before), (_, after) in itertools.pairwise(kept)
    )
    return ClassTree(levels, flows)


def tree_of_history(table: Mapping[str, Any], uri: str) -> ClassTree:
    """From the classes' sizes by iteration, as FAML writes them. Raises InvalidArgument naming the table.

    Sizes do not say who went where: a class is led to itself.
    """
    try:
        sizes = [[float(size) for size in iteration["sizes"]] for iteration in table["iterations"]]
    except (KeyError, TypeError, ValueError):
        raise InvalidArgument(f"{uri} is no history of classes: its iterations must have sizes") from None
    if any(not np.isfinite(row).all() or min(row, default=0) < 0 or len(row) != len(sizes[0]) for row in sizes):
        raise InvalidArgument(f"{uri} is no history of classes: sizes must be as many each time, none below 0")
    levels = tuple(Level(str(number), dict(enumerate(row))) for number, row in enumerate(sizes, start=1))
    flows = tuple(
        {(number, number): min(a, b) for number, (a, b) in enumerate(zip(before, after, strict=True))}
        for before, after in itertools.pairwise(sizes)
    )
    return ClassTree(levels, flows)


def class_tree_svg(tree: ClassTree) -> str:
    """A column for each level, a bar for each class as high as its share, and bands where particles went."""
    if not tree.levels:
        return ""
    levels = [_largest(level.counts) for level in tree.levels]
    total = max(sum(counts.values()) for counts, _ in levels) or 1.0
    most = max(len(counts) for counts, _ in levels)
    scale = (_HEIGHT - _HEAD - _GAP * (most + 1)) / total
    label = 84
    step = (_WIDTH - label - _BAR) / max(1, len(levels) - 1)
    tops = []
    for counts, _ in levels:
        y, places = float(_HEAD + _GAP), {}
        for number, count in counts.items():
            places[number] = y
            y += count * scale + _GAP
        tops.append(places)
    bands, bars, words = [], [], []
    for index, flows in enumerate(tree.flows):
        merged: dict[tuple[int, int], float] = {}
        for (source, target), count in flows.items():
            key = (levels[index][1].get(source, _OTHERS), levels[index + 1][1].get(target, _OTHERS))
            merged[key] = merged.get(key, 0.0) + count
        left, right = dict(tops[index]), dict(tops[index + 1])
        x0, x1 = index * step + _BAR, (index + 1) * step
        middle = (x0 + x1) / 2
        for (source, target), count in sorted(merged.items()):
            a, b, high = left[source], right[target], count * scale
            left[source], right[target] = a + high, b + high
            bands.append(
                f'<path d="M{x0:.1f} {a:.1f}C{middle:.1f} {a:.1f} {middle:.1f} {b:.1f} {x1:.1f} {b:.1f}'
                f'V{b + high:.1f}C{middle:.1f} {b + high:.1f} {middle:.1f} {a + high:.1f} {x0:.1f} {a + high:.1f}Z" '
                f'fill="{_colour(source)}" opacity="0.35"><title>{count:.0f} particles, '
                f"{_name(source)} to {_name(target)}</title></path>"
            )
    for index, (level, (counts, _)) in enumerate(zip(tree.levels, levels, strict=True)):
        x = index * step
        named = len(levels) <= _NAMED_LEVELS or index == len(levels) - 1
        anchor = "start" if index == 0 else "middle"
        if len(levels) <= _NAMED_LEVELS or index in (0, len(levels) - 1):
            words.append(f'<text x="{x:.1f}" y="{_HEAD - 4}" text-anchor="{anchor}">{escape(level.name)}</text>')
        for number, count in counts.items():
            top, high = tops[index][number], max(count * scale, 0.5)
            bars.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{_BAR}" height="{high:.1f}" fill="{_colour(number)}">'
                f"<title>{_name(number)}: {count:.0f}</title></rect>"
            )
            if named and high >= 8:
                words.append(
                    f'<text x="{x + _BAR + 3:.1f}" y="{top + high / 2 + 4:.1f}">{_name(number)}: {count:.0f}</text>'
                )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" height="100%" role="img" aria-label="classes by step">'
        f"{''.join(bands)}{''.join(bars)}"
        f'<g fill="currentColor" font-size="13" font-family="sans-serif">{"".join(words)}</g></svg>'
    )


def _same(one: Mapping[int, NDArray[np.int64]], other: Mapping[int, NDArray[np.int64]]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(np.sort(one[k]), np.sort(other[k])) for k in one)


def _largest(counts: Mapping[int, float]) -> tuple[dict[int, float], dict[int, int]]:
    """Counts of the largest classes, the others together; and where each class is."""
    ranked = sorted(counts, key=lambda number: (-counts[number], number))
    shown = sorted(ranked if len(ranked) <= _SHOWN else ranked[: _SHOWN - 1])
    rest = sum(counts[number] for number in counts if number not in shown)
    drawn = {number: counts[number] for number in shown} | ({_OTHERS: rest} if len(shown) < len(ranked) else {})
    return drawn, {number: number for number in shown}


def _colour(number: int) -> str:
    return CLASS_COLOURS[number] if number < len(CLASS_COLOURS) else OTHER_CLASSES_COLOUR


def _name(number: int) -> str:
    return "others" if number == _OTHERS else f"class {number + 1}"
