"""The report page: complete, self-contained, the same for the same input, and safe against what users write."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.label_colours import label_colour
from services.io import figures, report
from services.io.picks import Picks
from services.io.report_tables import Figures, object_tables

SHAPE = (24, 50, 64)


def tomogram(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> report.TomogramView:
    array = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    return report.central_slices(lambda i, j: array[i:j], shape, 10.0, 30.0)


class Page(HTMLParser):
    """Tags, texts and attributes of a page; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "img", "br", "image", "path", "circle", "rect", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.comments: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1] == "circle" and tag != "circle":
            self.open.pop()
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def whole_page(**changed: Any) -> str:
    rng = np.random.default_rng(3)
    positions = np.array([[32.0, 25.0, 12.0], [10.0, 40.0, 12.5], [50.0, 5.0, 2.0]])
    fsc = report.fsc_curve({"fsc": [1, 0.9, 0.5, 0.1, 0.0], "frequency": [0, 0.1, 0.2, 0.3, 0.4]}, 10.0)
    arguments: dict[str, Any] = {
        "title": "A run",
        "tomogram": tomogram(),
        "picks": Picks(positions, 80.0, ["ribosome", "ribosome", "<b>&"]),
        "centres": [report.Centre(rng.random((9, 9, 9), np.float32), "light", n) for n in (40, 10)],
        "averages": [report.Average(rng.random((9, 9, 9), np.float32), "dark", 10.0, 40, fsc)],
        "tables": [
            Figures("picking.Evaluate", {"precision": 0.91234, "f1": 0.875, "by": {"a": {"recall": 0.5}}}),
            Figures("learning.Train", {"epochs": [{"epoch": i, "loss": 1 / i} for i in (1, 2, 3)]}),
        ],
    }
    return report.build(**(arguments | changed))


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere() -> None:
    text = whole_page()
    page = Page(text)
    assert [tag for tag, _ in page.tags if tag in {"script", "link", "iframe", "object"}] == []
    for attributes in (attributes for _, attributes in page.tags):
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:image/png").startswith("data:image/png")
    assert "http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert [comment.strip() for comment in page.comments] == ["run-details"]


def test_all_parts_are_there_with_their_figures() -> None:
    text = Page(whole_page()).text()
    shown = ("A run", "64 × 50 × 24 nm", "3 picks", "40 particles · 80%", "0.9123", "picking.Evaluate")
    for words in shown:
        assert words in text, words
    # 0.5 to 0.1 between 1/50 and 1/33.3 Å: 0.143 is 0.8925 of the way
    assert f"{1 / (0.02 + 0.8925 * 0.01):.1f} Å at FSC 0.143" in text


def test_parts_without_content_are_left_out() -> None:
    text = Page(report.build("t", tomogram())).text()
    assert "Tomogram" in text
    for heading in ("Clusters", "Averages", "Figures", "Circles"):
        assert heading not in text


def test_the_same_input_gives_the_same_bytes() -> None:
    assert whole_page() == whole_page()


def test_what_users_write_is_escaped() -> None:
    evil = '<script>alert("1")</script><!-- run-details -->'
    table = {evil: evil, "rows": [{evil: evil}], "by": {evil: {"a": 1}}}
    picks = Picks(np.full((1, 3), 12.0), 80.0, [evil])
    text = whole_page(title=evil, picks=picks, tables=[Figures(evil, table)])
    assert "<script" not in text
    assert text.count("<!-- run-details -->") == 1
    Page(text)


def test_circles_are_where_the_picks_are() -> None:
    page = Page(whole_page())
    circles = page.all("circle")
    places = {(circle["cx"], circle["cy"], circle["r"]) for circle in circles}
    # Radius 4 voxels. In xy (z = 12): the first two; in xz (y = 25) and yz (x = 32): the first alone.
    expected = {("32.00", "25.00"), ("10.00", "40.00"), ("32.00", "12.00"), ("12.00", "25.00")}
    assert places == {(*place, "4.00") for place in expected}
    assert len(circles) == 4
    assert {circle["stroke"] for circle in circles} == {label_colour(1)}


