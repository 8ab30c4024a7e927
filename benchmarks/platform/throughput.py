"""How many tasks a second go through: one run of tasks that do nothing, on PostgreSQL, with two orchestrators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from benchmarks.harness import Row
from benchmarks.platform.site import Site, running_site
from cryofleet.channels import open_channel
from cryofleet.v1 import orchestrator_pb2, orchestrator_pb2_grpc

TASKS = 10_000
INSTANCES = 20
SLOTS = 4
ORCHESTRATORS = 2
_TARGET_PER_SECOND = 150.0

_PIPELINE = """
name: many
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


async def run_tasks(site: Site, numbers: list[int]) -> float:
    """Seconds from the submission of a run with one task for each number until its end. Raises where one is missing."""
    async with open_channel(site.orchestrators[0].address) as channel:
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        arguments = Struct()
        arguments.update({"numbers": numbers})
        request = orchestrator_pb2.SubmitRunRequest(pipeline_yaml=_PIPELINE, arguments=arguments)
        await stub.ListRuns(orchestrator_pb2.ListRunsRequest(), wait_for_ready=True, timeout=60)
        started = time.perf_counter()
        run = (await stub.SubmitRun(request, timeout=60)).run
        async for response in stub.WatchRun(orchestrator_pb2.WatchRunRequest(run_id=run.id)):
            run = response.run
        seconds = time.perf_counter() - started
    if run.state != orchestrator_pb2.RUN_STATE_SUCCEEDED or MessageToDict(run.outputs)["indices"] != numbers:
        raise RuntimeError(f"the run ended as {orchestrator_pb2.RunState.Name(run.state)}: {run.error}")
    return seconds


def measure(quick: bool) -> Iterator[Row]:
    """A run of 10,000 tasks; of 500 in a quick one."""
    tasks = 500 if quick else TASKS
    with running_site(ORCHESTRATORS, INSTANCES, SLOTS) as site:
        # Whatever is loaded late, and connections that are opened, is then there.
        asyncio.run(run_tasks(site, list(range(300))))
        cpu, counts = site.cpu_seconds(), site.database_counts()
        seconds = asyncio.run(run_tasks(site, list(range(tasks))))
        used = {name: after - cpu[name] for name, after in site.cpu_seconds().items()}
        done = {name: after - counts[name] for name, after in site.database_counts().items()}
    case = f"{tasks} tasks, {INSTANCES} instances, {ORCHESTRATORS} orchestrators, PostgreSQL"
    yield Row(case, "tasks per second", tasks / seconds, "1/s", "higher", _TARGET_PER_SECOND)
    for name, value in used.items():
        yield Row(case, f"CPU of {name}", value / tasks * 1000, "ms/task", "lower")
    for name in ("transactions", "inserted", "updated", "read"):
        unit = "per task" if name == "transactions" else "rows/task"
        yield Row(case, f"database: {name}", done[name] / tasks, unit, "lower")
    yield Row(case, "database: size", done["size_bytes"] / tasks, "B/task", "lower")
