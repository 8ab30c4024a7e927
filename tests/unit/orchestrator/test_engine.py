"""Whole runs on DBOS, with a service that does what the test says."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from dbos import DBOS, WorkflowHandleAsync
from google.protobuf.json_format import MessageToDict

from cryofleet.errors import Unavailable
from cryofleet.particles import Particles
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import runtime_pb2
from orchestrator import tasks
from orchestrator.database import make_database
from orchestrator.runs import Pause
from tests.unit.orchestrator.fake import Platform, running_platform

MAPPED = """
name: mapped
parameters:
  numbers: {type: list}
  seconds: {type: number, default: 0}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${numbers}
    as: number
    with: {index: "${number}", seconds: "${seconds}"}
outputs:
  indices: ${each.index}
"""

SHARDED = """
name: sharded
inputs:
  table: {kind: particles}
parameters:
  size: {type: integer, default: 10}
steps:
  - id: parts
    op: runtime.SelfTest
    with: {particles_uri: "${table}", index: 1}
    shards: {over: particles_uri, size: "${size}"}
outputs:
  first_rows: ${parts.first_row}
"""

GRAPH = """
name: graph
parameters:
  wanted: {type: boolean, default: false}
steps:
  - id: last
    op: runtime.SelfTest
    with: {index: "${left.index}", fail_with: "", seconds: 0}
  - id: left
    op: runtime.SelfTest
    with: {index: 1, seconds: 0.3}
  - id: right
    op: runtime.SelfTest
    with: {index: 2, seconds: 0.3}
  - id: maybe
    if: ${wanted}
    op: runtime.SelfTest
    with: {index: 3}
  - id: both
    if: ["${right.index}", "${wanted}"]
    op: runtime.SelfTest
    with: {index: 4}
  - id: after_maybe
    op: runtime.SelfTest
    with: {index: "${right.index}", particles_uri: ""}
outputs:
  last: ${last.index}
  maybe: ${maybe.index}
  both: ${both.index}
"""

BLOCKS = """
name: blocks
parameters:
  numbers: {type: list}
steps:
  - id: item
    foreach: ${numbers}
    as: number
    steps:
      - id: second
        op: runtime.SelfTest
        with: {index: "${first.index}", seconds: 0.001}
      - id: first
        op: runtime.SelfTest
        with: {index: "${number}", seconds: 0}
  - id: all
    op: runtime.SelfTest
    foreach: ${item.second.index}
    with: {index: "${item2}", seconds: 0.002}
    as: item2
outputs:
  second: ${item.second.index}
