from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.artifacts import ResultWriter, open_blob
from cryofleet.errors import DataLoss, Failure, InvalidArgument
from cryofleet.particles import COLUMNS, Particles, row_count
from cryofleet.storage import Store


def example(count: int = 5, seed: int = 0) -> Particles:
    generator = np.random.default_rng(seed)
    return Particles.from_positions(
        generator.uniform(0, 100, (count, 3)),
        13.48,
        "tomo_1",
        (50, 60, 70),
        rotations=Rotation.random(count, rng=generator),
        shift_x=generator.normal(size=count),
        shift_y=generator.normal(size=count),
        shift_z=generator.normal(size=count),
        score=generator.normal(size=count),
        diameter_angstrom=generator.uniform(100, 300, count),
        class_id=np.arange(count),
        class_name=[f"clässe {index}" for index in range(count)],
        half=np.arange(count) % 2 + 1,
        filament=np.arange(count) % 3 - 1,
        editor=[f"änn {index}" for index in range(count)],
    )


def same(one: Particles, two: Particles) -> bool:
    return (
        one.table.equals(two.table)
        and list(one.table.dtypes) == list(two.table.dtypes)
        and one.voxel_size_angstrom == two.voxel_size_angstrom
        and one.tomogram == two.tomogram
        and one.tomogram_shape == two.tomogram_shape
    )


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"id": [0, 1, 2], "x": [1.0] * 3, "y": [2.0] * 3, "z": [3.0] * 3, **columns})


# --- Parquet -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_table_comes_back_as_it_was(count: int) -> None:
    particles = example(count)
    data = particles.to_parquet()
    assert same(Particles.from_parquet(data), particles)
    assert row_count(data) == count


def test_a_table_without_optional_columns_and_shape() -> None:
    particles = Particles(frame(), 2.0)
    back = Particles.from_parquet(particles.to_parquet())
    assert same(back, particles)
    assert back.rotations() is None
    assert back.tomogram_shape is None
    assert list(back.table) == ["id", "x", "y", "z"]


def test_same_particles_same_bytes() -> None:
    particles = example()
    shuffled = Particles(particles.table[list(reversed(list(particles.table)))], 13.48, "tomo_1", (50, 60, 70))
    assert shuffled.to_parquet() == particles.to_parquet()
    assert Particles.from_parquet(particles.to_parquet()).to_parquet() == particles.to_parquet()
    assert example(seed=1).to_parquet() != particles.to_parquet()


def test_other_programs_can_read_it() -> None:
    table = pq.read_table(pa.BufferReader(example().to_parquet()))
    assert table.schema.field("id").type == pa.int64()
    assert table.schema.field("class_name").type == pa.string()
    assert table.column_names == [name for name in COLUMNS if name != "tomogram"]


def test_a_table_is_read_from_the_store(store: Store, writer: ResultWriter) -> None:
    particles = example(1000)
    uri = writer.put("p.parquet", particles.to_parquet())
    writer.commit(operation="t.M", version=1, parameters={}, inputs={}, result={}, seconds=0)
    assert same(Particles.from_parquet(open_blob(store, uri), uri), particles)
    assert row_count(open_blob(store, uri)) == 1000


def parquet(metadata: Any = True, **columns: Any) -> bytes:
    """Without our checks."""
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    if metadata is True:
        metadata = {"cryofleet": '{"tomogram": "", "tomogram_shape": null, "voxel_size_angstrom": 1.0}'}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


