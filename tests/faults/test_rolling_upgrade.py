"""Processes of one version are replaced, one by one, by those of the next while a run goes on."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from cryofleet.artifacts import Manifest
from cryofleet.channels import open_channel
from cryofleet.storage import Store
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc
from orchestrator.database import make_database
from orchestrator.schema import MIGRATIONS, version
from tests.faults.test_shards_after_crash import Orchestrators
from tests.faults.two_versions import NEXT, NEXT_TABLES, make_next_version
from tests.postgres import new_database, running_postgres
from tests.unit.orchestrator.fake import short_folder

TASKS = 100
"""Two chunks."""
SLOTS = 4
PATIENCE_SECONDS = 150
"""On a machine that has much else to do."""
PIPELINE = """
name: mapped
parameters:
  numbers: {type: list}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${numbers}
    as: number
    with: {index: "${number}", seconds: 0.5}
outputs:
  indices: ${each.index}
"""
"""As it was when the run was submitted."""
CHANGED = PIPELINE.replace("indices: ${each.index}", "next: ${each.next_index}").replace("0.5}", "0}")


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture
async def home() -> AsyncIterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Processes:
    """Services and orchestrators of both versions."""

    def __init__(self, home: Path, database: str, next_version: dict[str, str]) -> None:
        self.home = home
        self._environment = {
            "CRYOFLEET_HOME": str(home),
            "CRYOFLEET_STORE": f"file://{home}/store",
            "CRYOFLEET_DATABASE": database,
            "CRYOFLEET_PIPELINES": str(home / "pipelines"),
            "CRYOFLEET_POOL_IO": f"unix:{home}/old.sock,unix:{home}/new.sock",
            "CRYOFLEET_SLOTS": str(SLOTS),
            "CRYOFLEET_DRAIN_SECONDS": "20",
            "TEST_EXPIRY_SECONDS": "3",
        }
        self._next = next_version
        self.old = Orchestrators(home, self._environment)
        self.new = Orchestrators(home, {**self._environment, **next_version})
        self._services: dict[str, asyncio.subprocess.Process] = {}
        self._orchestrators: dict[str, int] = {}

    async def open(self) -> None:
        """All that takes long; the new service does not stand where the pool looks for it yet."""
        await asyncio.gather(self.old.open(), self.new.open(), self._start("old", {}), self._start("new", self._next))

    async def _start(self, name: str, version: dict[str, str]) -> None:
        socket = self.home / ("hidden.sock" if name == "new" else "old.sock")
        own = {"CRYOFLEET_ADDRESS": f"unix:{socket}", "CRYOFLEET_INSTANCE": name}
        with (self.home / f"{name}.log").open("ab") as log:
            self._services[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.io"),
                env={**os.environ, **self._environment, **own, **version},
                stdout=log,
                stderr=log,
            )
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not socket.exists():
                await asyncio.sleep(0.05)

    def show_new_service(self) -> None:
        (self.home / "hidden.sock").rename(self.home / "new.sock")

    async def drain_service(self, name: str) -> int:
        """Stops it as Kubernetes does; its exit code."""
        process = self._services.pop(name)
        process.terminate()
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await process.wait()

    async def start_orchestrator(self, name: str, which: Orchestrators) -> None:
        self._orchestrators[name] = await which.start(name)

    async def drain_orchestrator(self, name: str) -> None:
        process = self._orchestrators.pop(name)
        os.kill(process, signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while Path(f"/proc/{process}").exists():
                await asyncio.sleep(0.02)

    def computed(self, name: str) -> list[str]:
        """Keys of the results that a service says it has computed, in order."""
        lines = (self.home / f"{name}.log").read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [entry["key"] for entry in entries if entry["message"] == "computed"]

    async def close(self) -> None:
        for process in self._orchestrators.values():
            os.kill(process, signal.SIGKILL)
        for service in self._services.values():
            service.kill()
            await service.wait()
        await asyncio.gather(self.old.close(), self.new.close())


async def ended(stub: Any, run_id: str) -> pb.Run:
    watch = stub.WatchRun(pb.WatchRunRequest(run_id=run_id), wait_for_ready=True, timeout=PATIENCE_SECONDS)
    async for response in watch:
        run: pb.Run = response.run
    return run


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "other_steps",
    [pytest.param(False, id="same-steps"), pytest.param(True, id="other-steps", marks=pytest.mark.long)],
)
async def test_a_run_goes_on_over_an_upgrade(postgres: str, home: Path, other_steps: bool) -> None:
    url = await asyncio.to_thread(new_database, postgres, "other_steps" if other_steps else "same_steps")
    (home / "pipelines").mkdir()
    (home / "pipelines" / "mapped.yaml").write_text(PIPELINE)
    for name in ("o0", "o1"):
        (home / name).mkdir(mode=0o700)
    processes = Processes(home, url, await asyncio.to_thread(make_next_version, home / "next", other_steps))
    database = make_database(url)

    def done() -> int:
        return len(processes.computed("old")) + len(processes.computed("new"))

    def alive() -> dict[str, str]:
        with database.connect() as connection:
            query = "SELECT name, application_version FROM cryofleet_orchestrators WHERE heartbeat > 0"
            return {row.name: row.application_version for row in connection.execute(sa.text(query))}

    try:
        await processes.open()
        for name in ("o0", "o1"):
            await processes.start_orchestrator(name, processes.old)
        async with open_channel(f"unix:{home}/o0/o.sock") as to_0, open_channel(f"unix:{home}/o1/o.sock") as to_1:
            first: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(to_0)
            second: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(to_1)
            await second.ListRuns(pb.ListRunsRequest(), wait_for_ready=True, timeout=PATIENCE_SECONDS)
            arguments = Struct()
            arguments.update({"numbers": list(range(TASKS))})
            request = pb.SubmitRunRequest(pipeline="mapped", arguments=arguments, run_id="run")
            await first.SubmitRun(request, wait_for_ready=True, timeout=PATIENCE_SECONDS)
            await until(lambda: done() >= 2 * SLOTS)
            (home / "pipelines" / "mapped.yaml").write_text(CHANGED)

            # The services.
            processes.show_new_service()
            await until(lambda: bool(processes.computed("new")))
            assert await processes.drain_service("old") == 0
            by_old = len(processes.computed("old"))

            # One orchestrator: its tables are the new ones, and the other goes on with them.
            assert version(database) == len(MIGRATIONS)
            await processes.drain_orchestrator("o1")
            await processes.start_orchestrator("o1", processes.new)
            await until(lambda: version(database) == NEXT_TABLES)
            await second.ListRuns(pb.ListRunsRequest(), wait_for_ready=True, timeout=PATIENCE_SECONDS)
            assert alive() == {"o0": "1", "o1": "2" if other_steps else "1"}
            before = done()
            await until(lambda: done() >= before + SLOTS)
            run = (await first.GetRun(pb.GetRunRequest(run_id="run"))).run
            assert (run.state, run.attempt) == (pb.RUN_STATE_RUNNING, 1), run.error

            # And the other.
            await processes.drain_orchestrator("o0")
            await processes.start_orchestrator("o0", processes.new)
            run = await ended(second, "run")
        assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 2 if other_steps else 1), run.error
        assert MessageToDict(run.outputs) == {"indices": list(range(TASKS))}, "by the pipeline as it was submitted"
        assert run.steps[0].tasks_done == TASKS
        if other_steps:
            assert run.steps[0].tasks_cached >= 2 * SLOTS, "begun anew, it finds what was done"
    finally:
        await processes.close()
        database.dispose()
    computed = Counter([*processes.computed("old"), *processes.computed("new")])
    assert len(computed) == TASKS
    assert set(computed.values()) == {1}, "nothing is done twice"
    store = Store(f"file://{home}/store")
    made = Counter(
        Manifest.from_json(store.get(found.uri)).software
        for found in store.list(store.root)
        if found.uri.endswith("/manifest.json")
    )
    assert made.pop(f"cryofleet {NEXT}") == TASKS - by_old
    assert list(made.values()) == [by_old], "both versions have done their part"


async def test_an_orchestrator_of_the_version_before_is_refused(postgres: str, home: Path) -> None:
    """Once the tables are newer, the old one does not start any more, and says why."""
    url = await asyncio.to_thread(new_database, postgres, "refused")
    database = make_database(url)
    with database.begin() as connection:
        connection.execute(
            sa.text("CREATE TABLE cryofleet_schema (version INTEGER PRIMARY KEY, applied_at FLOAT, applied_by TEXT)")
        )
        connection.execute(sa.text(f"INSERT INTO cryofleet_schema VALUES ({NEXT_TABLES}, 0, '{NEXT}')"))
    database.dispose()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orchestrator"),
        env={**os.environ, "CRYOFLEET_HOME": str(home), "CRYOFLEET_DATABASE": url},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 1
    last = json.loads(said.decode().splitlines()[-1])
    assert f"has tables of version {NEXT_TABLES}, made by Cryofleet {NEXT}" in last["message"]
    assert "Traceback" not in said.decode()
