"""One HTML page that shows what a run found, complete in itself: pictures, curves and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.fsc import HALF_MAP_THRESHOLD
from cryofleet.numerics.label_colours import FIRST_COLOURS, label_colour
from cryofleet.progress import Progress, no_progress
from services.io import figures
from services.io.figures import Circle, Dots, Line

Contrast = Literal["dark", "light"]
Volume = NDArray[np.float32]

_SLAB_BYTES = 16 << 20
_TEMPLATE = Path(__file__).with_name("report.html")
_COLOURED_CLASSES = 7
_LONGEST_TABLE, _LONGEST_LIST = 40, 12
#: What tables keep for the charts made of it.
_DRAWN = ("peak_heights", "curve", "confusion_matrix")
#: A drawing of more dots than these is slow to open and shows no more.
_MOST_DOTS, _NUMBERED_CLUSTERS = 4000, 30
_MAX_LABEL = 65535
_ABBREVIATIONS = {"ctf", "f1", "fsc", "id", "snr"}
_UNITS = {"angstrom": "Å", "degrees": "°", "seconds": "s", "bytes": "B", "nm": "nm", "voxels": "voxels"}


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
class Picks:
    """What is circled."""

    positions: NDArray[np.float64]
    """(n, 3), (x, y, z) in voxels of the tomogram shown, shifts included."""
    diameter_angstrom: float
    classes: Sequence[str] | None = None
    """The class of each pick by name."""


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
    """The cluster of each, from 0."""
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
    """From 0, in the order of the centres; None where it is not of one cluster."""


@dataclass(frozen=True)
class FscCurve:
    """Fourier shell correlation of two half maps."""

    frequency_per_angstrom: Sequence[float]
    correlation: Sequence[float]
    resolution_angstrom: float | None


@dataclass(frozen=True)
class Figures:
    """A table of figures under its heading: any JSON object."""

    heading: str
    table: Mapping[str, Any]


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
    cz, cy, cx = depth // 2, height // 2, width // 2
    half = max(0, round((thickness_angstrom / voxel_size_angstrom - 1) / 2))
    half = min(half, (min(shape) - 1) // 2)
    xy = np.zeros((height, width), np.float64)
    xz = np.empty((depth, width), np.float32)
    yz = np.empty((depth, height), np.float32)
    step = max(1, _SLAB_BYTES // (4 * height * width))
    for start in range(0, depth, step):
        stop = min(start + step, depth)
        slab = read(start, stop)
        xz[start:stop] = slab[:, cy - half : cy + half + 1].mean(axis=1)
        yz[start:stop] = slab[:, :, cx - half : cx + half + 1].mean(axis=2)
        first, last = max(start, cz - half), min(stop, cz + half + 1)
        if first < last:
            xy += slab[first - start : last - start].sum(axis=0, dtype=np.float64)
        progress(stop / depth, "reading the tomogram")
    mean = (xy / (2 * half + 1)).astype(np.float32)
    return TomogramView(shape, voxel_size_angstrom, (cx, cy, cz), 2 * half + 1, mean, xz, yz)


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

    Reads `x`, `y` and `cluster` of some particles, `centre_x` and `centre_y` of all clusters, `explained_variance` and
    the number of all `particles`.
    """
    x, y, clusters = (_numbers(table.get(name)) for name in ("x", "y", "cluster"))
    centres = list(zip(_numbers(table.get("centre_x")), _numbers(table.get("centre_y")), strict=False))
    if not 0 < len(x) == len(y) == len(clusters) or not centres:
        return None
    stated = table.get("particles")
    return Embedding(
        x,
        y,
        [int(number) for number in clusters],
        centres,
        _numbers(table.get("explained_variance")),
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
        _tables(tables),
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
    radius = picks.diameter_angstrom / tomogram.voxel_size_angstrom / 2
    names = list(picks.classes) if picks.classes is not None else ["picks"] * len(picks.positions)
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    colours = dict(zip(ranked[:_COLOURED_CLASSES], FIRST_COLOURS, strict=False))
    other = FIRST_COLOURS[_COLOURED_CLASSES]

    views: tuple[list[Circle], list[Circle], list[Circle]] = ([], [], [])
    for (x, y, z), name in zip(picks.positions, names, strict=True):
        in_view = ((x, y, z - tomogram.centre[2]), (x, z, y - tomogram.centre[1]), (z, y, x - tomogram.centre[0]))
        for view, (column, row, distance) in zip(views, in_view, strict=True):
            if abs(distance) <= radius:
                opacity = 1 - 0.65 * abs(distance) / radius
                label = f"{name}: x {x:.1f}, y {y:.1f}, z {z:.1f}"
                view.append(Circle(column, row, radius, colours.get(name, other), opacity, label))
    if picks.classes is None:
        return views, ""
    rest = sum(counts[name] for name in ranked[_COLOURED_CLASSES:])
    entries = [(colours[name], name, counts[name]) for name in colours]
    if rest:
        entries.append((other, f"{len(ranked) - _COLOURED_CLASSES} others", rest))
    items = (f'<li><i style="border-color:{colour}"></i>{escape(name)} ({n:,})</li>' for colour, name, n in entries)
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
    for label, count in list(labels.voxels.items())[:_LONGEST_TABLE]:
        name = labels.names[label - 1] if label <= len(labels.names) and labels.names[label - 1] else f"label {label}"
        colour = label_colour(label)
        words = f"{escape(name)} ({count:,} voxels, {_percent(count / total)})"
        items.append(f'<li><i style="border-color:{colour};background:{colour}"></i>{words}</li>')
    legend = f'<ul class="legend">{"".join(items)}</ul>' if items else '<p class="note">No voxel has a label.</p>'
    return (
        f'<section><h2>Labels</h2><p class="note">{note}</p>{drawing}{legend}{_left_out(len(labels.voxels))}</section>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share >= 0.001 else "under 0.1%"


def _centres(centres: Sequence[Centre]) -> str:
    if not centres:
        return ""
    total = sum(centre.particles or 0 for centre in centres)
    cards = []
    for number, centre in sorted(enumerate(centres), key=lambda each: -(each[1].particles or 0)):
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
        rest = [row for row, number in enumerate(members) if number >= coloured]
        groups.append(Dots("others", [x[row] for row in rest], [y[row] for row in rest], _COLOURED_CLASSES))
    for number in range(coloured):
        rows = [row for row, member in enumerate(members) if member == number]
        groups.append(Dots(f"cluster {number}", [x[row] for row in rows], [y[row] for row in rows], number))
    shares = [f" ({_percent(share)} of the variance)" for share in embedding.explained] + ["", ""]
    drawing = figures.scatter(
        groups,
        f"first principal component{shares[0]}",
        f"second principal component{shares[1]}",
        marks=[(*centre, str(number)) for number, centre in enumerate(embedding.centres[:_NUMBERED_CLUSTERS])],
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
            known.append(f"{resolution:.1f} Å at FSC 0.143" if resolution else "FSC does not fall below 0.143")
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
    """
    inner = table.get("fsc")
    if isinstance(inner, Mapping):
        return fsc_curve({**table, **inner} if "fsc" in inner else {}, voxel_size_angstrom)
    correlation = _numbers(inner)
    frequency = _numbers(table.get("frequency_per_angstrom"))
    if not frequency:
        frequency = [f / voxel_size_angstrom for f in _numbers(table.get("frequency"))]
    if len(frequency) < 2 or len(frequency) != len(correlation) or max(frequency) <= 0:
        return None
    stated = table.get("resolution_angstrom")
    resolution = float(stated) if _is_number(stated) and stated > 0 else _first_crossing(frequency, correlation)
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


# --- Tables of figures ---------------------------------------------------------------------------------------------


def _tables(tables: Sequence[Figures]) -> str:
    if not tables:
        return ""
    parts = "".join(f"<h3 class='table'>{escape(t.heading)}</h3>{_object(t.table)}" for t in tables)
    return f"<section><h2>Figures</h2>{parts}</section>"


def _object(table: Mapping[str, Any]) -> str:
    """An object as a table of its single values, and a table or chart of each thing in it that holds several."""
    single = {key: value for key, value in table.items() if _is_single(value)}
    blocks = [_single_values(single)] if single else []
    charts = _curves({key: value for key, value in table.items() if _numbers(value)})
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
    charts = _curves({name: column for name, column in value.items() if _numbers(column)})
    return heading + ("".join(charts) if charts else _single_values(_flat(value)))


def _histogram(table: Mapping[str, Any]) -> list[str]:
    """How many peaks of a picking's scores are how high, and where its threshold lies."""
    heights = table.get("peak_heights")
    if not isinstance(heights, Mapping):
        return []
    edges, counts = _numbers(heights.get("edges")), _numbers(heights.get("counts"))
    if len(counts) < 2 or len(edges) != len(counts) + 1:
        return []
    # a step for each bin; a bin without peaks lies on the axis, at half a peak
    x = [edge for pair in pairwise(edges) for edge in pair]
    y = [max(count, 0.5) for count in counts for _ in range(2)]
    threshold = table.get("threshold")
    markers = [(float(threshold), "threshold")] if _is_number(threshold) and edges[0] <= threshold <= edges[-1] else []
    return [figures.chart([Line("peaks", x, y)], "score", "peaks", markers=markers, logarithmic=True)]


def _detection_curves(table: Mapping[str, Any]) -> list[str]:
    """Precision over recall, and recall over the false positives, as the threshold falls."""
    curve = table.get("curve")
    if not isinstance(curve, Mapping):
        return []
    recall, precision = _numbers(curve.get("recall")), _numbers(curve.get("precision"))
    false = _numbers(curve.get("false_positives"))
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
    counts = [_numbers(row) for row in matrix["counts"]]
    if not isinstance(rows, list) or not isinstance(columns, list) or not counts or len(counts) != len(rows):
        return []
    if any(len(row) != len(columns) for row in counts):
        return []
    down, across = escape(str(matrix.get("rows", "rows"))), escape(str(matrix.get("columns", "columns")))
    head = "".join(f'<th scope="col" class="n">{escape(_text(name))}</th>' for name in columns[:_LONGEST_TABLE])
    body = ""
    for name, row in list(zip(rows, counts, strict=True))[:_LONGEST_TABLE]:
        whole = sum(row) or 1
        cells = "".join(
            # At most so dark that the count can be read on it.
            f'<td class="n" style="--part:{55 * max(count, 0) / whole:.1f}%" title="{_percent(count / whole)}">'
            f"{count:,.0f}</td>"
            for count in row[:_LONGEST_TABLE]
        )
        body += f'<tr><th scope="row">{escape(_text(name))}</th>{cells}</tr>'
    grid = (
        f'<table class="confusion"><caption>Rows: {down}; columns: {across}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    left_out = _left_out(max(len(rows), len(columns)))
    return [f'<h3>Confusion matrix</h3><div class="scroll">{grid}</div>{left_out}']


def _curves(columns: Mapping[str, Sequence[float]]) -> list[str]:
    """Line charts of columns that go along with an epoch or iteration: one of the losses, one of each other unit."""
    along = next((name for name in ("epoch", "iteration", "round", "step") if name in columns), None)
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
        charts.append(figures.chart(lines[:8], along, label, logarithmic=logarithmic))
    return charts


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The columns that have a number in every row."""
    columns = {name: _numbers([row.get(name) for row in rows]) for name in rows[0]}
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
    rows = "".join(
        f'<tr><th scope="row">{escape(_words(key))}</th>{_cell(value)}</tr>'
        for key, value in list(values.items())[:_LONGEST_TABLE]
    )
    return f"<table><tbody>{rows}</tbody></table>{_left_out(len(values))}"


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name: all(_is_number(row.get(name, 0)) for row in rows) for name in names}
    head = "".join(f"<th{' class=n' if numeric[name] else ''}>{escape(_words(name))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(_cell(row.get(name, "")) for name in names) + "</tr>" for row in rows[:_LONGEST_TABLE]
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>{_left_out(len(rows))}'


def _left_out(count: int) -> str:
    return f'<p class="note">and {count - _LONGEST_TABLE:,} more</p>' if count > _LONGEST_TABLE else ""


def _cell(value: object) -> str:
    return f"<td{' class=n' if _is_number(value) else ''}>{escape(_text(value))}</td>"


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
        case list() if len(value) > _LONGEST_LIST and _numbers(value):
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


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(value: Any) -> list[float]:
    """A list of finite numbers as it is; anything else as an empty one."""
    if isinstance(value, list) and all(_is_number(item) and math.isfinite(item) for item in value):
        return [float(item) for item in value]
    return []
