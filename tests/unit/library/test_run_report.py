"""What the command line says of a run, and how it fits on a terminal."""

from __future__ import annotations

import re
import sys

import pytest

from cryofleet.cli.output import figure_lines, output_lines, print_table, report_end, set_aside_counts
from cryofleet.v1 import orchestrator_pb2 as pb


def test_counts_are_those_of_the_outermost_steps() -> None:
    run = pb.Run()
    for step, total, done, set_aside in (
        ("tomogram", 100, 97, 3),
        ("tomogram.pick", 100, 98, 2),
        ("tomograms", 4, 3, 1),
        ("average", 1, 1, 0),
    ):
        run.steps.add(id=step, tasks_total=total, tasks_done=done, tasks_set_aside=set_aside)
    assert set_aside_counts(run) == ["tomogram: 97 of 100 done, 3 set aside", "tomograms: 3 of 4 done, 1 set aside"]


def test_figures_are_lines_and_artifacts_are_not_among_them() -> None:
    run = pb.Run()
    run.outputs.update({"count": [12, None, 3], "f1": 0.8125, "picks": ["file:///a", None, "file:///c"], "note": ""})
    run.outputs.update({"advice": ["", "look", ""], "recall": [None, None, None]})
    for name in ("count", "advice"):
        run.output_names[name].names.extend(["TS_01", "TS_02", "TS_03"])
    assert figure_lines(run) == ["advice: TS_02 look", "count: TS_01 12, TS_02 -, TS_03 3", "f1: 0.8125"]
    assert "picks: file:///a, -, file:///c" in output_lines(run)


@pytest.mark.parametrize(("status", "offered"), [("INVALID_ARGUMENT", False), ("UNAVAILABLE", True)])
def test_another_try_is_offered_where_it_can_do(status: str, offered: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run = pb.Run(id="r1", state=pb.RUN_STATE_PARTIAL)
    run.set_aside.add(step="tomogram", item="2", status=status, cause="why", input_uri="file:///up/TS_03.mrc")
    report_end(run)
    said = capsys.readouterr().err
    assert f"set aside: tomogram[2] (TS_03.mrc): {status}: why" in said
    assert ("cryofleet retry r1" in said) == offered


@pytest.mark.parametrize("columns", [80, 200])
def test_wide_rows_are_paragraphs_on_a_narrow_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    folder = "file:///data/facility/krios1/session-2026-11-22/tomograms"
    row = ["krios1", "watching", "pick-template", 1, 2, 3, 100, 4, folder, ""]
    headings = [
        "inbox",
        "state",
        "pipeline",
        "arriving",
        "waiting",
        "started",
        "done",
        "set aside",
        "folder",
        "problem",
    ]
    print_table(headings, [row, row], paragraphs=True)
    lines = [re.sub(r"\x1b\[\d+m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert all(len(line) <= columns for line in lines)
    assert any(folder in line for line in lines), "in one piece"
    assert len(lines) == (19 if columns == 80 else 3)
