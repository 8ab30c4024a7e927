"""The operations of all services, read from the contract by reflection.

A new method needs nothing here: its messages and its line in the .proto say its parameters, units,
defaults, documentation, version and pool.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from cryofleet.errors import InvalidArgument
from cryofleet.tomogram_names import file_stem
from cryofleet.v1 import common_pb2, options_pb2
from cryofleet.v1.buf.validate import validate_pb2

_CONTEXT = common_pb2.Context.DESCRIPTOR.full_name
_MODULES = ("io", "picking", "alignment", "learning", "simulation", "runtime")
_SCALARS = {
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
    FieldDescriptor.CPPTYPE_FLOAT: "number",
    FieldDescriptor.CPPTYPE_INT32: "integer",
    FieldDescriptor.CPPTYPE_INT64: "integer",
    FieldDescriptor.CPPTYPE_UINT32: "integer",
    FieldDescriptor.CPPTYPE_UINT64: "integer",
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
    FieldDescriptor.CPPTYPE_STRING: "text",
}


@dataclass(frozen=True)
class Parameter:
    """One field of a request or result, as its .proto documents it."""

    name: str
    type: str
    """number, integer, boolean, text, choice, structure; or, of an artifact's URI, the artifact's kind
    (file, volume, subtomograms, particles, model, table, report)."""
    repeated: bool
    required: bool
    default: object
    """As JSON; None where there is none."""
    unit: str
    help: str
    choices: tuple[str, ...] = ()
    fields: tuple[Parameter, ...] = ()
    """Of a structure: its own fields."""

    @property
    def is_artifact(self) -> bool:
        return self.type in ARTIFACT_KINDS


@dataclass(frozen=True)
class Operation:
    """A method that streams events and ends in a result kept in the store."""

    name: str
    """As picking.Extract."""
    service: str
    method: str
    full_name: str
    """As gRPC calls it: /cryofleet.v1.PickingService/Extract."""
    help: str
    version: int
    pool: str
    """cpu or gpu."""
    stall_limit_seconds: float
    parameters: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    request_class: type[Message]
    response_class: type[Message]
    result_class: type[Message]


def _kind_name(kind: int) -> str:
    return options_pb2.ArtifactKind.Name(cast(Any, kind)).removeprefix("ARTIFACT_KIND_").lower()


ARTIFACT_KINDS = frozenset(_kind_name(number) for number in options_pb2.ArtifactKind.values() if number)


def _options(field: FieldDescriptor) -> options_pb2.Parameter:
    return field.GetOptions().Extensions[options_pb2.parameter]


def _is_context(field: Any) -> bool:
    return field.message_type is not None and field.message_type.full_name == _CONTEXT


@functools.cache
def _is_identity(field: Any) -> bool:
    """Whether a field is a parameter of the result's identity: neither an input nor the context."""
    return not (_options(field).artifact or _is_context(field))


def _enum_prefix(field: FieldDescriptor) -> str:
    """What all value names of the field's enum begin with: CONTRAST_ of CONTRAST_DARK."""
    return _enum(field).values[0].name.removesuffix("UNSPECIFIED")


def _enum(field: FieldDescriptor) -> EnumDescriptor:
    return cast(EnumDescriptor, field.enum_type)


def _default(field: FieldDescriptor) -> object:
    text = _options(field).default_value
    if not text:
        return None
    kind = _SCALARS.get(field.cpp_type)
    if kind in ("number", "integer", "boolean"):
        return json.loads(text)
    if field.enum_type is not None:
        return text.removeprefix(_enum_prefix(field)).lower()
    return text


