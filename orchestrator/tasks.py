"""One task: one operation with its fields, done once, wherever that is possible.

All retries live here, inside the durable step that the task is. A task never raises for what a service or the store
does; it returns an outcome, which the workflow keeps.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypedDict

import grpc
from google.protobuf.message import Message

from cryofleet import tracing
from cryofleet.artifacts import Manifest
from cryofleet.channels import (
    REASON_BUSY,
    REASON_DRAINING,
    REASON_NEVER_FITS,
    REASON_TOO_LARGE,
    reason_of,
)
from cryofleet.errors import Failure, InvalidArgument, Unavailable
from cryofleet.operations import Operation, find_operation, inputs_of, request_from_mapping, result_to_mapping
from cryofleet.settings import Settings
from orchestrator.cache import ResultCache, portable
from orchestrator.placement import Instance, Placement, Pool

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 60.0
"""A stream without any event, heartbeats included, for so long counts as lost."""
MAX_FAILED_INSTANCES = 3
"""A task that failed on so many different instances is given up."""
_MAX_FAILURES = {"INTERNAL": 2, "UNKNOWN": 2, "DATA_LOSS": 2, "RESOURCE_EXHAUSTED": 2, "STALLED": 2}
"""How often a task may fail in one way before it is given up, where no instance is left that has not tried it."""
_MAX_LOST = 5
_BACKOFF_SECONDS = (0.2, 10.0)
_BEGUN_SECONDS = 1.0
_aio: Any = grpc.aio
_EOF = _aio.EOF  # which the stubs of gRPC forgot
# What gRPC itself says of a connection; a service's own UNAVAILABLE says what is away.
_TRANSPORT = re.compile(
    r"socket closed|connect|reset|broken pipe|stream removed|goaway|transport|recvmsg|sendmsg|endpoint|ping|keepalive"
    r"|name resolution|dns|too_many_pings|cancelling all calls|no such file",
    re.IGNORECASE,
)


class Outcome(TypedDict, total=False):
    """What became of a task; plain JSON, kept by DBOS."""

    task: str
    """The task's own key, so that no result is taken for another's."""
    status: str
    """OK, or a gRPC status by name."""
    cause: str
    input_uri: str
    result: dict[str, Any]
    manifest: str
    """URI of the result's folder."""
    cached: bool
    seconds: float
    attempts: int
    instance: str
    tried: list[str]
    """Of a task that failed: addresses of the instances that it was given to."""
    started_at: float
    finished_at: float


