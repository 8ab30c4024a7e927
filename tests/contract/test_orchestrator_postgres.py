"""Several orchestrators on one PostgreSQL: they share the work, and a survivor goes on with a dead one's runs."""

from __future__ import annotations

import asyncio
import json
import math
import random
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from cryofleet.channels import open_channel
from cryofleet.errors import FailedPrecondition, NotFound
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc, runtime_pb2
from orchestrator.database import make_database
from orchestrator.inboxes.record import InboxRecord
from orchestrator.runs import RunRow, RunStore
from orchestrator.schema import migrate
from orchestrator.views import AGE_SECONDS
from tests.faults.test_shards_after_crash import Orchestrators, ended, kill
from tests.postgres import new_database, running_postgres
from tests.unit.orchestrator.fake import FakeService, short_folder
from tests.unit.orchestrator.test_inbox import check_order, check_several_take
from tests.unit.orchestrator.test_owners import check_counted_one_by_one
from tests.unit.orchestrator.test_schema import (
    check_goes_on,
    check_migrated_once,
    check_nothing_changes,
    check_tables,
)

PIPELINE = """
name: mapped
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
TASKS = 200
"""Several chunks, for several orchestrators to share."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL 18 of its own."""
    with running_postgres() as url:
        yield url


@pytest.fixture
async def home() -> AsyncIterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_record_of_runs(postgres: str) -> None:
    engine = make_database(postgres)
    try:
        with engine.connect() as connection:
            assert int(connection.execute(sa.text("SHOW server_version_num")).scalar_one()) >= 180000
        store = RunStore(engine)
        row = RunRow("r", "default", "p", "p.yaml", "name: p", {"a": [1.5]}, 1.0)
        assert store.create(row)
        assert not store.create(row)
        assert store.run("r") == row
        assert store.set_started("r", 1)
        assert store.set_started("r", 1), "a replay goes on"
        assert store.set_finished("r", 1, "failed", "why", {"x": 1})
        assert not store.set_finished("r", 1, "succeeded"), "it has ended"
        assert not store.set_started("r", 1)
        assert store.held(time.time() - 60.0).since == math.inf
        assert store.next_attempt("r", 1)
        assert not store.next_attempt("r", 1), "only one caller adds it"
        assert [(a.attempt, a.state) for _, a in store.newest("default", 5)] == [(2, "queued")]
        store.write_units({("r", 2, "s"): '{"path": "s", "total": 3}'})
        store.write_units({("r", 2, "s"): '{"path": "s", "total": 4}', ("r", 2, "t"): '{"path": "t"}'})
        assert {name: unit.total for name, unit in store.units("r", 2).items()} == {"s": 4, "t": 0}
        assert store.held(time.time() - 60.0).since == row.created_at, "the second attempt goes on"
        with pytest.raises(FailedPrecondition, match="run r is queued"):
            store.forget("r")
        assert store.run("r") == row, "refused, it has lost nothing"
        assert store.set_finished("r", 2, "cancelled")
        store.forget("r")
        for lost in (store.run, store.attempt, store.forget):
            with pytest.raises(NotFound):
                lost("r")
        with pytest.raises(NotFound):
            store.next_attempt("r", 2)
        store.write_units({("r", 2, "s"): '{"path": "s"}', ("q", 1, "s"): '{"path": "s", "total": 1}'})
        assert store.units("r", 2) == store.units("q", 1) == {}, "nobody would ever delete them"
        store.beat("one")
        assert store.claim_expired("two", ["one"], 60.0) == []
        store.leave("one")
        assert store.claim_expired("two", ["one"], 60.0) == ["one"]
        assert store.claim_expired("three", ["one"], 60.0) == [], "the second comes too late"
    finally:
        engine.dispose()


def test_owners_of_runs(postgres: str) -> None:
    engine = make_database(postgres)
    try:
        RunStore(engine)
        with engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE cryofleet_runs DROP COLUMN owner"))
            connection.execute(sa.text("DROP TABLE cryofleet_schema"))
        with ThreadPoolExecutor(4) as threads:  # orchestrators that start at the same time
            stores = list(threads.map(RunStore, [engine] * 4))
        check_counted_one_by_one(stores[0])
        for run, _ in stores[0].newest("", 100):
            stores[0].set_finished(run.run_id, 1, "cancelled")
            stores[0].forget(run.run_id)
    finally:
        engine.dispose()


