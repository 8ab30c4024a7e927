"""What the orchestrator costs: a run of tasks that do nothing, against the bare calls of the same tasks.

A real instance and a real orchestrator with SQLite, each a process of its own; the bare calls are made at the
concurrency that the instance has slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import numpy as np
from google.protobuf.struct_pb2 import Struct

from benchmarks.harness import Row
from cryofleet.channels import open_channel
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.v1 import common_pb2, orchestrator_pb2, orchestrator_pb2_grpc, runtime_pb2, runtime_pb2_grpc

SLOTS = 4
TASKS = 500
_TARGET_MS = 8.0

_PIPELINE = """
name: nothing
inputs:
  particles: {kind: particles}
parameters:
  index: {type: integer}
steps:
  - id: nothing
    op: runtime.SelfTest
    with: {index: "${index}", particles_uri: "${particles}"}
    shards: {over: particles_uri, size: 1}
"""


@contextlib.contextmanager
def _process(home: Path, name: str, module: str) -> Iterator[str]:
    address = f"unix:{home}/run/{name}.sock"
    environment = {
        **os.environ,
        "CRYOFLEET_HOME": str(home),
        "CRYOFLEET_ADDRESS": address,
        "CRYOFLEET_INSTANCE": name,
        "CRYOFLEET_SLOTS": str(SLOTS),
        "CRYOFLEET_DRAIN_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (home / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", module], env=environment, stderr=log)
    try:
        yield address
    finally:
        process.terminate()
        process.wait(60)


async def _bare(address: str, particles_uri: str, tasks: int, index: int) -> float:
    """Seconds that the calls take by themselves."""
    channel = open_channel(address)
    stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
    await stub.GetCapacity(runtime_pb2.GetCapacityRequest(), wait_for_ready=True, timeout=60)
    left = iter(range(tasks))

    async def caller() -> None:
        for row in left:
            request = runtime_pb2.SelfTestRequest(
                context=common_pb2.Context(task_key=str(row)),
                index=index,
                particles_uri=particles_uri,
                rows=common_pb2.RowRange(first=row, count=1),
            )
            async for _ in stub.SelfTest(request):
                pass

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(SLOTS)))
    seconds = time.perf_counter() - started
    await channel.close(None)
    return seconds


async def _run(address: str, particles_uri: str, index: int) -> tuple[float, orchestrator_pb2.Run]:
    """Seconds from the run's submission to its end, and the run."""
    channel = open_channel(address)
    stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
    arguments = Struct()
    arguments.update({"particles": particles_uri, "index": index})
    started = time.perf_counter()
    request = orchestrator_pb2.SubmitRunRequest(pipeline_yaml=_PIPELINE, arguments=arguments)
    submitted = await stub.SubmitRun(request, wait_for_ready=True, timeout=60)
    run = submitted.run
    async for response in stub.WatchRun(orchestrator_pb2.WatchRunRequest(run_id=run.id)):
        run = response.run
    seconds = time.perf_counter() - started
    await channel.close(None)
    if run.state != orchestrator_pb2.RUN_STATE_SUCCEEDED:
        raise RuntimeError(f"the run ended as {orchestrator_pb2.RunState.Name(run.state)}: {run.error}")
    return seconds, run


def _table(store: Store, rows: int) -> str:
    """A particle table in the store, to shard over."""
    uri = f"{store.root}/default/tables/{rows}.parquet"
    store.put(uri, Particles.from_positions(np.zeros((rows, 3)), 10.0).to_parquet())
    return uri


def _figures(home: Path, tasks: int, rounds: int) -> Iterable[Row]:
    # Each index makes the tasks' results new ones, and so does each table.
    indices = iter(range(1000))
    store = Store(f"file://{home}/store")
    with (
        _process(home, "io", "cryofleet.server") as service,
        _process(home, "orchestrator", "orchestrator") as orchestrator,
    ):
        few, many = _table(store, 40), _table(store, tasks)
        # Both processes have then loaded what they need, and the queue is being listened to.
        asyncio.run(_bare(service, few, 40, next(indices)))
        asyncio.run(_run(orchestrator, few, next(indices)))
        overheads, bares, runs, cached = [], [], [], []
        for _ in range(rounds):
            bare = asyncio.run(_bare(service, many, tasks, next(indices)))
            index = next(indices)
            wall, run = asyncio.run(_run(orchestrator, many, index))
            again, second = asyncio.run(_run(orchestrator, many, index))
            if run.steps[0].tasks_cached or second.steps[0].tasks_cached != tasks:
                raise RuntimeError("the first run must compute everything, and the second nothing")
            overheads.append((wall - bare) / tasks * 1000)
            bares.append(bare / tasks * 1000)
            runs.append(wall / tasks * 1000)
            cached.append(again / tasks * 1000)
    case = f"{tasks} shards of one run that do nothing, {SLOTS} slots, SQLite"
    yield Row(case, "task_overhead", statistics.median(overheads), "ms", "lower", _TARGET_MS)
    yield Row(case, "bare_call", statistics.median(bares), "ms", "lower")
    yield Row(case, "task_in_run", statistics.median(runs), "ms", "lower")
    yield Row(case, "task_from_store", statistics.median(cached), "ms", "lower")


def measure(quick: bool) -> Iterable[Row]:
    """The overhead of a task in a run."""
    home = Path(tempfile.mkdtemp(prefix="cryofleet-bench-"))
    (home / "run").mkdir(mode=0o700)
    try:
        yield from _figures(home, 200 if quick else TASKS, 1 if quick else 3)
    except grpc.RpcError:
        for log in home.glob("*.log"):
            sys.stderr.write(log.read_text()[-2000:])
        raise
    finally:
        shutil.rmtree(home, ignore_errors=True)
