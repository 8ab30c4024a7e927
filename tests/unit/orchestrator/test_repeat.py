"""Repeats: what is checked before they run, and what their rounds do."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import grpc
import numpy as np
import pandas as pd
import pytest
from google.protobuf.json_format import MessageToDict

from cryofleet.errors import InvalidArgument
from cryofleet.particles import Particles
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import runtime_pb2
from orchestrator import tasks
from orchestrator.engine import Engine
from orchestrator.estimate import estimate_run
from orchestrator.pipeline_reading import load
from tests.unit.orchestrator.fake import Platform, running_platform

COUNT = """\
name: count
help: Each round counts two on.
inputs:
  table: {kind: particles, optional: true}
parameters:
  start: {type: integer, default: 0}
  most: {type: integer, default: 20}
  count_to: {type: integer, default: 6}
  seconds: {type: number, default: 0}
steps:
  - id: count
    repeat: ${most}
    carry: {index: "${start}"}
    next: {index: "${two.next_index}"}
    until: ${two.counted}
    steps:
      - id: two
        op: runtime.SelfTest
        with: {index: "${one.next_index}", count_to: "${count_to}", seconds: "${seconds}"}
      - id: one
        op: runtime.SelfTest
        with: {index: "${count.index}", seconds: "${seconds}"}
  - id: after
    op: runtime.SelfTest
    with: {index: "${count.index}", seconds: 0.001}
outputs:
  index: ${count.index}
  rounds: ${count.rounds}
  last: ${count.two.index}
  after: ${after.index}
