"""What the commands print: tables for people, JSON for scripts, progress for both."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cryofleet.client import RunHandle, state_name
from cryofleet.v1 import orchestrator_pb2

_BETWEEN = 2
"""Columns of a terminal between those of a table."""
_LEAST_FOLDED = 20

STATE_STYLES = {
    "succeeded": "green",
    "partial": "yellow",
    "failed": "red",
    "cancelled": "magenta",
    "running": "cyan",
}


def print_json(value: Any) -> None:
    """One JSON document on standard output; messages by field names."""
    click.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return json_format.MessageToDict(value, preserving_proto_field_name=True)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def print_table(headings: Sequence[str], rows: Iterable[Sequence[Any]], paragraphs: bool = False) -> None:
    """A table on a terminal, tab-separated lines without headings when piped.

    With `paragraphs`, where a terminal is too narrow for it, each row is one, a line for each heading.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            click.echo("\t".join(row))
        return
    console = Console()
    widths = [max(map(cell_len, column)) for column in zip(headings, *cells, strict=True)]
    # The last column, of free text, may be folded.
    needed = sum(width + _BETWEEN for width in widths[:-1]) + min(widths[-1], _LEAST_FOLDED)
    if cells and needed > console.width and paragraphs:
        for number, row in enumerate(cells):
            record = Table(box=None, pad_edge=False, show_header=False)
            for heading, cell in zip(headings, row, strict=True):
                if cell:
                    record.add_row(Text(heading, "bold"), Text(cell, overflow="fold"))
            console.print(*([""] if number else []), record, sep="\n")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in cells:
        # Text, not str: names come from outside and may hold what looks like markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def size_text(size_bytes: float) -> str:
    """1536 as 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """75 as 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def step_seconds(step: orchestrator_pb2.StepStatus) -> float:
    """From a step's start to its end, or until now."""
    if not step.HasField("started_at"):
        return 0.0
    end = _time(step.finished_at) if step.HasField("finished_at") else datetime.now(UTC)
    return max(0.0, (end - _time(step.started_at)).total_seconds())


def run_seconds(run: orchestrator_pb2.Run) -> float:
    """From a run's start to its end, or until now."""
    if not run.HasField("started_at"):
        return 0.0
    end = _time(run.finished_at) if run.HasField("finished_at") else datetime.now(UTC)
    return max(0.0, (end - _time(run.started_at)).total_seconds())


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


def time_text(stamp: Timestamp) -> str:
    """Local date and time."""
    return _time(stamp).astimezone().strftime("%Y-%m-%d %H:%M:%S") if stamp.seconds else ""


def step_state(step: orchestrator_pb2.StepStatus) -> str:
    """waiting, running, succeeded, partial, failed, cancelled or skipped."""
    return orchestrator_pb2.StepState.Name(step.state).removeprefix("STEP_STATE_").lower()


def steps_table(run: orchestrator_pb2.Run) -> Table:
    """What each step of a run does and took."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("step", "operation", "state", "tasks", "time", ""):
        table.add_column(heading, justify="right" if heading in ("tasks", "time") else "left", no_wrap=True)
    for step in run.steps:
        state = step_state(step)
        tasks = f"{step.tasks_done}/{step.tasks_total}" if step.tasks_total else ""
        took = seconds_text(step_seconds(step)) if step.HasField("started_at") else ""
        if state == "running":
            note = f"{step.fraction:4.0%} {step.phase}"
        elif step.tasks_cached and step.tasks_cached == step.tasks_done:
            note = "from the store"
        elif step.tasks_set_aside:
            note = f"{step.tasks_set_aside} set aside"
        else:
            note = ""
        table.add_row(
            Text(step.id), Text(step.operation), Text(state, STATE_STYLES.get(state, "dim")), tasks, took, Text(note)
        )
    return table


def follow(handle: RunHandle) -> orchestrator_pb2.Run:
    """Show a run until it has ended: a live table on a terminal, a line for each change when piped."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Live(steps_table(handle.record), console=console, refresh_per_second=4) as live:
            for run in handle.watch():
                live.update(steps_table(run))
    else:
        seen: dict[str, str] = {}
        for run in handle.watch():
            for step in run.steps:
                state = step_state(step)
                if seen.get(step.id, "waiting") != state:
                    took = f" after {seconds_text(step_seconds(step))}" if step.HasField("finished_at") else ""
                    what = f"{step.id} ({step.operation})" if step.operation else step.id
                    click.echo(f"{what}: {state}{took}", err=True)
                    seen[step.id] = state
    return handle.record


_NEVER_WORKS = "INVALID_ARGUMENT"
"""Of an item that was set aside: trying it again will not do."""


def report_end(run: orchestrator_pb2.Run) -> None:
    """The last lines of a run on stderr: its state, its causes where it did not go well."""
    for item in run.set_aside:
        what = f"{item.step}[{item.item}]" if item.item else item.step
        if item.input_uri:
            what += f" ({item.input_uri.rpartition('/')[2]})"
        click.echo(f"set aside: {what}: {item.status}: {item.cause}", err=True)
    if run.error:
        click.echo(f"error: {run.error}", err=True)
    counts = "; ".join(set_aside_counts(run))
    click.echo(
        f"run {run.id}: {state_name(run)} after {seconds_text(run_seconds(run))}{counts and ': '}{counts}", err=True
    )
    if state_name(run) == "partial" and any(item.status != _NEVER_WORKS for item in run.set_aside):
        click.echo(f"to try what was set aside once more, and only that: cryofleet retry {run.id}", err=True)


def figure_lines(run: orchestrator_pb2.Run) -> list[str]:
    """A run's numbers and texts, a line each; not its artifacts."""
    return [line for line in output_lines(run) if "://" not in line]


def output_lines(run: orchestrator_pb2.Run) -> list[str]:
    """A run's outputs, a line each; of lists each item with the name of its file, where it is of one."""
    lines = []
    for name, value in sorted(json_format.MessageToDict(run.outputs).items()):
        items = value if isinstance(value, list) else [value]
        called = list(run.output_names[name].names) if name in run.output_names else []
        texts = ["-" if item is None else _figure_text(item) for item in items]
        if not set(texts) - {"", "-"}:
            continue
        if len(called) == len(texts) > 1:
            texts = [f"{file} {text}" for file, text in zip(called, texts, strict=True) if text]
        lines.append(f"{name}: {', '.join(texts)}")
    return lines


def _figure_text(value: Any) -> str:
    """JSON has one kind of number: 12.0 is 12."""
    if isinstance(value, float):
        return f"{value:.7g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def set_aside_counts(run: orchestrator_pb2.Run) -> list[str]:
    """Of the steps that have set something aside, as each: 97 of 100 done, 3 set aside; not of those inside them."""
    counts: dict[str, str] = {}
    for step in run.steps:
        if step.tasks_set_aside and not any(step.id.startswith(f"{outer}.") for outer in counts):
            counts[step.id] = f"{step.tasks_done} of {step.tasks_total} done, {step.tasks_set_aside} set aside"
    return [f"{step}: {count}" for step, count in counts.items()]


EXIT_BY_STATE = {"succeeded": 0, "partial": 3, "failed": 1, "cancelled": 1}


def exit_code(run: orchestrator_pb2.Run) -> int:
    """What a command that waited for the run ends with."""
    return EXIT_BY_STATE.get(state_name(run), 0)
