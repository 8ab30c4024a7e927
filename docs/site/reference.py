"""The reference: operations from the contract, pipelines from their files, the command line from itself."""

from __future__ import annotations

import importlib.resources
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from grpc_tools import protoc

from cryofleet.cli import cli
from cryofleet.operations import Operation, Parameter, operations
from cryofleet.settings import Settings
from cryofleet.v1 import (
    alignment_pb2,
    io_pb2,
    learning_pb2,
    options_pb2,
    orchestrator_pb2,
    picking_pb2,
    runtime_pb2,
    simulation_pb2,
    viewer_pb2,
)
from cryofleet.v1.buf.validate import validate_pb2
from orchestrator.library import Library
from orchestrator.pipeline import Pipeline, Step

_FILES = {
    "io": io_pb2,
    "picking": picking_pb2,
    "alignment": alignment_pb2,
    "learning": learning_pb2,
    "simulation": simulation_pb2,
    "orchestrator": orchestrator_pb2,
    "viewer": viewer_pb2,
    "runtime": runtime_pb2,
}
_BOUNDS = {"gt": "above {}", "gte": "from {}", "lt": "below {}", "lte": "to {}"}
_FILE_COMMENT = (2,)
"""What stands above `package` is of the whole file."""


def operation_pages(protos: Path) -> dict[str, str]:
    """A page for each service by its name: its operations with their fields, and its other calls."""
    comments = _comments(protos)
    return {name: _service_page(name, module.DESCRIPTOR, comments) for name, module in _FILES.items()}


