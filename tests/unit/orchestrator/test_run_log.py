"""The log of a run: brought together from its processes, and of failed tasks kept."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from cryofleet.server.recent_log import RecentLog
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import runtime_pb2
from orchestrator import run_log
from orchestrator.engine import logger
from orchestrator.run_log import RunLog
from orchestrator.tasks import TaskRequest
from tests.unit.orchestrator.fake import Platform, running_platform

FAILING = """
name: failing
parameters:
  numbers: {type: list}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${numbers}
    as: number
    with: {index: "${number}"}
outputs:
  indices: ${each.index}
"""


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    async with running_platform() as made:
        yield made


def line(message: str, seconds: float, task_key: str = "") -> runtime_pb2.LogLine:
    made = runtime_pb2.LogLine(level="ERROR", service="io", instance="fake", task_key=task_key, message=message)
    made.time.FromMilliseconds(round(seconds * 1000))
    return made


async def fail_unless_first(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
    if request.index:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no box at {request.index}")


async def read(platform: Platform, limit: int = 1000) -> pb.ReadLogResponse:
    return await platform.engine.run_log.read(platform.engine.runs.run("run"), limit)


def messages(response: pb.ReadLogResponse) -> list[str]:
    return [each.message for each in response.lines]


async def test_lines_of_orchestrator_and_instances_are_in_order_of_time(platform: Platform) -> None:
    own = RecentLog("orchestrator", "one", {})
    platform.engine.run_log = RunLog(platform.engine, own)
    logger.addHandler(own)
    try:
        logger.warning("of a run that had this id before", extra={"run_id": "run"})
        began = time.time() + 1
        await platform.submit(FAILING, numbers=[0])
        await platform.ended()
        # As if it had been submitted a second later than what was logged first.
        row = platform.engine.runs.run("run")
        platform.service.log = [line("last", began + 60), line("first", 10.0), line("first", 10.0)]
        late = logger.makeRecord("x", 30, "", 0, "in between", (), None, extra={"run_id": "run"})
        late.created, late.msecs = began + 30, 0.0
        own.handle(late)
        found = await platform.engine.run_log.read(replace(row, created_at=began), 10)
        assert (messages(found), found.cut, len(found.unread)) == (["first", "in between", "last"], False, 0)
        found = await platform.engine.run_log.read(row, 1)
        assert (messages(found), found.cut) == (["last"], True)
    finally:
        logger.removeHandler(own)


async def test_an_instance_that_hangs_is_named_and_costs_no_more_than_the_patience(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "PATIENCE_SECONDS", 0.3)
    await platform.submit(FAILING, numbers=[0])
    await platform.ended()
    platform.service.hangs = True
    began = time.monotonic()
    (unread,) = (await read(platform)).unread
    assert time.monotonic() - began < 2.0
    assert (unread.pool, unread.instance, unread.address) == ("io", "fake", platform.address)
    assert unread.cause == "it did not answer within 0.3 s"


async def test_what_a_failed_task_logged_outlives_its_instance(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.service.behave = fail_unless_first
    platform.service.log = [line(f"task {i}", i, f"run:1/each[{i}]") for i in range(4)]
    await platform.submit(FAILING, numbers=[0, 1, 2, 3])
    run = await platform.ended()
    assert len(run.set_aside) == 3
    monkeypatch.setattr(run_log, "KEPT_TASKS", 3)
    last = TaskRequest("run:1/each[0]", "run", "default", "runtime.SelfTest", {})
    await platform.engine.run_log.keep(last, {"tried": [platform.address]})
    await platform.service.kill()
    found = await read(platform)
    assert len(found.unread) == 1
    assert messages(found) == ["task 1", "task 2", "task 3"], "not of those that did not fail, nor of too many"
    await platform.engine.forget("run")
    assert platform.engine.runs.kept_log("run") == []
    platform.engine.runs.keep_log("run", 1, "run:1/each[1]", "[]")
    assert platform.engine.runs.kept_log("run") == [], "nothing is kept of a run that is not there"


async def test_an_answer_is_bounded(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MOST_BYTES", 2500)
    await platform.submit(FAILING, numbers=[0])
    await platform.ended()
    platform.service.log = [line("x" * 1000, at) for at in range(4)]
    found = await read(platform)
    assert ([each.time.seconds for each in found.lines], found.cut) == ([2, 3], True)