@dataclass(frozen=True)
class TaskRequest:
    """A task, ready to be done."""

    key: str
    run_id: str
    project: str
    operation: str
    fields: dict[str, Any]
    user: str = ""
    """Whose turn it takes where users wait for a pool."""

    @property
    def attempt(self) -> int:
        """The attempt at the run that it belongs to."""
        return int(self.key.removeprefix(f"{self.run_id}:").partition("/")[0])

    def content(self) -> str:
        """What is the same for two tasks that do the same."""
        text = json.dumps([self.operation, self.project, self.fields], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


Report = Callable[[float, str], None]
"""Takes a running task's fraction and phase."""


class _Stalled(Exception):
    pass


class _Silent(Exception):
    pass


class _Garbled(Exception):
    pass


@dataclass
class _History:
    """How a task has failed so far."""

    content: str
    key: str
    """The identity that its result must have."""
    failures: dict[str, int] = field(default_factory=dict)
    causes: dict[str, str] = field(default_factory=dict)
    """By instance, the last of each."""
    lost: int = 0
    attempts: int = 0
    failed_on: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    unfit: set[str] = field(default_factory=set)
    """Instances that can never do this task."""
    waiting_since: float | None = None
    pauses: int = 0
    begun: bool = False
    """Whether the running call got so far that its end says something of the task."""


class _GiveUp(Exception):
    def __init__(self, status: str, cause: str) -> None:
        super().__init__(cause)
        self.status = status
        self.cause = cause
        self.tried: list[str] = []


class TaskRunner:
    """Does tasks: looks for the result, finds a slot, calls, retries."""

    def __init__(self, settings: Settings, cache: ResultCache, placement: Placement) -> None:
        self._settings = settings
        self._cache = cache
        self._placement = placement
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="store")

    def close(self) -> None:
        """Ends the idle threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def run(self, task: TaskRequest, report: Report) -> Outcome:
        """Raises nothing but asyncio.CancelledError."""
        outcome: Outcome = {"task": task.key, "started_at": time.time(), "attempts": 0}
        request: Message | None = None
        try:
            operation = find_operation(task.operation)
            request = build_request(operation, task)
            key, manifest = await self.in_thread(self._cache.look_up, operation, request, task.project)
            if manifest is not None:
                outcome.update(_from_manifest(manifest))
            else:
                outcome.update(await self._call_until_done(task, operation, request, report, key))
        except _GiveUp as error:
            outcome["status"], outcome["cause"], outcome["tried"] = error.status, error.cause, error.tried
        except Failure as failure:
            outcome["status"], outcome["cause"] = failure.status, str(failure)
        if outcome["status"] == "DATA_LOSS" and request is not None:
            damaged = await self.in_thread(self._cache.take_back_damaged, request, task.project, outcome["cause"])
            if damaged:
                outcome["cause"] += (
                    f" (damaged: {', '.join(damaged)}; it was taken out of the store, and "
                    f"'cryofleet resume {task.run_id}' makes it anew)"
                )
        if outcome["status"] != "OK" and request is not None:
            outcome["input_uri"] = _input_concerned(request, outcome["cause"])
        outcome["finished_at"] = time.time()
        return outcome

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs blocking work on the store; where the store is away, waits for it.

        Raises the store's failures, Unavailable only after the settings' time.
        """
        since = time.monotonic()
        pauses = 0
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
            except Unavailable:
                if time.monotonic() - since > self._settings.pool_wait_seconds:
                    raise
                await _pause(pauses)
                pauses += 1

    async def _kept(self, task: TaskRequest, operation: Operation, request: Message, key: str) -> dict[str, Any] | None:
        """The result as the store has it; None where it isn't there. Raises the store's failures."""
        manifest = await self.in_thread(self._cache.kept, task.project, key)
        if manifest is None:
            # An input that is no result of ours may have been replaced since the task began.
            _, manifest = await self.in_thread(self._cache.look_up, operation, request, task.project)
        return portable(manifest.result) if manifest is not None else None

    async def _call_until_done(
        self, task: TaskRequest, operation: Operation, request: Message, report: Report, key: str
    ) -> Outcome:
        history = _History(task.content(), key)
        pools: set[Pool] = set()
        try:
            outcome = await self._try(task, operation, request, report, history, pools)
        except _GiveUp as error:
            error.tried = sorted(history.tried)
            for pool in pools:
                pool.set_aside.given_up(history.content)
            raise
        finally:
            for pool in pools:
                pool.set_aside.left(history.content)
        return outcome

    async def _try(
        self,
        task: TaskRequest,
        operation: Operation,
        request: Message,
        report: Report,
        history: _History,
        pools: set[Pool],
    ) -> Outcome:
        while True:
            pool = self._placement.pool(operation.service)
            pools.add(pool)
            avoid = frozenset(history.failed_on | history.unfit)
            report(0.0, f"{pool.name} is paused" if pool.paused else f"waiting for a slot of {pool.name}")
            async with pool.slot(avoid, operation.pool == "gpu", task.user) as instance:
                report(0.0, operation.name)
                started = time.monotonic()
                history.attempts += 1
                history.tried.add(instance.address)
                history.begun = False
                try:
                    with _span(task, instance, history):
                        outcome = await self._call(task, operation, request, instance, report, history)
                    outcome["attempts"] = history.attempts
                    pool.set_aside.done(instance.address, history.content, started)
                    return outcome
                except grpc.aio.AioRpcError as error:
                    history.begun |= time.monotonic() - started >= _BEGUN_SECONDS
                    pause = self._judge(error, pool, instance, history)
                except _Stalled as error:
                    pause = self._count("STALLED", "DEADLINE_EXCEEDED", str(error), pool, instance, history)
                except _Garbled as error:
                    pause = self._count("INTERNAL", "INTERNAL", str(error), pool, instance, history)
                except _Silent as error:
                    instance.set_away(str(error))
                    pause = self._count_lost(str(error), pool, instance, history)
            if pause:
                history.pauses += 1
                await _pause(history.pauses)

    async def _call(
        self,
        task: TaskRequest,
        operation: Operation,
        request: Message,
        instance: Instance,
        report: Report,
        history: _History,
    ) -> Outcome:
        method = instance.channel.unary_stream(
            operation.full_name,
            request_serializer=operation.request_class.SerializeToString,
            response_deserializer=operation.response_class.FromString,
        )
        call = method(request, metadata=tracing.metadata())
        result: Any = None
        provenance: Any = None
        try:
            while True:
                try:
                    async with asyncio.timeout(SILENCE_SECONDS):
                        event: Any = await call.read()
                except TimeoutError:
                    raise _Silent(
                        f"instance {instance.name} ({instance.address}) was silent for {SILENCE_SECONDS:.0f} s"
                    ) from None
                if event is _EOF:
                    break
                if event is None:
                    # What gRPC makes of bytes that are no message.
                    raise _Garbled(f"instance {instance.name} answered {operation.name} with what is no message of it")
                history.begun = True
                match event.WhichOneof("event"):
                    case "progress":
                        report(event.progress.fraction, event.progress.phase)
                    case "heartbeat":
                        idle = event.heartbeat.seconds_since_progress
                        if operation.stall_limit_seconds and idle > operation.stall_limit_seconds:
                            raise _Stalled(
                                f"{operation.name} made no progress for {idle:.0f} s on instance {instance.name}"
                            )
                    case "result":
                        result, provenance = event.result, event.provenance
        finally:
            if not call.done():
                call.cancel()
        if result is None:
            raise _Silent(f"instance {instance.name} ended {operation.name} without a result")
        if provenance.task_key != task.key:
            raise _Garbled(f"instance {instance.name} answered task {task.key} with that of {provenance.task_key!r}")
        found = portable(result_to_mapping(result))
        if any(output.is_artifact for output in operation.outputs):
            # What names objects counts only as the store has it: that is what the next steps will read.
            found = await self._kept(task, operation, request, history.key)
            if found is None:
                raise _Garbled(
                    f"instance {instance.name} answered {operation.name} with a result that is not in the store"
                )
        tracing.note(status="OK", cached=provenance.cached)
        return {
            "status": "OK",
            "result": found,
            "manifest": provenance.manifest_uri.rpartition("/")[0],
            "cached": provenance.cached,
            "seconds": provenance.seconds,
            "instance": instance.name,
        }

    def _judge(self, error: grpc.aio.AioRpcError, pool: Pool, instance: Instance, history: _History) -> bool:
        """Whether to pause before the next call after one that failed. Raises _GiveUp where there is no next one."""
        status, details, reason = error.code().name, error.details() or "", reason_of(error)
        match status:
            case "RESOURCE_EXHAUSTED" if reason == REASON_BUSY:
                history.attempts -= 1
                pool.refused(instance)
                return False
            case "RESOURCE_EXHAUSTED" if reason == REASON_TOO_LARGE:
                raise _GiveUp(status, details)
            case "RESOURCE_EXHAUSTED" if not reason:
                # No disk space, say: waits, as for storage that is away, but not for ever.
                pool.refused(instance)
                pool.set_aside.failed(instance.address, history.content, f"{status}: {details}", shared=True)
                self._wait_patiently(status, details, history)
                return True
            case "UNAVAILABLE" if reason == REASON_DRAINING:
                history.attempts -= 1
                instance.set_away(details)
                return False
            case "UNAVAILABLE" | "CANCELLED" if status == "CANCELLED" or _TRANSPORT.search(details):
                instance.set_away(f"{status}: {details}")
                if not history.begun:
                    # The instance was away before it began; that says nothing of the task.
                    history.attempts -= 1
                    self._wait_patiently(status, details, history)
                    return True
                return self._count_lost(f"instance {instance.name} was lost: {details}", pool, instance, history)
            case "UNAVAILABLE":
                pool.set_aside.failed(instance.address, history.content, f"{status}: {details}", shared=True)
                self._wait_patiently(status, details, history)
                return True
            case "FAILED_PRECONDITION" | "UNIMPLEMENTED" if reason == REASON_NEVER_FITS or status == "UNIMPLEMENTED":
                history.unfit.add(instance.address)
                if all(i.address in history.unfit for i in pool.instances.values() if i.ready):
                    raise _GiveUp(status, details)
                return False
            case "DEADLINE_EXCEEDED":
                return self._count_lost(details, pool, instance, history)
            case _ if status in _MAX_FAILURES:
                return self._count(status, status, details, pool, instance, history)
            case _:
                raise _GiveUp(status, details)

    def _wait_patiently(self, status: str, details: str, history: _History) -> None:
        now = time.monotonic()
        if history.waiting_since is None:
            history.waiting_since = now
        if now - history.waiting_since > self._settings.pool_wait_seconds:
            raise _GiveUp(status, f"{details} (waited {now - history.waiting_since:.0f} s)")

    def _count(self, kind: str, status: str, cause: str, pool: Pool, instance: Instance, history: _History) -> bool:
        history.failures[kind] = tries = history.failures.get(kind, 0) + 1
        pool.set_aside.failed(instance.address, history.content, f"{status}: {cause}")
        self._note(status, cause, instance, history)
        if tries >= _MAX_FAILURES[kind] and not pool.has_other(history.failed_on | history.unfit):
            raise _GiveUp(status, f"{_causes(history)} (tried {tries} times)")
        return True

    def _count_lost(self, cause: str, pool: Pool, instance: Instance, history: _History) -> bool:
        """A call that broke off: perhaps the task itself ends the processes that try it."""
        history.lost += 1
        pool.set_aside.lost(instance.address, history.content, f"UNAVAILABLE: {cause}")
        self._note("UNAVAILABLE", cause, instance, history)
        if history.lost >= _MAX_LOST:
            raise _GiveUp("UNAVAILABLE", f"{_causes(history)} (lost {history.lost} times)")
        return True

    def _note(self, status: str, cause: str, instance: Instance, history: _History) -> None:
        """Keeps why the task failed there. Raises _GiveUp where that was one instance too many."""
        logger.warning("%s on instance %s: %s", status, instance.name or instance.address, cause)
        history.failed_on.add(instance.address)
        history.causes[instance.name or instance.address] = cause
        if len(history.failed_on) >= MAX_FAILED_INSTANCES:
            raise _GiveUp(status, f"{_causes(history)} (failed on {len(history.failed_on)} instances)")


