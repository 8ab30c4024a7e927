from __future__ import annotations

import subprocess
import sys

from google.protobuf.json_format import MessageToDict

from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator.pipeline_reading import load
from orchestrator.run_message import run_message
from orchestrator.runs import AttemptRow, RunRow, Unit

PIPELINE = """
name: nested
parameters:
  numbers: {type: list}
steps:
  - id: item
    foreach: ${numbers}
    as: number
    steps:
      - id: one
        op: runtime.SelfTest
        with: {index: "${number}"}
  - id: end
    op: runtime.SelfTest
"""
RUN = RunRow("r", "default", "nested", "nested.yaml", PIPELINE, {"numbers": [1]}, 1.0)


def message(units: dict[str, Unit], state: str = "running") -> pb.Run:
    attempt = AttemptRow("r", 1, state, "", {}, 1.0, 2.0, None)
    return run_message(RUN, attempt, load(PIPELINE, "nested.yaml"), units)


def states(run: pb.Run) -> list[str]:
    return [pb.StepState.Name(step.state).removeprefix("STEP_STATE_") for step in run.steps]


def test_a_step_is_the_sum_of_its_units() -> None:
    units = {
        "item": Unit("item", "running", total=12),
        "item[10].one": Unit("item.one", "succeeded", total=1, done=1, compute_seconds=2.0, outputs={"index": 10}),
        "item[9].one": Unit("item.one", "succeeded", total=1, done=1, cached=1, outputs={"index": 9}),
        "item[11].one": Unit("item.one", "running", total=1, partial=0.5, phase="fitting"),
    }
    run = message(units)
    assert states(run) == ["RUNNING", "RUNNING", "WAITING"]
    step = run.steps[1]
    assert (step.tasks_total, step.tasks_done, step.tasks_cached, step.compute_seconds) == (3, 2, 1, 2.0)
    assert step.fraction == 2.5 / 3
    assert step.phase == "fitting"
    assert MessageToDict(step.outputs) == {"index": [9, 10]}, "item 10 comes behind item 9"


def test_what_had_not_ended_with_the_run_is_cancelled() -> None:
    units = {"item": Unit("item", "running", total=2), "item[0].one": Unit("item.one", "succeeded", total=1, done=1)}
    assert states(message(units, "cancelled")) == ["CANCELLED", "SUCCEEDED", "CANCELLED"]


def test_items_that_end_differently() -> None:
    def joint(*each: str) -> str:
        return states(message({f"item[{i}].one": Unit("item.one", s) for i, s in enumerate(each)}))[1]

    assert joint("succeeded", "skipped") == "SUCCEEDED"
    assert joint("skipped", "skipped") == "SKIPPED"
    assert joint("succeeded", "failed") == "PARTIAL"
    assert joint("failed", "failed") == "FAILED"
    assert joint("succeeded", "running", "failed") == "RUNNING"


def test_a_unit_survives_json() -> None:
    unit = Unit("a.b", "partial", 5, 3, 1, 2, 0.5, 0.25, "x", 1.0, 2.0, {"u": ["v"]}, [{"step": "a"}], ["file:///r"])
    assert Unit.from_json(unit.to_json()) == unit
    assert Unit("a").to_json() == '{"path": "a"}'


def test_the_orchestrator_needs_no_torch_and_no_service() -> None:
    code = (
        "import sys, orchestrator.service;"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'services')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
