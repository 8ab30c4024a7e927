"""The averages view: what a run left, surfaces, FSC, directions of view, classes by step."""

from __future__ import annotations

import io
import json
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
from google.protobuf.json_format import ParseDict
from scipy.spatial.transform import Rotation

from cryofleet.client import Client
from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles
from cryofleet.provenance import Origin
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views.averages import _tomograms_in
from cryofleet.views.class_tree import class_tree_svg, classes_of_tables, tree_of_history, tree_of_steps
from cryofleet.views.fsc_curve import fsc_curves, fsc_svg
from cryofleet.views.run_averages import average_sets, class_tables, tomograms
from cryofleet.views.surface import Density, Surface
from cryofleet.views.tables import read_json
from cryofleet.views.view_directions import counts_on_map, directions_svg, mollweide, view_directions


def run_of(outputs: dict[str, Any], *steps: tuple[str, str, dict[str, Any]]) -> orchestrator_pb2.Run:
    described = [{"id": name, "operation": operation, "outputs": values} for name, operation, values in steps]
    return ParseDict({"id": "r", "outputs": outputs, "steps": described}, orchestrator_pb2.Run())


def test_averages_of_each_kind_of_run_are_found() -> None:
    faml = run_of(
        {},
        ("start", "alignment.FamlStart", {"particles_uri": "s.parquet"}),
        (
            "finish",
            "alignment.FamlFinish",
            {
                "average_uris": ["1.mrc", "2.mrc"],
                "fsc_uris": ["1.json", "2.json"],
                "class_particles_uris": ["1.parquet", "2.parquet"],
                "particles_uri": "all.parquet",
                "history_uri": "h.json",
            },
        ),
    )
    [found] = average_sets(faml)
    assert [(a.name, a.volume, a.fsc, a.particles) for a in found.averages] == [
        ("finish 1", "1.mrc", "1.json", "1.parquet"),
        ("finish 2", "2.mrc", "2.json", "2.parquet"),
    ]
    assert (found.particles, found.history) == ("all.parquet", "h.json")
    # Each average of a foreach has its own table; there is none of all.
    discover = run_of(
        {},
        ("average", "alignment.Average", {"average_uri": ["a.mrc", "b.mrc"], "fsc_uri": ["a.json", None],
                                          "particles_uri": ["a.parquet", "b.parquet"]}),
        ("ingest", "io.Ingest", {"tomogram_uri": "t.mrc"}),
    )  # fmt: skip
    [found] = average_sets(discover)
    assert [(a.volume, a.fsc, a.particles) for a in found.averages] == [
        ("a.mrc", "", "a.parquet"), ("b.mrc", "", "b.parquet"),
    ]  # fmt: skip
    assert found.particles == ""
    assert tomograms(discover) == {"ingest: tomogram": "t.mrc"}
    # Of a run that settled its classes before it averaged them, the tables are among its outputs.
    mine = run_of(
        {"averages": ["x.mrc"], "class_particles": ["x.parquet"], "particles": "all.parquet"},
        ("final", "alignment.SumClasses", {"average_uris": ["x.mrc"], "fsc_uris": ["x.json"]}),
    )
    assert average_sets(mine)[0].averages[0].particles == "x.parquet"
    assert average_sets(mine)[0].particles == "all.parquet"
    assert [(each.step, each.uris, each.one_each) for each in class_tables(faml)] == [
        ("start", ("s.parquet",), False), ("finish", ("all.parquet",), False),
    ]  # fmt: skip
    assert class_tables(discover)[0].one_each
    # A step that holds others repeats their outputs, and counts once.
    assert average_sets(run_of({}, ("each", "", {"average_uri": "a.mrc"}))) == []


def test_the_tomogram_is_found_where_the_particles_were_cut_from() -> None:
    cut = Origin("b.mrc", "picking.Extract", inputs={"tomogram_uri": [Origin("t.mrc", "io.Ingest")]})
    origin = Origin("a", "alignment.Average", inputs={"subtomograms_uri": [Origin("m", "x", inputs={"s": [cut, cut]})]})
    assert _tomograms_in(origin) == ["t.mrc", "t.mrc"]


def ball(side: int = 24, radius: float = 7.0) -> Density:
    grid = np.indices((side,) * 3) - side // 2
    return Density((np.sqrt((grid**2).sum(axis=0)) < radius).astype(np.float32), 10.0)


