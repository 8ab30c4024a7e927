"""run, runs, show, watch, cancel, resume, retry, forget, pipelines: runs of pipelines."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
from google.protobuf.message import Message
from rich.console import Console

from cryofleet.cli.options import json_option, key_values, project_option
from cryofleet.cli.output import (
    exit_code,
    figure_lines,
    follow,
    output_lines,
    print_json,
    print_table,
    report_end,
    run_seconds,
    seconds_text,
    size_text,
    steps_table,
    time_text,
)
from cryofleet.client import Client, RunHandle, state_name
from cryofleet.errors import Failure
from cryofleet.results import save_outputs
from cryofleet.v1 import orchestrator_pb2

_PARTIAL = 3
_VOLUME_ENDING = re.compile(r"\.(mrc|rec|map|st|tiff?)(\.gz)?$", re.IGNORECASE)


@click.command()
@click.argument("pipeline")
@click.option("--tomogram", "tomograms", multiple=True, help="A tomogram: file or URI; may be given again.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="An input or a parameter, as text or JSON.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to bring the outputs to.")
@click.option("--detach", is_flag=True, help="Start the run and print its id without waiting.")
@click.option("--estimate", is_flag=True, help="Only check, and say what the run would take.")
@project_option
@json_option
def run(
    pipeline: str,
    tomograms: tuple[str, ...],
    settings: tuple[str, ...],
    out: Path | None,
    detach: bool,
    estimate: bool,
    project: str,
    as_json: bool,
) -> None:
    """Run PIPELINE, a shipped one by name or a YAML file, and wait for its end.

    The platform on this machine is started where it is not up.
    """
    arguments = key_values(settings)
    with Client(project=project) as client:
        each = [{**arguments, "tomogram": tomogram} for tomogram in tomograms] or [arguments]
        if tomograms and "tomograms" in client.input_names(pipeline):
            each = [{**arguments, "tomograms": list(tomograms)}]
        if estimate:
            for wanted in each:
                _print_estimate(client.estimate(pipeline, **wanted), as_json)
            return
        handles: list[RunHandle] = []
        try:
            for wanted in each:
                handles += [client.run(pipeline, **wanted)]
        except Failure:
            for handle in handles:
                click.echo(f"run {handle.id} was started and goes on", err=True)
            raise
        if detach:
            if as_json:
                print_json([handle.record for handle in handles])
            else:
                click.echo("\n".join(handle.id for handle in handles))
            return
        folders = _folders(out, handles, tomograms)
        codes = [_finish(handle, folder, as_json) for handle, folder in zip(handles, folders, strict=True)]
    sys.exit(next((code for code in codes if code not in (0, _PARTIAL)), max(codes)))


def _folders(out: Path | None, handles: list[RunHandle], tomograms: tuple[str, ...]) -> list[Path | None]:
    """Where the outputs of each run go: to `out` itself, or to a folder in it for each of several tomograms."""
    if out is None or len(handles) == 1:
        return [out] * len(handles)
    names = [_VOLUME_ENDING.sub("", Path(tomogram).name) for tomogram in tomograms]
    return [
        out / (name if names.count(name) == 1 else f"{name}-{handle.id}")
        for name, handle in zip(names, handles, strict=True)
    ]


def _finish(handle: RunHandle, out: Path | None, as_json: bool) -> int:
    """Wait for a run, bring its outputs home, say how it ended."""
    try:
        record = follow(handle)
    except KeyboardInterrupt:
        click.echo(f"run {handle.id} goes on; stop it with: cryofleet cancel {handle.id}", err=True)
        raise
    if out is not None and state_name(record) in ("succeeded", "partial"):
        for path in save_outputs(handle, out):
            click.echo(f"wrote {path}", err=True)
    report_end(record)
    if as_json:
        print_json(record)
    else:
        for line in figure_lines(record):
            click.echo(line)
    return exit_code(record)


def _print_estimate(estimate: orchestrator_pb2.EstimateRunResponse, as_json: bool) -> None:
    if as_json:
        print_json(estimate)
        return
    rows = [
        [
            step.id,
            step.operation,
            _tasks_text(step),
            str(step.tasks_cached) if step.known else "",
            size_text(step.input_bytes) if step.known else "",
            size_text(step.memory_bytes) if step.memory_bytes else "",
        ]
        for step in estimate.steps
    ]
    print_table(["step", "operation", "tasks", "in store", "input", "memory a task"], rows)


def _tasks_text(step: orchestrator_pb2.StepEstimate) -> str:
    if step.known:
        return str(step.tasks)
    return f"about {step.tasks}, by earlier steps" if step.tasks else "depends on earlier steps"


@click.command()
@project_option
@click.option("--limit", default=50, show_default=True, help="The newest so many.")
@json_option
def runs(project: str, limit: int, as_json: bool) -> None:
    """List runs, newest first."""
    with Client(project=project, start=False) as client:
        found = client.runs(limit)
    if as_json:
        print_json(found)
        return
    rows = [
        [
            r.id,
            r.pipeline,
            state_name(r),
            r.attempt,
            r.owner,
            time_text(r.created_at),
            seconds_text(run_seconds(r)),
            r.error,
        ]
        for r in found
    ]
    print_table(["run", "pipeline", "state", "attempt", "owner", "created", "took", "error"], rows)


@click.command()
@click.argument("run_id", metavar="RUN")
@json_option
def show(run_id: str, as_json: bool) -> None:
    """Show what each step of RUN took, its outputs, and what was set aside."""
    with Client(start=False) as client:
        record = client.get(run_id).record
    if as_json:
        print_json(record)
        return
    console = Console()
    console.print(steps_table(record))
    for line in output_lines(record):
        click.echo(line)
    report_end(record)


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to bring the outputs to.")
@json_option
def watch(run_id: str, out: Path | None, as_json: bool) -> None:
    """Follow RUN until it has ended."""
    with Client(start=False) as client:
        code = _finish(client.get(run_id), out, as_json)
    sys.exit(code)


@click.command()
@click.argument("run_id", metavar="RUN")
@json_option
def cancel(run_id: str, as_json: bool) -> None:
    """Stop RUN; what it has finished stays in the store."""
    with Client(start=False) as client:
        record = client.get(run_id).cancel().record
    print_json(record) if as_json else report_end(record)


def _again(run_id: str, method: str, out: Path | None, detach: bool, as_json: bool) -> None:
    with Client() as client:
        handle: RunHandle = getattr(client.get(run_id), method)()
        if detach:
            print_json(handle.record) if as_json else click.echo(handle.id)
            return
        code = _finish(handle, out, as_json)
    sys.exit(code)


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to bring the outputs to.")
@click.option("--detach", is_flag=True, help="Don't wait for the end.")
@json_option
def resume(run_id: str, out: Path | None, detach: bool, as_json: bool) -> None:
    """Go on with RUN where it failed, was cancelled or was cut off."""
    _again(run_id, "resume", out, detach, as_json)


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder to bring the outputs to.")
@click.option("--detach", is_flag=True, help="Don't wait for the end.")
@json_option
def retry(run_id: str, out: Path | None, detach: bool, as_json: bool) -> None:
    """Try the items of RUN that were set aside once more, and only these."""
    _again(run_id, "retry", out, detach, as_json)


@click.command()
@click.argument("run_id", metavar="RUN")
@json_option
def forget(run_id: str, as_json: bool) -> None:
    """Delete the record of RUN, which has ended; gc then finds what only RUN needed."""
    with Client(start=False) as client:
        # By its id alone: also a run that cannot be shown any more can be forgotten.
        client.forget(run_id)
    print_json({"forgotten": run_id}) if as_json else click.echo(f"run {run_id} is forgotten")


@click.command()
@click.argument("name", required=False)
@json_option
def pipelines(name: str | None, as_json: bool) -> None:
    """List pipelines; with NAME, the inputs and parameters of one."""
    with Client() as client:
        found = [p for p in client.pipelines() if name in (None, p.name)]
    if name is not None and not found:
        raise click.BadParameter(f"there is no pipeline {name!r}")
    if as_json:
        print_json(found)
    elif name is None:
        print_table(["pipeline", "what it does"], [[p.name, p.help] for p in found])
    else:
        click.echo(f"{found[0].name}: {found[0].help}\n")
        rows = []
        for parameter in found[0].parameters:
            default = "required" if parameter.required else _default_text(parameter)
            kind = f"list of {parameter.type}s" if parameter.repeated else parameter.type
            if parameter.choices:
                kind = " | ".join(_value_text(choice) for choice in parameter.choices)
            rows.append([parameter.name, kind, default, parameter.unit, parameter.help])
        print_table(["name", "type", "default", "unit", "what it is"], rows)
        click.echo("\nsteps:\n  " + "\n  ".join(found[0].steps))
        click.echo("outputs: " + ", ".join(found[0].outputs))


def _default_text(parameter: orchestrator_pb2.PipelineParameter) -> str:
    return _value_text(parameter.default_value) if parameter.HasField("default_value") else ""


def _value_text(value: Message) -> str:
    """As `--set` takes it: text bare, all else as JSON."""
    from google.protobuf import json_format

    plain = _whole_numbers(json_format.MessageToDict(value))
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _whole_numbers(value: Any) -> Any:
    """JSON has one kind of number, and Python would show 256 as 256.0."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


COMMANDS = (run, runs, show, watch, cancel, resume, retry, forget, pipelines)
