"""The orchestrator is killed at random points of a sharded run, 20 times over: every shard's result is its own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from cryofleet.channels import open_channel
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc, runtime_pb2
from tests.unit.orchestrator.fake import FakeService, short_folder

ROUNDS = 20
SHARDS = 20
ROWS = 5
SEED = 20260731

PIPELINE = """
name: sharded
inputs:
  table: {kind: particles}
parameters:
  mark: {type: integer}
steps:
  - id: before
    op: runtime.SelfTest
    with: {index: "${mark}"}
  - id: parts
    op: runtime.SelfTest
    with: {particles_uri: "${table}", index: "${before.index}"}
    shards: {over: particles_uri, size: 5}
  - id: beside
    op: runtime.SelfTest
    with: {index: "${before.index}"}
outputs:
  first_rows: ${parts.first_row}
  marks: ${parts.index}
"""


class Orchestrators:
    """Forks orchestrators, and kills them."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = home
        self._environment = environment
        self._forker: asyncio.subprocess.Process | None = None
        self._log: Any = None

    async def open(self) -> None:
        self._log = (self.home / "orchestrators.log").open("ab")
        self._forker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.faults.orchestrator_processes",
            env={**os.environ, **self._environment},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
        )
        assert await self._answer() == "ready"

    async def _answer(self) -> str:
        assert self._forker is not None
        assert self._forker.stdout is not None
        return (await self._forker.stdout.readline()).decode().strip()

    async def start(self, name: str = "") -> int:
        assert self._forker is not None
        assert self._forker.stdin is not None
        self._forker.stdin.write(f"{name}\n".encode())
        await self._forker.stdin.drain()
        return int(await self._answer())

    async def close(self) -> None:
        if self._forker is not None:
            assert self._forker.stdin is not None
            self._forker.stdin.close()
            await self._forker.wait()
        if self._log is not None:
            self._log.close()


async def kill(process: int) -> None:
    """SIGKILL, and wait until nothing is left of it."""
    os.kill(process, signal.SIGKILL)
    while Path(f"/proc/{process}").exists():
        await asyncio.sleep(0.005)


@pytest.fixture
async def home() -> AsyncIterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def recorded_tasks(database: Path) -> dict[str, dict[str, Any]]:
    """Outcomes that DBOS has kept, by task."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT output FROM operation_outputs WHERE function_name = 'task'").fetchall()
    outcomes = [json.loads(row[0]) for row in rows]
    return {outcome["task"]: outcome for outcome in outcomes}


async def ended(stub: Any, run_id: str) -> pb.Run:
    async with asyncio.timeout(60):
        async for response in stub.WatchRun(pb.WatchRunRequest(run_id=run_id), wait_for_ready=True):
            run: pb.Run = response.run
    return run


async def submit(stub: Any, run_id: str, table: str, mark: int) -> None:
    arguments = Struct()
    arguments.update({"table": table, "mark": mark})
    request = pb.SubmitRunRequest(pipeline_yaml=PIPELINE, arguments=arguments, run_id=run_id)
    await stub.SubmitRun(request, wait_for_ready=True, timeout=60)


async def test_every_shard_keeps_its_own_result(home: Path) -> None:
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    store = Store(f"file://{home}/store")
    rows = SHARDS * ROWS
    table = pd.DataFrame({"id": np.arange(rows), "x": 1.0, "y": 1.0, "z": np.arange(rows, dtype=float)})
    table_uri = f"{store.root}/default/table.parquet"
    store.put(table_uri, Particles(table, 10.0, "t", None).to_parquet())
    # It keeps no results, so that nothing that is done twice could be taken from the store.
    service = FakeService("worker", slots=4)

    async def take_a_while(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        await asyncio.sleep(chance.uniform(0.0, 0.12))

    service.behave = take_a_while
    await service.start(f"unix:{home}/worker.sock")
    address = f"unix:{home}/o/o.sock"
    orchestrators = Orchestrators(
        home,
        {
            "CRYOFLEET_HOME": str(home),
            "CRYOFLEET_ADDRESS": address,
            "CRYOFLEET_INSTANCE": "orchestrator",
            "CRYOFLEET_DATABASE": f"sqlite:///{home}/orchestrator.sqlite",
            "CRYOFLEET_LOG_LEVEL": "WARNING",
            "CRYOFLEET_POOL_IO": f"unix:{home}/worker.sock",
        },
    )
    await orchestrators.open()
    process = await orchestrators.start()
    killed_with: list[int] = []
    try:
        async with open_channel(address) as channel:
            stub: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            for round_ in range(1, ROUNDS + 1):
                run_id = f"run-{round_}"
                service.done.clear()
                await submit(stub, run_id, table_uri, round_)
                # By the work that is done, not by the clock: so the points are spread over the run on any machine.
                point = chance.randint(0, SHARDS + 1)
                async with asyncio.timeout(60):
                    while len(service.done) < point:
                        await asyncio.sleep(0.002)
                await asyncio.sleep(chance.uniform(0.0, 0.05))
                await kill(process)
                before = {
                    key: outcome
                    for key, outcome in recorded_tasks(home / "orchestrator.sqlite").items()
                    if key.startswith(f"{run_id}:")
                }
                killed_with.append(len(before))
                service.calls.clear()
                process = await orchestrators.start()
                run = await ended(stub, run_id)
                assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 1), run.error
                outputs = MessageToDict(run.outputs)
                assert outputs["first_rows"] == list(range(0, rows, ROWS)), f"round {round_}"
                assert outputs["marks"] == [round_] * SHARDS
                again = before.keys() & set(service.calls)
                assert not again, f"round {round_}: recorded, and done once more: {again}"
                after = {
                    key: outcome
                    for key, outcome in recorded_tasks(home / "orchestrator.sqlite").items()
                    if key.startswith(f"{run_id}:")
                }
                assert len(after) == SHARDS + 2, "one record for each task"
                for key, outcome in before.items():
                    assert after[key] == outcome, f"round {round_}: {key} was recorded, and has changed"
                for shard in range(SHARDS):
                    result = after[f"{run_id}:1/parts[{shard}]"]["result"]
                    assert (result["first_row"], result["index"]) == (shard * ROWS, round_)
                steps = {step.id: step for step in run.steps}
                assert steps["parts"].tasks_done == steps["parts"].tasks_total == SHARDS
    finally:
        await kill(process)
        await orchestrators.close()
        await service.kill()
    print(f"tasks recorded when killed: {killed_with}")
    in_the_middle = [count for count in killed_with if 2 < count < SHARDS + 2]
    assert len(in_the_middle) >= ROUNDS // 2, f"the kills must hit the shards: {killed_with}"