"""


@pytest.fixture
async def platform(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Platform]:
    monkeypatch.setattr(tasks, "_BACKOFF_SECONDS", (0.01, 0.05))
    async with running_platform() as running:
        yield running


def outputs(run: pb.Run) -> dict[str, Any]:
    return MessageToDict(run.outputs)


def states(run: pb.Run) -> dict[str, str]:
    return {step.id: pb.StepState.Name(step.state).removeprefix("STEP_STATE_") for step in run.steps}


def figures(run: pb.Run, step_id: str) -> tuple[int, int]:
    """Tasks, or rounds, that are done and that there are."""
    step = next(step for step in run.steps if step.id == step_id)
    return step.tasks_done, step.tasks_total


# Before anything runs. Each case: what is replaced, by what, the line that the error must name (by text on it), and
# what it must say.
FAULTS = {
    "no rounds": ("repeat: ${most}", "repeat: 0", "repeat:", "'repeat' is 0; it must be an integer from 1 to 1000"),
    "half a round": ("repeat: ${most}", "repeat: 1.5", "repeat:", "'repeat' is 1.5; it must be an integer"),
    "too many rounds": ("repeat: ${most}", "repeat: 1001", "repeat:", "it must be an integer from 1 to 1000"),
    "rounds that are no number": ("repeat: ${most}", "repeat: often", "repeat:", "'repeat' is 'often'"),
    "rounds of another type": (
        "repeat: ${most}",
        "repeat: ${seconds}",
        "repeat:",
        "must be an integer; ${seconds} is a",
    ),
    "rounds from inside": ("repeat: ${most}", "repeat: ${one.index}", "repeat:", "unknown reference ${one.index}"),
    "unknown value in carry": ("${start}", "${strat}", "carry:", "unknown reference ${strat}; did you mean 'start'"),
    "carried from itself": ("${start}", "${count.index}", "- id: count", "in a circle: count -> count"),
    "carried from inside": ("${start}", "${one.index}", "carry:", "unknown reference ${one.index}"),
    "nothing carried": ('"${start}"', "null", "carry:", "carries nothing as 'index'; give the first round a value"),
    "nothing carried on": ('"${two.next_index}"', "null", "next:", "carries nothing as 'index' into the following"),
    "no next": ('    next: {index: "${two.next_index}"}\n', "", "- id: count", "say what it is in the following round"),
    "another next": ("next: {index:", "next: {indx:", "next:", "carries no 'indx'; did you mean 'index'"),
    "next of another type": (
        "${two.next_index}",
        "${two.instance}",
        "next:",
        "'index' is an integer in the first round, and text in the following",
    ),
    "next of another literal type": (
        '"${two.next_index}"',
        "1.5",
        "next:",
        "'index' is an integer in the first round, and a number in the following",
    ),
    "carried of another kind": (
        '"${start}"',
        '"${table}"',
        "next:",
        "'index' is particles that may be missing in the first round, and an integer in the following",
    ),
    "unknown next": ("${two.next_index}", "${three.index}", "next:", "unknown reference ${three.index}"),
    "until is no truth": ("${two.counted}", "${two.index}", "until:", "must be true or false; ${two.index} is an int"),
    "unknown until": ("${two.counted}", "${two.count}", "until:", "'two' has no output 'count'"),
    "until is no reference": ("until: ${two.counted}", "until: true", "until:", "'until' must be a reference"),
    "carried is unknown inside": ("${count.index}", "${count.indx}", "index: ", "did you mean 'index'"),
    "an inner output before it is": ("${count.index}", "${count.two.index}", "with:", "'count' has no output 'two'"),
    "wrong type inside": ('{index: "${count.index}"', '{fail_with: "${count.index}"', "fail_with", "takes text"),
    "a cycle inside": ("${count.index}", "${two.index}", "- id: two", "in a circle: two -> one -> two"),
    "a step named as what is carried": ("- id: one", "- id: index", "- id: index", "'index' is taken already"),
    "a step named rounds": ("- id: one", "- id: rounds", "- id: rounds", "'rounds' is taken already"),
    "round carried": ("carry: {index:", "carry: {round:", "carry:", "'round' is the number of rounds"),
    "a malformed name": ("carry: {index:", "carry: {in dex:", "carry:", "'in dex' is no name"),
    "unknown output": ("${count.rounds}", "${count.round}", "count.round}", "did you mean 'rounds'"),
    "a foreach beside it": ("    repeat:", "    foreach: ${most}\n    repeat:", "repeat:", "make it a step inside"),
    "no repeat": ("    repeat: ${most}\n", "    foreach: ${most}\n", "carry:", "'carry' belongs to a 'repeat'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_its_place(fault: str) -> None:
    old, new, marked, told = FAULTS[fault]
    assert old in COUNT
    text = COUNT.replace(old, new, 1)
    with pytest.raises(InvalidArgument) as caught:
        load(text, "bad.yaml")
    lines = str(caught.value).splitlines()
    matching = [line for line in lines if told in line]
    assert matching, lines
    assert all(line.startswith("bad.yaml:") for line in lines)
    assert marked in text.splitlines()[int(matching[0].split(":")[1]) - 1]


def test_a_repeat_needs_steps() -> None:
    text = "name: x\nsteps:\n  - id: a\n    repeat: 3\n    op: runtime.SelfTest\n"
    with pytest.raises(InvalidArgument, match=r"x\.yaml:3: step 'a' has a 'repeat', and needs 'steps'"):
        load(text, "x.yaml")


@pytest.mark.parametrize("most", [0, -1, 1001])
def test_the_number_of_rounds_is_checked_with_the_arguments(most: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"count\.yaml:12: step 'count': 'repeat' is {most}; it must be"):
        load(COUNT, "count.yaml").bind({"most": most})


def test_an_output_of_a_step_that_is_left_out_may_be_missing_afterwards() -> None:
    text = COUNT.replace(
        "      - id: one\n",
        "      - id: maybe\n        if: ${table}\n        op: picking.Extract\n"
        "        with: {tomogram_uri: 'file:///t', particles_uri: \"${table}\", box_size_voxels: 8}\n      - id: one\n",
    )
    text = text.replace(
        "outputs:\n",
        "  - id: merge\n    op: learning.TrainAutoencoder\n"
        '    with: {subtomograms_uri: "${count.maybe.subtomograms_uri}"}\noutputs:\n',
    )
    with pytest.raises(InvalidArgument, match=r"\$\{count\.maybe\.subtomograms_uri\} may be missing"):
        load(text, "count.yaml")


def test_a_condition_on_one_value_says_nothing_of_another_that_is_carried() -> None:
    text = """\
name: optional
inputs:
  tomogram: {kind: volume, optional: true}
  table: {kind: particles, optional: true}
steps:
  - id: refine
    repeat: 2
    carry: {tomogram: "${tomogram}", table: "${table}"}
    next: {tomogram: "${refine.tomogram}", table: "${refine.table}"}
    steps:
      - id: pick
        if: ${refine.tomogram}
        op: picking.DifferenceOfGaussians
        with: {tomogram_uri: "${refine.tomogram}", particle_diameter_angstrom: 100}
