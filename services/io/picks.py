"""Picks as circles on the slices of their tomogram, each class in its colour."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.io.figures import Circle
from services.io.slices import Slab


@dataclass(frozen=True)
class Picks:
    """What is circled."""

    positions: NDArray[np.float64]
    """(n, 3), (x, y, z) in voxels of the tomogram shown, shifts included."""
    diameter_angstrom: float
    classes: Sequence[str] | None = None
    """The class of each pick by name."""

    def names(self) -> Sequence[str]:
        """What each pick is called."""
        return self.classes if self.classes is not None else ["picks"] * len(self.positions)


@dataclass(frozen=True)
class ClassColours:
    """The largest classes each with its colour, all others with one."""

    colours: Mapping[str, str]
    """By name, the largest class first."""
    other: str
    counts: Mapping[str, int]
    """Of all classes, the largest first."""

    def of(self, name: str) -> str:
        return self.colours.get(name, self.other)

    def legend(self) -> list[tuple[str, str, int]]:
        """Colour, name and number of picks."""
        entries = [(colour, name, self.counts[name]) for name, colour in self.colours.items()]
        rest = [count for name, count in self.counts.items() if name not in self.colours]
        return entries + ([(self.other, f"{len(rest)} others", sum(rest))] if rest else [])


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts class 10 behind class 9."""
    return [(int(word), "") if word.isdecimal() else (0, word) for word in re.split(r"(\d+)", name)]


def class_colours(classes: Iterable[str], palette: Sequence[str], other: str) -> ClassColours:
    """Colours of the classes of picks, whose names these are."""
    counts: dict[str, int] = {}
    for name in classes:
        counts[name] = counts.get(name, 0) + 1
    ranked = sorted(counts, key=lambda name: (-counts[name], _natural(name)))
    return ClassColours(
        dict(zip(ranked[: len(palette)], palette, strict=False)), other, {name: counts[name] for name in ranked}
    )


def circles_on(picks: Picks, slab: Slab, voxel_size_angstrom: float, colours: ClassColours) -> list[Circle]:
    """Circles of the picks whose sphere reaches into a slab, in pixels of its mean; the fainter, the further from it.

    The columns and rows of the mean are (x, y) along z, (x, z) along y and (y, z) along x.
    """
    along = "xyz".index(slab.axis)
    column, row = (axis for axis in range(3) if axis != along)
    radius = picks.diameter_angstrom / voxel_size_angstrom / 2
    distances = np.maximum(slab.first - picks.positions[:, along], picks.positions[:, along] - (slab.last - 1))
    distances = np.maximum(distances, 0)
    names = picks.names()
    circles = []
    for index in np.flatnonzero(distances <= radius).tolist():
        x, y, z = picks.positions[index]
        opacity = 1 - 0.65 * distances[index] / radius
        label = f"{names[index]}: x {x:.1f}, y {y:.1f}, z {z:.1f}"
        place = picks.positions[index]
        circles.append(Circle(place[column], place[row], radius, colours.of(names[index]), opacity, label))
    return circles
