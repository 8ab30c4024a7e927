"""Pools of several real instances: draining, setting aside, pausing; and what the command line says of it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from cryofleet.channels import open_channel
from cryofleet.cli import cli
from cryofleet.errors import NotFound
from cryofleet.server import Server
from cryofleet.server.runtime_service import service as runtime_service
from cryofleet.settings import Settings
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc
from orchestrator import service as orchestrator_module
from orchestrator.engine import Engine
from tests.unit.orchestrator.fake import short_folder

TASKS = """
name: tasks
parameters:
  items: {type: list}
  seconds: {type: number, default: 0}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${items}
    with: {index: "${item.index}", fail_with: "${item.fail}", seconds: "${seconds}"}
outputs:
  indices: ${each.index}
  instances: ${each.instance}
"""


def items(count: int, *failing: int) -> list[dict[str, Any]]:
    return [{"index": index, "fail": "INVALID_ARGUMENT" if index in failing else ""} for index in range(count)]


@dataclass
class Site:
    stub: Any
    """OrchestratorServiceStub; its types are for blocking channels."""
    settings: Settings
    workers: dict[str, Server]

    @property
    def engine(self) -> Engine:
        (engine,) = orchestrator_module._engines.values()
        return engine

    async def submit(self, count: int, *failing: int, seconds: float = 0.0) -> str:
        given = Struct()
        given.update({"items": items(count, *failing), "seconds": seconds})
        run: pb.Run = (await self.stub.SubmitRun(pb.SubmitRunRequest(pipeline_yaml=TASKS, arguments=given))).run
        return run.id

    async def get(self, run_id: str) -> pb.Run:
        run: pb.Run = (await self.stub.GetRun(pb.GetRunRequest(run_id=run_id))).run
        return run

    async def ended(self, run_id: str) -> pb.Run:
        async for response in self.stub.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=60):
            run: pb.Run = response.run
        return run

    async def pool(self) -> pb.PoolStatus:
        (pool,) = (await self.stub.GetPools(pb.GetPoolsRequest())).pools
        status: pb.PoolStatus = pool
        return status

    async def cli(self, arguments: Sequence[str]) -> Result:
        """What the command prints; the orchestrator goes on meanwhile."""
        environment = {"CRYOFLEET_HOME": str(self.settings.home), "CRYOFLEET_ORCHESTRATOR": self.settings.address}
        return await asyncio.to_thread(CliRunner(env=environment).invoke, cli, list(arguments))


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    home = short_folder()
    worker = Settings(
        home=home, store=f"file://{home}/store", slots=2, memory_bytes=2**30, instance="", address="", drain_seconds=10
    )
    names = ("worker-0", "worker-1")
    workers = {
        name: Server(runtime_service, replace(worker, instance=name, address=f"unix:{home}/{name}/s.sock"))
        for name in names
    }
    settings = Settings(
        home=home,
        store=worker.store,
        address=f"unix:{home}/o/o.sock",
        instance="orchestrator",
        pools={"io": ",".join(f"unix:{home}/{name}/s.sock" for name in names)},
        database=f"sqlite:///{home}/orchestrator.sqlite",
        drain_seconds=0.2,
        pool_wait_seconds=20,
    )
    orchestrator = Server(orchestrator_module.service, settings)
    try:
        for server in (*workers.values(), orchestrator):
            await server.start()
        async with open_channel(settings.address) as channel:
            site = Site(orchestrator_pb2_grpc.OrchestratorServiceStub(channel), settings, workers)
            async with asyncio.timeout(10):
                while not all(instance.ready for instance in (await site.pool()).instances):
                    await asyncio.sleep(0.05)
            yield site
    finally:
        await orchestrator.stop()
        for server in workers.values():
            await server.stop()
        shutil.rmtree(home, ignore_errors=True)


async def test_a_drained_instance_loses_no_task(site: Site) -> None:
    run_id = await site.submit(24, seconds=0.4)
    async with asyncio.timeout(20):
        while (await site.get(run_id)).steps[0].tasks_done < 4:
            await asyncio.sleep(0.05)
    await site.workers.pop("worker-0").stop()
    run = await site.ended(run_id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
    outputs = MessageToDict(run.outputs)
    assert outputs["indices"] == list(range(24))
    assert set(outputs["instances"]) == {"worker-0", "worker-1"}
    assert not run.set_aside
    (other,) = [each for each in (await site.pool()).instances if each.instance == "worker-1"]
    assert not other.HasField("set_aside_until")


async def test_a_pool_is_paused_and_resumed(site: Site) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="there is no pool 'oi'; there are io"):
        await site.stub.PausePool(pb.PausePoolRequest(pool="oi"))
    paused = await site.cli(["pools", "pause", "io", "--because", "new disks"])
    assert (paused.exit_code, paused.stdout.endswith(": new disks\n")) == (0, True), paused.output
    run_id = await site.submit(6)
    await asyncio.sleep(1.5)
    run = await site.get(run_id)
    assert (run.state, run.steps[0].tasks_done) == (pb.RUN_STATE_RUNNING, 0)
    pool = await site.pool()
    assert (pool.tasks_running, pool.tasks_queued, pool.paused_because) == (0, 6, "new disks")
    listed = (await site.cli(["pools"])).stdout.rstrip("\n").split("\t")
    assert listed[0] == "io"
    assert listed[1].startswith("paused since ")
    assert listed[1].endswith(f"by {pool.paused_by}: new disks")
    assert listed[2:] == ["2 of 2 ready", "4/4", "0", "6"]
    assert "0 running, 6 queued, paused" in (await site.cli(["status"])).stdout
    resumed = await site.cli(["pools", "resume", "io"])
    assert (resumed.exit_code, resumed.stdout) == (0, "pool io is open\n")
    assert (await site.ended(run_id)).state == pb.RUN_STATE_SUCCEEDED
    assert not (await site.pool()).HasField("paused_at")


async def test_an_instance_that_is_set_aside_is_listed_with_its_causes(site: Site) -> None:
    address = f"unix:{site.settings.home}/worker-0/s.sock"
    aside = site.engine.placement.pools["io"].set_aside
    for number in range(3):
        aside.failed(address, f"{number}", f"INTERNAL: CUDA error {number % 2}")
    first, second = (await site.pool()).instances
    assert (first.ready, list(first.set_aside_causes)) == (True, ["INTERNAL: CUDA error 0", "INTERNAL: CUDA error 1"])
    assert not second.HasField("set_aside_until")
    listed = await site.cli(["pools"])
    assert "2 of 2 ready, 1 set aside" in listed.stdout
    assert f"io: worker-0 ({address}): set aside until " in listed.stderr
    assert "INTERNAL: CUDA error 0; INTERNAL: CUDA error 1" in listed.stderr
    assert (await site.cli(["status"])).exit_code == 0
    outputs = MessageToDict((await site.ended(await site.submit(6))).outputs)
    assert outputs["instances"] == ["worker-1"] * 6


async def test_97_of_100_done_3_set_aside(site: Site) -> None:
    run_id = await site.submit(100, 7, 50, 99)
    run = await site.ended(run_id)
    assert run.state == pb.RUN_STATE_PARTIAL
    watched = await site.cli(["watch", run_id])
    assert watched.exit_code == 3
    assert "partial after " in watched.stderr
    assert ": each: 97 of 100 done, 3 set aside\n" in watched.stderr
    assert "cryofleet retry" not in watched.stderr, "what the inputs are wrong for would fail again"
    again = await site.cli(["retry", run_id])
    assert again.exit_code == 3, "they fail again"
    step = (await site.get(run_id)).steps[0]
    assert (step.tasks_done, step.tasks_cached, step.tasks_set_aside) == (97, 97, 3), "the others are not done again"
    assert all(not instance.HasField("set_aside_until") for instance in (await site.pool()).instances)


async def test_what_was_logged_about_a_run_is_printed_with_what_files_have_of_it(site: Site) -> None:
    run_id = await site.submit(2, 1)
    await site.ended(run_id)
    listed = await site.cli(["logs", run_id, "--follow"])
    assert (listed.exit_code, listed.stderr) == (0, "")
    failed = "INVALID_ARGUMENT: failed with INVALID_ARGUMENT, as asked for"
    assert f"WARNING orchestrator runtime.SelfTest {run_id}:1/each[1]: the task failed: {failed}\n" in listed.stdout
    told = [json.loads(line) for line in (await site.cli(["logs", run_id, "--raw"])).stdout.splitlines()]
    assert [line["time"] for line in told] == sorted(line["time"] for line in told)
    # A file has one of these lines, what came before, and what is of another run.
    before = {"time": "2026-01-01T00:00:00.000Z", "level": "INFO", "run_id": run_id, "message": "of old"}
    whole = {**told[0], "run_id": run_id, "traceback": "Traceback"}
    written = [whole, before, {**before, "run_id": f"{run_id}-2", "message": "of others"}]
    folder = site.settings.log_folder
    folder.mkdir()
    (folder / "io.log").write_text("".join(json.dumps(line) + "\n" for line in written))
    both = [json.loads(line) for line in (await site.cli(["logs", run_id, "--raw"])).stdout.splitlines()]
    assert both == [before, whole, *told[1:]], "the file's line is the whole one"
    of_files = (await site.cli(["logs", run_id, "--raw", "--files"])).stdout.splitlines()
    assert {json.loads(line)["message"] for line in of_files} == {"of old", "of others", told[0]["message"]}
    await site.workers.pop("worker-0").stop()
    away = await site.cli(["logs", run_id])
    assert "io: worker-0 did not say what it logged: UNAVAILABLE" in away.stderr
    unknown = await site.cli(["logs", "nothing"])
    assert isinstance(unknown.exception, NotFound)
    assert "there is no run 'nothing'" in unknown.stderr