def _parameter(field: FieldDescriptor) -> Parameter:
    options = _options(field)
    choices: tuple[str, ...] = ()
    fields: tuple[Parameter, ...] = ()
    if options.artifact:
        kind = _kind_name(options.artifact)
    elif field.enum_type is not None:
        kind = "choice"
        prefix = _enum_prefix(field)
        choices = tuple(value.name.removeprefix(prefix).lower() for value in field.enum_type.values if value.number)
    elif field.message_type is not None:
        kind = "structure"
        fields = tuple(_parameter(inner) for inner in field.message_type.fields)
    else:
        kind = _SCALARS[field.cpp_type]
    optional_by_kind = field.has_presence or field.is_repeated or field.cpp_type == FieldDescriptor.CPPTYPE_BOOL
    return Parameter(
        name=field.name,
        type=kind,
        repeated=field.is_repeated,
        required=_is_required(field) if not optional_by_kind or field.is_repeated else False,
        default=_default(field),
        unit=options.unit,
        help=options.help,
        choices=choices,
        fields=fields,
    )


def _is_required(field: FieldDescriptor) -> bool:
    """Whether the field's empty value breaks its own rules; the rules are the only place that says so."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    if rules.required:
        return True
    match rules.WhichOneof("type"):
        case "string":
            return bool(rules.string.min_len) or rules.string.pattern.startswith("^[")
        case "repeated":
            return bool(rules.repeated.min_items)
        case "enum":
            return 0 in rules.enum.not_in
        case "double" | "int32" | "int64" as kind:
            numbers = getattr(rules, kind)
            return bool((numbers.HasField("gt") and numbers.gt >= 0) or (numbers.HasField("gte") and numbers.gte > 0))
        case _:
            return False


def _operation(service: str, method: MethodDescriptor) -> Operation:
    documented = method.GetOptions().Extensions[options_pb2.operation]
    result = cast(Descriptor, method.output_type.fields_by_name["result"].message_type)
    return Operation(
        name=f"{service}.{method.name}",
        service=service,
        method=method.name,
        full_name=f"/{method.containing_service.full_name}/{method.name}",
        help=documented.help,
        version=documented.version,
        pool="gpu" if documented.pool == options_pb2.POOL_GPU else "cpu",
        stall_limit_seconds=documented.stall_limit_seconds,
        parameters=tuple(_parameter(field) for field in method.input_type.fields if not _is_context(field)),
        outputs=tuple(_parameter(field) for field in result.fields),
        request_class=message_factory.GetMessageClass(method.input_type),
        response_class=message_factory.GetMessageClass(method.output_type),
        result_class=message_factory.GetMessageClass(result),
    )


@functools.cache
def operations() -> dict[str, Operation]:
    """All operations by name, in the order of the contract."""
    found = {}
    for module in _MODULES:
        descriptor = importlib.import_module(f"cryofleet.v1.{module}_pb2").DESCRIPTOR
        for service in descriptor.services_by_name.values():
            for method in service.methods:
                if method.GetOptions().HasExtension(options_pb2.operation):
                    operation = _operation(module, method)
                    found[operation.name] = operation
    return found


def find_operation(name: str) -> Operation:
    """The operation of that name, as picking.Extract.

    Raises InvalidArgument with the nearest names.
    """
    try:
        return operations()[name]
    except KeyError:
        raise InvalidArgument(f"unknown operation {name!r}{suggestion(name, operations())}") from None


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown word: one that goes on where it ends (its unit was forgotten), the
    nearest of those that are known, or all of them.
    """
    folded = {name.lower(): name for name in known}
    close = [name for name in folded if name.startswith(word.lower() + "_")][:1]
    close = close or difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; there are {', '.join(folded.values())}" if folded else ""


def resolve_defaults(request: Message) -> Message:
    """A copy of `request` in which optional fields that were left out have their documented defaults.

    So have the fields of messages inside it; a message that was left out is put in where all of its fields have one.
    """
    resolved = type(request)()
    resolved.CopyFrom(request)
    _fill_in(resolved)
    return resolved


