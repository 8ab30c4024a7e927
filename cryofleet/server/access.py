"""Access control of every call: who calls, whether they may, and whether what they name is theirs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from cryofleet.access import audit
from cryofleet.access.authentication import Authenticator, certificate_names
from cryofleet.access.caller import Caller, calling
from cryofleet.access.projects import check_request, projects_of
from cryofleet.access.roles import Rule, rule_of
from cryofleet.channels import MESSAGE_LIMIT_BYTES
from cryofleet.errors import InvalidArgument, PermissionDenied, Unauthenticated
from cryofleet.logs import bind_log_context
from cryofleet.server.failures import TooLarge
from cryofleet.server.interception import Behaviour, Interceptor, wrap_handler
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.storage import Store


class _Unread:
    """Stands for a request that was not read; it is refused once it is known who sent it."""

    def __init__(self, failure: InvalidArgument | TooLarge) -> None:
        self.failure = failure


def _reading(deserialise: Callable[[bytes], Message]) -> Callable[[bytes], Message | _Unread]:
    def read(data: bytes) -> Message | _Unread:
        if len(data) > MESSAGE_LIMIT_BYTES:
            return _Unread(TooLarge(f"a message of {len(data)} bytes came; {MESSAGE_LIMIT_BYTES} are taken"))
        try:
            return deserialise(data)
        except DecodeError:
            return _Unread(InvalidArgument("the request is not of the method's type"))

    return read


class AccessInterceptor(Interceptor):
    """Lets calls through whose caller is known and may make them; refuses all others, with the reason in the audit."""

    def __init__(self, authenticator: Authenticator, store: Store) -> None:
        super().__init__()
        self._authenticator = authenticator
        self._store = store

    def wrap(self, method: str, handler: Any) -> Any:
        """The handler behind the door."""
        return wrap_handler(handler, functools.partial(self._guarded, method), _reading(handler.request_deserializer))

    def _guarded(self, method: str, behaviour: Behaviour, streams_requests: bool) -> Behaviour:
        rule = rule_of(method)

        async def call(request: Any, context: Any) -> Any:
            entry = audit.current_entry() or audit.Entry(method)
            with _noting_refusals(entry):
                if rule is None:
                    raise PermissionDenied(f"nobody may call {method}: no rule says who")
                entry.audited = rule.audited
                if rule.role is None:
                    return await behaviour(_read(request), context)
                metadata = context.invocation_metadata() or ()
                caller = await self._authenticator.identify(metadata, certificate_names(context.auth_context()))
                entry.caller = caller
                caller.check_role(method, rule)
                if not streams_requests:
                    self._check(caller, request, rule, entry)
            bind_log_context(user=caller.user)
            with calling(caller):
                checked = self._checked(caller, request, rule, entry) if streams_requests else request
                return await behaviour(checked, context)

        return call

    def _check(self, caller: Caller, request: Any, rule: Rule, entry: audit.Entry) -> None:
        message = _read(request)
        _describe(message, rule, entry)
        check_request(caller, message, self._store, rule.every_project)

    async def _checked(
        self, caller: Caller, requests: AsyncIterator[Any], rule: Rule, entry: audit.Entry
    ) -> AsyncIterator[Message]:
        async for request in requests:
            with _noting_refusals(entry):
                self._check(caller, request, rule, entry)
            yield request


def _read(request: Any) -> Message:
    if isinstance(request, _Unread):
        raise request.failure
    message: Message = request
    return message


@contextlib.contextmanager
def _noting_refusals(entry: audit.Entry) -> Iterator[None]:
    try:
        yield
    except (Unauthenticated, PermissionDenied, TooLarge) as failure:
        entry.refused = str(failure)
        raise


def _describe(message: Any, rule: Rule, entry: audit.Entry) -> None:
    """What the audit log says of a request."""
    projects = sorted({project or ("" if rule.every_project else DEFAULT_PROJECT) for project in projects_of(message)})
    entry.project = entry.project or " ".join(projects)
    fields = message.DESCRIPTOR.fields_by_name
    if "run_id" in fields:
        entry.run_id = message.run_id
    if "context" in fields:
        entry.run_id, entry.task_key = message.context.run_id, message.context.task_key
