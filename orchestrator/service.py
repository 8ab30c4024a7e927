"""OrchestratorService: turns messages into calls of the engine, and what it knows into messages."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Value
from prometheus_client import Counter, Gauge

from cryofleet import tracing
from cryofleet.access import audit
from cryofleet.access.caller import current_caller
from cryofleet.errors import FailedPrecondition, NotFound
from cryofleet.server import CallContext, Instance, Service
from cryofleet.server.failures import Draining
from cryofleet.server.recent_log import DEFAULT_LIMIT
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.v1 import orchestrator_pb2 as pb
from cryofleet.v1 import runtime_pb2
from orchestrator import garbage, housekeeping, run_trace, submission
from orchestrator.arguments import Argument
from orchestrator.engine import Engine
from orchestrator.estimate import estimate_run
from orchestrator.inboxes import requests as inbox_requests
from orchestrator.inboxes.inbox import ACTIVE as INBOX_ACTIVE
from orchestrator.inboxes.inbox import ITEM_STATES, PAUSED, Inbox
from orchestrator.inboxes.message import inbox_message, item_message, states_of
from orchestrator.inboxes.work import Inboxes
from orchestrator.library import Library
from orchestrator.pipeline import Pipeline, Step
from orchestrator.pipeline_reading import load
from orchestrator.run_message import ENDED, run_message, timestamp
from orchestrator.runs import ACTIVE, CANCELLED, FAILED, PARTIAL, SUCCEEDED, AttemptRow, Pause
from orchestrator.views import AGE_SECONDS

service = Service(pb.DESCRIPTOR.services_by_name["OrchestratorService"])

_WATCH_SECONDS = 1.0
_DEFAULT_LIMIT = 50
_engines: dict[int, Engine] = {}


@contextlib.asynccontextmanager
async def _lifespan(instance: Instance) -> AsyncIterator[None]:
    engine = Engine(instance.settings, instance.store, instance.recent_log)
    await engine.start()
    _engines[id(instance)] = engine
    tasks = Gauge(
        "cryofleet_pool_tasks",
        "Tasks of all runs that wait for a pool or run there.",
        ("pool",),
        registry=instance.metrics.registry,
    )
    for name in engine.placement.pools:
        tasks.labels(name).set_function(functools.partial(engine.tasks_left, name))
    runs = Gauge(
        "cryofleet_runs", "Runs of all orchestrators that go on.", ("state",), registry=instance.metrics.registry
    )
    for state in ACTIVE:
        runs.labels(state).set_function(functools.partial(engine.runs_going_on, state))
    ended = Counter(
        "cryofleet_runs_ended",
        "Runs that ended here, by the state they ended in; a run that is resumed ends once more.",
        ("state",),
        registry=instance.metrics.registry,
    )
    for state in (SUCCEEDED, PARTIAL, FAILED, CANCELLED):
        ended.labels(state)

    def on_ended(run_id: str, attempt: int, state: str) -> None:
        ended.labels(state).inc()
        run_trace.run_ended(engine.runs, run_id, attempt, state)

    engine.runs.on_ended = on_ended
    instance.metrics.pages["/slots"] = functools.partial(_slots, engine)
    inboxes = Inboxes(engine, instance.quotas)
    items = Gauge(
        "cryofleet_inbox_items", "Items of all inboxes, by state.", ("state",), registry=instance.metrics.registry
    )
    for state in ITEM_STATES:
        items.labels(state).set_function(functools.partial(inboxes.items_in, state))
    keeping = asyncio.create_task(housekeeping.keep_rules(engine, instance.quotas.rules))
    working = asyncio.create_task(inboxes.keep_working())
    try:
        yield
    finally:
        keeping.cancel()
        working.cancel()
        await asyncio.gather(keeping, working, return_exceptions=True)
        await inboxes.stop()
        del _engines[id(instance)]
        await engine.stop()


service.lifespan = _lifespan


def _slots(engine: Engine) -> dict[str, Any]:
    """Slots that each pool's waiting and running tasks take, one each: the signal that pools are scaled by."""
    pools = {name: engine.tasks_left_by_kind(name) for name in engine.placement.pools}
    return {"pools": {name: {**kinds, "all": sum(kinds.values())} for name, kinds in pools.items()}}


def _engine(context: CallContext) -> Engine:
    return _engines[id(context.instance)]


# Submitting


