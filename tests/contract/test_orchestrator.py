"""The orchestrator over real gRPC, with a real instance that keeps results in a store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from prometheus_client import CollectorRegistry

from cryofleet.artifacts import find, manifest_for
from cryofleet.channels import open_channel
from cryofleet.server import Server
from cryofleet.server.runtime_service import service as runtime_service
from cryofleet.settings import Settings
from cryofleet.storage import Store
from cryofleet.testing import call_operation
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc, runtime_pb2
from orchestrator.runs import RunStore
from orchestrator.service import service as orchestrator_service
from tests.unit.orchestrator.fake import short_folder

TASKS = """
name: tasks
parameters:
  numbers: {type: list}
  seconds: {type: number, default: 0}
  fail: {type: text, default: ""}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${numbers}
    as: number
    with: {index: "${number}", seconds: "${seconds}"}
  - id: last
    op: runtime.SelfTest
    with: {index: 100, fail_with: "${fail}"}
  - id: after
    op: runtime.SelfTest
    with: {index: "${last.index}", seconds: 0.01}
outputs:
  indices: ${each.index}
  last: ${after.index}
"""


@dataclass
class Orchestrator:
    stub: Any
    """OrchestratorServiceStub; its types are for blocking channels."""
    instance: grpc.aio.Channel
    store: Store
    home: Path
    registry: CollectorRegistry
    """Its metrics."""

    async def submit(self, text: str = TASKS, run_id: str = "", project: str = "", **arguments: Any) -> pb.Run:
        given = Struct()
        given.update(arguments)
        request = pb.SubmitRunRequest(pipeline_yaml=text, arguments=given, run_id=run_id, project=project)
        run: pb.Run = (await self.stub.SubmitRun(request)).run
        return run

    async def ended(self, run: pb.Run) -> pb.Run:
        """The run's last state, by watching it."""
        async for response in self.stub.WatchRun(pb.WatchRunRequest(run_id=run.id), timeout=60):
            run = response.run
        return run


@pytest.fixture
async def orchestrator(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Orchestrator]:
    monkeypatch.setattr("orchestrator.garbage.RECORD_SECONDS", 0.1)
    home = short_folder()
    settings = Settings(
        home=home,
        store=f"file://{home}/store",
        address=f"unix:{home}/o/o.sock",
        instance="orchestrator",
        pools={"io": f"unix:{home}/s/s.sock"},
        database=f"sqlite:///{home}/orchestrator.sqlite",
        drain_seconds=0.2,
        pool_wait_seconds=20,
    )
    instance = Settings(
        home=home, store=settings.store, address=f"unix:{home}/s/s.sock", instance="worker", slots=3, memory_bytes=2**30
    )
    servers = [Server(runtime_service, instance), Server(orchestrator_service, settings)]
    try:
        for server in servers:
            await server.start()
        async with open_channel(settings.address) as channel, open_channel(instance.address) as direct:
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            yield Orchestrator(stub, direct, Store(settings.store), home, servers[1].instance.metrics.registry)
    finally:
        for server in reversed(servers):
            await server.stop()
        shutil.rmtree(home, ignore_errors=True)


