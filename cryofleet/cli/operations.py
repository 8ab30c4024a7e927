"""ops, call: single operations, read from the contract."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cryofleet.cli.options import json_option, key_values, project_option
from cryofleet.cli.output import print_json, print_table
from cryofleet.client import Client
from cryofleet.operations import Parameter, find_operation, operations
from cryofleet.v1 import common_pb2


@click.command()
@click.argument("name", metavar="[OPERATION]", required=False)
@json_option
def ops(name: str | None, as_json: bool) -> None:
    """List every operation; with OPERATION, its parameters, units and defaults."""
    wanted = [find_operation(name)] if name else list(operations().values())
    if as_json:
        print_json(
            [
                {
                    "name": o.name,
                    "help": o.help,
                    "version": o.version,
                    "pool": o.pool,
                    "parameters": [_parameter_mapping(p) for p in o.parameters],
                    "outputs": [_parameter_mapping(p) for p in o.outputs],
                }
                for o in wanted
            ]
        )
    elif name is None:
        print_table(["operation", "what it does"], [[o.name, o.help] for o in wanted])
    else:
        operation = wanted[0]
        click.echo(f"{operation.name}: {operation.help}\n")
        headings = ["parameter", "type", "default", "unit", "what it is"]
        print_table(headings, [row for p in operation.parameters for row in _rows(p, "")])
        click.echo("\nresult:")
        print_table(
            ["field", "type", "unit", "what it is"],
            [[o.name, _type_text(o), o.unit, o.help] for o in operation.outputs],
        )


def _parameter_mapping(parameter: Parameter) -> dict[str, object]:
    return {
        "name": parameter.name,
        "type": parameter.type,
        "repeated": parameter.repeated,
        "required": parameter.required,
        "default": parameter.default,
        "unit": parameter.unit,
        "choices": list(parameter.choices),
        "fields": [_parameter_mapping(field) for field in parameter.fields],
        "help": parameter.help,
    }


def _type_text(parameter: Parameter) -> str:
    kind = "|".join(parameter.choices) or parameter.type
    return f"list of {kind}" if parameter.repeated else kind


def _rows(parameter: Parameter, prefix: str) -> list[list[str]]:
    default = "required" if parameter.required else "" if parameter.default is None else str(parameter.default)
    own = [prefix + parameter.name, _type_text(parameter), default, parameter.unit, parameter.help]
    separator = "[]." if parameter.repeated else "."
    inner = [row for field in parameter.fields for row in _rows(field, f"{prefix}{parameter.name}{separator}")]
    return [own, *inner]


@click.command()
@click.argument("operation")
@click.argument("settings", nargs=-1, metavar="KEY=VALUE…")
@project_option
@json_option
def call(operation: str, settings: tuple[str, ...], project: str, as_json: bool) -> None:
    """Call one OPERATION, as picking.Extract, and print its result.

    Values are text, numbers, true or false, or JSON; files on this machine are uploaded.
    """
    find_operation(operation)
    console = Console(stderr=True)
    percentage = TextColumn("{task.percentage:>3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), percentage, TimeElapsedColumn())
    with Client(project=project) as client, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(operation, total=1.0)

        def show(progress: common_pb2.Progress) -> None:
            bar.update(task, completed=progress.fraction, description=f"{operation}: {progress.phase}")

        result = client.call(operation, on_progress=show, **key_values(settings))
    if as_json or not sys.stdout.isatty():
        print_json(result)
    else:
        print_table(["field", "value"], list(result.items()))


COMMANDS = (ops, call)
