"""top: what the platform does, live."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import click
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cryofleet.cli.options import json_option
from cryofleet.cli.output import (
    STATE_STYLES,
    print_json,
    run_seconds,
    seconds_text,
    size_text,
    step_state,
)
from cryofleet.client import Client, state_name
from cryofleet.errors import Failure, NotFound
from cryofleet.v1 import orchestrator_pb2

_LOOKED_THROUGH = 200
"""The newest so many runs are looked through for those that go on."""
_SHOWN = 20
"""So many of these are shown with their steps."""
_RATE_SECONDS = 60.0


@dataclass(frozen=True)
class PoolLine:
    """A pool; slots and memory are those of its ready instances."""

    pool: str
    paused: bool
    instances_ready: int
    instances: int
    instances_set_aside: int
    slots_busy: int
    slots: int
    waiting: int
    memory_granted_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class RunLine:
    """A run that goes on."""

    run: str
    pipeline: str
    project: str
    owner: str
    state: str
    seconds: float
    fraction: float
    tasks_done: int
    tasks: int
    tasks_set_aside: int
    tasks_per_minute: float
    doing: str
    """The steps that run, with their phases."""


@dataclass(frozen=True)
class OperationLine:
    """An operation that an instance works on."""

    operation: str
    pool: str
    instance: str
    run: str
    seconds: float
    fraction: float
    phase: str


@dataclass(frozen=True)
class Picture:
    """The platform at one moment."""

    pools: list[PoolLine] = field(default_factory=list)
    runs: list[RunLine] = field(default_factory=list)
    operations: list[OperationLine] = field(default_factory=list)


class Rates:
    """How fast runs compute tasks: over the last minute, or since a run's start where it was not watched before."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def per_minute(self, run: str, computed: int, seconds: float, now: float) -> float:
        """`computed` tasks in the `seconds` since the run's start."""
        seen = self._seen.setdefault(run, deque())
        if seen and computed < seen[-1][1]:
            seen.clear()  # another attempt
        seen.append((now, computed))
        while len(seen) > 1 and now - seen[1][0] >= _RATE_SECONDS:
            seen.popleft()
        since, before = seen[0]
        # A difference over a moment would jump about.
        took, done = (now - since, computed - before) if now - since >= _RATE_SECONDS / 4 else (seconds, computed)
        return 60.0 * done / took if took > 0 else 0.0

    def keep(self, runs: set[str]) -> None:
        """Forgets all other runs."""
        self._seen = {run: seen for run, seen in self._seen.items() if run in runs}


def take_picture(client: Client, rates: Rates) -> Picture:
    """Asks the orchestrator. Raises the failures that it answers with."""
    pools = client.pools()
    newest = client.orchestrate("ListRuns", orchestrator_pb2.ListRunsRequest(limit=_LOOKED_THROUGH)).runs
    active = [run for run in newest if state_name(run) in ("queued", "running")]
    for number, run in enumerate(active[:_SHOWN]):
        try:
            active[number] = client.get(run.id).record
        except NotFound:
            continue  # forgotten in this moment
    now = time.monotonic()
    picture = Picture(
        pools=[_pool_line(pool) for pool in pools],
        runs=[_run_line(run, rates, now) for run in active if state_name(run) in ("queued", "running")],
        operations=[line for pool in pools for line in _operation_lines(pool)],
    )
    rates.keep({run.id for run in active})
    return picture


def _pool_line(pool: orchestrator_pb2.PoolStatus) -> PoolLine:
    ready = [instance for instance in pool.instances if instance.ready]
    return PoolLine(
        pool=pool.name,
        paused=pool.HasField("paused_at"),
        instances_ready=len(ready),
        instances=len(pool.instances),
        instances_set_aside=sum(instance.HasField("set_aside_until") for instance in ready),
        slots_busy=sum(instance.slots_total - instance.slots_free for instance in ready),
        slots=sum(instance.slots_total for instance in ready),
        waiting=pool.tasks_queued,
        memory_granted_bytes=sum(each.memory_total_bytes - each.memory_free_bytes for each in ready),
        memory_bytes=sum(instance.memory_total_bytes for instance in ready),
    )


def _run_line(run: orchestrator_pb2.Run, rates: Rates, now: float) -> RunLine:
    tasks = [step for step in run.steps if step.operation]
    computed = sum(step.tasks_done - step.tasks_cached for step in tasks)
    # A step that holds others counts by its own fraction; those inside are in it.
    outer = [1.0 if _has_ended(step) else step.fraction for step in run.steps if "." not in step.id]
    doing = [f"{step.id}: {step.phase}" if step.phase else step.id for step in tasks if step_state(step) == "running"]
    seconds = run_seconds(run)
    return RunLine(
        run=run.id,
        pipeline=run.pipeline,
        project=run.project,
        owner=run.owner,
        state=state_name(run),
        seconds=seconds,
        fraction=sum(outer) / len(outer) if outer else 0.0,
        tasks_done=sum(step.tasks_done for step in tasks),
        tasks=sum(step.tasks_total for step in tasks),
        tasks_set_aside=sum(step.tasks_set_aside for step in tasks),
        tasks_per_minute=rates.per_minute(run.id, computed, seconds, now),
        doing="; ".join(doing),
    )


