"""models: the trained networks of a project."""

from __future__ import annotations

from datetime import datetime

import click

from cryofleet import models as stored
from cryofleet.cli.options import json_option, project_option
from cryofleet.cli.output import print_json, print_table
from cryofleet.client import Client


@click.group(invoke_without_command=True)
@project_option
@json_option
@click.pass_context
def models(context: click.Context, project: str, as_json: bool) -> None:
    """List the trained models of the project, the newest first."""
    if context.invoked_subcommand is not None:
        return
    with Client(project=project, start=False) as client:
        found = stored.models(client)
    if as_json:
        print_json([model.to_mapping() for model in found])
        return
    rows = []
    for model in found:
        figures = ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in model.figures.items())
        size = "" if model.training_set_size is None else model.training_set_size
        rows.append([model.architecture, _local(model.created_at), size, figures, model.uri])
    print_table(["architecture", "trained", "boxes", "figures", "uri"], rows)


@models.command()
@click.argument("uri")
@project_option
@json_option
def show(uri: str, project: str, as_json: bool) -> None:
    """Print the card of the model at URI: what it is, was trained on and reaches. With --json, its config."""
    with Client(project=project, start=False) as client:
        if as_json:
            print_json(stored.config(client, uri))
        else:
            click.echo(stored.card(client, uri), nl=False)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _local(created_at: str) -> str:
    """Local date and time."""
    return datetime.fromisoformat(created_at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


COMMANDS = (models,)