@service.rpc("SubmitRun")
async def submit_run(request: pb.SubmitRunRequest, context: CallContext) -> pb.SubmitRunResponse:
    """Checks everything that can be known before, keeps the run, starts it."""
    engine = _engine(context)
    project = request.project or DEFAULT_PROJECT
    pipeline, text = await _pipeline(request, context)
    values = pipeline.bind(json_format.MessageToDict(request.arguments))
    await context.in_thread(submission.check_inputs, engine.store.for_project(project), pipeline, values)
    await context.in_thread(submission.check_space, context.store, context.instance.quotas, project)
    run_id = request.run_id or f"{pipeline.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    run = submission.run_row(pipeline, text, values, run_id=run_id, project=project, owner=current_caller().user)
    audit.note(run_id=run.run_id)
    tracing.note(run_id=run.run_id)
    await submission.start(engine, run)
    return pb.SubmitRunResponse(run=await _run(engine, run.run_id))


async def _pipeline(
    request: pb.SubmitRunRequest | pb.EstimateRunRequest | pb.AddInboxRequest, context: CallContext
) -> tuple[Pipeline, str]:
    """The pipeline with its text."""
    text = request.pipeline_yaml
    if text:
        return await context.in_thread(load, text, request.pipeline_file or "pipeline.yaml"), text
    pipeline = await context.in_thread(Library(context.settings).get, request.pipeline)
    return pipeline, pipeline.document.text


@service.rpc("EstimateRun")
async def estimate(request: pb.EstimateRunRequest, context: CallContext) -> pb.EstimateRunResponse:
    """The same checks; nothing is kept or started."""
    engine = _engine(context)
    project = request.project or DEFAULT_PROJECT
    pipeline, _ = await _pipeline(request, context)
    values = pipeline.bind(json_format.MessageToDict(request.arguments))
    await context.in_thread(submission.check_inputs, engine.store.for_project(project), pipeline, values)
    return await estimate_run(engine, pipeline, values, project)


# Watching


def _no_run(run_id: str) -> NotFound:
    return NotFound(f"there is no run {run_id!r}")


def _check_own(run_id: str, project: str) -> None:
    """Raises NotFound for a run of another project, as for one that is not there: ids of others tell nothing."""
    if not current_caller().may_use(project):
        raise _no_run(run_id)
    audit.note(project=project)


async def _attempt(engine: Engine, run_id: str) -> AttemptRow:
    """The last attempt at a run of the caller's projects. Raises NotFound."""
    run = await engine.answer(engine.runs.run, run_id)
    _check_own(run_id, run.project)
    return await engine.answer(engine.runs.attempt, run_id)


async def _run(engine: Engine, run_id: str, age_seconds: float = 0.0) -> pb.Run:
    """The run, of the caller's projects, as the record told it at most so long ago. Raises NotFound."""
    run = await engine.views.run(run_id, age_seconds)
    _check_own(run_id, run.project)
    return run


@service.rpc("GetRun")
async def get_run(request: pb.GetRunRequest, context: CallContext) -> pb.GetRunResponse:
    """As it stands in the record, or stood there half a second ago."""
    return pb.GetRunResponse(run=await _run(_engine(context), request.run_id, AGE_SECONDS))


@service.rpc("WatchRun")
async def watch_run(request: pb.WatchRunRequest, context: CallContext) -> AsyncIterator[pb.WatchRunResponse]:
    """Reads the record once a second, and at once when the run begins or ends here."""
    engine = _engine(context)
    last = None
    while True:
        run = await _run(engine, request.run_id, AGE_SECONDS)
        if run is not last and run != last:
            last = run
            yield pb.WatchRunResponse(run=run)
        if run.state in ENDED:
            return
        if context.instance.draining:
            raise Draining(f"instance {context.instance.name} is stopping; the run goes on")
        await engine.wait_for_change(request.run_id, _WATCH_SECONDS)


@service.rpc("ReadLog")
async def read_log(request: pb.ReadLogRequest, context: CallContext) -> pb.ReadLogResponse:
    """What this orchestrator and the instances have in memory, and what the record keeps of failed tasks."""
    engine = _engine(context)
    run = await engine.answer(engine.runs.run, request.run_id)
    _check_own(request.run_id, run.project)
    return await engine.run_log.read(run, request.limit or DEFAULT_LIMIT)


