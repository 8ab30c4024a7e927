"""A pool that grows and shrinks while a run goes on, over TLS and names as on a cluster; and the simulated facility."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from cryofleet.access.certificates import make_set
from cryofleet.channels import open_channel
from cryofleet.server import Server
from cryofleet.server.runtime_service import service as runtime_service
from cryofleet.settings import Settings, TlsFiles
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc
from orchestrator import service as orchestrator_module
from tests.unit.orchestrator.fake import short_folder

TASKS = """
name: tasks
parameters:
  numbers: {type: list}
  seconds: {type: number}
steps:
  - id: each
    op: runtime.SelfTest
    foreach: ${numbers}
    as: number
    with: {index: "${number}", seconds: "${seconds}"}
outputs:
  indices: ${each.index}
  instances: ${each.instance}
"""
APPEARS_SECONDS = 10.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Site:
    """A pool behind the name `io`, whose instances have addresses of their own and the same port."""

    home: Path
    stub: Any
    workers: dict[str, Server]
    port: int

    async def start(self, number: int) -> None:
        """One more instance, which the name then tells."""
        address = f"127.0.0.{number}"
        settings = worker_settings(self.home, f"worker-{number}", f"{address}:{self.port}")
        self.workers[address] = server = Server(runtime_service, settings)
        await server.start()

    async def submit(self, count: int, seconds: float) -> str:
        given = Struct()
        given.update({"numbers": list(range(count)), "seconds": seconds})
        run: pb.Run = (await self.stub.SubmitRun(pb.SubmitRunRequest(pipeline_yaml=TASKS, arguments=given))).run
        return run.id

    async def instances(self) -> dict[str, pb.InstanceStatus]:
        (pool,) = (await self.stub.GetPools(pb.GetPoolsRequest())).pools
        return {each.address: each for each in pool.instances}

    async def ended(self, run_id: str) -> pb.Run:
        async for response in self.stub.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=90):
            run: pb.Run = response.run
        return run


def tls_of(home: Path, name: str) -> TlsFiles:
    own = home / "certificates" / name
    return TlsFiles(own / "tls.crt", own / "tls.key", own / "ca.crt")


def worker_settings(home: Path, name: str, address: str) -> Settings:
    return Settings(
        home=home,
        store=f"file://{home}/store",
        slots=2,
        memory_bytes=2**30,
        instance=name,
        address=address,
        drain_seconds=10,
        tls=tls_of(home, "io"),
    )


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    home = short_folder()
    make_set(home / "certificates")
    port = free_port()
    workers: dict[str, Server] = {}
    loop = asyncio.get_running_loop()
    ask = loop.getaddrinfo

    async def resolve(host: Any, port: Any, **options: Any) -> Any:
        if host != "io":
            return await ask(host, port, **options)
        if not workers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in workers]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    settings = replace(
        worker_settings(home, "orchestrator", f"unix:{home}/o/o.sock"),
        tls=tls_of(home, "orchestrator"),
        pools={"io": f"dns:///io:{port}"},
        database=f"sqlite:///{home}/orchestrator.sqlite",
        drain_seconds=0.2,
    )
    orchestrator = Server(orchestrator_module.service, settings)
    await orchestrator.start()
    try:
        async with open_channel(settings.address) as channel:
            yield Site(home, orchestrator_pb2_grpc.OrchestratorServiceStub(channel), workers, port)
    finally:
        await orchestrator.stop()
        for server in workers.values():
            await server.stop()
        shutil.rmtree(home, ignore_errors=True)


async def test_new_instances_take_work_within_ten_seconds_and_a_drained_one_loses_none(site: Site) -> None:
    run_id = await site.submit(40, seconds=1.0)
    took: dict[int, float] = {}
    for number in (1, 2):
        # From nothing, and beside one that has more than it can do.
        await site.start(number)
        began = time.monotonic()
        async with asyncio.timeout(APPEARS_SECONDS):
            while True:
                found = (await site.instances()).get(f"127.0.0.{number}:{site.port}")
                if found is not None and found.running:
                    break
                await asyncio.sleep(0.05)
        took[number] = time.monotonic() - began
    print("seconds until a new instance worked:", took)
    leaving = site.workers["127.0.0.1"]
    await leaving.stop()
    del site.workers["127.0.0.1"]
    run = await site.ended(run_id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
    outputs = MessageToDict(run.outputs)
    assert outputs["indices"] == list(range(40))
    assert set(outputs["instances"]) == {"worker-1", "worker-2"}
    assert not run.set_aside


def test_a_simulated_facility_does_every_task_once() -> None:
    tomograms, rounds = 2, 1
    command = [sys.executable, "-m", "benchmarks.platform.simulation", "--json"]
    # Instances are lost every hour, those with a GPU every seven minutes; whether one is just at work is chance.
    command += ["--tomograms", str(tomograms), "--rounds", str(rounds), "--losses", "200"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=240).stdout)
    # Eight parts of 256 particles and their joining; the six other steps of a tomogram.
    of_tomograms = tomograms * (8 + 1 + 6)
    # Of all particles together: merged and begun; the first expectation and each round's, joined; the end.
    of_all = 2 + (1 + rounds) * (-(-tomograms * 2000 // 256) + 1) + 1
    assert found["tasks"] == of_tomograms + of_all
    assert found["done_twice"] == 0
    assert found["calls"] == found["tasks"] + found["failed"] + found["lost"]
    assert all(done + aside == total for total, done, aside in found["steps"].values())
    assert found["makespan_seconds"] >= found["critical_path_seconds"] > 0
    busy = sum(found["busy_seconds"].values())
    assert busy >= found["work_seconds"] * (1 - 1e-6)
    assert all(found["busy_seconds"][pool] <= slots + 1e-6 for pool, slots in found["slot_seconds"].items())
