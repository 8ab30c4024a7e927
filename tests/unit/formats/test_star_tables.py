"""STAR tables: what other programs write, and what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import starfile

from cryofleet.errors import InvalidArgument
from cryofleet.formats.star_tables import StarTable, parse_star

TEXT = b"""# version 50001

data_general

_rlnTomoSubTomosAre2DStacks   1  # a flag

data_particles

loop_
_rlnTomoName #1
_rlnValue #2
_rlnTomoVisibleFrames #3
TS_01   1.5e0  [1,0,1]
'TS 02' -2     [1,1]

data_

_rlnEmpty "two words"
"""


def table(column: str, *values: str) -> StarTable:
    return StarTable("a.star", "particles", {column: list(values)})


def test_loops_lists_comments_and_quotes() -> None:
    tables = parse_star(TEXT, "a.star")
    assert list(tables) == ["general", "particles", ""]
    assert tables["general"].integers("rlnTomoSubTomosAre2DStacks").tolist() == [1]
    assert tables["particles"].rows == 2
    assert tables["particles"].texts("rlnTomoName") == ["TS_01", "TS 02"]
    assert tables["particles"].numbers("rlnValue").tolist() == [1.5, -2.0]
    assert [v.tolist() for v in tables["particles"].vectors("rlnTomoVisibleFrames")] == [[1, 0, 1], [1, 1]]
    assert tables[""].texts("rlnEmpty") == ["two words"]


@pytest.mark.parametrize(
    "file",
    [
        "cryocat_relion_3.0.star",
        "cryocat_relion_3.1_optics2.star",
        "cryocat_R5_tutorial_run_tomograms.star",
        "cryocat_relion5_TS_01_tilt.star",
        "cryocat_warp2_particles_matching.star",
        "cylindra_Refine3D_job_refine_run_it050_data.star",
    ],
)
def test_files_of_other_programs_as_the_starfile_library_reads_them(shared_data: Path, file: str) -> None:
    path = shared_data / "formats" / "particles" / file
    ours, theirs = parse_star(path.read_bytes(), file), starfile.read(path, always_dict=True)
    assert list(ours) == list(theirs)
    for name, block in theirs.items():
        columns = {key: [value] for key, value in block.items()} if isinstance(block, dict) else block
        assert list(ours[name].columns) == list(columns)
        for column in columns:
            values = np.asarray(columns[column])
            if values.dtype.kind in "if":
                np.testing.assert_allclose(ours[name].numbers(column), values)
            else:
                assert list(ours[name].texts(column)) == [str(value) for value in values]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no data_ block"),
        (b"\x89PNG\r\n", "byte 0 is not text"),
        (b"hello there\n", "line 1: not a STAR file"),
        (b"data_a\nloop_\n_x #1\n_y #2\n1\n", "line 5: a row of 1 values under 2 labels"),
        (b"data_a\nloop_\n_x #1\n_x #2\n", "line 4: a second column x"),
        (b"data_a\n_x 1\ndata_a\n", "line 3: a second table 'a'"),
        (b"data_a\n_x 1 2\n", "line 2: a label and one value"),
        (b"data_a\nx 1\n", "line 2: 'x' is neither a _label nor loop_"),
        (b"data_a\n_x 'open\n", "line 2: a quote is opened"),
        (b"data_a\n_x 1\nloop_\n_y\n", "line 3: a block with two loops"),
    ],
)
def test_what_is_no_star_file_is_named_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"b.star.*{message}"):
        parse_star(data, "b.star")


def test_values_of_the_wrong_kind_are_named_with_their_row() -> None:
    for values in (("1", "x"), ("1", "nan"), ("1", "inf"), ("1", "1e999")):
        with pytest.raises(
            InvalidArgument, match=r"a\.star: table particles, column rlnX, row 2: .* not a finite number"
        ):
            table("rlnX", *values).numbers("rlnX")
    with pytest.raises(InvalidArgument, match=r"row 1: '1\.5' is not a whole number"):
        table("rlnX", "1.5").integers("rlnX")
    with pytest.raises(InvalidArgument, match="has no column rlnY"):
        table("rlnX", "1").numbers("rlnY")
    for text in ("1,0", "[1,a]", "[]", "[1,,2]", "[nan]"):
        with pytest.raises(InvalidArgument, match=r"row 1: .* is not a list of numbers"):
            table("rlnX", text).vectors("rlnX")
    with pytest.raises(InvalidArgument, match="2 numbers, 4 were expected"):
        table("rlnX", "[1,2]").vectors("rlnX", 4)


def test_long_loops_are_read_as_short_ones() -> None:
    rows = [f"{i / 7:.6f}\t name_{i} {i}  x" for i in range(5000)]
    text = "data_a\nloop_\n_number #1\n_name #2\n_index\n_text\n{}\n\n# of b\ndata_b\n_value 3\n"
    tables = parse_star(text.format("\n".join(rows)).encode(), "long.star")
    table = tables["a"]
    assert table.rows == 5000
    np.testing.assert_array_equal(table.numbers("number"), [float(row.split()[0]) for row in rows])
    assert table.integers("index")[-1] == 4999
    assert table.texts("name")[4998] == "name_4998"
    assert list(table.texts("text"))[:2] == ["x", "x"]
    assert tables["b"].texts("value")[0] == "3"
    for bad in ("1 2 3", "1 2 3 4 5", "1 2 3 4 5 6 7"):
        with pytest.raises(InvalidArgument, match=f"line 3007: a row of {len(bad.split())} values under 4 labels"):
            parse_star(text.format("\n".join([*rows[:3000], bad, *rows[3000:]])).encode(), "long.star")
    quoted = parse_star(text.format("\n".join([*rows, "1 'two words' 3 y"])).encode(), "long.star")["a"]
    assert (quoted.rows, quoted.texts("name")[5000]) == (5001, "two words")
    rows[7] = rows[7].replace("1.000000", "seven")
    table = parse_star(text.format("\n".join(rows)).encode(), "long.star")["a"]
    with pytest.raises(InvalidArgument, match="column number, row 8: 'seven' is not a finite number"):
        table.numbers("number")