"""


@pytest.fixture
async def platform(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Platform]:
    monkeypatch.setattr(tasks, "_BACKOFF_SECONDS", (0.01, 0.05))
    async with running_platform() as running:
        yield running


def outputs(run: pb.Run) -> dict[str, Any]:
    return MessageToDict(run.outputs)


def states(run: pb.Run) -> dict[str, str]:
    return {step.id: pb.StepState.Name(step.state).removeprefix("STEP_STATE_") for step in run.steps}


def fails_for(*indices: int) -> Any:
    async def behave(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        if request.index in indices:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"index {request.index} is bad")

    return behave


async def test_every_task_has_its_own_result_over_several_chunks(platform: Platform) -> None:
    numbers = [(number * 37) % 150 for number in range(150)]
    await platform.submit(MAPPED, numbers=numbers, seconds=0.02)
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert outputs(run)["indices"] == numbers
    step = run.steps[0]
    assert (step.tasks_total, step.tasks_done, step.tasks_cached, step.tasks_set_aside) == (150, 150, 0, 0)
    assert step.compute_seconds == pytest.approx(150 * 0.25)
    assert step.fraction == 1.0
    assert run.started_at.ToNanoseconds() <= step.started_at.ToNanoseconds() <= step.finished_at.ToNanoseconds()
    assert platform.service.peak == platform.service.slots
    assert len(platform.service.calls) == len(set(platform.service.calls)) == 150
    # Nothing that DBOS keeps is a pickle.
    with sqlite3.connect(platform.home / "orchestrator.sqlite") as database:
        kinds = {row[0] for row in database.execute("SELECT DISTINCT serialization FROM operation_outputs")}
        kinds |= {row[0] for row in database.execute("SELECT DISTINCT serialization FROM workflow_status")}
        names = dict(database.execute("SELECT name, count(*) FROM workflow_status GROUP BY name"))
    database.close()
    assert kinds <= {"portable_json", None}
    assert names == {"run": 1, "fan_out": 1, "chunk": 3}


async def test_a_second_run_is_answered_from_the_store(platform: Platform) -> None:
    await platform.submit(MAPPED, "first", numbers=list(range(5)))
    first = await platform.ended("first")
    await platform.submit(MAPPED, "second", numbers=[3, 4, 5])
    second = await platform.ended("second")
    assert (first.steps[0].tasks_cached, second.steps[0].tasks_cached, second.steps[0].tasks_done) == (0, 2, 3)
    assert outputs(second)["indices"] == [3, 4, 5]
    assert second.steps[0].compute_seconds == pytest.approx(0.25)
    assert len(platform.service.calls) == 6


async def test_steps_run_as_soon_as_what_they_need_is_there(platform: Platform) -> None:
    await platform.submit(GRAPH)
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_SUCCEEDED
    steps = {step.id: step for step in run.steps}
    assert [step.id for step in run.steps] == ["last", "left", "right", "maybe", "both", "after_maybe"]
    assert states(run)["maybe"] == "SKIPPED"
    assert states(run)["both"] == "SKIPPED", "one of its two conditions fails"
    # left and right ran together, last and after_maybe behind them.
    assert steps["left"].started_at.ToNanoseconds() < steps["right"].finished_at.ToNanoseconds()
    assert steps["right"].started_at.ToNanoseconds() < steps["left"].finished_at.ToNanoseconds()
    assert steps["last"].started_at.ToNanoseconds() >= steps["left"].finished_at.ToNanoseconds()
    assert outputs(run) == {"last": 1}


async def test_a_failed_item_is_set_aside_and_retried_alone(platform: Platform) -> None:
    platform.service.behave = fails_for(3, 70)
    await platform.submit(MAPPED, numbers=list(range(80)))
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_PARTIAL
    assert states(run) == {"each": "PARTIAL"}
    assert [(s.step, s.item, s.status, s.cause) for s in run.set_aside] == [
        ("each", "3", "INVALID_ARGUMENT", "index 3 is bad"),
        ("each", "70", "INVALID_ARGUMENT", "index 70 is bad"),
    ]
    assert run.steps[0].tasks_set_aside == 2
    assert outputs(run)["indices"] == [None if n in (3, 70) else n for n in range(80)], "each in its own place"
    platform.service.behave = None
    platform.service.calls.clear()
    await platform.next_attempt()
    run = await platform.ended()
    assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 2)
    assert sorted(platform.service.calls) == ["run:2/each[3]", "run:2/each[70]"]
    assert outputs(run)["indices"] == list(range(80))
    assert not run.set_aside


async def test_a_strict_foreach_fails_once_all_items_have_ended(platform: Platform) -> None:
    platform.service.behave = fails_for(1, 3)
    strict = MAPPED.replace("foreach: ${numbers}", "foreach: ${numbers}\n    strict: true")
    await platform.submit(strict, numbers=list(range(10)))
    run = await platform.ended()
    assert (run.state, states(run)) == (pb.RUN_STATE_FAILED, {"each": "FAILED"})
    assert run.error == (
        "step each failed: INVALID_ARGUMENT: 2 of 10 items failed, and the step is strict; the first: index 1 is bad"
    )
    assert [each.item for each in run.set_aside] == ["1", "3"]
    assert (run.steps[0].tasks_done, run.steps[0].tasks_set_aside) == (8, 2)
    platform.service.behave = None
    platform.service.calls.clear()
    await platform.next_attempt()
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert sorted(platform.service.calls) == ["run:2/each[1]", "run:2/each[3]"], "the others are found in the store"


async def test_only_what_needs_a_failed_item_is_left_out(platform: Platform) -> None:
    platform.service.behave = fails_for(1)
    await platform.submit(BLOCKS, numbers=[0, 1, 2])
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_PARTIAL
    assert states(run) == {"item": "PARTIAL", "item.second": "CANCELLED", "item.first": "PARTIAL", "all": "SUCCEEDED"}
    assert [(s.step, s.item, s.cause) for s in run.set_aside] == [("item", "1", "step item[1].first: index 1 is bad")]
    assert outputs(run)["second"] == [0, None, 2]
    steps = {step.id: MessageToDict(step.outputs).get("index") for step in run.steps}
    assert steps["item.second"] == steps["item.first"] == steps["all"] == [0, None, 2]
    assert {step.id: step.tasks_total for step in run.steps}["all"] == 2
    assert sorted(platform.service.done) == [
        "run:1/all[0]",
        "run:1/all[2]",
        "run:1/item[0].first",
        "run:1/item[0].second",
        "run:1/item[2].first",
        "run:1/item[2].second",
    ]


JOINED = """
name: joined
parameters:
  seeds: {type: list}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${seeds}
    as: seed
    with: {index: "${seed}"}
  - id: again
    foreach: ${each.index}
    as: index
    steps:
      - id: inner
        op: runtime.SelfTest
        with: {index: "${index}", seconds: 0.001}