GOOD: dict[str, Any] = {"id": [0, 1], "x": [0.0, 1.0], "y": [0.0, 1.0], "z": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": None}, "no column 'x'"),
        ({"id": None}, "no column 'id'"),
        ({"x": [0, 1]}, "column 'x' is of type int64; it must be float64"),
        ({"id": [0.0, 1.0]}, "column 'id' is of type double; it must be int64"),
        ({"x": ["a", "b"]}, "column 'x' is of type string"),
        ({"colour": [0, 1]}, "has a column 'colour'"),
        ({"id": [7, 7]}, "id 7 in row 1"),
        ({"y": [0.0, float("nan")]}, r"y in row 1 \(id 1\) is nan"),
        ({"z": [float("inf"), 0.0]}, r"z in row 0 \(id 0\) is inf"),
        ({"x": [0.0, None]}, "column 'x' has no value in row 1"),
        ({"class_name": ["a", None]}, "column 'class_name' has no value in row 1"),
        ({"qx": [0.0, 0.0]}, "no column 'qy'"),
        ({"shift_y": [0.0, 0.0]}, "no column 'shift_x'"),
        ({"qx": [0.0, 0.0], "qy": [0.0, 0.0], "qz": [0.0, 0.0], "qw": [1.0, 2.0]}, r"row 1 \(id 1\).*length 1"),
    ],
)
def test_wrong_tables_say_what_is_wrong(columns: dict[str, Any], message: str) -> None:
    given = {name: values for name, values in {**GOOD, **columns}.items() if values is not None}
    with pytest.raises(InvalidArgument, match=message) as error:
        Particles.from_parquet(parquet(**given), "file:///p.parquet")
    assert "file:///p.parquet" in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "about",
    [
        None,
        "",
        "[]",
        "{}",
        '{"tomogram": "", "tomogram_shape": null}',
        '{"tomogram": 1, "tomogram_shape": null, "voxel_size_angstrom": 1}',
        '{"tomogram": "", "tomogram_shape": [1, 2], "voxel_size_angstrom": 1}',
        '{"tomogram": "", "tomogram_shape": null, "voxel_size_angstrom": "1"}',
        '{"tomogram": "", "tomogram_shape": null, "voxel_size_angstrom": -1}',
        '{"tomogram": "", "tomogram_shape": null, "voxel_size_angstrom": 1' + "0" * 400 + "}",
        '{"tomogram": "", "tomogram_shape": [1, 2, 0], "voxel_size_angstrom": 1}',
    ],
)
def test_the_metadata_must_be_there(about: str | None) -> None:
    with pytest.raises(InvalidArgument, match="file:///p"):
        Particles.from_parquet(parquet(about and {"cryofleet": about}, **GOOD), "file:///p")


def test_what_is_no_parquet() -> None:
    for data in (b"", b"PAR1", b"PAR1" * 10, example().to_parquet()[:-1]):
        for call in (Particles.from_parquet, row_count):
            with pytest.raises(InvalidArgument, match="file:///p is no Parquet"):
                call(data, "file:///p")
    with pytest.raises((InvalidArgument, DataLoss), match="file:///p"):
        Particles.from_parquet(example().to_parquet()[100:], "file:///p")


def test_damaged_bytes_never_crash() -> None:
    good = example(50).to_parquet()
    generator = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(good)
        for position in generator.integers(0, len(data), 3):
            data[position] = generator.integers(0, 256)
        try:
            Particles.from_parquet(bytes(data))
        except Failure as failure:
            assert "particles" in failure.message  # noqa: PT017


def test_tables_that_claim_too_much_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryofleet.particles.MAX_ROWS", 4)
    with pytest.raises(InvalidArgument, match="5 rows"):
        Particles.from_parquet(example(5).to_parquet())


# --- Tables --------------------------------------------------------------------------------------------------------


def test_types_are_converted_where_nothing_is_lost() -> None:
    particles = Particles(
        frame(x=[1, 2, 3], class_id=np.array([0, 1, 2], np.int64), score=np.array([1, 2, 3], np.float32)), 1
    )
    assert [str(particles.table[name].dtype) for name in ("x", "class_id", "score")] == ["float64", "int32", "float64"]
    with pytest.raises(InvalidArgument, match="outside int32"):
        Particles(frame(class_id=[0, 1, 2**31]), 1)
    with pytest.raises(InvalidArgument, match="class_id"):
        Particles(frame(class_id=[0.0, 1.5, 2.0]), 1)
    with pytest.raises(InvalidArgument, match="class_name in row 1 is "):
        Particles(frame(class_name=["a", None, "b"]), 1)


