"""Runs as durable workflows of DBOS.

A run is a workflow; its steps form a graph. What makes a replay after a crash find each result in its own place:

- step ids follow the order of calls, so concurrent work reserves its ids, in order of declaration, before it awaits;
- whatever has a number of parts that is known only when it runs (a foreach, a repeat, shards) is a workflow of its own,
  with an explicit id, waited for inside one reserved step of its parent;
- each result names its task, and the workflow checks it;
- steps return outcome records and never raise, since a step's exception would be its recorded result.

Tasks are queued in chunks of up to 64: a queue entry costs several times what a step does.

What is here decides the order of steps. Raise `engine.APPLICATION_VERSION` when that changes: runs that were begun by
an older version are then left to an orchestrator of that version, or begin anew once there is none.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from dbos import DBOS, SetEnqueueOptions, SetWorkflowID, StepOptions

from cryofleet.operations import Operation
from orchestrator import run_trace
from orchestrator.expressions import Reference, evaluate, look_up_in
from orchestrator.pipeline import ROUND, ROUNDS, Step, check_rounds
from orchestrator.runs import CANCELLED, FAILED, PARTIAL, RUNNING, SKIPPED, SUCCEEDED, Unit
from orchestrator.tasks import Outcome, TaskRequest

if TYPE_CHECKING:
    from orchestrator.engine import Engine, Plan

CHUNK_TASKS = 64
"""Tasks in a queue entry at most."""
QUEUE = "cryofleet-work"
"""Of chunks."""
ITEMS = "cryofleet-items"
"""Of the items of a foreach, which mostly wait for their tasks."""
_POLL_SECONDS = 0.1
_INDEX = re.compile(r"\[(\d+)\]|@(\d+)")
"""Of an item, or of a round."""
_TASK: StepOptions = {"name": "task", "preemptible": True}
_COUNT: StepOptions = {"name": "count", "preemptible": True}
_PART: StepOptions = {"name": "part", "preemptible": True}
_BEGIN: StepOptions = {"name": "begin"}
_FINISH: StepOptions = {"name": "finish"}

Json = Any
Values = dict[str, Any]
ResultT = TypeVar("ResultT")


class StepResult(TypedDict, total=False):
    """What became of a step, or of one item of a foreach; plain JSON."""

    place: str
    """The step's own name in the run, so that no result is taken for another's."""
    state: str
    outputs: Values
    set_aside: int
    """Items that were given up, those of steps inside included."""
    status: str
    cause: str
    input_uri: str


_engine: Engine | None = None


def use_engine(engine: Engine | None) -> None:
    """DBOS calls plain functions; this is where they find what they work with."""
    global _engine
    _engine = engine


def _current() -> Engine:
    if _engine is None:
        raise RuntimeError("no engine is running in this process")
    return _engine


def workflow_id(run_id: str, attempt: int, place: str = "") -> str:
    """The id of a run's workflow, or of the part of it at `place`."""
    return f"{run_id}:{attempt}/{place}" if place else f"{run_id}:{attempt}"


async def _together(coroutines: Iterable[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """All results in order; the first exception, as it is, once all others are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


# The run


@DBOS.workflow(name="run", max_recovery_attempts=None)
async def run_workflow(run_id: str, attempt: int) -> Json:
    """One attempt at a run."""
    engine = _current()
    plan = await engine.plan(run_id)
    begun = await DBOS.run_step_async(_BEGIN, engine.begin, run_id, attempt)
    if begun.get("ended"):
        return {"state": CANCELLED}
    results = await _block(plan, attempt, "", "", plan.pipeline.steps, plan.values)
    failed = next((r for r in results.values() if r["state"] == FAILED), None)
    values = {**plan.values, **{name: result.get("outputs") for name, result in results.items()}}
    look_up = look_up_in(values)
    outputs = {name: evaluate(value, look_up, keep_places=True) for name, value in plan.pipeline.outputs.items()}
    outputs = {name: value for name, value in outputs.items() if value is not None}
    state, error = SUCCEEDED, ""
    if failed is not None:
        state = FAILED
        about = f" (input {failed['input_uri']})" if failed.get("input_uri") else ""
        error = f"step {failed['place']} failed: {failed['status']}: {failed['cause']}{about}"
    elif any(result.get("set_aside") for result in results.values()):
        state = PARTIAL
    await DBOS.run_step_async(_FINISH, engine.finish, run_id, attempt, state, error, outputs)
    return {"state": state}


async def _block(
    plan: Plan, attempt: int, place: str, path: str, steps: Sequence[Step], scope: Mapping[str, Any]
) -> dict[str, StepResult]:
    """Runs steps as soon as what they need is there. After a failure no other is started; those that run go on."""
    engine = _current()
    # One id for each step, in order, before anything is awaited.
    reserved = {step.id: DBOS.reserve_step() for step in steps}
    ended = {step.id: asyncio.Event() for step in steps}
    results: dict[str, StepResult] = {}
    values = dict(scope)

    async def work(step: Step) -> StepResult:
        result: StepResult
        needs = {reference.root for reference in step.references()} & ended.keys()
        for need in sorted(needs):
            await ended[need].wait()
        if any(results[need]["state"] in (FAILED, CANCELLED) for need in needs) or any(
            result["state"] == FAILED for result in results.values()
        ):
            return {"place": place + step.id, "state": CANCELLED}
        look_up = look_up_in(values)
        if step.left_out(values, look_up) or (step.foreach is not None and look_up(step.foreach) is None):
            return {"place": place + step.id, "state": SKIPPED}
        if step.foreach is None and step.repeat is None and step.shards is None:
            assert step.operation is not None
            unit = engine.unit(plan.run_id, attempt, place + step.id, path + step.id, RUNNING)
            unit.total = 1
            fields = {name: evaluate(expression, look_up) for name, expression in step.fields.items()}
            task = plan.task(attempt, place + step.id, step.operation, fields)
            outcome = await reserved[step.id].run_async(_TASK, functools.partial(engine.do, task, unit))
            result = _from_outcome(place + step.id, _checked(outcome, task), unit)
            unit.state, unit.outputs = result["state"], result.get("outputs")
            return result
        part = functools.partial(
            _part, fan_out_workflow, plan.run_id, attempt, place + step.id, path + step.id, _subset(values, step)
        )
        result = await reserved[step.id].run_async(_PART, engine.stoppable(part))
        assert result["place"] == place + step.id, f"{result['place']} stands in the place of {place + step.id}"
        return result

    async def watched(step: Step) -> None:
        result = await work(step)
        if result["state"] in (SKIPPED, CANCELLED):
            engine.unit(plan.run_id, attempt, place + step.id, path + step.id, result["state"])
        results[step.id] = result
        values[step.id] = result.get("outputs")
        ended[step.id].set()

    await _together(watched(step) for step in steps)
    return results


def _subset(values: Mapping[str, Any], step: Step) -> Values:
    """Of the values, what the step and the steps inside it refer to."""
    chosen: Values = {}
    for reference in step.references():
        if len(reference.path) == 1 or not isinstance(values[reference.root], dict):
            chosen[reference.root] = values[reference.root]
            continue
        source, target = values[reference.root], chosen.setdefault(reference.root, {})
        for name in reference.path[1:-1]:
            source = source.get(name) or {}
            target = target.setdefault(name, {})
        target[reference.path[-1]] = source.get(reference.path[-1])
    return chosen


def _checked(outcome: Outcome, task: TaskRequest) -> Outcome:
    assert outcome["task"] == task.key, f"the outcome of {outcome['task']} stands in the place of {task.key}"
    return outcome


def _from_outcome(place: str, outcome: Outcome, unit: Unit) -> StepResult:
    _note(unit, outcome)
    if outcome["status"] == "OK":
        return {"place": place, "state": SUCCEEDED, "outputs": outcome["result"]}
    return {
        "place": place,
        "state": FAILED,
        "status": outcome["status"],
        "cause": outcome["cause"],
        "input_uri": outcome.get("input_uri", ""),
    }


def _note(unit: Unit, outcome: Outcome) -> None:
    """Adds a finished task to the unit."""
    if outcome["status"] == "OK":
        unit.done += 1
        unit.results.append(outcome["manifest"])
        if outcome["cached"]:
            unit.cached += 1
        else:
            unit.compute_seconds += outcome["seconds"]
    else:
        unit.set_aside += 1
    unit.started_at = min(unit.started_at or outcome["started_at"], outcome["started_at"])
    unit.finished_at = max(unit.finished_at or 0.0, outcome["finished_at"])


async def _part(workflow: Callable[..., Any], run_id: str, attempt: int, place: str, *arguments: Any) -> Json:
    """Starts a part of a run as a workflow with its own id, or finds the one that was started, and waits for it.

    It runs outside of the calling step's context: DBOS starts workflows from workflows only, and there would number
    them by the order of the calls. A cancelled run finds its parts by their ids.
    """

    async def start_and_wait() -> Json:
        with SetWorkflowID(workflow_id(run_id, attempt, place)):
            handle = await DBOS.start_workflow_async(workflow, run_id, attempt, place, *arguments)
        return await handle.get_result(polling_interval_sec=_POLL_SECONDS)

    return await asyncio.create_task(start_and_wait(), context=contextvars.Context())


# Steps that have many parts


@DBOS.workflow(name="fan_out", max_recovery_attempts=None)
@run_trace.of_step
async def fan_out_workflow(run_id: str, attempt: int, place: str, path: str, scope: Values) -> Json:
    """A step with a foreach, a repeat or shards."""
    engine = _current()
    plan = await engine.plan(run_id)
    step = plan.step(path)
    unit = engine.unit(run_id, attempt, place, path, RUNNING)
    if step.foreach is not None:
        result = await _mapped(plan, attempt, place, path, step, scope, unit)
    elif step.repeat is not None:
        result = await _repeated(plan, attempt, place, path, step, scope, unit)
    else:
        result = await _sharded(plan, attempt, place, path, step, scope, unit)
    unit.state = result["state"]
    unit.outputs = result.get("outputs")
    unit.finished_at = unit.finished_at or time.time()
    await engine.settle(run_id)
    return result


@DBOS.workflow(name="item", max_recovery_attempts=None)
@run_trace.of_step
async def item_workflow(run_id: str, attempt: int, place: str, path: str, scope: Values) -> Json:
    """One item of a foreach whose step has several parts."""
    engine = _current()
    plan = await engine.plan(run_id)
    step = plan.step(path)
    if not step.steps:
        unit = engine.unit(run_id, attempt, place, path, "")
        result = await _sharded(plan, attempt, place, path, step, scope, unit)
        await engine.settle(run_id)
        return result
    results = await _block(plan, attempt, place + ".", path + ".", step.steps, scope)
    await engine.settle(run_id)
    failed = next((r for r in results.values() if r["state"] == FAILED), None)
    if failed is not None:
        return {**failed, "place": place, "cause": f"step {failed['place']}: {failed['cause']}"}
    set_aside = sum(result.get("set_aside", 0) for result in results.values())
    return {
        "place": place,
        "state": PARTIAL if set_aside else SUCCEEDED,
        "outputs": {name: result.get("outputs") for name, result in results.items()},
        "set_aside": set_aside,
    }


@DBOS.workflow(name="chunk", max_recovery_attempts=None)
async def chunk_workflow(
    run_id: str, attempt: int, place: str, path: str, common: Values, own: list[Values | None], first: int
) -> Json:
    """Some of the tasks of a step: `own` has each task's fields beside the common ones, `first` counts the earlier.

    Where `own` has None, nothing is done, and the outcome is None.
    """
    engine = _current()
    plan = await engine.plan(run_id)
    operation = plan.step(path).operation
    assert operation is not None
    base, _, _ = place.rpartition("#")
    unit = engine.unit(run_id, attempt, place, path, "")
    reserved = [DBOS.reserve_step() for _ in own]

    async def one(index: int, fields: Values | None) -> Outcome | None:
        if fields is None:
            return None
        task = plan.task(attempt, f"{base}[{first + index}]", operation, {**common, **fields})
        outcome = _checked(await reserved[index].run_async(_TASK, functools.partial(engine.do, task, unit)), task)
        _note(unit, outcome)
        return outcome

    outcomes = await _together(one(index, fields) for index, fields in enumerate(own))
    await engine.settle(run_id)
    return {"place": place, "outcomes": outcomes}


async def _tasks(
    plan: Plan,
    attempt: int,
    place: str,
    path: str,
    operation: Operation,
    common: Values,
    own: Sequence[Values | None],
) -> list[Outcome | None]:
    """The outcomes of many tasks, in order, done in chunks of the operation's queue; None where `own` has None."""
    engine = _current()
    handles = []
    for number, first in enumerate(range(0, len(own), CHUNK_TASKS)):
        name = f"{place}#{number}"
        with (
            SetWorkflowID(workflow_id(plan.run_id, attempt, name)),
            # A share of the queue for each user, so that nobody waits behind all that another one has queued.
            SetEnqueueOptions(queue_partition_key=f"{operation.service}/{plan.user}"),
        ):
            handles.append(
                await DBOS.enqueue_workflow_async(
                    QUEUE,
                    chunk_workflow,
                    plan.run_id,
                    attempt,
                    name,
                    path,
                    common,
                    list(own[first : first + CHUNK_TASKS]),
                    first,
                )
            )
    outcomes: list[Outcome | None] = []
    for number, handle in enumerate(handles):
        await engine.endings.of(handle.workflow_id)
        result = await handle.get_result(polling_interval_sec=_POLL_SECONDS)
        assert result["place"] == f"{place}#{number}", f"{result['place']} stands in the place of {place}#{number}"
        outcomes += result["outcomes"]
    return outcomes


async def _sharded(
    plan: Plan, attempt: int, place: str, path: str, step: Step, scope: Values, unit: Unit
) -> StepResult:
    """One operation, split over rows, and the reduction of its results. One failed shard fails it."""
    engine = _current()
    operation, shards = step.operation, step.shards
    assert operation is not None
    assert shards is not None
    look_up = look_up_in(scope)
    fields = {name: evaluate(expression, look_up) for name, expression in step.fields.items()}
    uri = fields[shards.over]
    kind = next(p.type for p in operation.parameters if p.name == shards.over)
    counted = await DBOS.run_step_async(_COUNT, functools.partial(engine.count, plan.project, place, kind, uri))
    assert counted["task"] == place, f"the count of {counted['task']} stands in the place of {place}"
    if counted["status"] == "OK" and counted["count"] == 0:
        counted["status"] = "FAILED_PRECONDITION"
        counted["cause"] = f"{uri} has no rows, so there is nothing to do for {operation.name}"
    if counted["status"] != "OK":
        return {
            "place": place,
            "state": FAILED,
            "status": counted["status"],
            "cause": counted["cause"],
            "input_uri": uri,
        }
    size = max(1, int(evaluate(shards.size, look_up)))
    ranges = [
        {"first": first, "count": min(size, counted["count"] - first)} for first in range(0, counted["count"], size)
    ]
    unit.total = len(ranges) + (1 if shards.reduce is not None else 0)
    own = [{shards.into: rows} for rows in ranges]
    done = await _tasks(plan, attempt, place, path, operation, fields, own)
    outcomes = [outcome for outcome in done if outcome is not None]
    for rows, outcome in zip(ranges, outcomes, strict=True):
        if outcome["status"] != "OK":
            last = rows["first"] + rows["count"] - 1
            return {
                "place": place,
                "state": FAILED,
                "status": outcome["status"],
                "cause": f"rows {rows['first']} to {last}: {outcome['cause']}",
                "input_uri": outcome.get("input_uri", ""),
            }
    results = [outcome["result"] for outcome in outcomes]
    _cover(unit, outcomes)
    if shards.reduce is None:
        return {"place": place, "state": SUCCEEDED, "outputs": _collect(_output_names(operation), results)}
    reduce = shards.reduce
    fields = {name: evaluate(expression, look_up) for name, expression in reduce.fields.items()}
    fields[reduce.field] = [result[reduce.output] for result in results]
    task = plan.task(attempt, f"{place}/reduce", reduce.operation, fields)
    unit.phase = "joining the shards"
    outcome = await DBOS.run_step_async(_TASK, functools.partial(engine.do, task, unit))
    result = _from_outcome(place, _checked(outcome, task), unit)
    if result["state"] == FAILED:
        result["cause"] = f"joining the shards: {result['cause']}"
    return result


def _cover(unit: Unit, outcomes: list[Outcome]) -> None:
    """Makes the unit's time that of its tasks."""
    if outcomes:
        unit.started_at = min(outcome["started_at"] for outcome in outcomes)
        unit.finished_at = max(outcome["finished_at"] for outcome in outcomes)


async def _mapped(plan: Plan, attempt: int, place: str, path: str, step: Step, scope: Values, unit: Unit) -> StepResult:
    """A foreach. Items that fail are set aside; only where all do, or where it is strict, the step fails.

    An item that is None was set aside, or left out, by the step that the list is from: nothing is done for it. Outputs
    have None in its place, as in those of items that are set aside here.
    """
    assert step.foreach is not None
    items = evaluate(step.foreach, look_up_in(scope), keep_places=True)
    there = sum(item is not None for item in items)
    if step.operation is not None and step.shards is None:
        unit.total = there
        results = await _mapped_tasks(plan, attempt, place, path, step, scope, items, unit)
    else:
        if step.steps:
            unit.total = there
        results = await _mapped_items(plan, attempt, place, path, step, scope, items, unit)
    good = [result for result in results if result["state"] in (SUCCEEDED, PARTIAL)]
    for index, (item, result) in enumerate(zip(items, results, strict=True)):
        if result["state"] in (SUCCEEDED, PARTIAL, SKIPPED):
            continue
        about = item if isinstance(item, str) and "://" in item else result.get("input_uri", "")
        unit.problems.append(
            {
                "step": path,
                "item": f"{_item_of(place)}{index}",
                "status": result.get("status", ""),
                "cause": result.get("cause", ""),
                "input_uri": about,
            }
        )
    if there and not good:
        first = next(result for result in results if result["state"] != SKIPPED)
        return {
            "place": place,
            "state": FAILED,
            "status": first.get("status", ""),
            "cause": f"all {there} items failed; the first: {first.get('cause', '')}",
            "input_uri": unit.problems[0]["input_uri"],
        }
    set_aside = there - len(good) + sum(result.get("set_aside", 0) for result in good)
    if step.strict and len(good) < there:
        problem = unit.problems[0]
        failed = f"{there - len(good)} of {there} items failed, and the step is strict"
        return {
            "place": place,
            "state": FAILED,
            "status": problem["status"],
            "cause": f"{failed}; the first: {problem['cause']}",
            "input_uri": problem["input_uri"],
        }
    return {
        "place": place,
        "state": PARTIAL if set_aside else SUCCEEDED,
        "outputs": _collect(_names_of(step), [result.get("outputs") for result in results]),
        "set_aside": set_aside,
    }


def _item_of(place: str) -> str:
    """The items and rounds that a place lies in, as 3/round 2/."""
    return "".join(f"{item}/" if item else f"round {round_}/" for item, round_ in _INDEX.findall(place))


async def _repeated(
    plan: Plan, attempt: int, place: str, path: str, step: Step, scope: Values, unit: Unit
) -> StepResult:
    """A repeat. Its rounds follow each other in the one workflow: a replay finds each where it was."""
    repeat = step.repeat
    assert repeat is not None
    look_up = look_up_in(scope)
    try:
        rounds = check_rounds(evaluate(repeat.rounds, look_up))
    except ValueError as error:
        return {"place": place, "state": FAILED, "status": "INVALID_ARGUMENT", "cause": str(error)}
    unit.total = rounds
    carried = {name: evaluate(value, look_up, keep_places=True) for name, value in repeat.carry.items()}
    inner: Values = {}
    set_aside = round_ = 0
    for round_ in range(1, rounds + 1):
        given = {**scope, step.id: {**carried, ROUND: round_}}
        results = await _block(plan, attempt, f"{place}@{round_}.", path + ".", step.steps, given)
        failed = next((result for result in results.values() if result["state"] == FAILED), None)
        if failed is not None:
            return {**failed, "place": place, "cause": f"round {round_}: step {failed['place']}: {failed['cause']}"}
        set_aside += sum(result.get("set_aside", 0) for result in results.values())
        inner = {name: result.get("outputs") for name, result in results.items()}
        unit.done = round_
        look_up = look_up_in({**given, **inner})
        carried = {name: evaluate(value, look_up, keep_places=True) for name, value in repeat.next.items()}
        if repeat.until is not None and look_up(repeat.until):
            break
    unit.total = round_
    return {
        "place": place,
        "state": PARTIAL if set_aside else SUCCEEDED,
        "outputs": {**carried, ROUNDS: round_, **inner},
        "set_aside": set_aside,
    }


async def _mapped_tasks(
    plan: Plan, attempt: int, place: str, path: str, step: Step, scope: Values, items: list[Any], unit: Unit
) -> list[StepResult]:
    operation = step.operation
    assert operation is not None
    names = {name for name, expression in step.fields.items() if _mentions(expression, step.item)}
    look_up = look_up_in(scope)
    common = {name: evaluate(expr, look_up) for name, expr in step.fields.items() if name not in names}
    own: list[Values | None] = []
    for item in items:
        if item is None:
            own.append(None)
            continue
        look_up = look_up_in({**scope, step.item: item})
        own.append({name: evaluate(step.fields[name], look_up) for name in step.fields if name in names})
    outcomes = await _tasks(plan, attempt, place, path, operation, common, own)
    _cover(unit, [outcome for outcome in outcomes if outcome is not None])
    # The chunks have counted them.
    return [
        _left_out(f"{place}[{index}]") if outcome is None else _from_outcome(f"{place}[{index}]", outcome, Unit(path))
        for index, outcome in enumerate(outcomes)
    ]


def _left_out(place: str) -> StepResult:
    return {"place": place, "state": SKIPPED}


async def _mapped_items(
    plan: Plan, attempt: int, place: str, path: str, step: Step, scope: Values, items: list[Any], unit: Unit
) -> list[StepResult]:
    engine = _current()
    handles: list[Any] = []
    depth = place.count("[")
    for index, item in enumerate(items):
        name = f"{place}[{index}]"
        if item is None:
            handles.append(None)
            continue
        # Items wait for what is inside them, so each depth has a share of the queue of its own, for each user.
        with (
            SetWorkflowID(workflow_id(plan.run_id, attempt, name)),
            SetEnqueueOptions(queue_partition_key=f"items-{depth}/{plan.user}"),
        ):
            handles.append(
                await DBOS.enqueue_workflow_async(
                    ITEMS, item_workflow, plan.run_id, attempt, name, path, {**scope, step.item: item}
                )
            )
    results: list[StepResult] = []
    for index, handle in enumerate(handles):
        if handle is None:
            results.append(_left_out(f"{place}[{index}]"))
            continue
        await engine.endings.of(handle.workflow_id)
        result: StepResult = await handle.get_result(polling_interval_sec=_POLL_SECONDS)
        assert result["place"] == f"{place}[{index}]", f"{result['place']} stands in the place of {place}[{index}]"
        if step.steps:
            if result["state"] == FAILED:
                unit.set_aside += 1
            else:
                unit.done += 1
        results.append(result)
    return results


def _mentions(expression: Any, name: str) -> bool:
    found = False

    def look_up(reference: Reference) -> None:
        nonlocal found
        found |= reference.root == name

    evaluate(expression, look_up)
    return found


Names = dict[str, Any]
"""Names of outputs; of steps inside, with theirs."""


def _output_names(operation: Operation) -> Names:
    return {output.name: None for output in operation.outputs}


def _names_of(step: Step) -> Names:
    """Output names of one item of the step."""
    if step.steps:
        inside: Names = {inner.id: _names_of(inner) for inner in step.steps}
        return inside if step.repeat is None else {**dict.fromkeys([*step.repeat.carry, ROUNDS]), **inside}
    assert step.operation is not None
    if step.shards is not None and step.shards.reduce is not None:
        return _output_names(step.shards.reduce.operation)
    return _output_names(step.operation)


def _collect(names: Names, results: Sequence[Mapping[str, Any] | None]) -> Values:
    """Lists of the results' outputs, by name."""
    collected: Values = {}
    for name, inner in names.items():
        values = [(result or {}).get(name) for result in results]
        collected[name] = values if inner is None else _collect(inner, values)
    return collected
