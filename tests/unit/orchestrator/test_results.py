from __future__ import annotations

import json
from pathlib import Path

import pytest

from cryofleet.client import Artifact, Client, RunHandle
from cryofleet.results import save_outputs
from cryofleet.v1 import orchestrator_pb2 as pb
from tests.unit.orchestrator.fake import settings_in


def test_files_are_numbered_by_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(artifact: Artifact, path: Path) -> Path:
        path.write_text(artifact.uri)
        return path

    monkeypatch.setattr(Artifact, "save", save)
    run = pb.Run(id="r", state=pb.RUN_STATE_PARTIAL)
    run.outputs.update({"average": ["file:///1/a.mrc", None, "file:///3/a.mrc"], "resolution": [20.0, None, 30.0]})
    client = Client(settings_in(tmp_path, pools={}), start=False)
    written = save_outputs(RunHandle(client, run), tmp_path)
    assert [path.name for path in written] == ["average_1.mrc", "average_3.mrc", "metrics.json"]
    assert (tmp_path / "average_3.mrc").read_text() == "file:///3/a.mrc"
    assert json.loads((tmp_path / "metrics.json").read_text())["resolution"] == [20.0, None, 30.0]