"""
    load(text, "optional.yaml")
    with pytest.raises(InvalidArgument, match=r"\$\{refine\.tomogram\} may be missing"):
        load(text.replace("if: ${refine.tomogram}", "if: ${refine.table}"), "optional.yaml")


# Rounds


async def test_each_round_goes_on_from_the_one_before_until_a_condition_holds(platform: Platform) -> None:
    await platform.submit(COUNT)
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
    assert outputs(run) == {"index": 6, "rounds": 3, "last": 5, "after": 6}
    assert platform.service.done == [
        *(f"run:1/count@{round_}.{step}" for round_ in (1, 2, 3) for step in ("one", "two")),
        "run:1/after",
    ]
    assert figures(run, "count") == (3, 3)
    assert figures(run, "count.one") == (3, 3)
    assert set(states(run).values()) == {"SUCCEEDED"}
    steps = {step.id: MessageToDict(step.outputs) for step in run.steps}
    assert steps["count"]["index"] == 6
    assert steps["count.two"]["index"] == 5, "of the last round"


async def test_no_more_rounds_than_were_asked_for(platform: Platform) -> None:
    await platform.submit(COUNT, most=2, count_to=100)
    run = await platform.ended()
    assert outputs(run) == {"index": 4, "rounds": 2, "last": 3, "after": 4}


async def test_a_number_of_rounds_that_a_step_gives_is_checked_when_it_is_there(platform: Platform) -> None:
    text = COUNT.replace(
        "  - id: count\n", '  - id: most_of\n    op: runtime.SelfTest\n    with: {index: "${most}"}\n  - id: count\n'
    ).replace("repeat: ${most}", "repeat: ${most_of.index}")
    await platform.submit(text, "none", most=0)
    run = await platform.ended("none")
    assert run.error == ("step count failed: INVALID_ARGUMENT: 'repeat' is 0; it must be an integer from 1 to 1000")
    await platform.submit(text, "one", most=1)
    assert outputs(await platform.ended("one"))["rounds"] == 1


async def test_the_run_tells_the_round(platform: Platform) -> None:
    async def hold(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        if request.index == 4:
            await asyncio.sleep(60)

    platform.service.behave = hold
    await platform.submit(COUNT, most=5)
    await platform.until(lambda: "run:1/count@3.one" in platform.service.calls)
    await platform.engine.settle("run")
    run = platform.run()
    steps = {step.id: step for step in run.steps}
    assert states(run) == {"count": "RUNNING", "count.two": "RUNNING", "count.one": "RUNNING", "after": "WAITING"}
    assert steps["count"].phase == "round 3 of 5"
    assert steps["count"].fraction == steps["count.two"].fraction == pytest.approx(2 / 5)
    assert figures(run, "count") == (2, 5)
    assert figures(run, "count.one") == (2, 3)
    assert not steps["count.two"].HasField("finished_at")


async def test_a_failed_round_is_named_and_resumed_with_the_others_from_the_store(platform: Platform) -> None:
    async def behave(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        if request.index == 5:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "index 5 is bad")

    platform.service.behave = behave
    await platform.submit(COUNT)
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_FAILED
    assert run.error == ("step count failed: INVALID_ARGUMENT: round 3: step count@3.two: index 5 is bad")
    assert states(run) == {"count": "FAILED", "count.two": "FAILED", "count.one": "SUCCEEDED", "after": "CANCELLED"}
    platform.service.behave = None
    platform.service.calls.clear()
    await platform.next_attempt()
    run = await platform.ended()
    assert (run.state, run.attempt) == (pb.RUN_STATE_SUCCEEDED, 2)
    assert outputs(run)["index"] == 6
    assert platform.service.calls == ["run:2/count@3.two", "run:2/after"]


async def test_a_restart_goes_on_in_the_round_where_it_was(platform: Platform) -> None:
    # Without a store, so that nothing could be found there that is done twice.
    platform.service._store = None
    await platform.submit(COUNT, count_to=12, seconds=0.1)
    await platform.until(lambda: "run:1/count@3.one" in platform.service.done)
    await asyncio.sleep(0.03)
    await platform.engine.stop()
    with closing(sqlite3.connect(platform.home / "orchestrator.sqlite")) as database:
        rows = database.execute("SELECT output FROM operation_outputs WHERE function_name='task'").fetchall()
        pending = {row[0] for row in database.execute("SELECT status FROM workflow_status")}
    assert pending == {"PENDING"}, "stopping is no failure"
    recorded = {row[0].split('"task":"')[1].split('"')[0] for row in rows}
    assert recorded >= {"run:1/count@1.one", "run:1/count@1.two", "run:1/count@2.one", "run:1/count@2.two"}
    platform.service.calls.clear()
    await platform.restart_stopped()
    run = await platform.ended()
    assert outputs(run) == {"index": 12, "rounds": 6, "last": 11, "after": 12}
    assert not recorded & set(platform.service.calls), "what was recorded is not done again"
    assert "run:1/count@3.two" in platform.service.calls
    assert figures(run, "count.one") == (6, 6)
    assert figures(run, "count") == (6, 6)


async def test_cancelling_ends_the_rounds(platform: Platform) -> None:
    await platform.submit(COUNT, seconds=0.2)
    await platform.until(lambda: "run:1/count@2.one" in platform.service.calls)
    await asyncio.sleep(0.05)
    assert await platform.engine.cancel_attempt("run", 1)
    await platform.until(lambda: platform.service.running == 0)
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_CANCELLED
    assert states(run)["count"] == "CANCELLED"
    calls = len(platform.service.calls)
    await asyncio.sleep(0.5)
    assert len(platform.service.calls) == calls, "nothing more is started"
    done = set(platform.service.done)
    assert "run:1/count@1.two" in done
    platform.service.calls.clear()
    await platform.next_attempt()
    assert outputs(await platform.ended())["index"] == 6
    assert len(platform.service.calls) == 7 - len(done), "finished rounds are found in the store"


BESIDE = """\
name: beside
parameters:
  starts: {type: list}