@service.rpc("ListRuns")
async def list_runs(request: pb.ListRunsRequest, context: CallContext) -> pb.ListRunsResponse:
    """The newest first."""
    engine = _engine(context)
    among = current_caller().projects
    found = await engine.answer(engine.runs.newest, request.project, request.limit or _DEFAULT_LIMIT, among)
    return pb.ListRunsResponse(runs=[run_message(run, attempt) for run, attempt in found])


# Ending and beginning again


@service.rpc("CancelRun")
async def cancel_run(request: pb.CancelRunRequest, context: CallContext) -> pb.CancelRunResponse:
    """Nothing happens to a run that has ended."""
    engine = _engine(context)
    attempt = await _attempt(engine, request.run_id)
    if attempt.state in ACTIVE:
        await engine.cancel_attempt(request.run_id, attempt.attempt)
    return pb.CancelRunResponse(run=await _run(engine, request.run_id))


@service.rpc("ResumeRun")
async def resume_run(request: pb.ResumeRunRequest, context: CallContext) -> pb.ResumeRunResponse:
    """Nothing happens to a run that is going on or has succeeded."""
    engine = _engine(context)
    attempt = await _attempt(engine, request.run_id)
    if attempt.state == PARTIAL:
        raise FailedPrecondition(f"run {request.run_id} ended, with items set aside: retry it instead of resuming it")
    if attempt.state in (FAILED, CANCELLED):
        await _next_attempt(engine, request.run_id, attempt.attempt)
    return pb.ResumeRunResponse(run=await _run(engine, request.run_id))


@service.rpc("RetryRun")
async def retry_run(request: pb.RetryRunRequest, context: CallContext) -> pb.RetryRunResponse:
    """What is finished is found in the store; only what was set aside, and what needs it, is done."""
    engine = _engine(context)
    attempt = await _attempt(engine, request.run_id)
    if attempt.state == PARTIAL:
        await _next_attempt(engine, request.run_id, attempt.attempt)
    elif attempt.state not in ACTIVE:
        raise FailedPrecondition(
            f"run {request.run_id} is {attempt.state}, and has no items set aside to retry"
            + ("; resume it" if attempt.state in (FAILED, CANCELLED) else "")
        )
    return pb.RetryRunResponse(run=await _run(engine, request.run_id))


@service.rpc("ForgetRun")
async def forget_run(request: pb.ForgetRunRequest, context: CallContext) -> pb.ForgetRunResponse:
    """The record alone; what only this run needed is garbage from now on."""
    engine = _engine(context)
    await _attempt(engine, request.run_id)
    await engine.forget(request.run_id)
    return pb.ForgetRunResponse()


async def _next_attempt(engine: Engine, run_id: str, after: int) -> None:
    await engine.answer(engine.runs.next_attempt, run_id, after, engine.settings.max_runs_per_user)
    await engine.start_attempt(run_id, after + 1)


# Pipelines and pools


@service.rpc("ListPipelines")
async def list_pipelines(request: pb.ListPipelinesRequest, context: CallContext) -> pb.ListPipelinesResponse:
    """All that are sound."""
    pipelines = await context.in_thread(Library(context.settings).all)
    return pb.ListPipelinesResponse(pipelines=[_description(pipeline) for pipeline in pipelines])


def _description(pipeline: Pipeline) -> pb.PipelineDescription:
    return pb.PipelineDescription(
        name=pipeline.name,
        help=pipeline.help,
        parameters=[_parameter(argument) for argument in pipeline.arguments],
        outputs=list(pipeline.outputs),
        steps=[line for step in pipeline.steps for line in _lines(step, "")],
    )


def _lines(step: Step, prefix: str) -> list[str]:
    name = prefix + step.id
    if step.operation is not None:
        return [f"{name}: {step.operation.name}"]
    return [line for inner in step.steps for line in _lines(inner, name + ".")]


def _parameter(argument: Argument) -> pb.PipelineParameter:
    default = None
    if argument.default is not None:
        default = json_format.ParseDict(argument.default, Value())
    return pb.PipelineParameter(
        name=argument.name,
        help=argument.help,
        unit=argument.unit,
        type=argument.type,
        repeated=argument.repeated,
        required=argument.required,
        default_value=default,
        choices=[json_format.ParseDict(choice, Value()) for choice in argument.choices],
    )


