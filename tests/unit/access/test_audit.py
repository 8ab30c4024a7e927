from __future__ import annotations

import json
import logging
import stat
from pathlib import Path

import pytest

from cryofleet.access import audit
from cryofleet.access.audit import AuditLog, Entry
from cryofleet.access.caller import TOKEN, Caller
from cryofleet.access.roles import Role
from cryofleet.errors import FailedPrecondition

ANA = Caller("ana", Role.VIEWER, frozenset({"apo"}), TOKEN)
METHOD = "/cryofleet.v1.OrchestratorService/GetRun"


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_call_is_a_line_that_says_who_what_and_when(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = AuditLog(str(path), "orchestrator", "orchestrator-0")
    entry = Entry(METHOD, "ipv4:10.0.0.1:5000", "client", ANA, "apo", "run-1")
    log.write(entry, "OK")
    log.write(entry, "OK")
    (line,) = lines(path)
    assert float(str(line.pop("seconds"))) >= 0
    assert str(line.pop("time")).endswith("Z")
    assert line == {
        "service": "orchestrator",
        "instance": "orchestrator-0",
        "event": "audit",
        "user": "ana",
        "role": "viewer",
        "authenticated": "token",
        "peer": "ipv4:10.0.0.1:5000",
        "certificate": "client",
        "method": "cryofleet.v1.OrchestratorService/GetRun",
        "project": "apo",
        "run_id": "run-1",
        "status": "OK",
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_a_user_sends_makes_no_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = AuditLog(str(path), "io", "io")
    log.write(Entry(METHOD, run_id='x"}\n{"user": "root"', refused="y\n" * 1000), "PERMISSION_DENIED")
    (line,) = lines(path)
    assert line["run_id"] == 'x"}\n{"user": "root"'
    assert len(str(line["refused"])) == 300


def test_the_file_may_be_rotated(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = AuditLog(str(path), "io", "io")
    log.write(Entry(METHOD, caller=ANA), "OK")
    path.rename(tmp_path / "audit.log.1")
    log.write(Entry(METHOD, caller=ANA), "NOT_FOUND")
    assert [line["status"] for line in lines(path)] == ["NOT_FOUND"]


def test_quiet_methods_are_recorded_where_they_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = AuditLog(str(path), "io", "io")
    log.write(Entry(METHOD, caller=ANA, audited=False), "OK")
    log.write(Entry(METHOD, audited=False, refused="a token is needed"), "UNAUTHENTICATED")
    assert [(line["status"], line["authenticated"]) for line in lines(path)] == [("UNAUTHENTICATED", "none")]


def test_among_the_logs_whatever_their_level(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog("log", "io", "io")
    with caplog.at_level(logging.ERROR):
        logging.getLogger("cryofleet.audit").setLevel(logging.INFO)
        caplog.handler.setLevel(logging.NOTSET)
        log.write(Entry(METHOD, caller=ANA), "OK")
    (record,) = [each for each in caplog.records if each.name == "cryofleet.audit"]
    assert (vars(record)["user"], vars(record)["status"]) == ("ana", "OK")


def test_off_and_what_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        AuditLog("off", "io", "io").write(Entry(METHOD, refused="no"), "PERMISSION_DENIED")
        assert not caplog.records
        with pytest.raises(FailedPrecondition, match="cannot write the audit log"):
            AuditLog(str(tmp_path / "none" / "audit.log"), "io", "io")
        path = tmp_path / "audit.log"
        log = AuditLog(str(path), "io", "io")
        path.unlink()
        path.mkdir()
        log.write(Entry(METHOD, caller=ANA), "OK")
    (record,) = caplog.records
    assert vars(record)["user"] == "ana", "it is not lost"


def test_a_method_adds_what_it_knows() -> None:
    entry = Entry(METHOD)
    audit.begin(entry)
    audit.note(run_id="run-1")
    audit.note(project="apo")
    assert (entry.run_id, entry.project) == ("run-1", "apo")