steps:
  - id: each
    foreach: ${starts}
    as: start
    steps:
      - id: count
        repeat: ${start.most}
        carry: {index: "${start.index}"}
        next: {index: "${one.next_index}"}
        until: ${one.counted}
        steps:
          - id: one
            op: runtime.SelfTest
            with: {index: "${count.index}", count_to: "${start.count_to}"}
      - id: last
        op: runtime.SelfTest
        with: {index: "${count.index}", seconds: 0.001}
outputs:
  index: ${each.count.index}
  rounds: ${each.count.rounds}
  one: ${each.count.one.index}
  last: ${each.last.index}
"""


async def test_items_of_a_foreach_have_their_rounds_each_on_its_own(platform: Platform) -> None:
    async def behave(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        if request.index == 21:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "index 21 is bad")

    platform.service.behave = behave
    starts = [
        {"index": 0, "count_to": 3, "most": 10.0},
        {"index": 20, "count_to": 100, "most": 10},
        {"index": 10, "count_to": 11, "most": 5},
    ]
    await platform.submit(BESIDE, starts=starts)
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_PARTIAL, run.error
    assert outputs(run) == {
        "index": [3, None, 11],
        "rounds": [3, None, 1],
        "one": [2, None, 10],
        "last": [3, None, 11],
    }
    assert [(s.step, s.item, s.cause) for s in run.set_aside] == [
        ("each", "1", "step each[1].count: round 2: step each[1].count@2.one: index 21 is bad")
    ]
    steps = {step.id: MessageToDict(step.outputs) for step in run.steps}
    assert steps["each.count.one"]["index"] == [2, None, 10], "of each item's last round"
    platform.service.behave = None
    await platform.next_attempt()
    run = await platform.ended()
    assert outputs(run)["index"] == [3, 30, 11]
    assert outputs(run)["rounds"] == [3, 10, 1]


SPREAD = """\
name: spread
inputs:
  table: {kind: particles}
parameters:
  numbers: {type: list}
steps:
  - id: outer
    repeat: 2
    carry: {table_uri: "${table}", index: 0, found: "${numbers}"}
    next: {table_uri: "${outer.table_uri}", index: "${inner.index}", found: "${each.next_index}"}
    steps:
      - id: expect
        op: runtime.SelfTest
        with: {particles_uri: "${outer.table_uri}", index: "${outer.index}"}
        shards: {over: particles_uri, size: 10}
      - id: each
        op: runtime.SelfTest
        foreach: ${outer.found}
        as: number
        with: {index: "${number}", seconds: 0.002}
      - id: inner
        repeat: 3
        carry: {index: "${outer.index}"}
        next: {index: "${count.next_index}"}
        steps:
          - id: count
            op: runtime.SelfTest
            with: {index: "${inner.index}", count_to: "${outer.round}", fail_with: ""}