async def refused(call: Any) -> tuple[str, str]:
    """Status and message of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


async def test_a_run_from_submission_to_outputs(orchestrator: Orchestrator) -> None:
    run = await orchestrator.submit(numbers=[4, 5, 6], project="mine")
    assert run.state in (pb.RUN_STATE_QUEUED, pb.RUN_STATE_RUNNING)
    assert run.id.startswith("tasks-")
    states = []
    async for response in orchestrator.stub.WatchRun(pb.WatchRunRequest(run_id=run.id), timeout=60):
        states.append(response.run.state)
        run = response.run
    assert states[-1] == pb.RUN_STATE_SUCCEEDED
    assert states == sorted(states), "a run never goes back"
    assert MessageToDict(run.outputs) == {"indices": [4, 5, 6], "last": 100}
    assert MessageToDict(run.arguments) == {"numbers": [4, 5, 6], "seconds": 0, "fail": ""}
    assert run.steps[0].operation == "runtime.SelfTest"
    assert MessageToDict(run.steps[0].outputs)["instance"] == ["worker"] * 3
    got = (await orchestrator.stub.GetRun(pb.GetRunRequest(run_id=run.id))).run
    assert got == run
    listed = (await orchestrator.stub.ListRuns(pb.ListRunsRequest(project="mine"))).runs
    assert [(each.id, len(each.steps)) for each in listed] == [(run.id, 0)]
    assert not (await orchestrator.stub.ListRuns(pb.ListRunsRequest(project="other"))).runs
    # The results are the project's own.
    assert list((orchestrator.home / "store" / "mine").glob("*/manifest.json"))


async def test_bad_submissions_are_refused_before_anything_runs(orchestrator: Orchestrator) -> None:
    stub = orchestrator.stub
    status, message = await refused(stub.SubmitRun(pb.SubmitRunRequest(pipeline="discovre")))
    assert (status, "did you mean 'discover'" in message) == ("NOT_FOUND", True)
    status, message = await refused(stub.SubmitRun(pb.SubmitRunRequest(pipeline="discover")))
    assert (status, "discover needs 'tomogram'" in message) == ("INVALID_ARGUMENT", True)
    status, message = await refused(stub.SubmitRun(pb.SubmitRunRequest(pipeline="discover", pipeline_yaml=TASKS)))
    assert (status, "and not both" in message) == ("INVALID_ARGUMENT", True)
    status, message = await refused(orchestrator.submit(TASKS.replace("runtime.SelfTest", "runtime.SelfTes", 1)))
    assert (status, "pipeline.yaml:9:" in message) == ("INVALID_ARGUMENT", True)
    status, message = await refused(orchestrator.submit(numbers="all"))
    assert (status, "numbers is 'all'; it must be a list" in message) == ("INVALID_ARGUMENT", True)
    missing = Struct()
    missing.update({"tomogram": f"{orchestrator.store.root}/default/none.mrc"})
    status, message = await refused(stub.SubmitRun(pb.SubmitRunRequest(pipeline="discover", arguments=missing)))
    assert (status, "input tomogram" in message and "none.mrc" in message) == ("NOT_FOUND", True)
    missing.update({"tomogram": "file:///etc/passwd"})
    status, message = await refused(stub.SubmitRun(pb.SubmitRunRequest(pipeline="discover", arguments=missing)))
    assert (status, "/etc/passwd" in message) == ("PERMISSION_DENIED", True)
    assert not (await stub.ListRuns(pb.ListRunsRequest())).runs


async def test_submitting_twice_is_harmless(orchestrator: Orchestrator) -> None:
    first = await orchestrator.submit(run_id="mine", numbers=[1])
    second = await orchestrator.submit(run_id="mine", numbers=[1])
    assert first.id == second.id == "mine"
    run = await orchestrator.ended(second)
    assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 1)
    status, message = await refused(orchestrator.submit(run_id="mine", numbers=[2]))
    assert (status, "run mine exists" in message) == ("ALREADY_EXISTS", True)
    assert (await refused(orchestrator.stub.GetRun(pb.GetRunRequest(run_id="none"))))[0] == "NOT_FOUND"


async def test_cancel_and_resume(orchestrator: Orchestrator) -> None:
    # Three at a time: it goes on for some seconds after the first is done, however slowly that is seen.
    run = await orchestrator.submit(numbers=list(range(24)), seconds=0.4)
    async for response in orchestrator.stub.WatchRun(pb.WatchRunRequest(run_id=run.id), timeout=60):
        if response.run.steps[0].tasks_done >= 1:
            break
    started = time.monotonic()
    run = (await orchestrator.stub.CancelRun(pb.CancelRunRequest(run_id=run.id))).run
    assert run.state == pb.RUN_STATE_CANCELLED
    run = await orchestrator.ended(run)
    assert time.monotonic() - started < 10
    done_before = run.steps[0].tasks_done
    assert 1 <= done_before < 24
    status, message = await refused(orchestrator.stub.RetryRun(pb.RetryRunRequest(run_id=run.id)))
    assert (status, "is cancelled" in message and "resume it" in message) == ("FAILED_PRECONDITION", True)
    run = (await orchestrator.stub.ResumeRun(pb.ResumeRunRequest(run_id=run.id))).run
    assert run.attempt == 2
    # Harmless on a run that goes on.
    run = (await orchestrator.stub.ResumeRun(pb.ResumeRunRequest(run_id=run.id))).run
    assert run.attempt == 2
    run = await orchestrator.ended(run)
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert run.steps[0].tasks_cached >= done_before, "what was done is found in the store"
    assert MessageToDict(run.outputs)["indices"] == list(range(24))
    assert (await orchestrator.stub.ResumeRun(pb.ResumeRunRequest(run_id=run.id))).run.attempt == 2
    assert (await orchestrator.stub.CancelRun(pb.CancelRunRequest(run_id=run.id))).run.state == pb.RUN_STATE_SUCCEEDED


async def test_a_failed_run_says_which_step_and_why(orchestrator: Orchestrator) -> None:
    run = await orchestrator.ended(await orchestrator.submit(numbers=[1], fail="NOT_FOUND"))
    assert run.state == pb.RUN_STATE_FAILED
    assert run.error == "step last failed: NOT_FOUND: failed with NOT_FOUND, as asked for"
    assert {step.id: pb.StepState.Name(step.state) for step in run.steps} == {
        "each": "STEP_STATE_SUCCEEDED",
        "last": "STEP_STATE_FAILED",
        "after": "STEP_STATE_CANCELLED",
    }
    run = await orchestrator.ended((await orchestrator.stub.ResumeRun(pb.ResumeRunRequest(run_id=run.id))).run)
    assert (run.state, run.attempt) == (pb.RUN_STATE_FAILED, 2)
    status, message = await refused(orchestrator.stub.RetryRun(pb.RetryRunRequest(run_id=run.id)))
    assert (status, "has no items set aside" in message) == ("FAILED_PRECONDITION", True)


SOME_FAIL = """
name: some-fail
parameters:
  statuses: {type: list}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${statuses}
    as: status
    with: {fail_with: "${status}", index: 7}