def test_many_classes_share_the_last_colour() -> None:
    names = [f"class {i}" for i in range(12)]
    text = Page(whole_page(picks=Picks(np.full((12, 3), 12.0), 80.0, names))).text()
    assert "5 others (5)" in text


def test_central_slices_are_means_over_the_slab() -> None:
    array = np.random.default_rng(0).normal(0, 1, SHAPE).astype(np.float32)
    view = report.central_slices(lambda i, j: array[i:j], SHAPE, 10.0, 30.0)
    assert (view.centre, view.thickness_voxels) == ((32, 25, 12), 3)
    np.testing.assert_allclose(view.xy, array[11:14].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(view.xz, array[:, 24:27].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(view.yz, array[:, :, 31:34].mean(axis=2), atol=1e-6)


def test_pictures_of_averages_show_protein_bright() -> None:
    volume = np.zeros((9, 9, 9), np.float32)
    volume[3:6, 3:6, 3:6] = -1
    text = whole_page(averages=[report.Average(volume, "dark", 10.0)], centres=(), picks=None)
    encoded = re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)
    assert len(encoded) == 3
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[0]))))
    assert (pixels[4, 4], pixels[0, 0]) == (255, 0)


@pytest.mark.parametrize("shape", [(96, 256, 256), (10, 1400, 1000)])
def test_the_page_of_a_tomogram_stays_small(shape: tuple[int, int, int]) -> None:
    view = tomogram(shape)
    assert len(report.build("t", view).encode()) < 4_000_000


@pytest.mark.parametrize(
    ("width_nm", "bar_nm"), [(256.0, 50.0), (99.0, 20.0), (10.0, 2.0), (4000.0, 1000.0), (40.0, 10.0)]
)
def test_the_scale_bar_is_round_and_at_most_a_quarter(width_nm: float, bar_nm: float) -> None:
    assert figures.scale_bar_nm(width_nm) == bar_nm


def test_fsc_tables_of_several_kinds() -> None:
    frequency = [0.0, 0.125, 0.25, 0.375, 0.5]
    falling = [1.0, 0.8, 0.243, 0.043, 0.0]
    found = report.fsc_curve({"fsc": falling, "frequency": frequency}, 8.0)
    assert found is not None
    # halfway from 0.25 to 0.375 cycles per voxel of 8 Å
    assert found.resolution_angstrom == pytest.approx(8 / 0.3125)
    stated = report.fsc_curve({"fsc": falling, "frequency": frequency, "resolution_angstrom": 25.0}, 8.0)
    assert stated is not None
    assert stated.resolution_angstrom == 25.0
    angstrom = report.fsc_curve({"fsc": falling, "frequency_per_angstrom": [f / 8 for f in frequency]}, 1.0)
    assert angstrom == found
    never = report.fsc_curve({"fsc": [1, 0.9, 0.8], "frequency": [0, 0.2, 0.4]}, 8.0)
    assert never is not None
    assert never.resolution_angstrom is None
    not_a_number, short = {"fsc": [1, float("nan")], "frequency": [0, 1]}, {"fsc": [1, 2], "frequency": [1]}
    for table in ({}, {"fsc": [1.0]}, not_a_number, short):
        assert report.fsc_curve(table, 8.0) is None


def test_heights_of_peaks_and_curves_of_detections_are_drawn() -> None:
    heights = {"edges": [0.0, 0.1, 0.2, 0.3], "counts": [40, 3, 1]}
    drawn = object_tables({"threshold": 0.15, "peak_heights": heights, "picks": 4})
    assert drawn.count('<svg class="chart"') == 1
    assert "threshold" in drawn
    assert "edges" not in drawn
    curve = {
        "thresholds": [3.0, 2.0, 1.0],
        "precision": [1.0, 1.0, 0.5],
        "recall": [0.2, 0.4, 0.6],
        "false_positives": [0, 0, 3],
        "average_precision": 0.5,
    }
    assert object_tables({"f1": 0.5, "curve": curve}).count('<svg class="chart"') == 2
    assert '<svg class="chart"' not in object_tables({"curve": None, "peak_heights": {"edges": [1], "counts": []}})


def test_odd_tables_are_drawn_too() -> None:
    table = {
        "nothing": None, "empty": [], "flag": True, "text": "x", "nan": float("nan"), "deep": {"a": {"b": {"c": 1}}},
        "long": list(range(500)), "mixed": [1, "a", {"b": 2}], "same": {"epoch": [1, 2, 3], "loss": [1.0, 1.0, 1.0]},
        "rows": [{"i": i} for i in range(500)], "sizes_voxels": [60, 20], "one": [{"epoch": 1, "loss": 2.0}],
    }  # fmt: skip
    text = Page(whole_page(tables=[Figures("odd", table)])).text()
    for words in ("and 460 more", "500 values from 0 to 499", "sizes (voxels) 60, 20", "nan –", "flag yes"):
        assert words in text, words


def test_losses_become_one_chart_whichever_way_they_are_kept() -> None:
    rows = [{"epoch": i, "training_loss": 1 / i, "validation": {"loss": 2 / i}, "seconds": 3.0} for i in (1, 2, 3)]
    columns = {"epoch": [1, 2, 3], "training_loss": [1.0, 0.5, 0.3], "validation_loss": [2.0, 1.0, 0.6]}
    for table in ({"epochs": rows}, {"epochs": columns}, columns):
        page = Page(whole_page(tables=[Figures("training", table)], averages=()))
        assert len(page.all("polyline")) == 2, table
        assert "training loss" in page.text()
        assert "validation loss" in page.text()


def test_clusters_are_shown_by_the_numbers_they_are_chosen_by() -> None:
    sizes = (5, 40, 9)
    centres = [report.Centre(np.random.default_rng(n).random((8, 8, 8), np.float32), "light", n) for n in sizes]
    text = whole_page(centres=centres)
    # The largest first, each with the number of its place in the stack.
    assert re.findall(r"<b>Cluster (\d+)</b>(\d+) particles", text) == [("2", "40"), ("3", "9"), ("1", "5")]
    alts = [image["alt"] for image in Page(text).all("img")]
    for number in range(1, 4):
        shown = [f"{name} slice of the centre of cluster {number}" for name in ("xy", "xz", "yz")]
        assert [alt for alt in alts if alt in shown] == shown
    assert "Average of cluster 2" in whole_page(
        averages=[report.Average(centres[0].volume, "dark", 10.0, 9, None, cluster=2)]
    )


def labelled(array: np.ndarray[Any, Any], names: tuple[str, ...] = ()) -> report.LabelView:
    return report.central_labels(lambda i, j: array[i:j].astype(np.float32), array.shape, names)


def test_labels_are_coloured_over_the_slices_with_a_legend() -> None:
    array = np.zeros(SHAPE, np.uint16)
    array[10:14, 20:30, 5:10] = 3
    array[0, 0, 0:7] = 1
    view = labelled(array, ("membrane", "", "<b>"))
    assert view.voxels == {1: 7, 3: 4 * 10 * 5}
    for found, expected in ((view.xy, array[12]), (view.xz, array[:, 25]), (view.yz, array[:, :, 32])):
        assert np.array_equal(found, expected)
    text = whole_page(labels=view)
    page = Page(text)
    assert "membrane (7 voxels, under 0.1%)" in page.text()
    assert "&lt;b&gt; (200 voxels, 0.3%)" in text
    drawn = [str(image["href"]) for image in page.all("image")]
    assert len(drawn) == 6  # the slices without and with labels
    plain, coloured = (np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn[n].split(",")[1])))) for n in (0, 3))
    inside = array[12] == 3
    assert np.array_equal(coloured[~inside], np.repeat(plain[~inside][:, None], 3, axis=1))
    colour = np.array([int(label_colour(3)[i : i + 2], 16) for i in (1, 3, 5)])
    assert coloured[inside] == pytest.approx((plain[inside][:, None] + colour) / 2, abs=1)
    assert "No voxel has a label" in whole_page(labels=labelled(np.zeros(SHAPE, np.uint16)))
    for wrong in (-1.0, 0.5, 70000.0):
        with pytest.raises(InvalidArgument, match="whole numbers"):
            labelled(np.full(SHAPE, wrong, np.float32))


