"""What the command line makes of words, and where it puts files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest

from cryofleet.cli.options import key_values
from cryofleet.cli.output import seconds_text, size_text
from cryofleet.cli.runs import _folders
from cryofleet.client import Artifact, Client, RunHandle
from cryofleet.errors import NotFound
from cryofleet.results import RUN_DETAILS_MARK, artifacts_of, save_outputs
from cryofleet.v1 import orchestrator_pb2


def test_key_values_are_numbers_booleans_json_or_text() -> None:
    words = [
        "a=3",
        "b=0.5",
        "c=true",
        "d=D7",
        'e=[{"name": "x"}]',
        "rows.first=2",
        "rows.count=4",
        "f=",
        "g=2026-11-21",
    ]
    assert key_values(words) == {
        "a": 3,
        "b": 0.5,
        "c": True,
        "d": "D7",
        "e": [{"name": "x"}],
        "rows": {"first": 2, "count": 4},
        "f": "",
        "g": "2026-11-21",
    }


@pytest.mark.parametrize("word", ["nothing", "=3", "a={"])
def test_a_wrong_pair_is_named(word: str) -> None:
    with pytest.raises(click.BadParameter, match=word):
        key_values([word])


def test_sizes_and_times_read_well() -> None:
    assert [size_text(n) for n in (0, 1536, 3 * 1024**3)] == ["0 B", "1.5 KiB", "3.0 GiB"]
    assert [seconds_text(s) for s in (0.25, 59.94, 75)] == ["0.2 s", "59.9 s", "1 min 15 s"]


def test_each_tomogram_gets_a_folder_of_its_own() -> None:
    handles = [cast(RunHandle, SimpleNamespace(id=f"run-{n}")) for n in range(4)]
    names = ("a/TS_01.10A.mrc", "a/TS_01.13A.mrc", "b/t.mrc.gz", "c/t.rec")
    folders = _folders(Path("out"), handles, names)
    assert folders == [Path("out/TS_01.10A"), Path("out/TS_01.13A"), Path("out/t-run-2"), Path("out/t-run-3")]


class _Fetched:
    """A client whose artifacts hold their own URI."""

    project = "default"

    def in_project(self, project: str) -> _Fetched:
        return self

    def list(self, uri: str) -> Iterator[Any]:
        yield SimpleNamespace(uri=uri, size_bytes=1)

    def download_chunks(self, uri: str) -> Iterator[bytes]:
        yield RUN_DETAILS_MARK.encode() if uri.endswith(".html") else uri.encode()


def _handle(**outputs: Any) -> RunHandle:
    run = orchestrator_pb2.Run(id="r1", pipeline="p", state=orchestrator_pb2.RUN_STATE_SUCCEEDED)
    run.outputs.update(outputs)
    run.steps.add(id="pick", operation="picking.<b>")
    return RunHandle(cast(Client, _Fetched()), run)


def test_outputs_become_files_named_by_output_and_place(tmp_path: Path) -> None:
    handle = _handle(average=["file:///k/a.mrc", None, "file:///k/c.mrc"], f1=0.5, report="file:///k/report.html")
    save_outputs(handle, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"average_1.mrc", "average_3.mrc", "metrics.json", "report.html"}
    assert (tmp_path / "average_3.mrc").read_text() == "file:///k/c.mrc", "an item that was set aside keeps its number"
    assert json.loads((tmp_path / "metrics.json").read_text())["f1"] == 0.5
    page = (tmp_path / "report.html").read_text()
    assert "picking.&lt;b&gt;" in page, "names are shown, not run"


def test_outputs_of_several_files_are_called_by_them(tmp_path: Path) -> None:
    handle = _handle(picks=["file:///k/a.star", None, "file:///k/c.star"], average=["file:///k/a.mrc"])
    handle.record.output_names["picks"].names.extend(["TS_01", "TS_02", "TS_03"])
    save_outputs(handle, tmp_path)
    names = {"picks_TS_01.star", "picks_TS_03.star", "average_1.mrc"}
    assert {p.name for p in tmp_path.iterdir()} == {*names, "metrics.json"}
    assert artifacts_of(tmp_path / "picks_TS_03.star") == {"picks_TS_03.star": "file:///k/c.star"}
    assert set(artifacts_of(tmp_path)) == names
    (tmp_path / "mine.txt").write_text("the user's own")
    with pytest.raises(NotFound, match=r"mine\.txt is no result of the run"):
        artifacts_of(tmp_path / "mine.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="there is no metrics"):
        artifacts_of(tmp_path / "empty")


def test_files_of_an_earlier_run_are_not_left_to_be_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("the user's own")
    save_outputs(_handle(average=["file:///k/a.mrc", "file:///k/b.mrc"]), tmp_path)
    save_outputs(_handle(average=["file:///k/a.mrc"]), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"average_1.mrc", "metrics.json", "mine.txt"}


def test_only_artifacts_are_taken_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter's text is not taken for a file that happens to have that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dark").write_text("a file")
    client = Client.__new__(Client)
    client._uploads = True
    monkeypatch.setattr(client, "upload", lambda path: f"file:///up/{path}", raising=False)
    parameters = {"contrast": "dark", "tomogram_uri": "dark", "structures": [{"name": "dark", "source_uri": "dark"}]}
    assert client._uploaded(parameters, False) == {
        "contrast": "dark",
        "tomogram_uri": "file:///up/dark",
        "structures": [{"name": "dark", "source_uri": "file:///up/dark"}],
    }
    assert client._uploaded(Artifact("file:///x", client), False) == "file:///x"
    # The page's server takes no path of a visitor's for a file of its own.
    client._uploads = False
    assert client._uploaded(parameters, False) == parameters
    assert client._uploaded(Artifact("file:///x", client), False) == "file:///x"
