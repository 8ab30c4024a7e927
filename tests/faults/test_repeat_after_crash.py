"""The orchestrator is killed again and again in the middle of a repeat: it goes on in the round where it was."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from cryofleet.channels import open_channel
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import orchestrator_pb2_grpc, runtime_pb2
from tests.faults.test_shards_after_crash import Orchestrators, ended, kill, recorded_tasks
from tests.faults.test_shards_after_crash import home as home
from tests.unit.orchestrator.fake import FakeService

KILLS = 8
ROUNDS = 10
SHARDS = 4
ROWS = 5
SEED = 20261121

PIPELINE = f"""
name: refine
inputs:
  table: {{kind: particles}}
steps:
  - id: refine
    repeat: 50
    carry: {{index: 0, table_uri: "${{table}}"}}
    next: {{index: "${{maximise.index}}", table_uri: "${{refine.table_uri}}"}}
    until: ${{maximise.counted}}
    steps:
      - id: maximise
        op: runtime.SelfTest
        with: {{index: "${{before.next_index}}", count_to: {ROUNDS + 1}}}
      - id: expect
        op: runtime.SelfTest
        with: {{particles_uri: "${{refine.table_uri}}", index: "${{before.index}}"}}
        shards: {{over: particles_uri, size: {ROWS}}}
      - id: before
        op: runtime.SelfTest
        with: {{index: "${{refine.index}}"}}
outputs:
  index: ${{refine.index}}
  rounds: ${{refine.rounds}}
  marks: ${{refine.expect.index}}
"""


async def test_finished_rounds_are_not_run_again(home: Path) -> None:
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
        await asyncio.sleep(chance.uniform(0.0, 0.1))

    service.behave = take_a_while
    await service.start(f"unix:{home}/worker.sock")
    address = f"unix:{home}/o/o.sock"
    database = home / "orchestrator.sqlite"
    orchestrators = Orchestrators(
        home,
        {
            "CRYOFLEET_HOME": str(home),
            "CRYOFLEET_ADDRESS": address,
            "CRYOFLEET_INSTANCE": "orchestrator",
            "CRYOFLEET_DATABASE": f"sqlite:///{database}",
            "CRYOFLEET_LOG_LEVEL": "WARNING",
            "CRYOFLEET_POOL_IO": f"unix:{home}/worker.sock",
        },
    )
    await orchestrators.open()
    process = await orchestrators.start()
    arguments = Struct()
    arguments.update({"table": table_uri})
    killed_in: list[int] = []
    try:
        async with open_channel(address) as channel:
            stub: Any = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            request = pb.SubmitRunRequest(pipeline_yaml=PIPELINE, arguments=arguments, run_id="run")
            await stub.SubmitRun(request, wait_for_ready=True, timeout=60)
            tasks = ROUNDS * (SHARDS + 2)
            for number in range(KILLS):
                # By the work that is done, not by the clock: so the kills are spread over the rounds on any machine.
                point = int((number + chance.random()) * (tasks - 2) / KILLS)
                async with asyncio.timeout(60):
                    while len(recorded_tasks(database)) < point:
                        await asyncio.sleep(0.002)
                await asyncio.sleep(chance.uniform(0.0, 0.05))
                await kill(process)
                before = recorded_tasks(database)
                killed_in.append(1 + len(before) // (SHARDS + 2))
                service.calls.clear()
                process = await orchestrators.start()
                async with asyncio.timeout(60):
                    while not service.calls:
                        await asyncio.sleep(0.002)
                assert not before.keys() & set(service.calls), f"kill {number}: recorded, and done once more"
            run = await ended(stub, "run")
    finally:
        await kill(process)
        await orchestrators.close()
        await service.kill()
    print(f"killed in rounds {killed_in}")
    assert len(set(killed_in)) >= KILLS // 2, f"the kills must hit several rounds: {killed_in}"
    assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 1), run.error
    assert MessageToDict(run.outputs) == {"index": ROUNDS, "rounds": ROUNDS, "marks": [ROUNDS - 1] * SHARDS}
    after = recorded_tasks(database)
    assert len(after) == tasks, "one record for each task"
    assert not before.keys() & set(service.calls), "recorded, and done once more"
    for key, outcome in before.items():
        assert after[key] == outcome, f"{key} was recorded, and has changed"
    for round_ in range(1, ROUNDS + 1):
        assert after[f"run:1/refine@{round_}.maximise"]["result"]["index"] == round_
        for shard in range(SHARDS):
            result = after[f"run:1/refine@{round_}.expect[{shard}]"]["result"]
            assert (result["first_row"], result["index"]) == (shard * ROWS, round_ - 1)
    steps = {step.id: step for step in run.steps}
    assert (steps["refine"].tasks_done, steps["refine"].tasks_total) == (ROUNDS, ROUNDS)
    assert steps["refine.expect"].tasks_done == steps["refine.expect"].tasks_total == ROUNDS * SHARDS
