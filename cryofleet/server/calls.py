"""The border between gRPC and the rest: handlers, statuses, events, call metrics and logs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message

from cryofleet import tracing
from cryofleet.access import audit
from cryofleet.access.authentication import certificate_names
from cryofleet.channels import REASON_BUSY, REASON_KEY, REASON_NEVER_FITS
from cryofleet.errors import Cancelled, DeadlineExceeded, Failure
from cryofleet.logs import bind_log_context
from cryofleet.server.execution import Answer, Execution, Executions, Ticket
from cryofleet.server.failures import Draining, failure_of, one_line, reason_for
from cryofleet.server.instance import Instance
from cryofleet.server.interception import Interceptor, wrap_handler
from cryofleet.server.service import Method, Service
from cryofleet.server.task import Reader
from cryofleet.settings import DEFAULT_PROJECT, Settings
from cryofleet.storage import Store
from cryofleet.v1 import common_pb2

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.2
_HEARTBEAT_SECONDS = 2.0

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class CallContext:
    """What a hand-written handler may use."""

    instance: Instance
    executions: Executions

    @property
    def settings(self) -> Settings:
        """The settings of the process."""
        return self.instance.settings

    @property
    def store(self) -> Store:
        """The whole store; `store_of` closes it to other projects."""
        return self.instance.store

    def store_of(self, context: common_pb2.Context) -> Store:
        """The store as the project of a request's context may use it."""
        return self.instance.store.for_project(context.project or DEFAULT_PROJECT)

    def reader(self, context: common_pb2.Context) -> Reader:
        """Reads artifacts for the project of a request's context."""
        project = context.project or DEFAULT_PROJECT
        return Reader(
            self.store.for_project(project),
            project,
            self.instance.scratch.new_folder,
            self.settings.max_volume_bytes,
        )

    async def in_thread(self, function: Callable[..., ValueT], *arguments: Any) -> ValueT:
        """Runs blocking work, such as anything with the store, in a worker thread."""
        result: ValueT = await self.executions.in_thread(function, *arguments)
        return result


class Calls:
    """Makes the gRPC handlers of a service, and counts the calls that go on."""

    def __init__(self, instance: Instance, executions: Executions) -> None:
        self._instance = instance
        self._executions = executions
        self.count = 0
        """Operations and hand-written methods that are being answered."""

    def handler(self, service: Service) -> grpc.GenericRpcHandler[Any, Any]:
        """Handlers of all methods of the service's descriptor."""
        service.check()
        handlers = {}
        for described in service.descriptor.methods:
            if described.name in service.methods:
                behaviour = functools.partial(self._operate, service.methods[described.name])
            else:
                # What an instance says of itself it says while it is stopping, too.
                entered = contextlib.nullcontext if service.name == "runtime" else self._counted
                behaviour = functools.partial(self._call_rpc, service.rpcs[described.name], entered)
            sides = [
                "stream" if streams else "unary" for streams in (described.client_streaming, described.server_streaming)
            ]
            make = getattr(grpc, f"{'_'.join(sides)}_rpc_method_handler")
            handlers[described.name] = make(
                _as_coroutine_function(behaviour),
                request_deserializer=message_factory.GetMessageClass(described.input_type).FromString,
                response_serializer=_serialise,
            )
        return grpc.method_handlers_generic_handler(service.descriptor.full_name, handlers)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if self._instance.draining:
            raise Draining(f"instance {self._instance.name} is stopping")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    async def _call_rpc(
        self,
        handler: Callable[[Any, CallContext], Any],
        entered: Callable[[], contextlib.AbstractContextManager[None]],
        request: Any,
        context: Any,
    ) -> Any:
        with entered():
            answer = handler(request, CallContext(self._instance, self._executions))
            if not inspect.isasyncgen(answer):
                return await answer
            async with contextlib.aclosing(answer) as responses:
                async for response in responses:
                    await context.write(response)
            return None

    async def _operate(self, method: Method, request: Any, context: Any) -> None:
        """Runs an operation, or joins one that is running, and streams its events."""
        with self._counted():
            remaining = context.time_remaining()
            deadline = None if remaining is None else time.monotonic() + remaining
            ticket = Ticket()
            try:
                answer = await self._wait(method, request, context, ticket, deadline)
            except BaseException:
                # Cancelled by gRPC, which does so when the client leaves as well as when its deadline passes.
                over = deadline is not None and time.monotonic() >= deadline - 0.01
                why: Failure = DeadlineExceeded("the deadline has passed") if over else Cancelled("the caller has left")
                self._executions.leave(ticket, why)
                raise
            if answer.failure is not None:
                raise answer.failure.with_traceback(None)
            await context.write(self._result_event(method, request, answer))

    async def _wait(self, method: Method, request: Any, context: Any, ticket: Ticket, deadline: float | None) -> Answer:
        future: asyncio.Future[Any] = self._executions.submit(method, request, ticket)
        sent = None
        beat_at = time.monotonic() + _HEARTBEAT_SECONDS
        while True:
            await asyncio.wait((future,), timeout=_PROGRESS_SECONDS)
            if future.done():
                value = future.result()
                if isinstance(value, Answer):
                    return value
                future = asyncio.wrap_future(value.answer)
                continue
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise DeadlineExceeded("the deadline has passed")
            execution: Execution | None = ticket.execution
            progress = execution.progress if execution else None
            if progress is not None and progress is not sent:
                sent = progress
                fraction, phase, counters = progress
                event = common_pb2.Progress(fraction=fraction, phase=phase, counters=counters)
                await context.write(method.operation.response_class(progress=event))
            if now >= beat_at:
                beat_at = now + _HEARTBEAT_SECONDS
                since = now - (execution.progressed_at if execution else ticket.opened_at)
                heartbeat = common_pb2.Heartbeat(seconds_since_progress=since)
                await context.write(method.operation.response_class(heartbeat=heartbeat))

    def _result_event(self, method: Method, request: Any, answer: Answer) -> Message:
        manifest = answer.manifest
        assert manifest is not None
        tracing.note(cached=answer.cached)
        if answer.cached:
            self._instance.metrics.cached.labels(method.operation.name).inc()
        provenance = common_pb2.Provenance(
            key=manifest.key,
            task_key=request.context.task_key,
            cached=answer.cached,
            seconds=manifest.seconds,
            device=manifest.device,
            manifest_uri=manifest.manifest_uri,
        )
        return method.operation.response_class(result=answer.result, provenance=provenance)