def _fill_in(message: Message) -> None:
    for name, value in _defaults(message.DESCRIPTOR):
        if not message.HasField(name):
            setattr(message, name, value)
    for name, named_by in _default_names(message.DESCRIPTOR):
        if not message.HasField(name):
            setattr(message, name, file_stem(getattr(message, named_by)))
    for field in message.DESCRIPTOR.fields:
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if field.is_repeated:
            for item in getattr(message, field.name):
                _fill_in(item)
        elif message.HasField(field.name) or _is_all_defaults(field.message_type):
            child = getattr(message, field.name)
            child.SetInParent()
            _fill_in(child)


@functools.cache
def _is_all_defaults(descriptor: Descriptor) -> bool:
    """Whether each field of a message has a default, so that the message may be left out as a whole."""
    return len(_defaults(descriptor)) == len(descriptor.fields) > 0


@functools.cache
def _defaults(descriptor: Descriptor) -> tuple[tuple[str, object], ...]:
    found = []
    for field in descriptor.fields:
        text = _options(field).default_value
        if not text:
            continue
        if field.enum_type is not None:
            value: object = field.enum_type.values_by_name[text].number
        elif _SCALARS[field.cpp_type] == "text":
            value = text
        else:
            value = json.loads(text)
        found.append((field.name, value))
    return tuple(found)


@functools.cache
def _default_names(descriptor: Descriptor) -> tuple[tuple[str, str], ...]:
    """Fields that are by default the name of a file, each with the field of its URI."""
    options = ((field.name, _options(field).default_name_of) for field in descriptor.fields)
    return tuple((name, named_by) for name, named_by in options if named_by)


@functools.cache
def _artifact_paths(descriptor: Descriptor) -> tuple[tuple[str, ...], ...]:
    """Paths of field names that lead to artifact URIs."""
    found: list[tuple[str, ...]] = []
    for field in descriptor.fields:
        if _options(field).artifact:
            found.append((field.name,))
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            found += [(field.name, *path) for path in _artifact_paths(field.message_type)]
    return tuple(found)


def _reach(message: Message, path: tuple[str, ...]) -> list[tuple[Message, str]]:
    """The messages that hold the last field of `path`, with that field's name."""
    if len(path) == 1:
        return [(message, path[0])]
    field = message.DESCRIPTOR.fields_by_name[path[0]]
    if field.is_repeated:
        children = list(getattr(message, path[0]))
    else:
        children = [getattr(message, path[0])] if message.HasField(path[0]) else []
    return [found for child in children for found in _reach(child, path[1:])]


def _values(message: Message, name: str) -> list[str]:
    value = getattr(message, name)
    return list(value) if message.DESCRIPTOR.fields_by_name[name].is_repeated else [value]


def inputs_of(request: Message) -> dict[str, list[str]]:
    """The artifact URIs that `request` reads, by field (dotted where nested), in order.

    An optional input of a repeated structure that is left out stands as an empty string, so that
    each URI keeps its place.
    """
    found = {}
    for path in _artifact_paths(request.DESCRIPTOR):
        uris = [uri for holder, name in _reach(request, path) for uri in _values(holder, name)]
        if any(uris):
            found[".".join(path)] = uris
    return found


def parameters_of(request: Message) -> dict[str, Any]:
    """What makes a result's identity besides the inputs: the request's parameters, defaults resolved, as JSON."""
    return _to_mapping(resolve_defaults(request), identity_only=True)


def _to_mapping(message: Message, identity_only: bool = False) -> dict[str, Any]:
    """JSON of a message by field names; 64-bit integers as numbers, which JSON's own mapping would quote.

    With `identity_only`, artifact URIs and the context are left out.
    """
    mapping: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if identity_only and not _is_identity(field):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None:
            if field.message_type.GetOptions().map_entry:
                mapping[field.name] = dict(value)
            elif field.is_repeated:
                mapping[field.name] = [_to_mapping(child, identity_only) for child in value]
            elif message.HasField(field.name):
                mapping[field.name] = _to_mapping(value, identity_only)
        elif field.has_presence and not message.HasField(field.name):
            continue
        elif field.enum_type is not None:
            names = field.enum_type.values_by_number
            mapping[field.name] = [names[v].name for v in value] if field.is_repeated else names[value].name
        else:
            mapping[field.name] = list(value) if field.is_repeated else value
    return mapping


