"""Many who look on: 200 clients, each asking once a second for a run and watching another, while runs go on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.struct_pb2 import Struct

from benchmarks.harness import Row
from benchmarks.platform.site import Process, Site, running_site
from cryofleet.channels import open_channel
from cryofleet.v1 import orchestrator_pb2, orchestrator_pb2_grpc

CLIENTS = 200
RUNS = 10
INSTANCES = 10
SLOTS = 2
SECONDS = 600.0
QUICK_SECONDS = 10.0
_SETTLE_SECONDS = 20.0
"""Until the runs have begun and every client is connected: all is counted from then on."""
_WARM_UP_SECONDS = 60.0
"""Until caches are full: what memory does is measured from then on."""
_TASK_SECONDS = 5.0
_TARGET_MS = 100.0
_TARGET_GROWTH = 3.0

_PIPELINE = """
name: slow
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
"""


@dataclass
class _Seen:
    """What all clients have seen."""

    get_seconds: list[float] = field(default_factory=list)
    watched: int = 0


async def _submit(address: str, seconds: float) -> list[str]:
    """Runs that together keep all slots busy for so long."""
    tasks = int(seconds / _TASK_SECONDS * INSTANCES * SLOTS / RUNS) + 1
    arguments = Struct()
    arguments.update({"numbers": list(range(tasks)), "seconds": _TASK_SECONDS})
    async with open_channel(address) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        await stub.ListRuns(orchestrator_pb2.ListRunsRequest(), wait_for_ready=True, timeout=60)
        request = orchestrator_pb2.SubmitRunRequest(pipeline_yaml=_PIPELINE, arguments=arguments)
        return [(await stub.SubmitRun(request, timeout=60)).run.id for _ in range(RUNS)]


async def _client(address: str, asked: str, watched: str, begin: float, end: float, seen: _Seen) -> None:
    async with open_channel(address) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)

        async def watch() -> None:
            async for _ in stub.WatchRun(orchestrator_pb2.WatchRunRequest(run_id=watched)):
                seen.watched += time.monotonic() >= begin

        watching = asyncio.create_task(watch())
        # Not all in the same moment.
        await asyncio.sleep(random.random())
        while (now := time.monotonic()) < end:
            started = time.perf_counter()
            await stub.GetRun(orchestrator_pb2.GetRunRequest(run_id=asked), timeout=30)
            took = time.perf_counter() - started
            if now >= begin:
                seen.get_seconds.append(took)
            await asyncio.sleep(max(0.0, 1.0 - took))
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def _memory(process: Process, end: float) -> list[tuple[float, int]]:
    """Seconds and bytes, once a second."""
    began, sizes = time.monotonic(), []
    while (now := time.monotonic()) < end:
        sizes.append((now - began, process.memory_bytes()))
        await asyncio.sleep(1)
    return sizes


async def _used(site: Site, begin: float, end: float) -> dict[str, float]:
    """CPU seconds and transactions of that time."""
    used: list[dict[str, float]] = []
    for moment in (begin, end):
        await asyncio.sleep(moment - time.monotonic())
        # The database's counts come from a thread, since they are waited for.
        counts = await asyncio.to_thread(site.database_counts)
        used.append({**site.cpu_seconds(), "transactions": counts["transactions"]})
    return {name: value - used[0][name] for name, value in used[1].items()}


async def _look_on(site: Site, seconds: float) -> tuple[_Seen, list[tuple[float, int]], dict[str, float]]:
    (orchestrator,) = site.orchestrators
    runs = await _submit(orchestrator.address, seconds + 60)
    begin = time.monotonic() + _SETTLE_SECONDS
    seen, end = _Seen(), begin + seconds
    clients: list[Any] = [
        _client(orchestrator.address, runs[number % RUNS], runs[(number + 1) % RUNS], begin, end, seen)
        for number in range(CLIENTS)
    ]
    sizes, used, *_ = await asyncio.gather(_memory(orchestrator, end), _used(site, begin, end), *clients)
    return seen, sizes, used


def growth(sizes: list[tuple[float, int]]) -> float:
    """MiB that the straight line through the sizes rises over their time."""
    slope, _ = statistics.linear_regression(*zip(*sizes, strict=True))
    return slope * (sizes[-1][0] - sizes[0][0]) / 2**20


def measure(quick: bool) -> Iterator[Row]:
    """Ten minutes of it; a quick run 10 s, which say nothing of memory."""
    seconds = QUICK_SECONDS if quick else SECONDS
    with running_site(1, INSTANCES, SLOTS) as site:
        seen, sizes, used = asyncio.run(_look_on(site, seconds))
    case = f"{CLIENTS} clients, {RUNS} runs, {INSTANCES * SLOTS / _TASK_SECONDS:g} tasks/s, {seconds:.0f} s"
    ranks = statistics.quantiles(seen.get_seconds, n=100)
    yield Row(case, "get: p99", ranks[98] * 1000, "ms", "lower", _TARGET_MS)
    yield Row(case, "get: median", ranks[49] * 1000, "ms", "lower")
    yield Row(case, "get: calls", len(seen.get_seconds) / seconds, "1/s", "higher")
    yield Row(case, "watch: messages", seen.watched / seconds, "1/s", "higher")
    yield Row(case, "CPU of the orchestrator", used["orchestrators"] / seconds, "cores", "lower")
    yield Row(case, "CPU of PostgreSQL", used["PostgreSQL"] / seconds, "cores", "lower")
    yield Row(case, "database: transactions", used["transactions"] / seconds, "1/s", "lower")
    yield Row(case, "memory", sizes[-1][1] / 2**20, "MiB", "lower")
    settled = [size for size in sizes if size[0] >= _WARM_UP_SECONDS]
    if len(settled) > _WARM_UP_SECONDS:
        percent = growth(settled) / (sizes[-1][1] / 2**20) * 100
        yield Row(case, "memory: growth after 1 min", percent, "%", "lower", _TARGET_GROWTH)