@pytest.mark.parametrize("size", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_impossible_voxel_sizes(size: Any) -> None:
    with pytest.raises(InvalidArgument, match="voxel_size_angstrom"):
        Particles(frame(), size)


def test_positions_are_xyz() -> None:
    particles = Particles(frame(x=[1.0, 2.0, 3.0]), 1)
    assert particles.positions().tolist() == [[1, 2, 3], [2, 2, 3], [3, 2, 3]]
    assert particles.shifts().tolist() == [[0, 0, 0]] * 3


def test_rotations_are_active() -> None:
    """A quarter turn about z takes x to y."""
    half = np.sqrt(0.5)
    particles = Particles(frame(qx=[0.0] * 3, qy=[0.0] * 3, qz=[half] * 3, qw=[half] * 3), 1)
    rotations = particles.rotations()
    assert rotations is not None
    assert rotations.apply([1, 0, 0]) == pytest.approx(np.array([[0, 1, 0]] * 3))
    again = particles.with_rotations(rotations.inv()).rotations()
    assert again is not None
    assert (again * rotations).magnitude() == pytest.approx(0, abs=1e-12)
    empty = example(0).rotations()
    assert empty is not None
    assert len(empty) == 0


def test_with_columns() -> None:
    particles = Particles(frame(), 1, source="file:///p")
    changed = particles.with_columns(score=[3, 1, 2], class_name="ribosome", x=np.zeros(3))
    assert changed.table["score"].tolist() == [3, 1, 2]
    assert changed.table["class_name"].tolist() == ["ribosome"] * 3
    assert "score" not in particles.table
    assert particles.table["x"].tolist() == [1, 1, 1]
    assert list(changed.without_columns("score", "half").table) == ["id", "x", "y", "z", "class_name"]
    for wrong in ({"score": [1.0, 2.0]}, {"colour": [1, 2, 3]}, {"x": [np.nan, 1, 2]}):
        with pytest.raises(InvalidArgument):
            particles.with_columns(**wrong)


def test_select() -> None:
    particles = example(5)
    chosen: list[tuple[Any, list[int]]] = [
        (np.array([True, False, True, False, False]), [0, 2]),
        ([4, 0], [4, 0]),
        (np.array([-1]), [4]),
        (slice(1, 3), [1, 2]),
        ([], []),
        (np.zeros(5, bool), []),
    ]
    for what, ids in chosen:
        selected = particles.select(what)
        assert selected.table["id"].tolist() == ids
        assert selected.table.index.tolist() == list(range(len(ids)))
        assert selected.tomogram_shape == (50, 60, 70)
    wrong: list[Callable[[], Any]] = [lambda: particles.select([5]), lambda: particles.select(np.array([True]))]
    for call in wrong:
        with pytest.raises(InvalidArgument):
            call()


def test_concat_keeps_distinct_ids() -> None:
    particles = example(5)
    joined = Particles.concat([particles.select([3, 4]), particles.select([0])])
    assert joined.table["id"].tolist() == [3, 4, 0]
    assert (joined.tomogram, joined.tomogram_shape) == ("tomo_1", (50, 60, 70))
    assert "tomogram" not in joined.table


def test_concat_of_several_tomograms() -> None:
    one = Particles(frame(score=[1.0, 2.0, 3.0]), 2.0, "a", (9, 9, 9))
    two = Particles(frame(), 2.0, "b", (9, 9, 9))
    joined = Particles.concat([one, two])
    assert joined.table["id"].tolist() == list(range(6))
    assert joined.table["tomogram"].tolist() == ["a"] * 3 + ["b"] * 3
    assert "score" not in joined.table  # not known of all
    assert (joined.tomogram, joined.tomogram_shape) == ("", None)
    again = Particles.concat([joined, Particles(frame(), 2.0, "c")])
    assert again.table["tomogram"].tolist() == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    assert same(Particles.from_parquet(again.to_parquet()), again)


def test_concat_refuses_other_voxel_sizes() -> None:
    with pytest.raises(InvalidArgument, match="Å"):
        Particles.concat([Particles(frame(), 2.0), Particles(frame(), 4.0)])
    with pytest.raises(InvalidArgument):
        Particles.concat([])
