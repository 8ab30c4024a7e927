"""The order of steps in the workflows is that of APPLICATION_VERSION, which runs in flight rely on.

An orchestrator that goes on with a run replays its workflows, and takes each step's result by the number that the step
has. `steps.json` has these numbers as the present version gives them, and how many arguments each workflow has. Where
this test fails, the order was changed. Either it is put back as it was, or APPLICATION_VERSION is raised, so that runs
begin anew after the upgrade instead of taking one step's result for another's; then, with WRITE_STEPS=1 in the
environment, this test writes the new order.
"""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cryofleet.operations import find_operation
from cryofleet.particles import Particles
from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator.engine import APPLICATION_VERSION
from orchestrator.tasks import Outcome, TaskRequest
from tests.unit.orchestrator.fake import running_platform

RECORDED = Path(__file__).parent / "steps.json"
ITEMS = 66
"""Two chunks."""

PIPELINE = """
name: everything
inputs:
  table: {kind: particles}
  tomogram: {kind: volume}
parameters:
  numbers: {type: list}
  few: {type: list}
  wanted: {type: boolean, default: false}
steps:
  - id: start
    op: runtime.SelfTest
    with: {index: 1}
  - id: unwanted
    op: runtime.SelfTest
    if: ${wanted}
  - id: many
    op: runtime.SelfTest
    foreach: ${numbers}
    as: number
    with: {index: "${number}"}
  - id: items
    foreach: ${few}
    as: number
    steps:
      - id: one
        op: runtime.SelfTest
        with: {index: "${number}"}
      - id: two
        op: runtime.SelfTest
        with: {index: "${one.index}"}
  - id: boxes
    op: picking.Extract
    with: {tomogram_uri: "${tomogram}", particles_uri: "${table}", box_size_voxels: 8}
    shards:
      over: particles_uri
      size: 2
      reduce: {op: picking.MergeSubtomograms, field: subtomograms_uris}
  - id: rounds
    repeat: 2
    carry: {index: "${start.index}"}
    next: {index: "${inside.index}"}
    steps:
      - id: inside
        op: runtime.SelfTest
        with: {index: "${rounds.index}"}
  - id: last
    op: runtime.SelfTest
    with: {index: "${rounds.index}"}
outputs:
  index: ${last.index}
"""


async def done(task: TaskRequest, report: Any) -> Outcome:
    """Every operation succeeds at once, with the outputs that it should have."""
    outputs: dict[str, Any] = {}
    for output in find_operation(task.operation).outputs:
        outputs[output.name] = f"file:///{output.name}" if output.name.endswith("_uri") else 1
    return {
        "task": task.key,
        "status": "OK",
        "result": outputs,
        "manifest": "file:///manifest",
        "cached": False,
        "seconds": 0.0,
        "attempts": 1,
        "instance": "x",
        "started_at": 1.0,
        "finished_at": 2.0,
    }


def order_of_steps(database: Path) -> dict[str, Any]:
    """Of each workflow: its function, the number of its arguments, and its steps with the workflows they start."""
    found: dict[str, Any] = {}
    with closing(sqlite3.connect(database)) as connection:
        for name, function, inputs in connection.execute(
            "SELECT workflow_uuid, name, i.inputs FROM workflow_status JOIN workflow_input AS i USING (workflow_uuid)"
        ):
            found[name] = {"workflow": function, "arguments": len(json.loads(inputs)["positionalArgs"]), "steps": []}
        rows = connection.execute(
            "SELECT workflow_uuid, function_id, function_name, child_workflow_id FROM operation_outputs "
            "ORDER BY workflow_uuid, function_id"
        )
        for name, number, function, child in rows:
            found[name]["steps"].append(f"{number} {function}" + (f" {child}" if child else ""))
    # The second chunk of 66 tasks says what the 64 steps of the first would.
    found.pop("run:1/many#0")
    return dict(sorted(found.items()))


def all_recorded(database: Path) -> bool:
    """Whether every workflow has ended, and with it each of its steps."""
    with closing(sqlite3.connect(database)) as connection:
        states = {state for (state,) in connection.execute("SELECT status FROM workflow_status")}
    return states == {"SUCCESS"}


async def test_the_order_is_that_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_platform() as platform:
        monkeypatch.setattr(platform.engine.tasks, "run", done)
        table = pd.DataFrame({"id": np.arange(5), "x": 1.0, "y": 1.0, "z": 1.0})
        uri = f"{platform.store.root}/default/table.parquet"
        platform.store.put(uri, Particles(table, 10.0, "t", None).to_parquet())
        numbers, few = list(range(ITEMS)), [1, 2]
        await platform.submit(PIPELINE, table=uri, tomogram=f"{uri}.mrc", numbers=numbers, few=few)
        run = await platform.ended()
        assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
        database = platform.home / "orchestrator.sqlite"
        # The run has ended within its last step, which is recorded after that.
        await platform.until(lambda: all_recorded(database))
        found = {"application_version": APPLICATION_VERSION, "workflows": order_of_steps(database)}
    if os.environ.get("WRITE_STEPS"):
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
    recorded = json.loads(RECORDED.read_text())
    if found["workflows"] != recorded["workflows"]:
        assert recorded["application_version"] != APPLICATION_VERSION, "raise APPLICATION_VERSION, or keep the order"
    assert found == recorded
