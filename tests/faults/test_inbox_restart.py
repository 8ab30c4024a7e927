"""Orchestrators that work an inbox are killed: each file is started once, and none is forgotten."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from cryofleet.channels import open_channel
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc, runtime_pb2
from tests.faults.test_shards_after_crash import Orchestrators, kill
from tests.faults.test_shards_after_crash import home as home
from tests.unit.orchestrator.fake import FakeService

FILES = 12
SEED = 20261122

PIPELINE = """
name: one-task
inputs:
  table: {kind: particles}
steps:
  - id: one
    op: runtime.SelfTest
    with: {particles_uri: "${table}"}
outputs:
  index: ${one.index}
"""


async def items_of(stub: Any) -> list[pb.InboxItem]:
    answer = await stub.GetInbox(pb.GetInboxRequest(name="night", limit=1000), wait_for_ready=True, timeout=60)
    return list(answer.items)


async def worker_of(stub: Any) -> str:
    answer = await stub.GetInbox(pb.GetInboxRequest(name="night"), wait_for_ready=True, timeout=60)
    return str(answer.inbox.orchestrator)


async def until_done(stub: Any, count: int) -> None:
    async with asyncio.timeout(40):
        while sum(item.state == pb.INBOX_ITEM_STATE_DONE for item in await items_of(stub)) < count:
            await asyncio.sleep(0.02)


async def test_each_file_is_started_once(home: Path) -> None:
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    folder = home / "data"
    folder.mkdir()
    service = FakeService("worker", slots=4)

    async def take_a_while(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        await asyncio.sleep(chance.uniform(0.0, 0.3))

    service.behave = take_a_while
    await service.start(f"unix:{home}/worker.sock")
    orchestrators = Orchestrators(
        home,
        {
            "CRYOFLEET_HOME": str(home),
            "CRYOFLEET_DATABASE": f"sqlite:///{home}/orchestrator.sqlite",
            "CRYOFLEET_READ_ONLY_ROOTS": f"file://{folder}",
            "CRYOFLEET_LOG_LEVEL": "WARNING",
            "CRYOFLEET_POOL_IO": f"unix:{home}/worker.sock",
            "TEST_EXPIRY_SECONDS": "2",
            "TEST_ROUND_SECONDS": "0.1",
        },
    )

    def write(first: int, last: int) -> None:
        for number in range(first, last):
            (folder / f"{number:02}.dat").write_bytes(bytes([number]) * 100)

    await orchestrators.open()
    processes = {"a": await orchestrators.start("a")}
    try:
        async with open_channel(f"unix:{home}/a/o.sock") as to_a, open_channel(f"unix:{home}/b/o.sock") as to_b:
            a: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(to_a)
            b: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(to_b)
            write(0, 6)
            request = pb.AddInboxRequest(
                name="night",
                uri=f"file://{folder}",
                pipeline_yaml=PIPELINE,
                patterns=["*.dat"],
                settle_seconds=0.2,
                at_once=3,
            )
            await a.AddInbox(request, wait_for_ready=True, timeout=60)
            # The same one is started again, twice.
            for point in (1, 4):
                await until_done(a, point)
                await asyncio.sleep(chance.uniform(0.0, 0.1))
                await kill(processes.pop("a"))
                write(6 + point // 4, 7 + point // 4)
                processes["a"] = await orchestrators.start("a")
            # Another one takes over.
            processes["b"] = await orchestrators.start("b")
            await until_done(b, 6)
            assert await worker_of(b) == "a"
            write(8, FILES)
            async with asyncio.timeout(40):
                while len(await items_of(b)) <= 8:
                    await asyncio.sleep(0.02)
            await kill(processes.pop("a"))
            await until_done(b, FILES)
            assert await worker_of(b) == "b"
            items = await items_of(b)
            runs = (await b.ListRuns(pb.ListRunsRequest(limit=1000))).runs
    finally:
        for process in processes.values():
            await kill(process)
        await orchestrators.close()
        await service.kill()
    assert len(items) == len(runs) == FILES
    assert {item.run_id for item in items} == {run.id for run in runs}
    assert sorted(run.arguments["table"] for run in runs) == [f"file://{folder}/{n:02}.dat" for n in range(FILES)]
    assert {(run.attempt, run.state) for run in runs} == {(1, pb.RUN_STATE_SUCCEEDED)}