def _span(task: TaskRequest, instance: Instance, history: _History) -> AbstractContextManager[None]:
    """The span of one try."""
    return tracing.span(
        task.operation,
        "client",
        run_id=task.run_id,
        task_key=task.key,
        operation=task.operation,
        instance=instance.name,
        try_number=history.attempts,
    )


def _causes(history: _History) -> str:
    """Why a task failed: on each instance where that differs."""
    if len(set(history.causes.values())) == 1:
        return next(iter(history.causes.values()))
    return "; ".join(
        cause if f"instance {name}" in cause else f"{name}: {cause}" for name, cause in history.causes.items()
    )


async def _pause(count: int) -> None:
    shortest, longest = _BACKOFF_SECONDS
    await asyncio.sleep(min(longest, shortest * 2 ** min(count, 10)) * random.uniform(0.5, 1.0))


def build_request(operation: Operation, task: TaskRequest) -> Message:
    """The operation's request with its context. Raises InvalidArgument naming the field."""
    request: Any = request_from_mapping(operation, task.fields)
    for parameter in operation.parameters:
        if parameter.required and task.fields.get(parameter.name) in (None, ""):
            raise InvalidArgument(f"{operation.name} needs {parameter.name}: {parameter.help or parameter.type}")
    request.context.project = task.project
    request.context.run_id = task.run_id
    request.context.task_key = task.key
    result: Message = request
    return result


def _from_manifest(manifest: Manifest) -> Outcome:
    return {
        "status": "OK",
        "result": portable(manifest.result),
        "manifest": manifest.uri,
        "cached": True,
        "seconds": 0.0,
        "instance": "",
    }


def _input_concerned(request: Message, cause: str) -> str:
    """The input that the cause names, else the first."""
    uris = [uri for found in inputs_of(request).values() for uri in found if uri]
    named = [uri for uri in uris if uri in cause]
    return (named or uris or [""])[0]
