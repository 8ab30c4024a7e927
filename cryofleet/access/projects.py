"""What projects a request concerns, read from its message by reflection.

A project is named by a field `project`, in the request or in its context, and by the URIs that the request holds: in
the store's root, the first name is the project's. What a name says is decided before anything is looked for, so that
the answer is the same whether it exists or not. (The store is closed to other projects once more, by
`Store.for_project`; this is the door, that are the rooms.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from cryofleet.access.caller import Caller
from cryofleet.errors import PermissionDenied
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.storage import Store, checked_uri
from cryofleet.v1 import common_pb2, options_pb2

_CONTEXT = common_pb2.Context.DESCRIPTOR.full_name
_FREE = {kind.DESCRIPTOR.full_name for kind in (Struct, Value, ListValue)}
_SCHEMES = ("file://", "s3://")


@dataclass(frozen=True)
class _Fields:
    """Of a message, the fields that matter here."""

    project: bool
    context: str
    uris: tuple[str, ...]
    """Fields that hold URIs, one or several."""
    messages: tuple[str, ...]


@functools.cache
def _fields(descriptor: Descriptor) -> _Fields:
    project, context = False, ""
    uris, messages = [], []
    for field in descriptor.fields:
        if field.message_type is not None:
            if field.message_type.full_name == _CONTEXT:
                context = field.name
            else:
                messages.append(field.name)
        elif field.type == field.TYPE_STRING:
            documented = field.GetOptions().Extensions[options_pb2.parameter]
            if field.name == "project":
                project = True
            elif documented.artifact or field.name in ("uri", "uris") or field.name.endswith(("_uri", "_uris")):
                uris.append(field.name)
    return _Fields(project, context, tuple(uris), tuple(messages))


def projects_of(message: Message) -> Iterator[str]:
    """The projects that a request names; empty where it leaves one out."""
    fields = _fields(message.DESCRIPTOR)
    if fields.project:
        yield getattr(message, "project")  # noqa: B009  (a message's type does not say which fields it has)
    if fields.context:
        yield getattr(message, fields.context).project
    for child in _children(message, fields):
        yield from projects_of(child)


def uris_of(message: Message) -> Iterator[str]:
    """All URIs that a request holds: in fields meant for them, and wherever values of any kind are taken."""
    fields = _fields(message.DESCRIPTOR)
    for name in fields.uris:
        value = getattr(message, name)
        yield from (uri for uri in ([value] if isinstance(value, str) else value) if uri)
    for child in _children(message, fields):
        if child.DESCRIPTOR.full_name in _FREE:
            yield from (text for text in _texts(child) if text.startswith(_SCHEMES))
        else:
            yield from uris_of(child)


def _children(message: Message, fields: _Fields) -> Iterator[Message]:
    for name in fields.messages:
        field = message.DESCRIPTOR.fields_by_name[name]
        value: Any = getattr(message, name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from (item for item in value.values() if isinstance(item, Message))
        elif field.is_repeated:
            yield from value
        elif message.HasField(name):
            yield value


def _texts(value: Any) -> Iterator[str]:
    """All texts in a structure."""
    if isinstance(value, Struct):
        for item in value.fields.values():
            yield from _texts(item)
    elif isinstance(value, ListValue):
        for item in value.values:
            yield from _texts(item)
    elif isinstance(value, Value):
        match value.WhichOneof("kind"):
            case "string_value":
                yield value.string_value
            case "struct_value":
                yield from _texts(value.struct_value)
            case "list_value":
                yield from _texts(value.list_value)


def check_request(caller: Caller, message: Message, store: Store, every_project: bool = False) -> None:
    """Raises PermissionDenied where the request names a project, or something in one, that isn't the caller's.

    Where it names none it is about the default project; with `every_project`, about all that the caller may see.
    """
    if caller.projects is None:
        return  # what lies outside the roots the store refuses everybody
    for project in projects_of(message):
        if project or not every_project:
            caller.check_project(project or DEFAULT_PROJECT)
    for uri in uris_of(message):
        check_uri(caller, uri, store)


def check_uri(caller: Caller, uri: str, store: Store) -> None:
    """The same for a URI. What lies under a read-only root is open to all."""
    checked = checked_uri(uri)
    root = store.root_of(checked)
    if root != store.root:
        return
    project = checked.removeprefix(root).strip("/").partition("/")[0]
    if not project or not caller.may_use(project):
        raise PermissionDenied(f"{caller.user} has no access to {uri}")