def _service_page(name: str, file: Any, comments: Mapping[str, str]) -> str:
    documented = operations()
    methods = [method for service in file.services_by_name.values() for method in service.methods]
    known = [documented[f"{name}.{m.name}"] for m in methods if f"{name}.{m.name}" in documented]
    others = [method for method in methods if f"{name}.{method.name}" not in documented]
    parts = [f"# {name}", comments.get(file.name, "")]
    if known:
        parts += [
            "Called as `cryofleet call NAME field=value …`, by `Client.call`, or as `op:` of a "
            "[pipeline](../../pipelines.md). An artifact is given as its URI.",
            *(_operation(operation, comments) for operation in known),
        ]
    if others:
        parts += ["## Calls that keep no result" if known else "## Calls", *(_call(m, comments) for m in others)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _operation(operation: Operation, comments: Mapping[str, str]) -> str:
    request, result = operation.request_class.DESCRIPTOR, operation.result_class.DESCRIPTOR
    where = " · on a GPU where one is free" if operation.pool == "gpu" else ""
    parts = [
        f"## {operation.name}",
        operation.help,
        f"Version {operation.version}{where}.",
        _table(
            ("field", "type", "default", "what"),
            _fields(operation.parameters, request.fields_by_name, comments, documents_defaults=True),
        ),
        *(f"- {rule.message}" for rule in request.GetOptions().Extensions[validate_pb2.message].cel if rule.message),
        "It gives",
        _table(("field", "type", "what"), _fields(operation.outputs, result.fields_by_name, comments, False)),
    ]
    return "\n\n".join(parts)


def _fields(
    parameters: Iterable[Parameter],
    described: Mapping[str, Any],
    comments: Mapping[str, str],
    documents_defaults: bool,
    prefix: str = "",
) -> Iterator[tuple[str, ...]]:
    """A row for each field, those of a structure below it."""
    for parameter in parameters:
        field = described[parameter.name]
        name = f"`{prefix}{parameter.name}`"
        kind = parameter.type + (" (several)" if parameter.repeated else "")
        what = ". ".join(filter(None, [parameter.help, _rules(field, parameter.unit), _choices(field, comments)]))
        default = "**needed**" if parameter.required else _value(parameter.default)
        yield (name, kind, default, what) if documents_defaults else (name, kind, what)
        if parameter.fields and field.message_type is not None:
            inner = f"{prefix}{parameter.name}{'[]' if parameter.repeated else ''}."
            yield from _fields(parameter.fields, field.message_type.fields_by_name, comments, documents_defaults, inner)


def _rules(field: FieldDescriptor, unit: str) -> str:
    """The unit, and the numbers that a field takes."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    kind = rules.WhichOneof("type")
    numbers = getattr(rules, kind) if kind in ("double", "float", "int32", "int64", "uint32", "uint64") else None
    bounds = [
        text.format(_number(getattr(numbers, name)))
        for name, text in _BOUNDS.items()
        if numbers is not None and numbers.HasField(name)
    ]
    return " ".join([*bounds, unit] if unit else bounds)


def _choices(field: FieldDescriptor, comments: Mapping[str, str]) -> str:
    if field.enum_type is None:
        return ""
    prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
    found = []
    for value in field.enum_type.values:
        if value.number:
            comment = comments.get(f"{field.enum_type.full_name}.{value.name}", "").rstrip(".")
            name = value.name.removeprefix(prefix).lower()
            found.append(f"`{name}`" + (f" ({comment})" if comment else ""))
    return "One of " + ", ".join(found)


def _call(method: MethodDescriptor, comments: Mapping[str, str]) -> str:
    """A call that is no operation: what it says of itself, and of the fields of its messages."""
    rows = [
        (f"`{field.name}`", comments.get(f"{message.full_name}.{field.name}", "") or _help(field))
        for message in (method.input_type, method.output_type)
        for field in message.fields
    ]
    told = [row for row in rows if row[1]]
    parts = [f"### {method.name}", comments.get(method.full_name, ""), _table(("field", "what"), told) if told else ""]
    return "\n\n".join(part for part in parts if part)


def _help(field: FieldDescriptor) -> str:
    return field.GetOptions().Extensions[options_pb2.parameter].help


def _comments(protos: Path) -> dict[str, str]:
    """The contract's comments, by full name (of an enum's value, the enum's name before it); a file's by its path."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "contract.binpb"
        files = sorted(str(path) for path in protos.glob("cryofleet/v1/*.proto"))
        include = [f"-I{protos}", f"-I{importlib.resources.files('grpc_tools') / '_proto'}"]
        arguments = ["protoc", *include, "--include_source_info", f"--descriptor_set_out={out}", *files]
        if protoc.main(arguments) != 0:
            raise ValueError(f"protoc can't read the contract in {protos}")
        described = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    found = {}
    for file in described.file:
        names = dict(_names(file))
        for location in file.source_code_info.location:
            name = names.get(tuple(location.path))
            if name and location.leading_comments.strip():
                found[name] = " ".join(location.leading_comments.split())
    return found


def _names(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """The path of each declaration in the file's descriptor, by which comments are found, and its full name."""
    yield _FILE_COMMENT, file.name
    for i, service in enumerate(file.service):
        for j, method in enumerate(service.method):
            yield (6, i, 2, j), f"{file.package}.{service.name}.{method.name}"
    for i, enum in enumerate(file.enum_type):
        for j, value in enumerate(enum.value):
            yield (5, i, 2, j), f"{file.package}.{enum.name}.{value.name}"
    for i, message in enumerate(file.message_type):
        for j, field in enumerate(message.field):
            yield (4, i, 2, j), f"{file.package}.{message.name}.{field.name}"


def pipelines() -> str:
    """The page of the pipelines that ship with the product."""
    shipped = Library(Settings.from_environment({})).all()
    head = "Run as `cryofleet run NAME --set name=value …` or by `Client.run`; [how one is written](../pipelines.md)."
    return "\n\n".join(["# Pipelines", head, *(_pipeline(pipeline) for pipeline in shipped)]) + "\n"


def _pipeline(pipeline: Pipeline) -> str:
    rows = []
    for argument in pipeline.arguments:
        kind = argument.type + (" (several)" if argument.repeated else "")
        choices = ". One of " + ", ".join(f"`{choice}`" for choice in argument.choices) if argument.choices else ""
        what = argument.help + (f", {argument.unit}" if argument.unit else "") + choices
        default = "**needed**" if argument.required else _value(argument.default)
        rows.append((f"`{argument.name}`", kind, default, what))
    names = dict.fromkeys(_called(pipeline.steps))
    links = (f"[{name}](operations/{name.split('.')[0]}.md#{name.replace('.', '').lower()})" for name in names)
    return "\n\n".join(
        [
            f"## {pipeline.name}",
            pipeline.help,
            _table(("name", "type", "default", "what"), rows),
            "It gives " + ", ".join(f"`{name}`" for name in pipeline.outputs) + ".",
            "It calls " + ", ".join(links) + ".",
        ]
    )


def _called(steps: Iterable[Step]) -> Iterator[str]:
    for step in steps:
        yield from (operation.name for operation, _, _ in step.calls())
        yield from _called(step.steps)


def command_line() -> str:
    """The page of the command line: what each command says with `--help`."""
    context = click.Context(cli, info_name="cryofleet", max_content_width=100, terminal_width=100)
    return "\n\n".join(["# The command line", *_commands(cli, context)]) + "\n"


def _commands(command: click.Command, context: click.Context) -> Iterator[str]:
    if context.parent is not None:
        yield f"## {context.command_path}"
    yield f"~~~~ {{ .text }}\n{command.get_help(context)}\n~~~~"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from _commands(inner, click.Context(inner, parent=context, info_name=name))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _value(value: object) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, float):
        value = _number(value)
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def _number(value: float) -> str:
    return f"{int(value)}" if value == int(value) else f"{value:g}"
