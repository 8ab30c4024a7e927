"""One HTML page that shows what a run found, complete in itself: pictures, curves and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import HALF_MAP_THRESHOLD
from cryofleet.numerics.label_colours import CLASS_COLOURS, OTHER_CLASSES_COLOUR, label_colour
from cryofleet.progress import Progress, no_progress
from services.io import figures
from services.io.figures import Circle, Dots, Line
from services.io.picks import Picks, circles_on, class_colours
from services.io.report_tables import LONGEST_TABLE, Figures, figures_section, is_number, left_out, numbers, percent
from services.io.slices import Axis, Slab, mean_slices

Contrast = Literal["dark", "light"]
Volume = NDArray[np.float32]

_SLAB_BYTES = 16 << 20
_TEMPLATE = Path(__file__).with_name("report.html")
_COLOURED_CLASSES = 7
#: A drawing of more dots than these is slow to open and shows no more.
_MOST_DOTS, _NUMBERED_CLUSTERS = 4000, 30
_MAX_LABEL = 65535
_AXES: tuple[Axis, Axis, Axis] = ("x", "y", "z")


@dataclass(frozen=True)
class TomogramView:
    """The central slices of a tomogram, each the mean over a thin slab."""

    shape: tuple[int, int, int]
    voxel_size_angstrom: float
    centre: tuple[int, int, int]
    """(x, y, z) that the slices go through."""
    thickness_voxels: int
    xy: Volume
    xz: Volume
    yz: Volume
    """[z, y]."""


@dataclass(frozen=True)
class LabelView:
    """Labels on the central slices of a tomogram, and how many voxels have each."""

    xy: NDArray[np.uint16]
    xz: NDArray[np.uint16]
    yz: NDArray[np.uint16]
    """[z, y]."""
    voxels: Mapping[int, int]
    """Of each label above 0 that there is, rising."""
    names: Sequence[str] = ()
    """Of the labels from 1 on."""


@dataclass(frozen=True)
class Embedding:
    """Particles' codes in the plane."""

    x: Sequence[float]
    y: Sequence[float]
    clusters: Sequence[int]
    """The cluster of each, from 1."""
    centres: Sequence[tuple[float, float]]
    """Of each cluster."""
    explained: Sequence[float]
    """The two axes' shares of the codes' variance."""
    particles: int
    """Of which these are some."""


@dataclass(frozen=True)
class Centre:
    """A decoded cluster centre."""

    volume: Volume
    contrast: Contrast
    particles: int | None = None


@dataclass(frozen=True)
class Average:
    """An average and what is known of it."""

    volume: Volume
    contrast: Contrast
    voxel_size_angstrom: float
    particles: int | None = None
    fsc: FscCurve | None = None
    cluster: int | None = None
    """From 1, in the order of the centres; None where it is not of one cluster."""


@dataclass(frozen=True)
class Drawn:
    """A picture that an operation drew."""

    heading: str
    png: bytes


@dataclass(frozen=True)
class FscCurve:
    """Fourier shell correlation of two half maps."""

    frequency_per_angstrom: Sequence[float]
    correlation: Sequence[float]
    resolution_angstrom: float | None


