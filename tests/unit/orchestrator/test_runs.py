from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict

from cryofleet.errors import FailedPrecondition, NotFound
from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator.database import make_database
from orchestrator.pipeline_reading import load
from orchestrator.run_message import run_message
from orchestrator.runs import AttemptRow, RunRow, RunStore, Unit

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


FILES = """
name: files
inputs:
  tomograms: {kind: file, list: true}
parameters:
  numbers: {type: list, default: [1, 2]}
steps:
  - id: tomogram
    foreach: ${tomograms}
    as: file
    steps:
      - id: ingest
        op: io.Ingest
        with: {source_uri: "${file}"}
  - id: other
    foreach: ${numbers}
    as: number
    op: runtime.SelfTest
    with: {index: "${number}"}
outputs:
  volumes: ${tomogram.ingest.tomogram_uri}
  indices: ${other.index}
"""


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["file:///a/TS_01.mrc", "s3://b/TS_02.mrc.gz"], ["TS_01", "TS_02"]),
        (["file:///a/rec.mrc", "file:///b/rec.mrc"], ["1_rec", "2_rec"]),
    ],
)
def test_outputs_of_each_file_are_called_by_it(uris: list[str], names: list[str]) -> None:
    run = RunRow("r", "default", "files", "files.yaml", FILES, {"tomograms": uris, "numbers": [1, 2]}, 1.0)
    attempt = AttemptRow("r", 1, "running", "", {}, 1.0, 2.0, None)
    found = run_message(run, attempt, load(FILES, "files.yaml"), {})
    assert {name: list(each.names) for name, each in found.output_names.items()} == {"volumes": names}


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
    assert MessageToDict(step.outputs) == {"index": [None] * 9 + [9, 10, None]}, "each in its own place"


def test_outputs_of_nested_items_are_nested_lists() -> None:
    units = {
        "item[0].one[1]": Unit("item.one", "succeeded", outputs={"index": 1}),
        "item[0].one[0]": Unit("item.one", "failed"),
        "item[2].one[0]": Unit("item.one", "succeeded", outputs={"index": 20}),
    }
    assert MessageToDict(message(units).steps[1].outputs) == {"index": [[None, 1], None, [20]]}


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


@pytest.fixture
def record(tmp_path: Path) -> Iterator[RunStore]:
    engine = make_database(f"sqlite:///{tmp_path}/runs.sqlite")
    yield RunStore(engine)
    engine.dispose()


def kept_run(record: RunStore, run_id: str, *ends: str) -> None:
    """A run whose attempts ended so, the last one not where it is empty; each has one result of its own."""
    assert record.create(replace(RUN, run_id=run_id, arguments={"input": f"file:///in-{run_id}"}, created_at=5.0))
    for number, end in enumerate(ends, start=1):
        if number > 1:
            assert record.next_attempt(run_id, number - 1)
        assert record.set_started(run_id, number)
        record.write_units({(run_id, number, "one"): Unit("one", results=[f"{run_id}-{number}"]).to_json()})
        assert not end or record.set_finished(run_id, number, end)


def test_an_attempt_that_was_ended_does_not_start(record: RunStore) -> None:
    assert record.create(RUN)
    assert record.set_started("r", 1)
    began = record.attempt("r").started_at
    assert record.set_started("r", 1), "a replay after a crash goes on"
    assert record.attempt("r").started_at == began
    assert record.set_finished("r", 1, "cancelled")
    assert not record.set_started("r", 1)
    assert record.attempt("r").state == "cancelled"


def test_an_attempt_is_superseded_once(record: RunStore) -> None:
    ended: list[str] = []
    record.on_ended = lambda run_id, attempt, state: ended.append(f"{run_id}:{attempt} {state}")
    kept_run(record, "r", "")
    assert record.supersede("r", 1, "other steps")
    attempt = record.attempt("r")
    assert (attempt.attempt, attempt.state) == (2, "queued")
    assert [(each.attempt, each.error) for each in record.in_state(["failed"])] == [(1, "other steps")]
    assert not record.supersede("r", 1, "other steps"), "another orchestrator has just done so"
    record.set_finished("r", 2, "cancelled")
    assert not record.supersede("r", 2, "other steps"), "it has ended"
    assert record.attempt("r").attempt == 2
    assert ended == ["r:2 cancelled"], "the run has not ended when an attempt was superseded"


def test_what_runs_hold(record: RunStore) -> None:
    kept_run(record, "good", "failed", "succeeded")
    kept_run(record, "partial", "partial", "partial")
    kept_run(record, "bad", "failed")
    kept_run(record, "ended", "cancelled")
    inputs = {f"file:///in-{name}" for name in ("good", "partial", "bad", "ended")}
    recent = record.held(time.time() - 3600.0)
    assert recent.uris == inputs | {"good-1", "good-2", "partial-1", "partial-2", "bad-1", "ended-1"}
    assert recent.since == math.inf
    assert record.held(time.time() + 1.0).uris == inputs | {"good-2", "partial-2"}
    kept_run(record, "resumed", "failed", "")
    held = record.held(time.time() + 1.0)
    assert {"resumed-1", "resumed-2"} <= set(held.uris), "the attempt that goes on will look for the former's results"
    assert held.since == 5.0


def test_the_orchestrator_needs_no_torch_and_no_service() -> None:
    code = (
        "import sys, orchestrator.service;"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'services')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_a_forgotten_run_leaves_nothing_behind(tmp_path: Path) -> None:
    store = RunStore(make_database(f"sqlite:///{tmp_path}/runs.sqlite"))
    other = replace(RUN, run_id="other")
    for run in (RUN, other):
        assert store.create(run)
        store.write_units({(run.run_id, 1, "end"): Unit("end", results=[f"file:///store/{run.run_id}"]).to_json()})
    with pytest.raises(FailedPrecondition, match="run r is queued: only a run that has ended can be forgotten"):
        store.forget("r")
    assert store.set_started("r", 1)
    with pytest.raises(FailedPrecondition, match="run r is running"):
        store.forget("r")
    assert store.units("r", 1), "refused, it has lost nothing"
    assert store.held(0.0).uris == {"file:///store/r", "file:///store/other"}
    assert store.set_finished("r", 1, "succeeded")
    store.forget("r")
    assert [run.run_id for run, _ in store.newest("", 5)] == ["other"]
    assert store.held(0.0).uris == {"file:///store/other"}
    with pytest.raises(NotFound):
        store.next_attempt("r", 1)
    # As an orchestrator that has not heard of it would.
    late = {("r", 1, "end"): Unit("end", results=["file:///store/r"]).to_json(), ("other", 1, "item"): '{"path": "i"}'}
    store.write_units(late)
    assert store.units("r", 1) == {}
    assert store.units("other", 1).keys() == {"end", "item"}
    assert store.create(RUN), "its id can be used once more"
    assert (store.attempt("r").state, store.units("r", 1)) == ("queued", {})
