"""A run as the contract tells it: each of its steps is the sum of its units of work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator.pipeline import Pipeline, Step
from orchestrator.runs import (
    ACTIVE,
    CANCELLED,
    FAILED,
    PARTIAL,
    QUEUED,
    RUNNING,
    SKIPPED,
    SUCCEEDED,
    WAITING,
    AttemptRow,
    RunRow,
    Unit,
)

_RUN_STATES = {
    QUEUED: pb.RUN_STATE_QUEUED,
    RUNNING: pb.RUN_STATE_RUNNING,
    SUCCEEDED: pb.RUN_STATE_SUCCEEDED,
    PARTIAL: pb.RUN_STATE_PARTIAL,
    FAILED: pb.RUN_STATE_FAILED,
    CANCELLED: pb.RUN_STATE_CANCELLED,
}
_STEP_STATES = {
    WAITING: pb.STEP_STATE_WAITING,
    RUNNING: pb.STEP_STATE_RUNNING,
    SUCCEEDED: pb.STEP_STATE_SUCCEEDED,
    PARTIAL: pb.STEP_STATE_PARTIAL,
    FAILED: pb.STEP_STATE_FAILED,
    CANCELLED: pb.STEP_STATE_CANCELLED,
    SKIPPED: pb.STEP_STATE_SKIPPED,
}
_INDEX = re.compile(r"\[(\d+)\]")
ENDED = (pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_PARTIAL, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED)


def run_message(
    run: RunRow, attempt: AttemptRow, pipeline: Pipeline | None = None, units: Mapping[str, Unit] | None = None
) -> pb.Run:
    """The run; its steps where pipeline and units are given."""
    message = pb.Run(
        id=run.run_id,
        pipeline=run.pipeline,
        project=run.project,
        state=_RUN_STATES[attempt.state],
        attempt=attempt.attempt,
        arguments=_struct(run.arguments),
        error=attempt.error,
        outputs=_struct(attempt.outputs),
        created_at=_timestamp(run.created_at),
        started_at=_timestamp(attempt.started_at),
        finished_at=_timestamp(attempt.finished_at),
    )
    if pipeline is None:
        return message
    grouped: dict[str, dict[str, Unit]] = {}
    for name, unit in sorted((units or {}).items(), key=lambda item: _natural(item[0])):
        grouped.setdefault(unit.path, {})[name] = unit
        message.set_aside.extend(pb.SetAside(**problem) for problem in unit.problems)
    for path, step in _paths(pipeline.steps, ""):
        message.steps.append(_step_message(path, step, grouped.get(path, {}), attempt.state))
    return message


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts item 10 behind item 9."""
    words = re.split(r"(\d+)", name)
    return [(0, int(word)) if word.isdigit() else (1, word) for word in words if word]


def _paths(steps: Iterable[Step], prefix: str) -> Iterable[tuple[str, Step]]:
    for step in steps:
        path = prefix + step.id
        yield path, step
        yield from _paths(step.steps, path + ".")


def _step_message(path: str, step: Step, named: Mapping[str, Unit], run_state: str) -> pb.StepStatus:
    units = list(named.values())
    leading = [unit for unit in units if unit.state]
    states = {unit.state for unit in leading}
    if run_state not in ACTIVE:
        # Whatever had not ended when the run did never will.
        states = {CANCELLED if state in (RUNNING, WAITING) else state for state in states} or {CANCELLED}
    state = _joint_state(states)
    total = sum(unit.total for unit in units)
    done = sum(unit.done for unit in units)
    ended = state not in (RUNNING, WAITING)
    started = [unit.started_at for unit in leading if unit.started_at is not None]
    finished = [unit.finished_at for unit in leading if unit.finished_at is not None]
    fraction = min(1.0, (done + sum(unit.partial for unit in units)) / total) if total else 0.0
    return pb.StepStatus(
        id=path,
        operation=step.operation.name if step.operation is not None else "",
        state=_STEP_STATES[state],
        tasks_total=total,
        tasks_done=done,
        tasks_cached=sum(unit.cached for unit in units),
        tasks_set_aside=sum(unit.set_aside for unit in units),
        fraction=1.0 if state == SUCCEEDED else fraction,
        phase="" if ended else next((unit.phase for unit in units if unit.phase), ""),
        started_at=_timestamp(min(started, default=None)),
        finished_at=_timestamp(max(finished, default=None)) if ended else None,
        compute_seconds=sum(unit.compute_seconds for unit in units),
        outputs=_struct(_joint_outputs({name: unit for name, unit in named.items() if unit.state})),
    )


def _joint_state(states: set[str]) -> str:
    """Of a step that runs for several items."""
    if not states:
        return WAITING
    if RUNNING in states or (WAITING in states and len(states) > 1):
        return RUNNING
    if len(states) == 1:
        return next(iter(states))
    if CANCELLED in states:
        return CANCELLED
    if states == {SUCCEEDED, SKIPPED}:
        return SUCCEEDED
    return PARTIAL


def _joint_outputs(units: Mapping[str, Unit]) -> dict[str, Any]:
    """Of a step inside a foreach lists, by the items' numbers; None for an item that has no result."""
    outputs = {tuple(int(index) for index in _INDEX.findall(name)): unit.outputs or {} for name, unit in units.items()}
    names = dict.fromkeys(name for each in outputs.values() for name in each)
    return {name: _placed({indices: each.get(name) for indices, each in outputs.items()}) for name in names}


def _placed(values: Mapping[tuple[int, ...], Any]) -> Any:
    """Values by their indices as nested lists."""
    if () in values:
        return values[()]
    items: dict[int, dict[tuple[int, ...], Any]] = {}
    for (first, *rest), value in values.items():
        items.setdefault(first, {})[tuple(rest)] = value
    return [_placed(items[index]) if index in items else None for index in range(max(items) + 1)]


def _struct(values: Mapping[str, Any]) -> Struct:
    struct = Struct()
    struct.update({name: value for name, value in values.items() if value is not None})
    return struct


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp
