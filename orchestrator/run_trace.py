"""The trace of a run: one for all its attempts, whichever orchestrators and services work on them.

The trace's id follows from the run's id, and the ids of the spans of an attempt, its steps, items and tasks from the
names that they have in the run (`cryofleet.tracing.Identity`). So they are the same in every process, and are known
before they have ended. The first attempt is the root; later ones hang below it.

Such a span is written once, when what it is about has ended. What a crash cuts off therefore has none yet; the tasks
that had ended by then have theirs, and a replay, which takes their recorded outcomes, writes none for them. Only a
crash in the moment between the span and the record of the outcome writes it again, with the same ids. A step, or an
item of several steps, that goes on after a crash begins in its span when it was taken up again.

What is done within a task, as the calls of services, has random ids: each try is a span of its own.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import sqlalchemy as sa

from cryofleet import tracing
from cryofleet.errors import NotFound
from orchestrator.runs import CANCELLED, FAILED, RunStore
from orchestrator.tasks import Outcome, TaskRequest

_LAST_INDEX = re.compile(r"\[\d+\]$|/reduce$")
_LAST_ROUND = re.compile(r"@\d+$")
BodyT = TypeVar("BodyT", bound=Callable[..., Coroutine[Any, Any, Any]])
StepT = TypeVar("StepT", bound=Mapping[str, Any])


def _whole(run_id: str, attempt: int) -> str:
    return f"{run_id}:{attempt}"


def _part(run_id: str, attempt: int, place: str) -> str:
    return f"{run_id}:{attempt}/{place}" if place else _whole(run_id, attempt)


def around(place: str) -> str:
    """The place that a place lies in; empty for the run: a[3].b lies in a[3], that in a, and so does a@2.b."""
    without_index = _LAST_INDEX.sub("", place)
    if without_index != place:
        return without_index
    return _LAST_ROUND.sub("", place.rpartition(".")[0])


def _write(
    name: str,
    run_id: str,
    attempt: int,
    place: str,
    began_at: float,
    ended_at: float,
    failure: tuple[str, str] | None,
    **attributes: Any,
) -> None:
    tracing.write(
        name,
        tracing.Identity.of(run_id, _part(run_id, attempt, place)),
        tracing.Identity.of(run_id, _part(run_id, attempt, around(place))),
        began_at,
        ended_at,
        failure,
        run_id=run_id,
        attempt=attempt,
        step=place,
        **attributes,
    )


def starting(run_id: str, attempt: int) -> AbstractContextManager[None]:
    """The span of an attempt's start, linked with the call that asked for it."""
    if not tracing.is_on():
        return contextlib.nullcontext()
    parent = tracing.below(tracing.Identity.of(run_id, _whole(run_id, attempt)))
    name = "submit" if attempt == 1 else "resume"
    return tracing.span(name, parent=parent, link_from_current=True, run_id=run_id, attempt=attempt)


def of_run(body: BodyT) -> BodyT:
    """Puts what a method does for an attempt at a run, its first two arguments, into its trace."""

    @functools.wraps(body)
    async def call(engine: Any, run_id: str, attempt: int, *arguments: Any, **named: Any) -> Any:
        if not tracing.is_on():
            return await body(engine, run_id, attempt, *arguments, **named)
        with tracing.inside(tracing.Identity.of(run_id, _whole(run_id, attempt))):
            return await body(engine, run_id, attempt, *arguments, **named)

    return cast(BodyT, call)


def run_ended(runs: RunStore, run_id: str, attempt: int, state: str) -> None:
    """Writes the span of an attempt; blocks."""
    if not tracing.is_on():
        return
    # The attempt has ended, and is recorded as such, whether its span can be written or not.
    with contextlib.suppress(sa.exc.DBAPIError, NotFound):
        row, run = runs.attempt(run_id, attempt), runs.run(run_id)
        first = None if attempt == 1 else tracing.Identity.of(run_id, _whole(run_id, 1))
        tracing.write(
            f"run {run.pipeline}",
            tracing.Identity.of(run_id, _whole(run_id, attempt)),
            first,
            row.queued_at,
            row.finished_at or time.time(),
            ("FAILED", row.error) if state == FAILED else None,
            run_id=run_id,
            attempt=attempt,
            pipeline=run.pipeline,
            project=run.project,
            status=state,
        )


def of_step(
    workflow: Callable[[str, int, str, str, Any], Coroutine[Any, Any, StepT]],
) -> Callable[[str, int, str, str, Any], Coroutine[Any, Any, StepT]]:
    """Writes the span of a step, or of an item, whose parts a workflow does."""

    @functools.wraps(workflow)
    async def call(run_id: str, attempt: int, place: str, path: str, scope: Any) -> StepT:
        if not tracing.is_on():
            return await workflow(run_id, attempt, place, path, scope)
        began_at = time.time()
        with tracing.inside(tracing.Identity.of(run_id, _part(run_id, attempt, place))):
            result = await workflow(run_id, attempt, place, path, scope)
        failure = None
        if result["state"] in (FAILED, CANCELLED):
            failure = (result.get("status") or result["state"], result.get("cause", ""))
        state, set_aside = result["state"], result.get("set_aside")
        _write(place, run_id, attempt, place, began_at, time.time(), failure, status=state, set_aside=set_aside)
        return result

    return call


def inside(task: TaskRequest) -> AbstractContextManager[None]:
    """Hangs what is done for a task below its span."""
    if not tracing.is_on():
        return contextlib.nullcontext()
    return tracing.inside(tracing.Identity.of(task.run_id, task.key))


def task_ended(task: TaskRequest, outcome: Outcome) -> None:
    """Writes the span of a task, or of the step that the task is."""
    if not tracing.is_on():
        return
    attempt, _, place = task.key.removeprefix(f"{task.run_id}:").partition("/")
    now = time.time()
    status = outcome.get("status", "UNKNOWN")
    _write(
        place,
        task.run_id,
        int(attempt),
        place,
        outcome.get("started_at", now),
        outcome.get("finished_at", now),
        None if status == "OK" else (status, outcome.get("cause", "")),
        task_key=task.key,
        operation=task.operation,
        status=status,
        cached=outcome.get("cached"),
        tries=outcome.get("attempts"),
        instance=outcome.get("instance"),
    )
