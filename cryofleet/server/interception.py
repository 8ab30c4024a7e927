"""Putting something around every call of a server, whatever kind of call it is."""

from __future__ import annotations

import abc
import contextlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

Behaviour = Callable[[Any, Any], Any]


class Interceptor(grpc.aio.ServerInterceptor, abc.ABC):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps each method's handler once."""

    def __init__(self) -> None:
        self._wrapped: dict[str, Any] = {}

    @abc.abstractmethod
    def wrap(self, method: str, handler: Any) -> Any:
        """The handler that takes the place of a method's."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """What gRPC asks at each call."""
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = self.wrap(method, handler)
        return self._wrapped[method]


def _as_coroutine(behaviour: Behaviour) -> Behaviour:
    """The behaviour as a coroutine function, which writes what an asynchronous generator would yield.

    A cancelled call is then always inside of the function, and its clean-up is not left to the garbage collector.
    """
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour

    async def call(request: Any, context: Any) -> None:
        async with contextlib.aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return call


KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
"""Attributes of a gRPC method handler that hold its behaviour; one of them is set."""


def wrap_handler(
    handler: Any, wrap: Callable[[Behaviour, bool], Behaviour], deserialise: Callable[[bytes], Any] | None = None
) -> Any:
    """The handler with its behaviour replaced by `wrap(behaviour, streams_requests)`, a coroutine function from one.

    `deserialise` takes the place of the handler's own where it is given.
    """
    kind = next(name for name in KINDS if getattr(handler, name) is not None)
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        wrap(_as_coroutine(getattr(handler, kind)), handler.request_streaming),
        request_deserializer=deserialise or handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
