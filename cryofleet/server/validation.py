"""The rules of the contract, checked on every request message of every method."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import protovalidate
from google.protobuf.message import Message

from cryofleet.errors import InvalidArgument
from cryofleet.server.interception import Behaviour, Interceptor, wrap_handler

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


def _validating(behaviour: Behaviour, streams_requests: bool) -> Behaviour:
    async def call(request: Any, context: Any) -> Any:
        if streams_requests:
            return await behaviour(_checked(request), context)
        validate(request)
        return await behaviour(request, context)

    return call


class ValidationInterceptor(Interceptor):
    """Applies `validate` to every request message of every kind of call."""

    def wrap(self, method: str, handler: Any) -> Any:
        """The handler behind the rules."""
        return wrap_handler(handler, _validating)