def central_slices(
    read: Callable[[int, int], Volume],
    shape: tuple[int, int, int],
    voxel_size_angstrom: float,
    thickness_angstrom: float,
    progress: Progress = no_progress,
) -> TomogramView:
    """The three slices through the middle voxel, each the mean over about `thickness_angstrom`.

    Args:
        read: sections start to stop of the tomogram, [z, y, x].
        shape: (z, y, x).
        voxel_size_angstrom: of the tomogram.
        thickness_angstrom: that the means run over; at least one voxel.
        progress: called after each slab.
    """
    depth, height, width = shape
    centre = (width // 2, height // 2, depth // 2)
    half = max(0, round((thickness_angstrom / voxel_size_angstrom - 1) / 2))
    half = min(half, (min(shape) - 1) // 2)
    slabs = [Slab(axis, middle - half, middle + half + 1) for axis, middle in zip(_AXES, centre, strict=True)]
    yz, xz, xy = mean_slices(read, shape, slabs, progress, "reading the tomogram")
    return TomogramView(shape, voxel_size_angstrom, centre, 2 * half + 1, xy, xz, yz)


def central_labels(
    read: Callable[[int, int], Volume],
    shape: tuple[int, int, int],
    names: Sequence[str],
    progress: Progress = no_progress,
) -> LabelView:
    """The labels of a volume of labels on the three slices through its middle voxel.

    Args:
        read: sections start to stop of the labels, [z, y, x].
        shape: (z, y, x).
        names: of the labels from 1 on.
        progress: called after each slab.

    Raises InvalidArgument for values that are no labels.
    """
    depth, height, width = shape
    cz, cy, cx = depth // 2, height // 2, width // 2
    xy = np.zeros((height, width), np.uint16)
    xz = np.empty((depth, width), np.uint16)
    yz = np.empty((depth, height), np.uint16)
    voxels = np.zeros(_MAX_LABEL + 1, np.int64)
    step = max(1, _SLAB_BYTES // (4 * height * width))
    for start in range(0, depth, step):
        stop = min(start + step, depth)
        values = read(start, stop)
        slab = np.clip(values, 0, _MAX_LABEL).astype(np.uint16)
        if not np.array_equal(slab, values):
            raise InvalidArgument(f"labels must be whole numbers from 0 to {_MAX_LABEL}")
        xz[start:stop], yz[start:stop] = slab[:, cy], slab[:, :, cx]
        if start <= cz < stop:
            xy = slab[cz - start].copy()
        voxels += np.bincount(slab.ravel(), minlength=len(voxels))
        progress(stop / depth, "reading the labels")
    present = {int(label): int(voxels[label]) for label in np.flatnonzero(voxels) if label > 0}
    return LabelView(xy, xz, yz, present, tuple(names))


def embedding_of(table: Mapping[str, Any]) -> Embedding | None:
    """The embedding of a clustering's table; None where it has none.

    Reads `x`, `y` and `cluster`, from 1, of some particles, `centre_x` and `centre_y` of all clusters,
    `explained_variance` and the number of all `particles`.
    """
    x, y, clusters = (numbers(table.get(name)) for name in ("x", "y", "cluster"))
    centres = list(zip(numbers(table.get("centre_x")), numbers(table.get("centre_y")), strict=False))
    if not 0 < len(x) == len(y) == len(clusters) or not centres or min(clusters) < 1:
        return None
    stated = table.get("particles")
    return Embedding(
        x,
        y,
        [int(number) for number in clusters],
        centres,
        numbers(table.get("explained_variance")),
        stated if isinstance(stated, int) else len(x),
    )


def build(
    title: str,
    tomogram: TomogramView | None = None,
    picks: Picks | None = None,
    centres: Sequence[Centre] = (),
    averages: Sequence[Average] = (),
    tables: Sequence[Figures] = (),
    labels: LabelView | None = None,
    embedding: Embedding | None = None,
    pictures: Sequence[Drawn] = (),
) -> str:
    """The page as text.

    It holds one comment `<!-- run-details -->`, in the place of a table of what the run took. The same input gives the
    same text; everything that came from a user is escaped.
    """
    sections = [
        _facts(tomogram, picks, centres, averages),
        "" if tomogram is None else _tomogram(tomogram, picks),
        "" if tomogram is None or labels is None else _labels(tomogram, labels),
        _centres(centres),
        "" if embedding is None else _embedding(embedding),
        _averages(averages),
        _pictures(pictures),
        figures_section(tables),
    ]
    page = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return page.substitute(title=escape(title), body="\n".join(section for section in sections if section))


def _facts(
    tomogram: TomogramView | None, picks: Picks | None, centres: Sequence[Centre], averages: Sequence[Average]
) -> str:
    facts = []
    if tomogram is not None:
        z, y, x = tomogram.shape
        nm = tomogram.voxel_size_angstrom / 10
        facts = [
            (f"{x} × {y} × {z}", f"voxels of {tomogram.voxel_size_angstrom:.4g} Å"),
            (f"{x * nm:.0f} × {y * nm:.0f} × {z * nm:.0f} nm", "tomogram, x × y × z"),
        ]
    if picks is not None:
        facts.append((f"{len(picks.positions):,}", "picks"))
    if centres:
        facts.append((str(len(centres)), "clusters"))
    if averages:
        facts.append((str(len(averages)), "averages"))
    resolutions = [a.fsc.resolution_angstrom for a in averages if a.fsc and a.fsc.resolution_angstrom]
    if resolutions:
        facts.append((f"{min(resolutions):.1f} Å", "best resolution, FSC 0.143"))
    return (
        '<div class="facts">'
        + "".join(f'<div class="fact"><b>{value}</b><span>{words}</span></div>' for value, words in facts)
        + "</div>"
    )


def _tomogram(tomogram: TomogramView, picks: Picks | None) -> str:
    thickness = tomogram.thickness_voxels * tomogram.voxel_size_angstrom / 10
    note = (
        f"Slices through the middle, each the mean over {thickness:.3g} nm. Black and white are the 0.5th and 99.5th "
        "percentile."
    )
    circles: tuple[list[Circle], list[Circle], list[Circle]] = ([], [], [])
    legend = ""
    if picks is not None:
        circles, legend = _circles(tomogram, picks)
        note += (
            f" Circles are picks, {picks.diameter_angstrom / 10:.3g} nm across, whose centre lies within half a "
            "diameter of the slice; the fainter, the further from it."
        )
    drawing = figures.orthogonal_views(
        tomogram.xy, tomogram.xz, tomogram.yz, tomogram.centre, tomogram.voxel_size_angstrom, circles
    )
    return f'<section><h2>Tomogram</h2><p class="note">{note}</p>{drawing}{legend}</section>'


def _circles(tomogram: TomogramView, picks: Picks) -> tuple[tuple[list[Circle], list[Circle], list[Circle]], str]:
    """Circles on xy, xz and yz, and the legend of their colours."""
    colours = class_colours(picks.names(), CLASS_COLOURS, OTHER_CLASSES_COLOUR)
    yz, xz, xy = (
        circles_on(picks, Slab(axis, middle, middle + 1), tomogram.voxel_size_angstrom, colours)
        for axis, middle in zip(_AXES, tomogram.centre, strict=True)
    )
    # yz is drawn with z to the right.
    views = (xy, xz, [replace(circle, x=circle.y, y=circle.x) for circle in yz])
    if picks.classes is None:
        return views, ""
    items = (
        f'<li><i style="border-color:{colour}"></i>{escape(name)} ({n:,})</li>' for colour, name, n in colours.legend()
    )
    return views, f'<ul class="legend">{"".join(items)}</ul>'


def _labels(tomogram: TomogramView, labels: LabelView) -> str:
    total = math.prod(tomogram.shape)
    note = "The same slices, with the labels of their middle voxels coloured over them."
    none: list[Circle] = []
    drawing = figures.orthogonal_views(
        tomogram.xy,
        tomogram.xz,
        tomogram.yz,
        tomogram.centre,
        tomogram.voxel_size_angstrom,
        (none, none, none),
        labels=(labels.xy, labels.xz, labels.yz),
    )
    items = []
    for label, count in list(labels.voxels.items())[:LONGEST_TABLE]:
        name = labels.names[label - 1] if label <= len(labels.names) and labels.names[label - 1] else f"label {label}"
        colour = label_colour(label)
        words = f"{escape(name)} ({count:,} voxels, {percent(count / total)})"
        items.append(f'<li><i style="border-color:{colour};background:{colour}"></i>{words}</li>')
    legend = f'<ul class="legend">{"".join(items)}</ul>' if items else '<p class="note">No voxel has a label.</p>'
    return (
        f'<section><h2>Labels</h2><p class="note">{note}</p>{drawing}{legend}{left_out(len(labels.voxels))}</section>'
    )


def _centres(centres: Sequence[Centre]) -> str:
    if not centres:
        return ""
    total = sum(centre.particles or 0 for centre in centres)
    cards = []
    for number, centre in sorted(enumerate(centres, start=1), key=lambda each: -(each[1].particles or 0)):
        caption = f"<b>Cluster {number}</b>"
        if centre.particles is not None:
            caption += f"{centre.particles:,} particle{'' if centre.particles == 1 else 's'}"
            if total:
                share = 100 * centre.particles / total
                caption += f' · {share:.0f}%<div class="share"><i style="width:{share:.1f}%"></i></div>'
        slices = _central_slices(centre.volume)
        pictures = "".join(
            figures.picture(
                _protein_bright(values, [other for _, other in slices], centre.contrast),
                f"{name} slice of the centre of cluster {number}",
            )
            for name, values in slices
        )
        cards.append(f'<figure><div class="trio">{pictures}</div><figcaption>{caption}</figcaption></figure>')
    return (
        '<section><h2>Clusters</h2><p class="note">Central slices (xy, xz, yz) of each decoded centre; protein is '
        "bright. Clusters are chosen by these numbers.</p>"
        f'<div class="gallery">{"".join(cards)}</div></section>'
    )


def _central_slices(volume: Volume) -> list[tuple[str, Volume]]:
    z, y, x = (side // 2 for side in volume.shape)
    return [("xy", volume[z]), ("xz", volume[:, y]), ("yz", volume[:, :, x])]


def _embedding(embedding: Embedding) -> str:
    """The codes as dots: the largest clusters each in its colour, all others in one."""
    every = math.ceil(len(embedding.x) / _MOST_DOTS)
    x, y = embedding.x[::every], embedding.y[::every]
    members = embedding.clusters[::every]
    coloured = _COLOURED_CLASSES if len(embedding.centres) > _COLOURED_CLASSES + 1 else len(embedding.centres)
    groups = []
    # Those without a colour of their own first, so that they lie beneath.
    if coloured < len(embedding.centres):
        rest = [row for row, number in enumerate(members) if number > coloured]
        groups.append(Dots("others", [x[row] for row in rest], [y[row] for row in rest], _COLOURED_CLASSES))
    for number in range(1, coloured + 1):
        rows = [row for row, member in enumerate(members) if member == number]
        groups.append(Dots(f"cluster {number}", [x[row] for row in rows], [y[row] for row in rows], number - 1))
    shares = [f" ({percent(share)} of the variance)" for share in embedding.explained] + ["", ""]
    drawing = figures.scatter(
        groups,
        f"first principal component{shares[0]}",
        f"second principal component{shares[1]}",
        marks=[(*xy, str(number)) for number, xy in enumerate(embedding.centres[:_NUMBERED_CLUSTERS], start=1)],
    )
    shown = f"{len(x):,} of {embedding.particles:,}" if len(x) < embedding.particles else f"All {len(x):,}"
    note = f"{shown} particles by their codes; a number lies at its cluster's centre. Near to each other here is alike."
    return f'<section><h2>Codes</h2><p class="note">{note}</p>{drawing}</section>'


def _averages(averages: Sequence[Average]) -> str:
    if not averages:
        return ""
    cards = []
    for number, average in enumerate(averages, start=1):
        volume = average.volume
        slices = _central_slices(volume)
        pictures = "".join(
            f"<figure>{figures.picture(_protein_bright(s, [s for _, s in slices], average.contrast), f'{name} slice')}"
            f"<figcaption>{name}</figcaption></figure>"
            for name, s in slices
        )
        side = volume.shape[2] * average.voxel_size_angstrom / 10
        known = [f"{side:.3g} nm box"]
        if average.particles is not None:
            known.insert(0, f"{average.particles:,} particle{'' if average.particles == 1 else 's'}")
        curve = ""
        if average.fsc is not None:
            resolution = average.fsc.resolution_angstrom
            finest = 1 / max(average.fsc.frequency_per_angstrom)
            known.append(
                f"{resolution:.1f} Å at FSC 0.143" if resolution else f"FSC stays above 0.143 up to {finest:.1f} Å"
            )
            curve = _fsc_chart(average.fsc)
        name = f"Average {number}" if average.cluster is None else f"Average of cluster {average.cluster}"
        heading = f"<h3>{name} <span>· {' · '.join(known)}</span></h3>"
        cards.append(
            f'<div class="average{"" if curve else " alone"}"><div>{heading}<div class="trio">{pictures}</div></div>'
            f"{f'<div>{curve}</div>' if curve else ''}</div>"
        )
    return (
        '<section><h2>Averages</h2><p class="note">Central slices of each average; protein is bright. Beside them the '
        "Fourier shell correlation of its two half maps and where it falls below 0.143.</p>"
        f"{''.join(cards)}</section>"
    )


def _pictures(pictures: Sequence[Drawn]) -> str:
    if not pictures:
        return ""
    drawn = "".join(
        f"<figure>{figures.embedded_png(each.png, each.heading)}"
        f"<figcaption>{escape(each.heading)}</figcaption></figure>"
        for each in pictures
    )
    return f"<section><h2>Pictures</h2>{drawn}</section>"


def _fsc_chart(fsc: FscCurve) -> str:
    highest = max(fsc.frequency_per_angstrom)
    resolution = fsc.resolution_angstrom
    return figures.chart(
        [Line("FSC", fsc.frequency_per_angstrom, np.clip(fsc.correlation, -0.2, 1.0).tolist())],
        "spatial frequency (1/Å)",
        "FSC",
        x_ticks=figures.resolution_ticks(highest),
        y_range=(min(-0.05, max(-0.2, min(fsc.correlation))), 1.02),
        levels=[(HALF_MAP_THRESHOLD, "0.143")],
        markers=[(1 / resolution, f"{resolution:.1f} Å")] if resolution else [],
    )


def _protein_bright(picture: Volume, together: Iterable[Volume], contrast: Contrast) -> NDArray[np.uint8]:
    low, high = figures.limits(list(together))
    return figures.grey(picture, low, high, inverted=contrast == "dark")


def fsc_curve(table: Mapping[str, Any], voxel_size_angstrom: float) -> FscCurve | None:
    """The half-map curve of a table of figures; None where it has none.

    Reads `fsc` beside `frequency_per_angstrom` or, in cycles per voxel, `frequency`, all of one length, and
    `resolution_angstrom`, which is found on the curve where it is left out. They may stand in an object `fsc` together.
    A curve that never falls below 0.143 gives no resolution: what is stated then is only the finest that voxels hold.
    """
    inner = table.get("fsc")
    if isinstance(inner, Mapping):
        return fsc_curve({**table, **inner} if "fsc" in inner else {}, voxel_size_angstrom)
    correlation = numbers(inner)
    frequency = numbers(table.get("frequency_per_angstrom"))
    if not frequency:
        frequency = [f / voxel_size_angstrom for f in numbers(table.get("frequency"))]
    if len(frequency) < 2 or len(frequency) != len(correlation) or max(frequency) <= 0:
        return None
    stated = table.get("resolution_angstrom")
    resolution = _first_crossing(frequency, correlation)
    if resolution is not None and is_number(stated) and stated > 0:
        resolution = float(stated)
    return FscCurve(frequency, correlation, resolution)


def _first_crossing(frequency: Sequence[float], correlation: Sequence[float]) -> float | None:
    """Resolution in Å where the curve first falls below 0.143, interpolated; None where it does not."""
    for i in range(1, len(correlation)):
        before, after = correlation[i - 1], correlation[i]
        if before >= HALF_MAP_THRESHOLD > after:
            share = (before - HALF_MAP_THRESHOLD) / (before - after)
            crossing = frequency[i - 1] + share * (frequency[i] - frequency[i - 1])
            return 1 / crossing if crossing > 0 else None
    return None
