"""The latest lines about each run, in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from cryofleet.logs import log_context
from cryofleet.server import recent_log
from cryofleet.server.recent_log import RecentLog
from cryofleet.v1 import runtime_pb2

logger = logging.getLogger("cryofleet.somewhere")
LONG = "a-secret-that-is-much-longer-than-what-stands-for-it"


@pytest.fixture
def recent() -> Iterator[RecentLog]:
    handler = RecentLog("picking", "picking-0", {"CRYOFLEET_S3_SECRET_KEY": "hunter22", "CRYOFLEET_TOKEN": LONG})
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def messages(found: tuple[list[runtime_pb2.LogLine], bool]) -> list[str]:
    return [line.message for line in found[0]]


def test_a_line_says_what_the_logs_own_line_says(recent: RecentLog) -> None:
    about = {"run_id": "r", "project": "apo", "task_key": "r:1/pick", "operation": "picking.Extract", "user": "ana"}
    with log_context(**about):
        try:
            raise ValueError("no such box")
        except ValueError:
            logger.exception("it failed for %s", "a.mrc", extra={"seconds": 1.5})
    logger.warning("of no run")
    (line,), cut = recent.read("apo", "r")
    assert not cut
    assert (line.level, line.service, line.instance) == ("ERROR", "picking", "picking-0")
    assert (line.operation, line.task_key, line.message) == ("picking.Extract", "r:1/pick", "it failed for a.mrc")
    assert "ValueError" not in str(line), "a traceback stays in the process's own log"
    assert dict(line.fields) == {"logger": "cryofleet.somewhere", "user": "ana", "seconds": "1.5"}


def test_lines_are_in_order_of_time_and_of_one_run_project_or_task(recent: RecentLog) -> None:
    given = [("r", "apo", "a", 20.0), ("r", "apo", "b", 10.5), ("r", "apo", "a", 10.25), ("r", "ribo", "a", 1.0)]
    for number, (run, project, task, at) in enumerate([*given, ("q", "apo", "a", 2.0)]):
        fields = {"msg": f"{number}", "created": at, "msecs": at % 1 * 1000, "run_id": run, "project": project}
        recent.handle(logging.makeLogRecord({**fields, "task_key": task, "levelname": "INFO"}))
    assert messages(recent.read("apo", "r")) == ["2", "1", "0"]
    assert messages(recent.read("apo", "r", "a")) == ["2", "0"]
    assert (messages(newest := recent.read("apo", "r", limit=2)), newest[1]) == (["1", "0"], True)
    assert messages(recent.read("ribo", "r")) == ["3"]
    assert recent.read("", "r") == ([], False)


def test_what_a_run_may_have_is_bounded_by_lines_and_by_bytes(
    recent: RecentLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_log, "MOST_LINES", 3)
    for number in range(5):
        logger.warning("%d", number, extra={"run_id": "r"})
    found = recent.read("", "r")
    assert (messages(found), found[1]) == (["2", "3", "4"], True)
    monkeypatch.setattr(recent_log, "MOST_BYTES_OF_A_RUN", 1500)
    logger.warning("x" * 1200, extra={"run_id": "r"})
    logger.warning("last", extra={"run_id": "r"})
    assert [text[:4] for text in messages(recent.read("", "r"))] == ["xxxx", "last"]


def test_of_too_many_runs_the_one_that_was_written_about_the_longest_ago_is_dropped(
    recent: RecentLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_log, "MOST_BYTES", 4000)
    for run in ("a", "b", "a", "c"):
        logger.warning("x" * 1000, extra={"run_id": run})
    assert [len(recent.read("", run)[0]) for run in "abc"] == [2, 0, 1]
    logger.warning("x" * 3500, extra={"run_id": "d"})
    assert [len(recent.read("", run)[0]) for run in "abcd"] == [0, 0, 0, 1]


def test_long_texts_are_cut_and_no_secret_is_left_at_the_cut(
    recent: RecentLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_log, "LONGEST", 100)
    logger.warning(
        "%s hunter22 and more %s", "x" * 70, "y" * 1000, extra={"run_id": "r", "header": "Bearer abcdefghij"}
    )
    logger.warning("%s hunter22", "x" * 95, extra={"run_id": "r"})
    (first, second), _ = recent.read("", "r")
    assert first.message.startswith("x" * 70 + " (hidden) and more y")
    assert (len(first.message), first.message[-1]) == (101, "…")
    assert first.fields["header"] == "Bearer (hidden)"
    assert second.message == "x" * 95 + " (hid" + "…"


def test_half_a_secret_at_the_end_of_what_is_searched_is_not_shown(
    recent: RecentLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent_log, "LONGEST", 100)
    # What is hidden before it makes room for it.
    logger.warning("%s", LONG * 6, extra={"run_id": "r"})
    logger.warning("%s %s", LONG, "y" * 250, extra={"run_id": "r"})
    assert messages(recent.read("", "r")) == ["…", "(hidden) " + "y" * 47 + "…"]


def test_names_of_files_that_are_no_text_are_shown(recent: RecentLog) -> None:
    name = b"t\xff.mrc".decode(errors="surrogateescape")
    # To it alone: the report of a test that runs beside others cannot hold such a name.
    recent.handle(logging.makeLogRecord({"msg": f"cannot read {name}", "levelname": "WARNING", "run_id": "r"}))
    assert messages(recent.read("", "r")) == ["cannot read t?.mrc"]


def test_the_audit_is_not_for_those_who_see_the_run(recent: RecentLog) -> None:
    logger.warning("OK: GetRun", extra={"run_id": "r", "event": "audit", "peer": "10.0.0.1"})
    assert recent.read("", "r") == ([], False)
