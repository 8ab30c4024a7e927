"""up, down, status, pools, doctor, logs: the platform, its instances, its processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from cryofleet import local
from cryofleet.cli.options import json_option
from cryofleet.cli.output import print_json, print_table, time_text
from cryofleet.client import ENDED, Client
from cryofleet.errors import InvalidArgument, NotFound, Unavailable
from cryofleet.redaction import Redaction
from cryofleet.settings import Settings
from cryofleet.v1 import orchestrator_pb2, runtime_pb2

_FOLLOW_SECONDS = 2.0


@click.command()
@json_option
def up(as_json: bool) -> None:
    """Start the platform on this machine: all services and the orchestrator."""
    settings = Settings.from_environment()
    was_up = local.is_up(settings)
    local.start(settings)
    page = local.page_url(settings)
    if as_json:
        print_json({"home": str(settings.home), "store": settings.store, "was_up": was_up, "page": page})
    else:
        state = "is up already" if was_up else "is up"
        click.echo(f"the platform {state}: home {settings.home}, store {settings.store}")
        if page:
            click.echo(f"look at it in a browser: {page}")


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
        queue = _tasks_text(pool)
        for instance in pool.instances:
            slots = f"{instance.slots_free}/{instance.slots_total}"
            state = _instance_state(instance)
            rows.append([pool.name, instance.instance, state, slots, " ".join(instance.devices), queue])
        if not pool.instances:
            rows.append([pool.name, "", "no instance", "", "", queue])
    print_table(["service", "instance", "state", "slots free", "devices", "tasks"], rows)
    if any(not instance.ready for pool in pools for instance in pool.instances):
        sys.exit(5)


def _instance_state(instance: orchestrator_pb2.InstanceStatus) -> str:
    """What the instance does; of one that is set aside, why."""
    if not instance.ready:
        return instance.error or "not ready"
    if not instance.HasField("set_aside_until"):
        return "ready"
    causes = "; ".join(instance.set_aside_causes)
    if instance.set_aside_until.ToNanoseconds() <= time.time_ns():
        return f"on trial, a task at a time: {causes}"
    return f"set aside until {time_text(instance.set_aside_until)}: {causes}"


def _tasks_text(pool: orchestrator_pb2.PoolStatus) -> str:
    paused = ", paused" if pool.HasField("paused_at") else ""
    return f"{pool.tasks_running} running, {pool.tasks_queued} queued{paused}"


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def pools(context: click.Context, as_json: bool) -> None:
    """List the pools; pause one, and resume it."""
    if context.invoked_subcommand is not None:
        return
    with Client(start=False) as client:
        found = client.pools()
    if as_json:
        print_json(found)
        return
    rows = []
    for pool in found:
        ready = [instance for instance in pool.instances if instance.ready]
        aside = [instance for instance in ready if instance.HasField("set_aside_until")]
        instances = f"{len(ready)} of {len(pool.instances)} ready" + (f", {len(aside)} set aside" if aside else "")
        slots = f"{sum(instance.slots_free for instance in ready)}/{sum(instance.slots_total for instance in ready)}"
        rows.append([pool.name, _pool_state(pool), instances, slots, pool.tasks_running, pool.tasks_queued])
    print_table(["pool", "state", "instances", "slots free", "running", "queued"], rows)
    for pool in found:
        for instance in pool.instances:
            if instance.ready and instance.HasField("set_aside_until"):
                click.echo(
                    f"{pool.name}: {instance.instance} ({instance.address}): {_instance_state(instance)}", err=True
                )


def _pool_state(pool: orchestrator_pb2.PoolStatus) -> str:
    if not pool.HasField("paused_at"):
        return "open"
    because = f": {pool.paused_because}" if pool.paused_because else ""
    return f"paused since {time_text(pool.paused_at)} by {pool.paused_by}{because}"


@pools.command()
@click.argument("pool")
@click.option("--because", default="", help="Why, for others to read.")
@json_option
def pause(pool: str, because: str, as_json: bool) -> None:
    """Begin nothing more in POOL: what waits for it waits on, what runs there ends. Holds over restarts."""
    with Client(start=False) as client:
        status = client.pause_pool(pool, because)
    print_json(status) if as_json else click.echo(f"pool {pool} is {_pool_state(status)}")


@pools.command()
@click.argument("pool")
@json_option
def resume(pool: str, as_json: bool) -> None:
    """Begin again in POOL, which was paused."""
    with Client(start=False) as client:
        status = client.resume_pool(pool)
    print_json(status) if as_json else click.echo(f"pool {pool} is {_pool_state(status)}")


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
@click.option("--raw", is_flag=True, help="Print the lines as JSON.")
@click.option("--files", is_flag=True, help="Read the log files of this machine alone.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until the run has ended.")
def logs(run: str, raw: bool, files: bool, follow: bool) -> None:
    """Print what the platform's processes logged about RUN, in order of time.

    The orchestrator and the instances tell what they have in memory; to it comes what stands in log files of this
    machine, which alone are read where no orchestrator answers.
    """
    if files and follow:
        raise InvalidArgument("--files reads what is there, and --follow what comes: give one of them")
    settings = Settings.from_environment()
    with Client(settings, start=False) as client:
        found = None if files else _told_by_platform(client, run)
        entries = [_entry(line) for line in found.lines] if found is not None else []
        written = list(_log_lines(settings, run, whole_id=found is not None))
        # What a file has is whole, with its traceback.
        known = {_identity(entry) for entry in written}
        entries = written + [entry for entry in entries if _identity(entry) not in known]
        known.update(map(_identity, entries))
        _print_entries(entries, raw)
        if found is None:
            if not entries:
                raise NotFound(f"no log of {settings.log_folder} mentions run {run}")
            return
        _print_gaps(found)
        ended = not follow
        while not ended:
            # Before its lines are read: what is logged until it ends is among them.
            ended = client.get(run).record.state in ENDED
            if not ended:
                time.sleep(_FOLLOW_SECONDS)
            fresh = [entry for entry in map(_entry, client.log(run).lines) if _identity(entry) not in known]
            known.update(map(_identity, fresh))
            _print_entries(fresh, raw)


def _told_by_platform(client: Client, run: str) -> orchestrator_pb2.ReadLogResponse | None:
    """None where no orchestrator answers, or this one does not know the run."""
    try:
        return client.log(run)
    except (Unavailable, NotFound) as failure:
        click.echo(f"only log files of this machine are read: {failure}", err=True)
        return None


def _entry(line: runtime_pb2.LogLine) -> dict[str, Any]:
    """The line as a log file has it."""
    seconds = f"{line.time.ToDatetime():%Y-%m-%dT%H:%M:%S}.{line.time.nanos // 1_000_000:03d}Z"
    names = ("level", "service", "instance", "operation", "task_key", "message")
    fields = {name: value for name in names if (value := getattr(line, name))}
    return {"time": seconds, **line.fields, **fields}


def _identity(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """By which a line is known to be the same one in a file, where it may be longer."""
    return (*(str(entry.get(name, "")) for name in ("time", "instance", "task_key")), str(entry.get("message"))[:100])


def _print_entries(entries: Iterable[Mapping[str, Any]], raw: bool) -> None:
    for entry in sorted(entries, key=lambda entry: str(entry.get("time", ""))):
        if raw:
            click.echo(json.dumps(entry))
        else:
            where = " ".join(str(entry[key]) for key in ("service", "operation", "task_key") if entry.get(key))
            error = f" (error_id {entry['error_id']})" if entry.get("error_id") else ""
            click.echo(f"{entry.get('time', '')} {entry.get('level', '')} {where}: {entry.get('message', '')}{error}")
            if entry.get("traceback"):
                click.echo(str(entry["traceback"]).rstrip())


def _print_gaps(found: orchestrator_pb2.ReadLogResponse) -> None:
    if found.cut:
        click.echo("there were older lines, which are not in memory any more", err=True)
    for each in found.unread:
        click.echo(f"{each.pool}: {each.instance or each.address} did not say what it logged: {each.cause}", err=True)


def _log_lines(settings: Settings, run: str, whole_id: bool) -> Iterator[dict[str, Any]]:
    """Of this machine's files; those of all runs whose ids begin so, unless the id is whole."""
    redaction = Redaction(os.environ)
    for path in sorted(settings.log_folder.glob("*.log")):
        with path.open(errors="replace") as file:
            for line in file:
                if run in line and line.startswith("{"):
                    with contextlib.suppress(json.JSONDecodeError):
                        entry = json.loads(line)
                        of = str(entry.get("run_id", ""))
                        if of == run or (not whole_id and of.startswith(run)):
                            yield {
                                name: redaction.hide(value) if isinstance(value, str) else value
                                for name, value in entry.items()
                            }


COMMANDS = (up, down, status, pools, doctor, logs)