@service.rpc("GetPools")
async def get_pools(request: pb.GetPoolsRequest, context: CallContext) -> pb.GetPoolsResponse:
    """As this orchestrator sees them; the tasks are those of all."""
    engine = _engine(context)
    await engine.count_tasks()
    return pb.GetPoolsResponse(pools=[_pool(engine, name) for name in engine.placement.pools])


def _pool(engine: Engine, name: str) -> pb.PoolStatus:
    pool, pause = engine.placement.pools[name], engine.pauses.get(name)
    status = pb.PoolStatus(
        name=name,
        tasks_running=pool.running,
        tasks_queued=max(pool.waiting, engine.tasks_left(name) - pool.running),
    )
    if pause is not None:
        status.paused_at.CopyFrom(timestamp(pause.paused_at))
        status.paused_by, status.paused_because = pause.paused_by, pause.because
    for instance in sorted(pool.instances.values(), key=lambda each: each.address):
        until = pool.set_aside.until(instance.address)
        status.instances.add(
            address=instance.address,
            instance=instance.name,
            ready=instance.ready,
            slots_total=instance.slots_total,
            slots_free=max(0, instance.free),
            devices=instance.devices,
            version=instance.version,
            error=instance.error,
            set_aside_until=None if until is None else timestamp(until),
            set_aside_causes=[] if until is None else pool.set_aside.causes(instance.address),
            memory_total_bytes=instance.memory_total_bytes,
            memory_free_bytes=instance.memory_free_bytes,
            running=[_running(operation) for operation in instance.operations] if instance.ready else [],
        )
    return status


def _running(operation: runtime_pb2.RunningOperation) -> runtime_pb2.RunningOperation:
    """What an instance works on; of which run only for those who may use its project."""
    if current_caller().may_use(operation.project):
        return operation
    return runtime_pb2.RunningOperation(
        operation=operation.operation, started_at=operation.started_at, fraction=operation.fraction
    )


@service.rpc("PausePool")
async def pause_pool(request: pb.PausePoolRequest, context: CallContext) -> pb.PausePoolResponse:
    """Nothing changes where it is paused already."""
    engine = _engine(context)
    _check_pool(engine, request.pool)
    pause = Pause(request.pool, time.time(), current_caller().user, request.because)
    await engine.answer(engine.runs.pause, pause)
    await engine.read_pauses()
    return pb.PausePoolResponse(pool=_pool(engine, request.pool))


@service.rpc("ResumePool")
async def resume_pool(request: pb.ResumePoolRequest, context: CallContext) -> pb.ResumePoolResponse:
    """Nothing changes where it is not paused."""
    engine = _engine(context)
    _check_pool(engine, request.pool)
    await engine.answer(engine.runs.resume, request.pool)
    await engine.read_pauses()
    return pb.ResumePoolResponse(pool=_pool(engine, request.pool))


def _check_pool(engine: Engine, name: str) -> None:
    if name not in engine.placement.pools:
        raise NotFound(f"there is no pool {name!r}; there are {', '.join(engine.placement.pools)}")


# The store


@service.rpc("CollectGarbage")
async def collect_garbage(request: pb.CollectGarbageRequest, context: CallContext) -> pb.CollectGarbageResponse:
    """Only lists what it finds, unless it is told to delete it."""
    engine = _engine(context)
    found = await housekeeping.collect(engine, request.older_than_hours * 3600.0, request.project, request.delete)
    return pb.CollectGarbageResponse(
        results=[pb.Garbage(uri=each.uri, operation=each.operation, size_bytes=each.size_bytes) for each in found],
        size_bytes=sum(each.size_bytes for each in found),
        deleted=request.delete,
    )


@service.rpc("GetUsage")
async def get_usage(request: pb.GetUsageRequest, context: CallContext) -> pb.GetUsageResponse:
    """Of one project, or of all that the caller may see."""
    found = await context.in_thread(housekeeping.usage, context.store, context.instance.quotas.rules, request.project)
    return pb.GetUsageResponse(
        projects=[
            pb.ProjectUsage(
                project=project,
                size_bytes=usage.size_bytes,
                objects=usage.objects,
                quota_bytes=rules.quota_bytes,
                keep_days=rules.keep_days,
            )
            for project, (usage, rules) in found.items()
            if current_caller().may_use(project)
        ],
        free_bytes=context.store.free_bytes(),
        reserve_bytes=context.settings.reserve_bytes,
    )


