"""A run as the contract tells it: each of its steps is the sum of its units of work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from cryofleet.tomogram_names import file_stem
from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator.expressions import Reference
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
_WEIGHTS = (WAITING, SKIPPED, SUCCEEDED, PARTIAL, CANCELLED, FAILED, RUNNING)
"""Of the states that a step has in the rounds of a repeat, the one that comes last here counts."""
_INDEX = re.compile(r"\[(\d+)\]")
_ROUND = re.compile(r"@(\d+)")
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
        owner=run.owner,
    )
    if pipeline is None:
        return message
    for name, names in _output_names(pipeline, run.arguments).items():
        message.output_names[name].names.extend(names)
    grouped: dict[str, dict[str, Unit]] = {}
    for name, unit in sorted((units or {}).items(), key=lambda item: _natural(item[0])):
        grouped.setdefault(unit.path, {})[name] = unit
        message.set_aside.extend(pb.SetAside(**problem) for problem in unit.problems)
    repeats: dict[str, pb.StepStatus] = {}
    """Those that go on, by where the steps inside them are."""
    for path, step in _paths(pipeline.steps, ""):
        status = _step_message(path, step, grouped, attempt.state)
        repeat = next((repeats[place] for place in repeats if path.startswith(place)), None)
        if repeat is not None and status.state != pb.STEP_STATE_WAITING:
            # It runs again in the next round, which may begin at any time.
            status.state = pb.STEP_STATE_RUNNING
            status.fraction = repeat.fraction
            status.ClearField("finished_at")
        message.steps.append(status)
        if step.repeat is not None and status.state == pb.STEP_STATE_RUNNING:
            repeats[path + "."] = status
    return message


def _output_names(pipeline: Pipeline, arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """Of each output of a step that a foreach maps over a list of files: its items' names, the files' without endings,
    behind their numbers where two files have one name."""
    over = {step.id: step.foreach.path for step in pipeline.steps if step.foreach is not None}
    inputs = {argument.name for argument in pipeline.arguments if argument.is_input and argument.repeated}
    found = {}
    for output, expression in pipeline.outputs.items():
        path = over.get(expression.root, ()) if isinstance(expression, Reference) else ()
        if len(path) == 1 and path[0] in inputs and arguments.get(path[0]):
            stems = [file_stem(str(uri)) for uri in arguments[path[0]]]
            distinct = len(set(stems)) == len(stems)
            found[output] = stems if distinct else [f"{i}_{stem}" for i, stem in enumerate(stems, start=1)]
    return found


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts item 10 behind item 9."""
    words = re.split(r"(\d+)", name)
    return [(0, int(word)) if word.isdigit() else (1, word) for word in words if word]


def _paths(steps: Iterable[Step], prefix: str) -> Iterable[tuple[str, Step]]:
    for step in steps:
        path = prefix + step.id
        yield path, step
        yield from _paths(step.steps, path + ".")


def _step_message(path: str, step: Step, grouped: Mapping[str, Mapping[str, Unit]], run_state: str) -> pb.StepStatus:
    """The step as its own units tell it; of those inside, which a restart leaves as they were, it takes the times."""
    named = grouped.get(path, {})
    units = list(named.values())
    leading = [unit for unit in units if unit.state]
    states = _states_over_rounds({name: unit.state for name, unit in named.items() if unit.state})
    if run_state not in ACTIVE:
        # Whatever had not ended when the run did never will.
        states = {CANCELLED if state in (RUNNING, WAITING) else state for state in states} or {CANCELLED}
    state = _joint_state(states)
    total = sum(unit.total for unit in units)
    done = sum(unit.done for unit in units)
    ended = state not in (RUNNING, WAITING)
    inside = [unit for place in grouped if place.startswith(path + ".") for unit in grouped[place].values()]
    started = [unit.started_at for unit in (*leading, *inside) if unit.started_at is not None]
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
        phase="" if ended else _phase(step, units),
        started_at=_timestamp(min(started, default=None)),
        finished_at=_timestamp(max(finished, default=None)) if ended else None,
        compute_seconds=sum(unit.compute_seconds for unit in units),
        outputs=_struct(_joint_outputs({name: unit for name, unit in named.items() if unit.state})),
    )


def _phase(step: Step, units: Iterable[Unit]) -> str:
    if step.repeat is None:
        # The last, since of the rounds of a repeat that is the one that runs.
        return next((unit.phase for unit in reversed(list(units)) if unit.phase), "")
    running = [unit for unit in units if unit.state == RUNNING and unit.total]
    if not running:
        return ""
    # Several, where each item of a foreach has its own.
    rounds = sorted({min(unit.done + 1, unit.total) for unit in running})
    first, last, total = rounds[0], rounds[-1], max(unit.total for unit in running)
    return f"round {first} of {total}" if first == last else f"rounds {first} to {last} of {total}"


def _states_over_rounds(named: Mapping[str, str]) -> set[str]:
    """Of a step inside a repeat the one state that its rounds have together; for each item of a foreach."""
    states: dict[str, str] = {}
    for name, state in named.items():
        place = _ROUND.sub("", name)
        states[place] = max(states.get(place, state), state, key=_WEIGHTS.index)
    return set(states.values())


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
    """Of a step inside a foreach lists, by the items' numbers; None for an item that has no result. Of a step inside a
    repeat those of the last round.
    """
    last_rounds: dict[str, int] = {}
    for name in units:
        for match in _ROUND.finditer(name):
            place = name[: match.start()]
            last_rounds[place] = max(last_rounds.get(place, 0), int(match.group(1)))
    outputs = {
        tuple(int(index) for index in _INDEX.findall(name)): unit.outputs or {}
        for name, unit in units.items()
        if all(int(match.group(1)) == last_rounds[name[: match.start()]] for match in _ROUND.finditer(name))
    }
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


def timestamp(seconds: float) -> Timestamp:
    """Of Unix time."""
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def _timestamp(seconds: float | None) -> Timestamp | None:
    return None if seconds is None else timestamp(seconds)