def test_codes_are_drawn_as_dots_with_their_clusters_numbers() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.integers(1, 13, 9000)
    table = {
        "particles": 12345,
        "explained_variance": [0.5, 0.25],
        "cluster": clusters.tolist(),
        "x": (clusters + rng.normal(0, 0.1, 9000)).tolist(),
        "y": rng.normal(0, 1, 9000).tolist(),
        "centre_x": list(map(float, range(1, 13))),
        "centre_y": [0.0] * 12,
    }
    found = report.embedding_of(table)
    assert found is not None
    text = whole_page(embedding=found)
    page = Page(text)
    assert "3,000 of 12,345 particles" in page.text()
    assert "first principal component (50.0% of the variance)" in page.text()
    groups = [path for path in page.all("path") if str(path.get("class")).startswith("dots c")]
    assert [path["class"] for path in groups] == ["dots c7", *(f"dots c{n}" for n in range(7))]
    assert sum(str(path["d"]).count("M") for path in groups) == 3000
    assert str(groups[3]["d"]).count("M") == (clusters[::3] == 3).sum()
    # Cluster 3's dots lie about its number, which lies at its centre.
    places = re.findall(r'class="mark" x="([\d.]+)" y="([\d.]+)"[^>]*>(\d+)<', text)
    assert [number for *_, number in places] == [str(n) for n in range(1, 13)]
    columns = [float(place) for place in re.findall(r"M([\d.]+) ", str(groups[3]["d"]))]
    assert np.mean(columns) == pytest.approx(float(places[2][0]), abs=2)
    (drawing,) = [svg for svg in page.all("svg") if "plane" in str(svg.get("class"))]
    assert "cluster 1: " in str(drawing["aria-label"])
    few = report.embedding_of({"x": [1.0], "y": [1.0], "cluster": [1], "centre_x": [1.0], "centre_y": [1.0]})
    assert "All 1 particles" in Page(whole_page(embedding=few)).text()
    for lacking in ("x", "cluster", "centre_y"):
        assert report.embedding_of({**table, lacking: []}) is None


def test_a_confusion_matrix_is_a_table_shaded_by_rows() -> None:
    matrix = {"rows": "true classes", "columns": "classes found", "counts": [[30, 10], [0, 5]]}
    both = {"accuracy": 0.7, "confusion_matrix": {**matrix, "names": ["<a>", "b"]}}
    each = {"confusion_matrix": {**matrix, "row_names": ["<a>", "b"], "column_names": ["one", 2]}}
    for table, names in ((both, ["<a>", "b"]), (each, ["one", "2"])):
        text = whole_page(tables=[Figures("learning.CompareClasses", table)])
        page = Page(text)
        assert [cell["scope"] for cell in page.all("th") if "scope" in cell and cell.get("class")] == ["col", "col"]
        words = page.text()
        assert "Rows: true classes; columns: classes found" in words
        assert f"{names[0]} {names[1]} <a> 30 10 b 0 5" in words
        styles = [cell["style"] for cell in page.all("td") if "style" in cell]
        assert styles == ["--part:41.2%", "--part:13.8%", "--part:0.0%", "--part:55.0%"]
    broken: Any
    for broken in ({"counts": [[1, 2]]}, {"names": ["a"], "counts": [[1, 2]]}, {"names": "a", "counts": 3}, [1], None):
        assert "Confusion" not in whole_page(tables=[Figures("t", {"confusion_matrix": broken, "f1": 1.0})])


def test_figures_stand_with_their_errors_and_units() -> None:
    table = {
        "thickness_angstrom": 1503.26,
        "thickness_error_angstrom": 12.4,
        "snr": 0.01234,
        "snr_error": 0.00051,
        "error_rate": 0.5,
        "power_by_angle": {"angle_degrees": [-60.0, 0.0, 60.0], "power": [1.0, 2.0, 1.5]},
        "surfaces": [{"x": 1.0, "bottom": 2.0}],
    }
    page = Page(whole_page(tables=[Figures("io.FindSlab", table)], averages=()))
    assert "thickness (Å) 1,503 ± 12" in page.text()
    assert "SNR 0.01234 ± 0.00051" in page.text()
    assert "error rate 0.5" in page.text()
    assert "surfaces" not in page.text()
    assert len(page.all("polyline")) == 1, "the power over the angle"