def test_versions_of_the_tables(postgres: str) -> None:
    check_migrated_once(new_database(postgres, "migrated_at_once"))
    engine = make_database(new_database(postgres, "migrated"))
    try:
        check_goes_on(engine, 1)
    finally:
        engine.dispose()
    engine = make_database(new_database(postgres, "checked"))
    try:
        check_tables(engine)
        check_nothing_changes(engine)
    finally:
        engine.dispose()


def test_the_record_of_inboxes(postgres: str) -> None:
    engine = make_database(new_database(postgres, "inboxes"))
    try:
        migrate(engine)
        record = InboxRecord(engine)
        check_order(record)
        check_several_take(record)
    finally:
        engine.dispose()


def recorded_tasks(url: str, run_id: str) -> set[str]:
    engine = make_database(url)
    with engine.connect() as connection:
        rows = connection.execute(
            sa.text("SELECT output FROM dbos.operation_outputs WHERE function_name = 'task'")
        ).scalars()
        tasks = {json.loads(row)["task"] for row in rows}
    engine.dispose()
    return {task for task in tasks if task.startswith(f"{run_id}:")}


async def test_a_survivor_goes_on_with_a_dead_orchestrators_runs(postgres: str, home: Path) -> None:
    chance = random.Random(5)
    service = FakeService("worker", slots=8)

    async def take_a_while(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        await asyncio.sleep(chance.uniform(0.0, 0.1))

    service.behave = take_a_while
    await service.start(f"unix:{home}/worker.sock")
    orchestrators = Orchestrators(
        home,
        {
            "CRYOFLEET_HOME": str(home),
            "CRYOFLEET_DATABASE": postgres,
            "CRYOFLEET_LOG_LEVEL": "WARNING",
            "CRYOFLEET_POOL_IO": f"unix:{home}/worker.sock",
            "TEST_EXPIRY_SECONDS": "3",
        },
    )
    await orchestrators.open()
    processes = {name: await orchestrators.start(name) for name in ("a", "b")}
    try:
        async with open_channel(f"unix:{home}/a/o.sock") as to_a, open_channel(f"unix:{home}/b/o.sock") as to_b:
            a: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(to_a)
            b: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(to_b)
            await b.ListRuns(pb.ListRunsRequest(), wait_for_ready=True, timeout=60)
            arguments = Struct()
            arguments.update({"numbers": list(range(TASKS))})
            request = pb.SubmitRunRequest(pipeline_yaml=PIPELINE, arguments=arguments, run_id="shared")
            await a.SubmitRun(request, wait_for_ready=True, timeout=60)
            async with asyncio.timeout(60):
                while len(recorded_tasks(postgres, "shared")) < 20:
                    await asyncio.sleep(0.05)
            await kill(processes.pop("a"))
            before = recorded_tasks(postgres, "shared")
            executed = set(service.calls)
            service.calls.clear()
            assert 20 <= len(before) < TASKS
            run = await ended(b, "shared")
            assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 1), run.error
            assert MessageToDict(run.outputs)["indices"] == list(range(TASKS))
            assert run.steps[0].tasks_done == TASKS
            assert not before & set(service.calls), "what was recorded is not done again"
            assert executed | set(service.calls) == {f"shared:1/each[{index}]" for index in range(TASKS)}
    finally:
        for process in processes.values():
            await kill(process)
        await orchestrators.close()
        await service.kill()


class Shut:
    """A database of its own in the server, which can be shut: who is connected is cut off, and nobody gets in."""

    def __init__(self, postgres: str) -> None:
        self._admin = make_database(postgres)
        self._do("CREATE DATABASE shut")
        self.url = sa.make_url(postgres).set(database="shut").render_as_string(hide_password=False)

    def _do(self, *statements: str) -> None:
        with self._admin.connect() as connection:
            autocommit = connection.execution_options(isolation_level="AUTOCOMMIT")
            for statement in statements:
                autocommit.execute(sa.text(statement))

    def shut(self) -> None:
        self._do(
            "ALTER DATABASE shut ALLOW_CONNECTIONS false",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'shut'",
        )

    def open(self) -> None:
        self._do("ALTER DATABASE shut ALLOW_CONNECTIONS true")

    def dispose(self) -> None:
        self._admin.dispose()