def test_a_surface_encloses_its_ball() -> None:
    density = ball()
    # 0 and 1 are told apart anywhere between, and each voxel has 1 nm^3; a sphere of 7 nm has 1437 nm^3.
    assert 0 < density.otsu() < 1
    assert density.volume_nm3(density.otsu()) == np.count_nonzero(density.values)
    assert density.volume_nm3(0.5) == pytest.approx(4 / 3 * np.pi * 7**3, rel=0.06)
    noisy = Density(density.values + np.random.default_rng(1).normal(0, 0.1, density.values.shape).astype("f4"), 10.0)
    assert noisy.otsu() == pytest.approx(0.5, abs=0.03)
    mean, deviation = density.values.mean(), density.values.std()
    assert density.deviations(float(mean + 2 * deviation)) == pytest.approx(2, rel=1e-5)


def test_the_browser_gets_eight_bits_x_fastest_and_the_level_in_them() -> None:
    values = np.zeros((2, 3, 4), np.float32)
    values[0, 0, 1], values[1, 2, 3] = -2.0, 3.0
    density = Density(values, 5.0)
    surface = Surface()  # type: ignore[no-untyped-call]  # Panel's
    surface.display(density)
    assert surface.sides == [4, 3, 2]
    assert (surface.data[1], surface.data[23], surface.data[0]) == (0, 255, 102)
    surface.cut(density, 0.5)
    assert surface.level == pytest.approx(127.5)
    surface.display(None, "none")
    assert (surface.data, surface.note) == (b"", "none")


def fsc_table(**more: Any) -> dict[str, Any]:
    frequency = np.linspace(0.0, 0.05, 11)
    return {"frequency_per_angstrom": frequency.tolist(), "fsc": (1 - frequency / 0.05).tolist(), **more}


def test_fsc_names_its_resolution() -> None:
    curves = fsc_curves(fsc_table(), "f.json")
    # The curve falls linearly from 1 to 0 at 1/20 Å.
    assert curves.crossing_angstrom(0.5) == pytest.approx(40)
    assert curves.crossing_angstrom(0.143) == pytest.approx(20 / (1 - 0.143))
    assert curves.summary() == "Resolution: 23.3 Å at 0.143; 40.0 Å at 0.5"
    high = fsc_curves(
        fsc_table(fsc=[1.0] * 11, resolution_angstrom=20.0, remark="<b>", halves_joined_below_angstrom=50.0), "f"
    )
    # What never falls is not given the resolution that is stated for want of another.
    assert high.summary().splitlines() == [
        "Resolution: never below 0.143, up to 20.0 Å; never below 0.5, up to 20.0 Å",
        "Halves were aligned together up to 50 Å.",
        "<b>",
    ]
    drawn = ElementTree.fromstring(fsc_svg(curves))
    words = [each.text for each in drawn.iter("text")]
    assert {"0.143", "0.5", "corrected", "resolution (Å)"} <= set(words)
    # The corrected curve is on top, and all lie within the drawing.
    polylines = list(drawn.iter("polyline"))
    assert [each.findtext("title") for each in polylines][-1] == "corrected"
    places = np.array(
        [[float(n) for n in pair.split(",")] for each in polylines for pair in each.get("points", "").split()]
    )
    assert places.min() >= 0
    assert (places.max(axis=0) <= [380, 290]).all()


@pytest.mark.parametrize(
    "table",
    [
        {}, fsc_table(fsc=None), fsc_table(fsc=[1.0]), fsc_table(fsc=["x"] * 11),
        fsc_table(frequency_per_angstrom=[0.0] * 11), fsc_table(masked=[1.0]),
        fsc_table(frequency_per_angstrom=[float("nan")] * 11),
    ],
)  # fmt: skip
def test_what_is_no_fsc_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"f\.json holds no FSC"):
        fsc_curves(table, "f.json")


def test_the_beam_is_seen_in_the_frame_of_the_average() -> None:
    # A particle turned by 90 degrees about y has the average's -x where the beam's z is.
    turned = view_directions(Rotation.from_euler("y", [90], degrees=True))
    np.testing.assert_allclose(turned, [[-1, 0, 0]], atol=1e-12)
    x, y = mollweide(np.array([[0, 0, 1.0], [0, 0, -1.0], [1, 0, 0], [0, 1, 0], [-1, 1e-12, 0]]))
    np.testing.assert_allclose(y, [2**0.5, -(2**0.5), 0, 0, 0], atol=1e-3)
    np.testing.assert_allclose(x[2:], [0, 2**0.5, 2 * 2**0.5], atol=1e-6)