outputs:
  each: ${each.index}
  again: ${again.inner.index}
  both: ["${each.index}", "${again.inner.index}"]
"""


async def test_a_set_aside_item_keeps_its_place_through_later_steps(platform: Platform) -> None:
    platform.service.behave = fails_for(11)
    await platform.submit(JOINED, seeds=[10, 11, 12])
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_PARTIAL
    kept = [10, None, 12]
    assert outputs(run) == {"each": kept, "again": kept, "both": [kept, kept]}
    assert [(s.step, s.item) for s in run.set_aside] == [("each", "1")], "it is set aside once, where it failed"
    assert "run:1/again[2].inner" in platform.service.done


async def test_a_run_that_is_cancelled_before_its_workflow_starts_computes_nothing(platform: Platform) -> None:
    start = platform.engine.start_attempt

    async def cancel_first(run_id: str, attempt: int) -> None:
        assert await platform.engine.cancel_attempt(run_id, attempt)
        await start(run_id, attempt)

    platform.engine.start_attempt = cancel_first  # type: ignore[method-assign]
    await platform.submit(GRAPH)
    workflow: WorkflowHandleAsync[Any] = await DBOS.retrieve_workflow_async("run:1")
    assert await workflow.get_result() == {"state": "cancelled"}
    assert platform.service.calls == []
    assert platform.run().state == pb.RUN_STATE_CANCELLED


async def test_a_caller_is_told_that_the_database_is_away(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.engine._RETRY_SECONDS", 0.01)
    away = sa.exc.OperationalError("SELECT 1", {}, Exception("connection\nrefused"))
    answers: list[Any] = [away, away, "here"]

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert await platform.engine.answer(ask) == "here", "a short absence is waited for"
    monkeypatch.setattr("orchestrator.engine.ANSWER_SECONDS", 0.05)
    answers = [away] * 100
    with pytest.raises(Unavailable, match="database is away: connection refused"):
        await platform.engine.answer(ask)
    answers = [sa.exc.ProgrammingError("SELECT x", {}, Exception("no such column"))]
    with pytest.raises(sa.exc.ProgrammingError):
        await platform.engine.answer(ask)
    assert not answers, "what a defect raises is not tried again"


async def test_a_foreach_of_which_every_item_fails_fails(platform: Platform) -> None:
    platform.service.behave = fails_for(1, 2)
    await platform.submit(MAPPED, numbers=[1, 2])
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_FAILED
    assert run.error == "step each failed: INVALID_ARGUMENT: all 2 items failed; the first: index 1 is bad"


async def test_a_foreach_over_nothing_succeeds(platform: Platform) -> None:
    await platform.submit(MAPPED, numbers=[])
    run = await platform.ended()
    assert (run.state, outputs(run)) == (pb.RUN_STATE_SUCCEEDED, {"indices": []})


def write_table(platform: Platform, rows: int) -> str:
    table = pd.DataFrame({"id": np.arange(rows), "x": 1.0, "y": 2.0, "z": np.arange(rows, dtype=float)})
    uri = f"{platform.store.root}/default/table-{rows}.parquet"
    platform.store.put(uri, Particles(table, 10.0, "t", None).to_parquet())
    return uri


async def test_shards_cover_all_rows_in_order(platform: Platform) -> None:
    await platform.submit(SHARDED, table=write_table(platform, 95))
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert outputs(run)["first_rows"] == list(range(0, 95, 10))
    assert (run.steps[0].tasks_total, run.steps[0].tasks_done) == (10, 10)


async def test_a_failed_shard_fails_its_step_and_names_the_rows(platform: Platform) -> None:
    async def behave(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        if request.rows.first == 20:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "row 23 lies outside")

    platform.service.behave = behave
    uri = write_table(platform, 45)
    await platform.submit(SHARDED, table=uri)
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_FAILED
    assert run.error == (f"step parts failed: FAILED_PRECONDITION: rows 20 to 29: row 23 lies outside (input {uri})")
    assert states(run) == {"parts": "FAILED"}
    assert run.steps[0].tasks_done == 4, "the other shards are done, for the next attempt to find"
    platform.service.behave = None
    platform.service.calls.clear()
    await platform.next_attempt()
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert platform.service.calls == ["run:2/parts[2]"]


async def test_no_rows_and_no_table(platform: Platform) -> None:
    await platform.submit(SHARDED, "empty", table=write_table(platform, 0))
    run = await platform.ended("empty")
    assert run.state == pb.RUN_STATE_FAILED
    assert "table-0.parquet has no rows" in run.error
    await platform.submit(SHARDED, "none", table=f"{platform.store.root}/default/none.parquet")
    run = await platform.ended("none")
    assert run.error.startswith("step parts failed: NOT_FOUND")


async def test_cancelling_ends_the_calls_at_once(platform: Platform) -> None:
    await platform.submit(MAPPED, numbers=list(range(30)), seconds=30)
    await platform.until(lambda: platform.service.running == platform.service.slots)
    await asyncio.sleep(0.05)
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert await platform.engine.cancel_attempt("run", 1)
    await platform.until(lambda: platform.service.running == 0)
    assert loop.time() - started < 3.0
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_CANCELLED
    assert states(run) == {"each": "CANCELLED"}
    calls = len(platform.service.calls)
    await asyncio.sleep(0.3)
    assert len(platform.service.calls) == calls, "nothing more is started"
    assert not await platform.engine.cancel_attempt("run", 1)


async def test_a_restart_goes_on_where_it_was(platform: Platform) -> None:
    await platform.submit(MAPPED, numbers=list(range(40)), seconds=0.05)
    await platform.until(lambda: len(platform.service.done) >= 12)
    await platform.engine.stop()
    with sqlite3.connect(platform.home / "orchestrator.sqlite") as database:
        recorded = [
            row[0] for row in database.execute("SELECT output FROM operation_outputs WHERE function_name='task'")
        ]
        pending = {row[0] for row in database.execute("SELECT status FROM workflow_status")}
    database.close()
    assert pending == {"PENDING"}, "stopping is no failure"
    finished = {row.split('"task":"')[1].split('"')[0] for row in recorded}
    assert len(finished) >= 8
    platform.service.calls.clear()
    await platform.restart_stopped()
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert outputs(run)["indices"] == list(range(40))
    assert not finished & set(platform.service.calls), "what was recorded is not done again"
    assert len(finished) + len(set(platform.service.calls)) + run.steps[0].tasks_cached == 40


async def test_a_pause_holds_over_a_restart(platform: Platform) -> None:
    await platform.submit(MAPPED, numbers=list(range(40)), seconds=0.05)
    await platform.until(lambda: len(platform.service.done) >= 4)
    platform.engine.runs.pause(Pause("io", 1.0, "ana", "new disks"))
    platform.engine.runs.pause(Pause("io", 2.0, "ben", "the first stays"))
    await platform.engine.read_pauses()
    pool = platform.engine.placement.pools["io"]
    assert pool.waiting > 0
    await platform.until(lambda: pool.running == 0)
    calls = len(platform.service.calls)
    assert len(platform.service.done) == calls, "what runs ends"
    await asyncio.sleep(0.3)
    assert len(platform.service.calls) == calls < 40, "and nothing is begun"
    await platform.engine.stop()
    await platform.restart_stopped()
    assert platform.engine.pauses["io"] == Pause("io", 1.0, "ana", "new disks")
    await platform.until(lambda: platform.run().steps[0].phase == "io is paused")
    assert len(platform.service.calls) == calls
    platform.engine.runs.resume("io")
    await platform.engine.read_pauses()
    run = await platform.ended()
    assert (run.state, outputs(run)["indices"]) == (pb.RUN_STATE_SUCCEEDED, list(range(40)))


async def test_a_small_run_does_not_wait_behind_a_large_one_of_another_user(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.workflows.CHUNK_TASKS", 4)
    await platform.submit(MAPPED, "large", "ana", numbers=list(range(240)), seconds=0.05)
    await platform.until(lambda: len(platform.service.done) >= 8)
    assert platform.service.peak == platform.service.slots, "alone she has them all"
    await platform.submit(MAPPED, "small", "ben", numbers=list(range(1000, 1020)), seconds=0.05)
    run = await platform.ended("small")
    assert run.state == pb.RUN_STATE_SUCCEEDED
    done = sum(key.startswith("large") for key in platform.service.done)
    assert done < 150, "all of hers was queued before all of his"
    await platform.engine.cancel_attempt("large", 1)


async def test_an_unfinished_start_is_made_good(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.recovery._LOST_SECONDS", 0.1)
    monkeypatch.setattr("orchestrator.engine.HEARTBEAT_SECONDS", 0.1)

    async def nothing(run_id: str, attempt: int) -> None:
        """As where the orchestrator dies between keeping the run and starting it."""

    real = platform.engine.start_attempt
    platform.engine.start_attempt = nothing  # type: ignore[method-assign]
    await platform.submit(MAPPED, numbers=[1])
    platform.engine.start_attempt = real  # type: ignore[method-assign]
    run = await platform.ended(seconds=10)
    assert run.state == pb.RUN_STATE_SUCCEEDED


async def test_a_workflow_that_breaks_off_goes_on(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an error ends it that DBOS can't record, for the database is away."""
    monkeypatch.setattr("orchestrator.recovery._LOST_SECONDS", 0.5)
    monkeypatch.setattr("orchestrator.engine.HEARTBEAT_SECONDS", 0.1)
    await platform.submit(MAPPED, numbers=[1, 2, 3, 4], seconds=0.3)
    await platform.until(lambda: len(platform.service.done) >= 1)
    for task in list(platform.engine._running):
        task.cancel()
    run = await platform.ended(seconds=20)
    assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 1)