"""


async def test_set_aside_and_retry(orchestrator: Orchestrator) -> None:
    run = await orchestrator.ended(await orchestrator.submit(SOME_FAIL, statuses=["", "PERMISSION_DENIED"]))
    assert run.state == pb.RUN_STATE_PARTIAL
    assert [(each.step, each.item, each.status) for each in run.set_aside] == [("each", "1", "PERMISSION_DENIED")]
    status, message = await refused(orchestrator.stub.ResumeRun(pb.ResumeRunRequest(run_id=run.id)))
    assert (status, "retry it" in message) == ("FAILED_PRECONDITION", True)
    run = (await orchestrator.stub.RetryRun(pb.RetryRunRequest(run_id=run.id))).run
    assert run.attempt == 2
    run = await orchestrator.ended(run)
    assert run.state == pb.RUN_STATE_PARTIAL
    assert run.steps[0].tasks_cached == 1


def rows_of(database: Path, run_id: str) -> dict[str, int]:
    """How many rows each table has of a run and of its workflows; tables without any are left out."""
    counts = {}
    with contextlib.closing(sqlite3.connect(database)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            columns = {column[1] for column in connection.execute(f"PRAGMA table_info({table})")}
            for column in columns & {"run_id", "workflow_uuid"}:
                query = f"SELECT count(*) FROM {table} WHERE {column} = ? OR {column} LIKE ?"
                (count,) = connection.execute(query, (run_id, f"{run_id}:%")).fetchone()
                if count:
                    counts[table] = count
    return counts


async def test_a_run_that_has_ended_is_forgotten(orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    stub, database = orchestrator.stub, orchestrator.home / "orchestrator.sqlite"
    ours = await orchestrator.submit(run_id="mine", numbers=[1, 2], seconds=0.2)
    status, message = await refused(stub.ForgetRun(pb.ForgetRunRequest(run_id="mine")))
    assert status == "FAILED_PRECONDITION"
    assert message.startswith(("run mine is running:", "run mine is queued:"))
    # Its id begins like the other's; and the result of 2 is needed by both.
    other = await orchestrator.ended(await orchestrator.submit(run_id="mine2", numbers=[2, 3], seconds=0.2))
    run = await orchestrator.ended(ours)
    assert run.state == other.state == pb.RUN_STATE_SUCCEEDED
    of_other = rows_of(database, "mine2")
    kept = rows_of(database, "mine")
    assert kept.keys() >= {"cryofleet_runs", "cryofleet_attempts", "cryofleet_progress", "workflow_status"}
    manifests = set((orchestrator.home / "store" / "default").glob("*/manifest.json"))

    # Cut off in the middle, it is asked for once more.
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "forget", cut_off)
        assert (await refused(stub.ForgetRun(pb.ForgetRunRequest(run_id="mine"))))[0] == "INTERNAL"
    assert (await stub.GetRun(pb.GetRunRequest(run_id="mine"))).run == run
    await stub.ForgetRun(pb.ForgetRunRequest(run_id="mine"))
    assert rows_of(database, "mine") == {}
    assert rows_of(database, "mine2") == of_other
    for call in (stub.GetRun(pb.GetRunRequest(run_id="mine")), stub.ForgetRun(pb.ForgetRunRequest(run_id="mine"))):
        assert await refused(call) == ("NOT_FOUND", "there is no run 'mine'")
    assert [each.id for each in (await stub.ListRuns(pb.ListRunsRequest())).runs] == ["mine2"]
    assert set((orchestrator.home / "store" / "default").glob("*/manifest.json")) == manifests, "results stay"

    # Another run may have the id.
    again = await orchestrator.ended(await orchestrator.submit(COUNT, run_id="mine"))
    assert (again.pipeline, again.attempt, MessageToDict(again.outputs)) == ("count", 1, {"index": 4, "rounds": 4})
    await stub.ForgetRun(pb.ForgetRunRequest(run_id="mine"))
    age(orchestrator.home / "store")
    found = (await stub.CollectGarbage(pb.CollectGarbageRequest(delete=True))).results
    assert len(found) == 1 + 4, "the result of 1, and the rounds; what the other run has, too, stays"
    again = await orchestrator.ended(await orchestrator.submit(run_id="mine", numbers=[1, 2], seconds=0.2))
    assert [(step.tasks_done, step.tasks_cached) for step in again.steps] == [(2, 1), (1, 1), (1, 1)]


def cut_off(*_: Any) -> None:
    raise RuntimeError("cut off")


def age(folder: Path) -> None:
    """Makes all files of a store two hours old."""
    two_hours_ago = time.time() - 7200
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (two_hours_ago, two_hours_ago))


async def test_the_calls_of_a_forgotten_run_have_stopped(orchestrator: Orchestrator) -> None:
    stub = orchestrator.stub
    run = await orchestrator.submit(numbers=[1, 2, 3], seconds=30)
    async for response in stub.WatchRun(pb.WatchRunRequest(run_id=run.id), timeout=60):
        if response.run.steps[0].fraction > 0:
            break
    await stub.CancelRun(pb.CancelRunRequest(run_id=run.id))
    await stub.ForgetRun(pb.ForgetRunRequest(run_id=run.id))
    assert rows_of(orchestrator.home / "orchestrator.sqlite", run.id) == {}
    async with asyncio.timeout(10):
        while (await stub.GetPools(pb.GetPoolsRequest())).pools[0].instances[0].slots_free < 3:
            await asyncio.sleep(0.1)
    # What the trackers of progress still have is not written.
    await asyncio.sleep(1.2)
    assert rows_of(orchestrator.home / "orchestrator.sqlite", run.id) == {}


COUNT = """
name: count
parameters:
  most: {type: integer, default: 20}
  seconds: {type: number, default: 0}