def _has_ended(step: orchestrator_pb2.StepStatus) -> bool:
    return step_state(step) not in ("waiting", "running")


def _operation_lines(pool: orchestrator_pb2.PoolStatus) -> list[OperationLine]:
    return [
        OperationLine(
            operation=each.operation,
            pool=pool.name,
            instance=instance.instance or instance.address,
            run=each.run_id,
            seconds=_seconds_since(each.started_at),
            fraction=each.fraction,
            phase=each.phase,
        )
        for instance in pool.instances
        for each in instance.running
    ]


def _seconds_since(stamp: Timestamp) -> float:
    return max(0.0, time.time() - stamp.ToNanoseconds() / 1e9)


_POOLS = ("pool", "instances", "slots", "waiting", "memory granted", "")
_RUNS = ("run", "pipeline", "owner", "state", "time", "done", "tasks", "a minute", "doing")
_OPERATIONS = ("operation", "instance", "time", "done", "run", "phase")
_RIGHT = ("instances", "slots", "waiting", "memory granted", "time", "done", "tasks", "a minute")


def _pool_cells(line: PoolLine) -> list[str]:
    notes = ["paused"] if line.paused else []
    notes += [f"{line.instances_set_aside} set aside"] if line.instances_set_aside else []
    return [
        line.pool,
        f"{line.instances_ready}/{line.instances}",
        f"{line.slots_busy}/{line.slots}",
        str(line.waiting),
        f"{size_text(line.memory_granted_bytes)} of {size_text(line.memory_bytes)}",
        ", ".join(notes),
    ]


def _run_cells(line: RunLine) -> list[str]:
    aside = f", {line.tasks_set_aside} set aside" if line.tasks_set_aside else ""
    return [
        line.run,
        line.pipeline,
        line.owner,
        line.state,
        seconds_text(line.seconds),
        f"{line.fraction:.0%}",
        f"{line.tasks_done}/{line.tasks}{aside}",
        f"{line.tasks_per_minute:.1f}",
        line.doing,
    ]


def _operation_cells(line: OperationLine) -> list[str]:
    return [line.operation, line.instance, seconds_text(line.seconds), f"{line.fraction:.0%}", line.run, line.phase]


def _table(headings: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for heading in headings:
        side = "right" if heading in _RIGHT else "left"
        table.add_column(heading, justify=side, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for row in rows:
        # Text, not str: names come from outside and may hold what looks like markup.
        table.add_row(*(Text(cell, STATE_STYLES.get(cell, "")) for cell in row))
    return table


def _tables(picture: Picture, note: str = "") -> Group:
    operations = sorted(picture.operations, key=lambda line: -line.seconds)
    parts: list[Any] = [_table(_POOLS, [_pool_cells(line) for line in picture.pools]), Text()]
    if picture.runs:
        parts += [_table(_RUNS, [_run_cells(line) for line in picture.runs]), Text()]
    else:
        parts += [Text("no run goes on", "dim"), Text()]
    if operations:
        parts.append(_table(_OPERATIONS, [_operation_cells(line) for line in operations]))
    if note:
        parts += [Text(), Text(note, "yellow")]
    return Group(*parts)


def _print_lines(picture: Picture) -> None:
    """A line for each pool, run and operation, for scripts."""
    for kind, cells in (
        *(("pool", _pool_cells(line)) for line in picture.pools),
        *(("run", _run_cells(line)) for line in picture.runs),
        *(("operation", _operation_cells(line)) for line in picture.operations),
    ):
        click.echo("\t".join([kind, *cells]))


def _show(client: Client, interval: float) -> None:
    """On a screen of its own, which goes away again, until the user or a signal ends it."""
    rates = Rates()
    picture = take_picture(client, rates)
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    live = Live(_tables(picture), console=Console(), screen=True, auto_refresh=False)
    try:
        # No `with`: what interrupts it while it begins must end it, too.
        live.start(refresh=True)
        while True:
            time.sleep(interval)
            note = ""
            try:
                picture = take_picture(client, rates)
            except Failure as failure:
                if failure.status != "UNAVAILABLE":
                    raise
                note = f"as it was before: {failure.message}"
            live.update(_tables(picture, note), refresh=True)
    except KeyboardInterrupt:
        return
    finally:
        live.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    # As an exception, so that the terminal is put right on the way out.
    sys.exit(128 + number)


@click.command()
@click.option("--once", is_flag=True, help="Print it once and end; so it is also where the output is no terminal.")
@click.option(
    "--interval", default=2.0, show_default=True, type=click.FloatRange(0.5, 3600), help="Seconds between two looks."
)
@json_option
def top(once: bool, interval: float, as_json: bool) -> None:
    """Show pools, runs that go on and what runs where, live; Ctrl-C ends it."""
    with Client(start=False) as client:
        if not once and not as_json and sys.stdout.isatty():
            _show(client, interval)
            return
        picture = take_picture(client, Rates())
        if as_json:
            print_json(asdict(picture))
        elif sys.stdout.isatty():
            Console().print(_tables(picture))
        else:
            _print_lines(picture)


COMMANDS = (top,)