async def test_callers_are_told_that_postgresql_is_away_and_the_run_goes_on(postgres: str, home: Path) -> None:
    database = await asyncio.to_thread(Shut, postgres)
    service = FakeService("worker", slots=8)

    async def take_a_while(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        await asyncio.sleep(0.1)

    service.behave = take_a_while
    await service.start(f"unix:{home}/worker.sock")
    orchestrators = Orchestrators(
        home,
        {
            "CRYOFLEET_HOME": str(home),
            "CRYOFLEET_DATABASE": database.url,
            "CRYOFLEET_LOG_LEVEL": "ERROR",
            "CRYOFLEET_POOL_IO": f"unix:{home}/worker.sock",
            "TEST_ANSWER_SECONDS": "0.5",
        },
    )
    await orchestrators.open()
    process = await orchestrators.start("c")
    try:
        async with open_channel(f"unix:{home}/c/o.sock") as channel:
            stub: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            arguments = Struct()
            arguments.update({"numbers": list(range(TASKS))})
            request = pb.SubmitRunRequest(pipeline_yaml=PIPELINE, arguments=arguments, run_id="away")
            await stub.SubmitRun(request, wait_for_ready=True, timeout=60)
            async with asyncio.timeout(60):
                while len(service.done) < 20:
                    await asyncio.sleep(0.02)
            watch = aiter(stub.WatchRun(pb.WatchRunRequest(run_id="away"), timeout=60))
            await anext(watch)
            await asyncio.to_thread(database.shut)
            # What was read a moment ago is still told.
            await asyncio.sleep(3 * AGE_SECONDS)
            for call in (
                stub.GetRun(pb.GetRunRequest(run_id="away"), timeout=30),
                stub.ListRuns(pb.ListRunsRequest(), timeout=30),
                _end(watch),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "the orchestrator's database is away" in (caught.value.details() or "")
            await asyncio.to_thread(database.open)
            run = await ended(stub, "away")
            assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 1), run.error
            assert MessageToDict(run.outputs)["indices"] == list(range(TASKS))
    finally:
        await kill(process)
        await orchestrators.close()
        await service.kill()
        database.dispose()


async def test_a_pause_holds_for_all_orchestrators(postgres: str, home: Path) -> None:
    service = FakeService("worker", slots=8)
    await service.start(f"unix:{home}/worker.sock")
    orchestrators = Orchestrators(
        home,
        {
            "CRYOFLEET_HOME": str(home),
            "CRYOFLEET_DATABASE": postgres,
            "CRYOFLEET_LOG_LEVEL": "WARNING",
            "CRYOFLEET_POOL_IO": f"unix:{home}/worker.sock",
        },
    )
    await orchestrators.open()
    processes = [await orchestrators.start(name) for name in ("d", "e")]
    try:
        async with open_channel(f"unix:{home}/d/o.sock") as to_d, open_channel(f"unix:{home}/e/o.sock") as to_e:
            d: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(to_d)
            e: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(to_e)
            for stub in (d, e):
                await stub.ListRuns(pb.ListRunsRequest(), wait_for_ready=True, timeout=60)

            async def paused(stub: Any) -> bool:
                pools = {pool.name: pool for pool in (await stub.GetPools(pb.GetPoolsRequest())).pools}
                return bool(pools["io"].HasField("paused_at"))

            await d.PausePool(pb.PausePoolRequest(pool="io"))
            assert await paused(d)
            async with asyncio.timeout(20):
                while not await paused(e):
                    await asyncio.sleep(0.1)
            arguments = Struct()
            arguments.update({"numbers": list(range(TASKS))})
            for stub, run_id in ((d, "of-d"), (e, "of-e")):
                request = pb.SubmitRunRequest(pipeline_yaml=PIPELINE, arguments=arguments, run_id=run_id)
                await stub.SubmitRun(request)
            await asyncio.sleep(2)
            assert not service.calls
            await e.ResumePool(pb.ResumePoolRequest(pool="io"))
            for run_id in ("of-d", "of-e"):
                assert (await ended(d, run_id)).state == pb.RUN_STATE_SUCCEEDED
    finally:
        for process in processes:
            await kill(process)
        await orchestrators.close()
        await service.kill()


async def _end(watch: Any) -> None:
    async for _ in watch:
        pass