async def test_a_defect_of_the_orchestrator_ends_the_run(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.engine.HEARTBEAT_SECONDS", 0.2)

    async def lying(*_: Any) -> tasks.Outcome:
        return {"task": "another", "status": "OK"}

    monkeypatch.setattr(platform.engine.tasks, "run", lying)
    await platform.submit(GRAPH)
    run = await platform.ended(seconds=15)
    assert run.state == pb.RUN_STATE_FAILED
    assert "the outcome of another stands in the place of run:1/" in run.error


async def test_what_an_orchestrator_had_that_now_has_other_steps_goes_on_elsewhere(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an upgrade the successor keeps the name, and beats; an orchestrator with the old steps takes the work over."""
    monkeypatch.setattr("orchestrator.engine.HEARTBEAT_SECONDS", 0.2)
    await platform.submit(MAPPED, numbers=list(range(8)), seconds=0.2)
    await platform.until(lambda: len(platform.service.done) == 4)
    await platform.engine.stop()
    database = make_database(platform.settings.database)
    with database.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE cryofleet_orchestrators SET heartbeat = :later, application_version = '2' WHERE name = 'one'"
            ),
            {"later": time.time() + 3600.0},
        )
    database.dispose()
    platform.settings = replace(platform.settings, instance="two")
    await platform.restart_stopped()
    run = await platform.ended(seconds=15)
    assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 1), run.error


async def test_runs_of_a_version_that_is_gone_begin_anew(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.engine.HEARTBEAT_SECONDS", 0.2)
    await platform.submit(MAPPED, numbers=list(range(12)), seconds=0.3)
    await platform.until(lambda: len(platform.service.done) >= 4)
    await platform.engine.stop()
    done = set(platform.service.done)
    assert len(done) < 12
    platform.service.calls.clear()
    monkeypatch.setattr("orchestrator.engine.APPLICATION_VERSION", "2")
    # Where another orchestrator has the old steps, the run is left to it.
    database = make_database(platform.settings.database)
    with database.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO cryofleet_orchestrators VALUES ('old', :later, '1')"), {"later": time.time() + 3600.0}
        )
    await platform.restart_stopped()
    await asyncio.sleep(1.0)
    assert (platform.engine.runs.attempt("run").attempt, platform.service.calls) == (1, [])
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE cryofleet_orchestrators SET heartbeat = 0 WHERE name = 'old'"))
    database.dispose()
    run = await platform.ended()
    assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 2), run.error
    assert outputs(run)["indices"] == list(range(12))
    assert run.steps[0].tasks_cached == len(done), "what was done is found in the store"
    assert len(platform.service.calls) == 12 - len(done)
    whole = await DBOS.list_workflows_async(workflow_ids=["run:1"])
    assert [workflow.status for workflow in whole] == ["CANCELLED"]
