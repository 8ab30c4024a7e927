"""up, down, status, doctor, logs: the platform on this machine."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from cryofleet import local
from cryofleet.cli.options import json_option
from cryofleet.cli.output import print_json, print_table
from cryofleet.client import Client
from cryofleet.errors import NotFound
from cryofleet.settings import Settings


@click.command()
@json_option
def up(as_json: bool) -> None:
    """Start the platform on this machine: all services and the orchestrator."""
    settings = Settings.from_environment()
    was_up = local.is_up(settings)
    local.start(settings)
    if as_json:
        print_json({"home": str(settings.home), "store": settings.store, "was_up": was_up})
    else:
        state = "is up already" if was_up else "is up"
        click.echo(f"the platform {state}: home {settings.home}, store {settings.store}")


@click.command()
def down() -> None:
    """Stop the platform on this machine; runs go on when it is started again."""
    stopped = local.stop(Settings.from_environment())
    click.echo("the platform is down" if stopped else "the platform was not up")


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show the services' instances with their slots, and what waits."""
    with Client(start=False) as client:
        pools = client.pools()
    if as_json:
        print_json(pools)
        return
    rows = []
    for pool in pools:
        queue = f"{pool.tasks_running} running, {pool.tasks_queued} queued"
        for instance in pool.instances:
            state = "ready" if instance.ready else instance.error or "not ready"
            slots = f"{instance.slots_free}/{instance.slots_total}"
            rows.append([pool.name, instance.instance, state, slots, " ".join(instance.devices), queue])
        if not pool.instances:
            rows.append([pool.name, "", "no instance", "", "", queue])
    print_table(["service", "instance", "state", "slots free", "devices", "tasks"], rows)
    if any(not instance.ready for pool in pools for instance in pool.instances):
        sys.exit(5)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check versions, devices, store, database and services: what is wrong and what to do."""
    from cryofleet.doctor import examine  # it loads much

    findings = examine(Settings.from_environment())
    if as_json:
        print_json([{"check": f.check, "ok": f.ok, "found": f.found, "advice": f.advice} for f in findings])
    else:
        for finding in findings:
            mark = click.style("ok  ", fg="green") if finding.ok else click.style("FAIL", fg="red")
            click.echo(f"{mark} {finding.check}: {finding.found}")
            if finding.advice:
                click.echo(f"     {finding.advice}")
    if not all(finding.ok for finding in findings):
        sys.exit(1)


@click.command()
@click.argument("run")
@click.option("--raw", is_flag=True, help="Print the log's own JSON lines.")
def logs(run: str, raw: bool) -> None:
    """Print what all processes of this machine logged about RUN, in order of time."""
    settings = Settings.from_environment()
    lines = sorted(_log_lines(settings, run), key=lambda entry: str(entry.get("time", "")))
    if not lines:
        raise NotFound(f"no log of {settings.log_folder} mentions run {run}")
    for entry in lines:
        if raw:
            click.echo(json.dumps(entry))
        else:
            where = " ".join(str(entry[key]) for key in ("service", "operation", "task_key") if entry.get(key))
            click.echo(f"{entry.get('time', '')} {entry.get('level', '')} {where}: {entry.get('message', '')}")
            if entry.get("traceback"):
                click.echo(str(entry["traceback"]).rstrip())


def _log_lines(settings: Settings, run: str) -> Iterator[dict[str, Any]]:
    for path in sorted(settings.log_folder.glob("*.log")):
        with path.open(errors="replace") as file:
            for line in file:
                if run in line and line.startswith("{"):
                    with contextlib.suppress(json.JSONDecodeError):
                        entry = json.loads(line)
                        if str(entry.get("run_id", "")).startswith(run):
                            yield entry


COMMANDS = (up, down, status, doctor, logs)