def _serialise(message: Message) -> bytes:
    return message.SerializeToString()


def _as_coroutine_function(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    # gRPC recognises asynchronous handlers by their function, which a partial hides.
    async def call(request: Any, context: Any) -> Any:
        return await behaviour(request, context)

    return call


class BorderInterceptor(Interceptor):
    """The outermost layer of every call: failures become statuses, and each call is counted, logged and audited."""

    def __init__(self, instance: Instance, audit_log: audit.AuditLog) -> None:
        super().__init__()
        self._instance = instance
        self._audit_log = audit_log
        self._operations = {method.operation.full_name: method.operation.name for method in instance.methods.values()}

    def wrap(self, method: str, handler: Any) -> Any:
        """The handler within the border."""
        return wrap_handler(handler, functools.partial(self._bordered, method))

    def _bordered(
        self, name: str, behaviour: Callable[[Any, Any], Any], streams_requests: bool
    ) -> Callable[[Any, Any], Any]:
        metrics = self._instance.metrics
        seconds = metrics.seconds.labels(name)
        operation = self._operations.get(name, "")
        level = logging.INFO if operation else logging.DEBUG

        async def call(request: Any, context: Any) -> Any:
            started = time.perf_counter()
            status = "OK"
            message = ""
            certificate = next(iter(certificate_names(context.auth_context())), "")
            entry = audit.Entry(name, unquote(context.peer()), certificate)
            audit.begin(entry)
            about = None if streams_requests else getattr(request, "context", None)
            if isinstance(about, common_pb2.Context):
                project = about.project or DEFAULT_PROJECT
                bind_log_context(run_id=about.run_id, task_key=about.task_key, operation=operation, project=project)
            metrics.in_flight.inc()
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                status = "CANCELLED"
                raise
            except grpc.aio.AbortError:
                status = context.code().name
                raise
            except Exception as error:
                failure = failure_of(error, self._instance.name)
                status, message, reason = failure.status, one_line(failure), reason_for(failure)
                if reason in (REASON_BUSY, REASON_NEVER_FITS):
                    metrics.refused.labels(operation).inc()
                trailing = ((REASON_KEY, reason),) if reason else ()
                self._audit_log.write(entry, status)  # before the caller is told
                await context.abort(grpc.StatusCode[status], message, trailing)
            finally:
                took = time.perf_counter() - started
                self._audit_log.write(entry, status)
                metrics.in_flight.dec()
                metrics.calls.labels(name, status).inc()
                seconds.observe(took)
                if logger.isEnabledFor(level):
                    extra = {"method": name, "status": status, "seconds": round(took, 4)}
                    logger.log(level, "%s: %s", status, message or name, extra=extra)

        return call
