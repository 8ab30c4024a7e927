"""ls, get, put, provenance, gc, usage, pin: what is in the store."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cryofleet.cli.options import json_option, project_option
from cryofleet.cli.output import print_json, print_table, size_text
from cryofleet.client import Artifact, Client, RunHandle
from cryofleet.provenance import Origin, trace
from cryofleet.results import artifacts_of


@click.command()
@click.argument("uri", required=False)
@project_option
@json_option
def ls(uri: str | None, project: str, as_json: bool) -> None:
    """List stored objects under URI; all of the project where left out."""
    with Client(project=project, start=False) as client:
        found = list(client.list(uri or f"{client.store_root()}/{project}"))
    if as_json:
        print_json([{"uri": entry.uri, "size_bytes": entry.size_bytes} for entry in found])
    else:
        print_table(["size", "uri"], [[size_text(entry.size_bytes), entry.uri] for entry in found])


@click.command()
@click.argument("uri")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@project_option
def get(uri: str, path: Path | None, project: str) -> None:
    """Bring one object to PATH, or all objects under a URI to the folder PATH."""
    with Client(project=project, start=False) as client:
        artifact = client.artifact(uri.rstrip("/"))
        target = path / artifact.name if path is not None and path.is_dir() else path
        click.echo(str(artifact.save(target or artifact.name)))


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@project_option
def put(path: Path, project: str) -> None:
    """Store the file PATH and print its URI."""
    with Client(project=project) as client:
        click.echo(client.upload(path))


@click.command()
@click.argument("what")
@project_option
@json_option
def provenance(what: str, project: str, as_json: bool) -> None:
    """Trace a result back to the raw data: every operation, its version, parameters and inputs.

    WHAT is a URI, a run's id for all of its outputs, or a file or folder that a run's results were brought to.
    """
    with Client(project=project, start=False) as client:
        if "://" in what:
            found = {what: what}
        elif Path(what).exists():
            found = artifacts_of(Path(what))
        else:
            found = _outputs_of(client.get(what))
        seen: set[str] = set()
        origins = {name: trace(client, uri, seen) for name, uri in found.items()}
    if as_json:
        traced = {name: origin.to_mapping() for name, origin in origins.items()}
        print_json(traced[what] if "://" in what else traced)
        return
    for name, origin in origins.items():
        if name != origin.uri:
            click.echo(f"{name}:")
        _print_origin(origin, 0 if name == origin.uri else 1)


def _outputs_of(run: RunHandle) -> dict[str, str]:
    """URIs of a run's outputs, by their names and places."""
    found = {}
    for name, value in sorted(run.outputs.items()):
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items, start=1):
            if isinstance(item, Artifact):
                found[f"{name} {number}" if isinstance(value, list) else name] = item.uri
    return found


def _print_origin(origin: Origin, depth: int) -> None:
    indent = "  " * depth
    if origin.operation is None:
        click.echo(f"{indent}{origin.uri} (outside the results)")
        return
    click.echo(f"{indent}{origin.operation} v{origin.version}  {origin.uri}")
    for name, value in sorted(origin.parameters.items()):
        if value not in ("", [], {}):
            click.echo(f"{indent}  {name} = {json.dumps(value, ensure_ascii=False)}")
    if origin.repeated:
        click.echo(f"{indent}  (its inputs are shown above)")
    for field, sources in origin.inputs.items():
        for source in sources:
            click.echo(f"{indent}  {field}:")
            _print_origin(source, depth + 2)


@click.command()
@click.option("--older-than-hours", default=24.0, show_default=True, help="Only what is older than this.")
@click.option("--delete", is_flag=True, help="Delete; without it nothing is changed.")
@project_option
@json_option
def gc(older_than_hours: float, delete: bool, project: str, as_json: bool) -> None:
    """Find results that no run and no pin needs; with --delete, delete them."""
    with Client(project=project, start=False) as client:
        answer = client.collect_garbage(older_than_hours, delete)
    if as_json:
        print_json(answer)
        return
    print_table(["size", "operation", "uri"], [[size_text(g.size_bytes), g.operation, g.uri] for g in answer.results])
    verb = "deleted" if answer.deleted else "would delete (with --delete)"
    click.echo(f"{verb} {len(answer.results)} results, {size_text(answer.size_bytes)}", err=True)


@click.command()
@click.option("--all", "every_project", is_flag=True, help="Every project that you may see.")
@project_option
@json_option
def usage(every_project: bool, project: str, as_json: bool) -> None:
    """Show what a project has stored, its quota, and for how long its runs are kept."""
    with Client(project=project, start=False) as client:
        answer = client.usage(every_project)
    if as_json:
        print_json(answer)
        return
    rows = [
        [
            each.project,
            size_text(each.size_bytes),
            str(each.objects),
            size_text(each.quota_bytes) if each.quota_bytes else "no limit",
            f"{each.keep_days:g}" if each.keep_days else "for ever",
        ]
        for each in answer.projects
    ]
    print_table(["project", "stored", "objects", "quota", "days kept"], rows)
    if answer.HasField("free_bytes"):
        kept = size_text(answer.reserve_bytes)
        click.echo(f"{size_text(answer.free_bytes)} are free on the store's disk; {kept} are kept free", err=True)


@click.command()
@click.argument("uri")
@click.option("--remove", is_flag=True, help="Take the pin away.")
def pin(uri: str, remove: bool) -> None:
    """Keep a result, and all that it was made from, from gc."""
    with Client(start=False) as client:
        client.pin(uri, unpin=remove)


COMMANDS = (ls, get, put, provenance, gc, usage, pin)
