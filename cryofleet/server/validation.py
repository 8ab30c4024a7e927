"""The rules of the contract, checked on every request message of every method."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import protovalidate
from google.protobuf.message import Message

from cryofleet.errors import InvalidArgument

_validator = protovalidate.Validator()
_SHOWN_VALUE_LENGTH = 80


def validate(message: Message) -> None:
    """Raises InvalidArgument naming the field, its value and the rule of the first violation."""
    violations = _validator.collect_violations(message, fail_fast=True)
    if violations:
        raise InvalidArgument(_describe(violations[0]))


def _describe(violation: Any) -> str:
    found = violation.proto
    rule = f"{found.message} [{found.rule_id}]" if found.message else f"breaks the rule {found.rule_id}"
    if found.field is None or not found.field.elements:
        return rule
    path = ""
    for element in found.field.elements:
        path += ("." if path else "") + element.field_name
        if element.subscript is not None:
            path += f"[{element.subscript.value}]"
    value = violation.field_value
    if isinstance(value, (str, int, float, bool)):
        shown = repr(value)
        if len(shown) > _SHOWN_VALUE_LENGTH:
            shown = shown[:_SHOWN_VALUE_LENGTH] + "…"
        return f"{path} is {shown}: {rule}"
    return f"{path}: {rule}"


async def _checked(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for request in requests:
        validate(request)
        yield request


Behaviour = Callable[[Any, Any], Any]


def _validating(behaviour: Behaviour, streams_requests: bool) -> Behaviour:
    async def call(request: Any, context: Any) -> Any:
        if streams_requests:
            return await behaviour(_checked(request), context)
        validate(request)
        return await behaviour(request, context)

    return call


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


class ValidationInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Applies `validate` to every request message of every kind of call."""

    def __init__(self) -> None:
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps each method's handler once."""
        method = handler_call_details.method
        if method in self._wrapped:
            return self._wrapped[method]
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        self._wrapped[method] = wrap_handler(handler, _validating)
        return self._wrapped[method]