steps:
  - id: count
    repeat: ${most}
    carry: {index: 0}
    next: {index: "${one.next_index}"}
    until: ${one.counted}
    steps:
      - id: one
        op: runtime.SelfTest
        with: {index: "${count.index}", count_to: 4, seconds: "${seconds}"}
outputs:
  index: ${count.index}
  rounds: ${count.rounds}
"""


async def test_a_repeat_is_watched_cancelled_and_resumed(orchestrator: Orchestrator) -> None:
    stub = orchestrator.stub
    status, message = await refused(orchestrator.submit(COUNT, most=0))
    assert (status, message) == (
        "INVALID_ARGUMENT",
        "pipeline.yaml:8: step 'count': 'repeat' is 0; it must be an integer from 1 to 1000",
    )
    request = pb.EstimateRunRequest(pipeline_yaml=COUNT)
    assert (await stub.EstimateRun(request)).tasks == 20
    run = await orchestrator.submit(COUNT, seconds=1)
    async for response in stub.WatchRun(pb.WatchRunRequest(run_id=run.id), timeout=60):
        if response.run.steps[0].phase in ("round 2 of 20", "round 3 of 20"):
            break
    assert [step.id for step in response.run.steps] == ["count", "count.one"]
    run = (await stub.CancelRun(pb.CancelRunRequest(run_id=run.id))).run
    assert run.state == pb.RUN_STATE_CANCELLED
    run = await orchestrator.ended(run)
    assert run.steps[0].tasks_done in (1, 2, 3)
    run = await orchestrator.ended((await stub.ResumeRun(pb.ResumeRunRequest(run_id=run.id))).run)
    assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 2), run.error
    assert MessageToDict(run.outputs) == {"index": 4, "rounds": 4}
    assert (run.steps[1].tasks_done, run.steps[1].tasks_total) == (4, 4)
    assert run.steps[1].tasks_cached >= 1, "what was done is found in the store"


async def test_pools_and_pipelines(orchestrator: Orchestrator) -> None:
    run = await orchestrator.submit(numbers=list(range(40)), seconds=0.5)
    async for response in orchestrator.stub.WatchRun(pb.WatchRunRequest(run_id=run.id), timeout=60):
        if response.run.steps[0].tasks_total:
            break
    pools = {pool.name: pool for pool in (await orchestrator.stub.GetPools(pb.GetPoolsRequest())).pools}
    assert list(pools) == ["io"]
    instance = pools["io"].instances[0]
    assert (instance.instance, instance.ready, instance.slots_total) == ("worker", True, 3)
    assert instance.address == f"unix:{orchestrator.home}/s/s.sock"
    await orchestrator.stub.CancelRun(pb.CancelRunRequest(run_id=run.id))
    pipelines = {p.name: p for p in (await orchestrator.stub.ListPipelines(pb.ListPipelinesRequest())).pipelines}
    discover = pipelines["discover"]
    parameters = {parameter.name: parameter for parameter in discover.parameters}
    assert (parameters["tomogram"].type, parameters["tomogram"].required) == ("file", True)
    assert parameters["particle_diameter_angstrom"].unit == "Å"
    assert parameters["particle_diameter_angstrom"].default_value.number_value > 0
    noise = {parameter.name: parameter for parameter in pipelines["simulate-tomogram"].parameters}["noise"]
    assert [choice.string_value for choice in noise.choices] == ["none", "gaussian", "poisson"]
    assert "pick: picking.DifferenceOfGaussians" in discover.steps
    assert "particles" in discover.outputs


async def test_pools_tell_what_runs_where(orchestrator: Orchestrator) -> None:
    before = time.time()
    run = await orchestrator.submit(numbers=[1, 2], seconds=20, project="mine")
    async with asyncio.timeout(20):
        instance = pb.InstanceStatus()
        while len(instance.running) < 2:
            await asyncio.sleep(0.1)
            instance = (await orchestrator.stub.GetPools(pb.GetPoolsRequest())).pools[0].instances[0]
    assert instance.memory_total_bytes == 2**30
    assert 0 < instance.memory_free_bytes <= 2**30
    for operation in instance.running:
        assert (operation.operation, operation.run_id, operation.project) == ("runtime.SelfTest", run.id, "mine")
        assert before - 1 <= operation.started_at.ToNanoseconds() / 1e9 <= time.time()
        assert 0 <= operation.fraction < 1
    started = [operation.started_at.ToNanoseconds() for operation in instance.running]
    assert started == sorted(started)
    await orchestrator.stub.CancelRun(pb.CancelRunRequest(run_id=run.id))
    async with asyncio.timeout(20):
        while instance.running:
            await asyncio.sleep(0.1)
            instance = (await orchestrator.stub.GetPools(pb.GetPoolsRequest())).pools[0].instances[0]


async def test_runs_are_counted_by_state(orchestrator: Orchestrator) -> None:
    def count(name: str, state: str) -> float:
        value = orchestrator.registry.get_sample_value(name, {"state": state})
        assert value is not None
        return value

    good = await orchestrator.submit(numbers=[1])
    bad = await orchestrator.submit(numbers=[1], fail="NOT_FOUND")
    await asyncio.gather(orchestrator.ended(good), orchestrator.ended(bad))
    assert count("cryofleet_runs_ended_total", "succeeded") == 1
    assert count("cryofleet_runs_ended_total", "failed") == 1
    going_on = await orchestrator.submit(numbers=[1], seconds=20)
    async with asyncio.timeout(20):
        while count("cryofleet_runs", "running") != 1:
            await asyncio.sleep(0.1)
            await orchestrator.stub.GetPools(pb.GetPoolsRequest())  # counts anew
    assert count("cryofleet_runs", "queued") == 0
    await orchestrator.stub.CancelRun(pb.CancelRunRequest(run_id=going_on.id))
    await orchestrator.stub.GetPools(pb.GetPoolsRequest())
    assert count("cryofleet_runs", "running") == 0
    assert count("cryofleet_runs_ended_total", "cancelled") == 1


async def test_an_estimate_knows_what_the_store_has(orchestrator: Orchestrator) -> None:
    arguments = Struct()
    arguments.update({"numbers": [1, 2, 3]})
    request = pb.EstimateRunRequest(pipeline_yaml=TASKS, arguments=arguments)
    estimate = await orchestrator.stub.EstimateRun(request)
    steps = {step.id: step for step in estimate.steps}
    assert (steps["each"].tasks, steps["each"].tasks_cached, steps["each"].known) == (3, 0, True)
    assert (steps["after"].tasks, steps["after"].known) == (1, False), "it depends on a result that is not there"
    assert estimate.tasks == 5
    assert not list((orchestrator.home / "store").glob("*/*/manifest.json"))
    await orchestrator.ended(await orchestrator.submit(numbers=[1, 2]))
    steps = {step.id: step for step in (await orchestrator.stub.EstimateRun(request)).steps}
    assert (steps["each"].tasks, steps["each"].tasks_cached) == (3, 2)
    assert (steps["after"].tasks_cached, steps["after"].known) == (1, True)


async def test_a_database_that_is_away_is_told_of(orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    run = await orchestrator.ended(await orchestrator.submit(numbers=[1]))
    monkeypatch.setattr("orchestrator.engine._RETRY_SECONDS", 0.02)

    def away(*_: Any) -> Any:
        raise sa.exc.OperationalError("SELECT 1", {}, Exception("connection refused"))

    stub = orchestrator.stub
    calls: dict[str, Callable[[], Any]] = {
        "GetRun": lambda: stub.GetRun(pb.GetRunRequest(run_id=run.id)),
        "ListRuns": lambda: stub.ListRuns(pb.ListRunsRequest()),
        "WatchRun": lambda: anext(aiter(stub.WatchRun(pb.WatchRunRequest(run_id=run.id)))),
        "CancelRun": lambda: stub.CancelRun(pb.CancelRunRequest(run_id=run.id)),
        "SubmitRun": lambda: orchestrator.submit(numbers=[1]),
        "CollectGarbage": lambda: stub.CollectGarbage(pb.CollectGarbageRequest()),
    }
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.engine.ANSWER_SECONDS", 0.1)
        patch.setattr("orchestrator.service.AGE_SECONDS", 0.0)
        for method in ("whole", "attempt", "newest", "create", "held"):
            patch.setattr(RunStore, method, away)
        for call in calls.values():
            status, message = await refused(call())
            assert (status, "database is away: connection refused" in message) == ("UNAVAILABLE", True)
    failures = 3

    def back_soon(store: RunStore, *arguments: Any) -> Any:
        nonlocal failures
        failures -= 1
        return newest(store, *arguments) if failures < 0 else away()

    newest = RunStore.newest
    monkeypatch.setattr(RunStore, "newest", back_soon)
    assert [each.id for each in (await calls["ListRuns"]()).runs] == [run.id], "a short absence is not noticed"


async def test_a_failed_run_does_not_hold_its_results_for_ever(orchestrator: Orchestrator) -> None:
    run = await orchestrator.ended(await orchestrator.submit(numbers=[1, 2], fail="NOT_FOUND"))
    assert run.state == pb.RUN_STATE_FAILED
    manifests = list((orchestrator.home / "store" / "default").glob("*/manifest.json"))
    assert len(manifests) == 2
    age(orchestrator.home / "store")
    young = await orchestrator.stub.CollectGarbage(pb.CollectGarbageRequest(older_than_hours=1, delete=True))
    assert not young.results, "the run failed less than an hour ago"
    old = await orchestrator.stub.CollectGarbage(pb.CollectGarbageRequest(delete=True))
    assert [each.operation for each in old.results] == ["runtime.SelfTest"] * 2
    again = await orchestrator.ended((await orchestrator.stub.ResumeRun(pb.ResumeRunRequest(run_id=run.id))).run)
    assert (again.steps[0].tasks_done, again.steps[0].tasks_cached) == (2, 0), "resumed, it does its work once more"


async def test_garbage_is_what_no_run_and_no_pin_needs(orchestrator: Orchestrator) -> None:
    run = await orchestrator.ended(await orchestrator.submit(numbers=[1, 2]))
    assert run.state == pb.RUN_STATE_SUCCEEDED
    made = []
    for index in (900, 901):
        reply = await call_operation(orchestrator.instance, runtime_pb2.SelfTestRequest(index=index), project="default")
        made.append(reply.provenance.manifest_uri)
    checkpoint = f"{orchestrator.store.root}/default/_work/{'0' * 64}/state"
    orchestrator.store.put(checkpoint, b"left behind")
    await orchestrator.stub.PinArtifact(pb.PinArtifactRequest(uri=made[0]))
    fresh = await orchestrator.stub.CollectGarbage(pb.CollectGarbageRequest(older_than_hours=1, delete=True))
    assert not fresh.results, "what is younger stays"
    fresh = await orchestrator.stub.CollectGarbage(pb.CollectGarbageRequest(delete=True))
    assert not fresh.results, "what is just written stays"
    age(orchestrator.home / "store")
    found = await orchestrator.stub.CollectGarbage(pb.CollectGarbageRequest())
    wanted = {made[1].rpartition("/")[0]: "runtime.SelfTest", checkpoint.rpartition("/")[0]: ""}
    assert {each.uri: each.operation for each in found.results} == wanted
    assert found.size_bytes == sum(each.size_bytes for each in found.results) > 0
    assert manifest_for(orchestrator.store, made[1]) is not None, "only listed"
    deleted = await orchestrator.stub.CollectGarbage(pb.CollectGarbageRequest(delete=True, project="default"))
    assert {each.uri for each in deleted.results} == set(wanted)
    assert not orchestrator.store.exists(made[1])
    assert not orchestrator.store.exists(checkpoint)
    assert orchestrator.store.exists(made[0])
    await orchestrator.stub.PinArtifact(pb.PinArtifactRequest(uri=made[0], unpin=True))
    deleted = await orchestrator.stub.CollectGarbage(pb.CollectGarbageRequest(delete=True))
    assert [each.uri for each in deleted.results] == [made[0].rpartition("/")[0]]
    # All of the run's own results are still there.
    again = await orchestrator.ended(await orchestrator.submit(numbers=[1, 2]))
    assert [step.tasks_cached for step in again.steps] == [2, 1, 1]
    nothing = f"{orchestrator.store.root}/default/{'a' * 64}/x"
    assert find(orchestrator.store, "default", "a" * 64) is None
    assert (await refused(orchestrator.stub.PinArtifact(pb.PinArtifactRequest(uri=nothing))))[0] == "NOT_FOUND"
