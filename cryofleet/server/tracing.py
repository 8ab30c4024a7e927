"""A span for each call that a server answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import grpc

from cryofleet import tracing
from cryofleet.server.instance import Instance
from cryofleet.server.interception import Interceptor, wrap_handler
from cryofleet.v1 import common_pb2

_ASIDES = (
    "/grpc.health.",
    "/grpc.reflection.",
    "/cryofleet.v1.RuntimeService/GetCapacity",
    "/cryofleet.v1.RuntimeService/GetLog",
)
"""Calls that ask an instance how it is, once a second and oftener: they have a span in their caller's trace alone."""


class TracingInterceptor(Interceptor):
    """Makes each call a span, below the one that the caller names; outermost, so that its log lines have the trace."""

    def __init__(self, instance: Instance) -> None:
        super().__init__()
        self._operations = {method.operation.full_name: method.operation.name for method in instance.methods.values()}

    def wrap(self, method: str, handler: Any) -> Any:
        """The handler within a span."""
        return wrap_handler(handler, functools.partial(self._traced, method))

    def _traced(
        self, name: str, behaviour: Callable[[Any, Any], Any], streams_requests: bool
    ) -> Callable[[Any, Any], Any]:
        aside = name.startswith(_ASIDES)
        attributes: dict[str, Any] = {
            "rpc.system": "grpc",
            "rpc.method": name[1:],
            "operation": self._operations.get(name, ""),
        }

        async def call(request: Any, context: Any) -> Any:
            parent = tracing.parent_in(context.invocation_metadata())
            if parent is None and aside:
                return await behaviour(request, context)
            aborted: grpc.aio.AbortError | None = None
            with tracing.span(name[1:], "server", parent, **attributes, **_subject(request, streams_requests)):
                try:
                    answer = await behaviour(request, context)
                    tracing.note(status="OK")
                    return answer
                except grpc.aio.AbortError as error:
                    # It says nothing itself; the call has what the caller is told.
                    tracing.failed(context.code().name, _text(context.details()))
                    aborted = error
            raise aborted

        return call


def _subject(request: Any, streams_requests: bool) -> dict[str, Any]:
    """The run and the task that a request is about."""
    if streams_requests:
        return {}
    about = getattr(request, "context", None)
    if isinstance(about, common_pb2.Context):
        return {"run_id": about.run_id, "task_key": about.task_key}
    run_id = getattr(request, "run_id", "")
    return {"run_id": run_id} if isinstance(run_id, str) else {}


def _text(details: str | bytes | None) -> str:
    return details.decode(errors="replace") if isinstance(details, bytes) else details or ""
