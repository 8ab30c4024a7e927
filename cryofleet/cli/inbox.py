"""inbox: folders and bucket prefixes whose new files start a pipeline."""

from __future__ import annotations

import re
from pathlib import Path

import click

from cryofleet.cli.options import json_option, key_values, project_option
from cryofleet.cli.output import print_json, print_table, size_text, time_text
from cryofleet.client import Client
from cryofleet.errors import NotFound
from cryofleet.settings import PROJECT_PATTERN
from cryofleet.storage import file_uri
from cryofleet.v1 import orchestrator_pb2

_NAME_LETTERS = 63
_WORDS = {
    state: name.removeprefix("INBOX_ITEM_STATE_").lower().replace("_", "-")
    for name, state in orchestrator_pb2.InboxItemState.items()
}
_STATES = {word: state for state, word in _WORDS.items() if state}


@click.group()
def inbox() -> None:
    """Watch folders and bucket prefixes: each new, complete tomogram starts a pipeline once."""


@inbox.command()
@click.argument("uri", metavar="FOLDER")
@click.option("--pipeline", required=True, help="A pipeline by name, or a YAML file; kept as it is now.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="An input or a parameter, as text or JSON.")
@click.option("--name", help="What the inbox is called; the folder's own name where left out.")
@click.option("--input", "input_", default="", help="The pipeline's input that gets the file, where not tomogram.")
@click.option(
    "--pattern", "patterns", multiple=True, help="Which files, as '*.mrc'; may be repeated. Volumes where left out."
)
@click.option("--settle-seconds", type=float, help="A file is complete that has not changed for so long.  [10]")
@click.option("--give-up-seconds", type=float, help="One that stays shorter than it says is set aside then.  [600]")
@click.option("--ready-suffix", default="", help="A file is complete when FILE with this behind it is there too.")
@click.option("--at-once", type=int, help="Runs that go on at a time.  [2]")
@click.option("--new-only", is_flag=True, help="Pass over what is there already.")
@project_option
@json_option
def add(
    uri: str,
    pipeline: str,
    settings: tuple[str, ...],
    name: str | None,
    input_: str,
    patterns: tuple[str, ...],
    settle_seconds: float | None,
    give_up_seconds: float | None,
    ready_suffix: str,
    at_once: int | None,
    new_only: bool,
    project: str,
    as_json: bool,
) -> None:
    """Watch FOLDER, a folder of this machine or a URI, until it is removed; what is there counts as new.

    A folder must lie in one of the platform's roots: set CRYOFLEET_READ_ONLY_ROOTS before it is started.
    """
    if "://" not in uri:
        if not Path(uri).is_dir():
            raise NotFound(f"no such folder: {uri}")
        uri = file_uri(uri)
    with Client(project=project) as client:
        added = client.add_inbox(
            name or _name_of(uri),
            uri,
            pipeline,
            key_values(settings),
            input=input_,
            patterns=patterns,
            settle_seconds=settle_seconds,
            give_up_seconds=give_up_seconds,
            ready_suffix=ready_suffix,
            at_once=at_once,
            new_only=new_only,
        )
    if as_json:
        print_json(added)
    else:
        click.echo(
            f"inbox {added.name} watches {added.uri} for {added.pipeline}; see: cryofleet inbox show {added.name}"
        )


def _name_of(uri: str) -> str:
    """What a folder's inbox is called by itself."""
    last = uri.rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9_-]+", "-", last).strip("-_")[:_NAME_LETTERS]
    if not PROJECT_PATTERN.fullmatch(name):
        raise click.UsageError(f"no name can be made of {uri}: give one with --name")
    return name


@inbox.command("list")
@project_option
@json_option
def list_(project: str, as_json: bool) -> None:
    """List the inboxes of the project, with how many of their items are where."""
    with Client(project=project, start=False) as client:
        found = client.inboxes()
    if as_json:
        print_json(found)
        return
    headings = [
        "inbox",
        "state",
        "pipeline",
        "arriving",
        "waiting",
        "started",
        "done",
        "set aside",
        "folder",
        "problem",
    ]
    print_table(headings, [_row(each) for each in found], paragraphs=True)


def _row(found: orchestrator_pb2.Inbox) -> list[object]:
    items = found.items
    counts = [items.arriving, items.waiting, items.started, items.done, items.set_aside]
    return [found.name, _state(found), found.pipeline, *counts, found.uri, found.problem]


def _state(found: orchestrator_pb2.Inbox) -> str:
    return orchestrator_pb2.InboxState.Name(found.state).removeprefix("INBOX_STATE_").lower()


@inbox.command()
@click.argument("name")
@click.option("--limit", default=50, show_default=True, help="The newest so many items.")
@click.option("--state", type=click.Choice(list(_STATES)), help="Only items in this state.")
@project_option
@json_option
def show(name: str, limit: int, state: str | None, project: str, as_json: bool) -> None:
    """Show what came into the inbox NAME, the newest first: its runs, and why something was set aside."""
    with Client(project=project, start=False) as client:
        answer = client.inbox(name, limit, _STATES.get(state or "", orchestrator_pb2.INBOX_ITEM_STATE_UNSPECIFIED))
    if as_json:
        print_json(answer)
        return
    found = answer.inbox
    click.echo(f"{found.name}: {_state(found)}; {found.pipeline} for {found.uri}, {found.at_once} at once", err=True)
    if found.problem:
        click.echo(f"it does not go on just now: {found.problem}", err=True)
    rows = [
        [
            item.number,
            _WORDS[item.state],
            time_text(item.first_seen_at),
            size_text(item.size_bytes),
            item.uri.removeprefix(found.uri).lstrip("/"),
            item.run_id,
            item.cause,
        ]
        for item in answer.items
    ]
    print_table(["item", "state", "first seen", "size", "file", "run", "cause"], rows, paragraphs=True)


@inbox.command()
@click.argument("name")
@project_option
@json_option
def pause(name: str, project: str, as_json: bool) -> None:
    """Start nothing more from the inbox NAME: what arrives is noted, runs that go on end. Holds over restarts."""
    with Client(project=project, start=False) as client:
        found = client.pause_inbox(name)
    print_json(found) if as_json else click.echo(f"inbox {name} is {_state(found)}")


@inbox.command()
@click.argument("name")
@project_option
@json_option
def resume(name: str, project: str, as_json: bool) -> None:
    """Go on with the inbox NAME, which was paused."""
    with Client(project=project, start=False) as client:
        found = client.resume_inbox(name)
    print_json(found) if as_json else click.echo(f"inbox {name} is {_state(found)}")


@inbox.command()
@click.argument("name")
@project_option
@json_option
def remove(name: str, project: str, as_json: bool) -> None:
    """Watch the inbox NAME no more and forget what came in; its runs stay, and those that go on end."""
    with Client(project=project, start=False) as client:
        client.remove_inbox(name)
    print_json({"removed": name}) if as_json else click.echo(f"inbox {name} is removed")


@inbox.command()
@click.argument("name")
@click.argument("items", nargs=-1, type=int, metavar="[ITEM]...")
@project_option
@json_option
def retry(name: str, items: tuple[int, ...], project: str, as_json: bool) -> None:
    """Try the ITEMs of the inbox NAME once more that were set aside; all of them where none is given."""
    with Client(project=project, start=False) as client:
        answer = client.retry_inbox(name, items)
    print_json(answer) if as_json else click.echo(f"inbox {name} tries {answer.retried} items once more")


COMMANDS = (inbox,)
