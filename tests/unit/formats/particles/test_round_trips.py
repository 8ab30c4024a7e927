"""Every format into every other and back, as far as both carry it."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryofleet.formats.particles.catalogue import FORMATS
from tests.unit.formats.particles.tables import ONE_TOMOGRAM, same, table_of, through

NAMES = sorted(FORMATS)


@pytest.mark.parametrize("first", NAMES)
def test_into_every_other_format_and_back(first: str, tmp_path: Path) -> None:
    for second in NAMES:
        tomograms = (
            ("TS_01",) if {first, second} & set(ONE_TOMOGRAM) else ("TS_01", "TS_02", "lamella 3".replace(" ", "_"))
        )
        given_table = table_of(tomograms=tomograms)
        here = tmp_path / second
        here.mkdir()
        there = here / "there"
        there.mkdir()
        back = here / "back"
        back.mkdir()
        once = through(given_table, first, here)
        same(given_table, once, FORMATS[first])
        if not once.tomogram and "tomogram" not in once.table:
            once = type(once)(once.table, once.voxel_size_angstrom, "TS_01", once.tomogram_shape)
        twice = through(once, second, there)
        same(given_table, twice, FORMATS[first], FORMATS[second])
        if not twice.tomogram and "tomogram" not in twice.table:
            twice = type(twice)(twice.table, twice.voxel_size_angstrom, "TS_01", twice.tomogram_shape)
        again = through(twice, first, back)
        same(given_table, again, FORMATS[first], FORMATS[second], FORMATS[first])


sides = st.integers(20, 700)


@settings(max_examples=80, deadline=None)
@given(
    pair=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    count=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    shape=st.tuples(sides, sides, sides),
    voxel_size=st.floats(0.5, 30).map(lambda size: round(size, 4)),
)
def test_any_pair_with_any_tomogram(
    pair: tuple[str, str], count: int, seed: int, shape: tuple[int, int, int], voxel_size: float
) -> None:
    particles = table_of(count, seed, shape, voxel_size)
    with tempfile.TemporaryDirectory() as folder:
        ways = [FORMATS[name] for name in pair]
        once = through(particles, pair[0], Path(folder))
        once = type(once)(once.table, voxel_size, "TS_01", shape)
        (Path(folder) / "second").mkdir()
        twice = through(once, pair[1], Path(folder) / "second")
        same(particles, twice, *ways)


def test_names_of_classes_survive_where_a_format_has_them(tmp_path: Path) -> None:
    names = np.array(["ribosome", "proteasome", "ribosome"], object)
    table = table_of(3, class_name=names).without_columns("class_id")
    for name in ("copick", "pytom", "eman", "csv", "parquet"):
        folder = tmp_path / name
        folder.mkdir()
        read = through(table, name, folder)
        order = np.argsort((read.positions() + read.shifts())[:, 0])
        assert read.table["class_name"].to_numpy()[order].tolist() == names.tolist()