def test_even_directions_lie_evenly_on_the_map() -> None:
    directions = view_directions(Rotation.random(20_000, random_state=3))
    counts = counts_on_map(directions)
    assert np.nansum(counts) == 20_000
    # Cells that lie wholly on the map: Poisson scatter about one mean, which equal areas make.
    rows, columns = counts.shape
    y, x = np.mgrid[:rows, :columns]
    far = (np.abs(2 * y + 1 - rows) + 1) ** 2 / rows**2 + (np.abs(2 * x + 1 - columns) + 1) ** 2 / columns**2
    whole = counts[far <= 1]
    mean = 20_000 / (rows * columns * np.pi / 4)
    assert whole.mean() == pytest.approx(mean, rel=0.05)
    assert whole.var() == pytest.approx(mean, rel=0.2)
    drawn = ElementTree.fromstring(directions_svg(directions))
    cells = [each for each in drawn.iter("rect") if each.find("title") is not None]
    assert sum(int(each.findtext("title") or 0) for each in cells) == 20_000


def table(ids: list[int], classes: list[int] | None = None) -> Particles:
    columns: dict[str, Any] = {} if classes is None else {"class_id": np.array(classes, np.int32)}
    return Particles.from_positions(np.zeros((len(ids), 3)), 10.0, id=np.array(ids), **columns)


def test_particles_are_followed_from_class_to_class() -> None:
    picked = classes_of_tables([table([1, 2, 3, 4, 5])], one_each=False)
    clustered = classes_of_tables([table([5, 4, 3, 2, 1], [1, 1, 0, 0, -1])], one_each=False)
    averaged = classes_of_tables([table([2]), table([4, 5]), table([])], one_each=True)
    tree = tree_of_steps([("pick", picked), ("again", picked), ("cluster", clustered), ("<average>", averaged)])
    assert [(level.name, dict(level.counts)) for level in tree.levels] == [
        ("pick", {0: 5.0}), ("cluster", {0: 2.0, 1: 2.0}), ("<average>", {0: 1.0, 1: 2.0}),
    ]  # fmt: skip
    assert [dict(each) for each in tree.flows] == [{(0, 0): 2.0, (0, 1): 2.0}, {(0, 0): 1.0, (1, 1): 2.0}]
    drawn = class_tree_svg(tree)
    assert drawn.count("<path") == 4
    assert "&lt;average&gt;" in drawn
    assert "<average>" not in drawn
    assert "class 2: 2" in drawn
    assert not tree_of_steps([("pick", picked)]).worth_drawing


def test_a_history_of_sizes_is_a_tree_too() -> None:
    history = {"iterations": [{"sizes": [10.0, 10.0]}, {"sizes": [15.5, 4.5]}]}
    tree = tree_of_history(history, "h.json")
    assert dict(tree.flows[0]) == {(0, 0): 10.0, (1, 1): 4.5}
    many = tree_of_history({"iterations": [{"sizes": [float(n) for n in range(1, 31)]}] * 30}, "h.json")
    assert "others: " in class_tree_svg(many)
    for wrong in ({}, {"iterations": [{"sizes": [1.0]}, {"sizes": [1.0, 2.0]}]}, {"iterations": [{"sizes": ["x"]}]}):
        with pytest.raises(InvalidArgument, match=r"h\.json is no history"):
            tree_of_history(wrong, "h.json")


def test_tables_of_figures_are_objects_and_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stored:
        def __init__(self, data: bytes) -> None:
            self.data = io.BytesIO(data)

        def download_chunks(self, uri: str) -> Any:
            return iter(lambda: self.data.read(8), b"")

    def read(data: bytes) -> Any:
        return read_json(cast(Client, Stored(data)), "t.json")

    assert read(json.dumps({"a": 1}).encode()) == {"a": 1}
    for data in (b"[1]", b"{", b"\xff"):
        with pytest.raises(InvalidArgument, match=r"t\.json is no"):
            read(data)
    monkeypatch.setattr("cryofleet.views.tables.MOST_BYTES", 16)
    with pytest.raises(InvalidArgument, match="shows no tables as large"):
        read(json.dumps({"a": "b" * 20}).encode())