outputs:
  rows: ${outer.expect.first_row}
  marks: ${outer.expect.index}
  found: ${outer.found}
  index: ${outer.index}
  inner_rounds: ${outer.inner.rounds}
"""


def write_table(platform: Platform, rows: int) -> str:
    table = pd.DataFrame({"id": np.arange(rows), "x": 1.0, "y": 2.0, "z": np.arange(rows, dtype=float)})
    uri = f"{platform.store.root}/default/table-{rows}.parquet"
    platform.store.put(uri, Particles(table, 10.0, "t", None).to_parquet())
    return uri


async def test_rounds_have_shards_items_and_rounds_of_their_own(platform: Platform) -> None:
    async def behave(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        if request.index == 51 and request.seconds == 0.002:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "index 51 is bad")

    platform.service.behave = behave
    await platform.submit(SPREAD, table=write_table(platform, 25), numbers=[30, 50, 70])
    run = await platform.ended()
    assert run.state == pb.RUN_STATE_PARTIAL, run.error
    assert outputs(run) == {
        "rows": [0, 10, 20],
        "marks": [3, 3, 3],
        "found": [32, None, 72],
        "index": 6,
        "inner_rounds": 3,
    }
    assert [(s.step, s.item) for s in run.set_aside] == [("outer.each", "round 2/1")]
    assert figures(run, "outer.expect") == (6, 6)
    assert figures(run, "outer.inner") == (6, 6)
    assert sorted(key for key in platform.service.done if "inner" in key) == [
        f"run:1/outer@{outer}.inner@{inner}.count" for outer in (1, 2) for inner in (1, 2, 3)
    ]
    steps = {step.id: MessageToDict(step.outputs) for step in run.steps}
    assert steps["outer.inner.count"]["index"] == 5
    assert steps["outer.each"]["index"] == [31, None, 71]
    assert states(run)["outer.each"] == "PARTIAL"
    assert states(run)["outer.expect"] == "SUCCEEDED"


# What it would take


async def estimated(engine: Engine, text: str, **arguments: Any) -> dict[str, tuple[int, int, bool]]:
    """Tasks, those in the store, and whether the figures are exact, by step."""
    pipeline = load(text, "test.yaml")
    estimate = await estimate_run(engine, pipeline, pipeline.bind(arguments), "default")
    return {step.id: (step.tasks, step.tasks_cached, step.known) for step in estimate.steps}


async def test_an_estimate_counts_all_rounds(platform: Platform) -> None:
    assert await estimated(platform.engine, COUNT, most=7) == {
        "count": (0, 0, False),
        "count.one": (7, 0, False),
        "count.two": (7, 0, False),
        "after": (1, 0, False),
    }
    table = write_table(platform, 25)
    figures_before = await estimated(platform.engine, SPREAD, table=table, numbers=[30, 50])
    assert figures_before["outer.expect"] == (6, 0, False), "three shards in each of two rounds"
    assert figures_before["outer.each"] == (4, 0, False)
    assert figures_before["outer.inner.count"] == (6, 0, False)
    await platform.submit(COUNT, most=2)
    await platform.ended()
    known = await estimated(platform.engine, COUNT, most=7)
    assert known["count.one"] == (7, 2, False), "two rounds are in the store, and nobody knows which is the last"
    await platform.submit(COUNT, "whole")
    await platform.ended("whole")
    assert await estimated(platform.engine, COUNT, most=7) == {
        "count": (0, 0, True),
        "count.one": (3, 3, True),
        "count.two": (3, 3, True),
        "after": (1, 1, True),
    }


async def test_shards_are_counted_where_something_else_is_not_known_yet(platform: Platform) -> None:
    text = """\
name: later
inputs:
  table: {kind: particles}
steps:
  - id: before
    op: runtime.SelfTest
    with: {index: 1}
  - id: parts
    op: runtime.SelfTest
    with: {particles_uri: "${table}", index: "${before.next_index}"}
    shards: {over: particles_uri, size: 10}
"""
    found = await estimated(platform.engine, text, table=write_table(platform, 25))
    assert found["parts"] == (3, 0, False)