@service.rpc("PinArtifact")
async def pin_artifact(request: pb.PinArtifactRequest, context: CallContext) -> pb.PinArtifactResponse:
    """Of a result that is pinned, all that it was made from is kept too."""
    await context.in_thread(garbage.pin, _engine(context).store, request.uri, request.unpin)
    return pb.PinArtifactResponse()


# Inboxes


@service.rpc("AddInbox")
async def add_inbox(request: pb.AddInboxRequest, context: CallContext) -> pb.AddInboxResponse:
    """Checks all that can be known before the first file comes."""
    engine = _engine(context)
    pipeline, text = await _pipeline(request, context)
    inbox = await context.in_thread(inbox_requests.opened, engine.store, request, pipeline, text, current_caller().user)
    present = await context.in_thread(inbox_requests.present, engine.store, inbox) if request.new_only else []
    await engine.answer(engine.inboxes.add, inbox, present)
    return pb.AddInboxResponse(inbox=await _inbox(engine, inbox.project, inbox.name))


async def _inbox(engine: Engine, project: str, name: str) -> pb.Inbox:
    """Raises NotFound."""
    inbox = await engine.answer(engine.inboxes.get, project or DEFAULT_PROJECT, name)
    counts = await engine.answer(engine.inboxes.counts)
    return inbox_message(inbox, counts.get(inbox.inbox_id))


@service.rpc("ListInboxes")
async def list_inboxes(request: pb.ListInboxesRequest, context: CallContext) -> pb.ListInboxesResponse:
    """By project and name."""
    engine = _engine(context)
    found = await engine.answer(engine.inboxes.all, request.project, current_caller().projects)
    counts = await engine.answer(engine.inboxes.counts)
    return pb.ListInboxesResponse(inboxes=[inbox_message(inbox, counts.get(inbox.inbox_id)) for inbox in found])


@service.rpc("GetInbox")
async def get_inbox(request: pb.GetInboxRequest, context: CallContext) -> pb.GetInboxResponse:
    """As it stands in the record."""
    engine = _engine(context)
    inbox = await engine.answer(engine.inboxes.get, request.project or DEFAULT_PROJECT, request.name)
    states = states_of(request.state)
    items = await engine.answer(engine.inboxes.items, inbox, states, request.limit or _DEFAULT_LIMIT)
    return pb.GetInboxResponse(
        inbox=await _inbox(engine, inbox.project, inbox.name),
        items=[item_message(item) for item in items],
    )


@service.rpc("PauseInbox")
async def pause_inbox(request: pb.PauseInboxRequest, context: CallContext) -> pb.PauseInboxResponse:
    """Nothing changes where it is paused already."""
    return pb.PauseInboxResponse(inbox=await _set_inbox(_engine(context), request.project, request.name, PAUSED))


@service.rpc("ResumeInbox")
async def resume_inbox(request: pb.ResumeInboxRequest, context: CallContext) -> pb.ResumeInboxResponse:
    """Nothing changes where it is not paused."""
    return pb.ResumeInboxResponse(inbox=await _set_inbox(_engine(context), request.project, request.name, INBOX_ACTIVE))


async def _set_inbox(engine: Engine, project: str, name: str, state: str) -> pb.Inbox:
    inbox: Inbox = await engine.answer(engine.inboxes.get, project or DEFAULT_PROJECT, name)
    await engine.answer(engine.inboxes.set_state, inbox, state)
    return await _inbox(engine, inbox.project, inbox.name)


@service.rpc("RemoveInbox")
async def remove_inbox(request: pb.RemoveInboxRequest, context: CallContext) -> pb.RemoveInboxResponse:
    """Its runs stay."""
    engine = _engine(context)
    inbox = await engine.answer(engine.inboxes.get, request.project or DEFAULT_PROJECT, request.name)
    await engine.answer(engine.inboxes.remove, inbox)
    return pb.RemoveInboxResponse()


@service.rpc("RetryInbox")
async def retry_inbox(request: pb.RetryInboxRequest, context: CallContext) -> pb.RetryInboxResponse:
    """Each waits for its turn; a run that failed goes on where it did."""
    engine = _engine(context)
    inbox = await engine.answer(engine.inboxes.get, request.project or DEFAULT_PROJECT, request.name)
    retried = await engine.answer(inbox_requests.retry, engine.inboxes, engine.runs, inbox, request.numbers)
    return pb.RetryInboxResponse(inbox=await _inbox(engine, inbox.project, inbox.name), retried=retried)