def result_to_mapping(message: Message) -> dict[str, Any]:
    """A result as JSON, every field that has a value or no presence included."""
    return _to_mapping(message)


def result_from_mapping(operation: Operation, mapping: Mapping[str, Any]) -> Message:
    """Undoes `result_to_mapping`; fields that this version does not know are passed over."""
    return json_format.ParseDict(dict(mapping), operation.result_class(), ignore_unknown_fields=True)


def request_from_mapping(operation: Operation, mapping: Mapping[str, Any]) -> Message:
    """The request whose fields are `mapping`, as it comes from a pipeline or the command line.

    Choices may be given by their short names (`dark` for CONTRAST_DARK), numbers as text. Rules are
    not checked here; the service does that.

    Raises InvalidArgument naming the field and what it takes.
    """
    request = operation.request_class()
    _fill(request, mapping, operation.name, "")
    return request


def _fill(message: Message, mapping: Mapping[str, Any], where: str, prefix: str) -> None:
    known = {field.name: field for field in message.DESCRIPTOR.fields if not _is_context(field)}
    for name, value in mapping.items():
        field = known.get(name)
        if field is None:
            raise InvalidArgument(f"{where} has no parameter {prefix + name!r}{suggestion(name, list(known))}")
        if value is None:
            continue
        label = f"{where}: {prefix}{name}"
        if field.is_repeated:
            if not isinstance(value, (list, tuple)):
                raise InvalidArgument(f"{label} is {value!r}; it must be a list")
            for index, item in enumerate(value):
                if field.message_type is not None:
                    if not isinstance(item, Mapping):
                        raise InvalidArgument(f"{label}[{index}] is {item!r}; it must be a mapping")
                    _fill(getattr(message, name).add(), item, where, f"{prefix}{name}[{index}].")
                else:
                    getattr(message, name).append(_scalar(cast(FieldDescriptor, field), item, f"{label}[{index}]"))
        elif field.message_type is not None:
            if not isinstance(value, Mapping):
                raise InvalidArgument(f"{label} is {value!r}; it must be a mapping")
            getattr(message, name).SetInParent()
            _fill(getattr(message, name), value, where, f"{prefix}{name}.")
        else:
            setattr(message, name, _scalar(cast(FieldDescriptor, field), value, label))


def _scalar(field: FieldDescriptor, value: Any, label: str) -> Any:
    if field.enum_type is not None:
        prefix = _enum_prefix(field)
        wanted = str(value).upper().replace("-", "_").removeprefix(prefix)
        choice = field.enum_type.values_by_name.get(prefix + wanted)
        if choice is None or not choice.number:
            names = [v.name.removeprefix(prefix).lower() for v in field.enum_type.values if v.number]
            raise InvalidArgument(f"{label} is {value!r}; it must be one of {', '.join(names)}")
        return choice.number
    kind = _SCALARS[field.cpp_type]
    if kind == "text":
        if not isinstance(value, str):
            raise InvalidArgument(f"{label} is {value!r}; it must be text")
        return value
    if kind == "boolean":
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise InvalidArgument(f"{label} is {value!r}; it must be true or false")
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if kind == "integer":
            if not number.is_integer():
                raise ValueError
            bits = 31 if field.cpp_type == FieldDescriptor.CPPTYPE_INT32 else 63
            if not -(2**bits) <= number < 2**bits:
                raise InvalidArgument(f"{label} is {value!r}; it must be a whole number of at most {bits} bits")
            return int(number)
    except (TypeError, ValueError, OverflowError):
        article = "a whole number" if kind == "integer" else "a number"
        raise InvalidArgument(f"{label} is {value!r}; it must be {article}") from None
    return number
