"""A run's outputs as a folder of files."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from cryofleet.client import Artifact, RunHandle, state_name
from cryofleet.errors import NotFound
from cryofleet.v1 import orchestrator_pb2

SOURCES = "sources"
"""The field of metrics.json that says which artifact each file is, by their names."""
RUN_DETAILS_MARK = "<!-- run-details -->"
"""Where a report's page leaves place for what its run took."""
METRICS = "metrics.json"


def save_outputs(handle: RunHandle, folder: Path) -> list[Path]:
    """Bring a run's outputs to `folder` and return the files written.

    Each artifact is named by its output and keeps its ending; a list's items are called by the files that they were
    made of, as particles_TS_01.star, or numbered from 1 where they are not of one file each.
    Figures and what each step took go into metrics.json; a report shows the latter too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_former(folder)
    written: list[Path] = []
    sources: dict[str, str] = {}
    figures: dict[str, Any] = {}
    names = handle.record.output_names
    for name, value in sorted(handle.outputs.items()):
        items = value if isinstance(value, list) else [value]
        if not any(isinstance(item, Artifact) for item in items):
            figures[name] = value
            continue
        called = dict(enumerate(names[name].names, start=1)) if name in names else {}
        for number, artifact in enumerate(items, start=1):
            if not isinstance(artifact, Artifact):
                continue  # an item that was set aside: the others keep their numbers
            suffix = f"_{called.get(number, number)}" if isinstance(value, list) else ""
            path = folder / f"{name}{suffix}{Path(artifact.name).suffix}"
            if path.name == METRICS:
                path = folder / f"output_{METRICS}"  # a pipeline of one's own may call an output so
            written.append(artifact.save(path))
            sources[path.name] = artifact.uri
    for path in written:
        if path.suffix == ".html":
            page = path.read_text()
            path.write_text(page.replace(RUN_DETAILS_MARK, run_details(handle.record), 1))
    metrics = folder / METRICS
    steps = [_step_figures(step) for step in handle.record.steps]
    set_aside = [f"{s.step} {s.item}: {s.status}: {s.cause}" for s in handle.record.set_aside]
    document = {
        "run": handle.id,
        "pipeline": handle.record.pipeline,
        "state": state_name(handle.record),
        **figures,
        "set_aside": set_aside,
        "steps": steps,
        "files": [path.name for path in written],
        SOURCES: sources,
    }
    metrics.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return [*written, metrics]


def artifacts_of(path: Path) -> dict[str, str]:
    """URIs of what a file or a folder is that `save_outputs` wrote, by the files' names.

    Raises NotFound where it wrote no such file.
    """
    folder = path if path.is_dir() else path.parent
    try:
        sources = dict(json.loads((folder / METRICS).read_text())[SOURCES])
    except (OSError, ValueError, KeyError, TypeError):
        raise NotFound(f"{folder} holds no results of a run that say what they are: there is no {METRICS}") from None
    if path.is_dir():
        return sources
    if path.name not in sources:
        raise NotFound(f"{path} is no result of the run whose results are in {folder}")
    return {path.name: sources[path.name]}


def _remove_former(folder: Path) -> None:
    """Remove the files that an earlier run brought to `folder`, so that none is taken for this one's."""
    metrics = folder / METRICS
    try:
        former = json.loads(metrics.read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in former:
        path = folder / Path(str(name)).name
        if path.is_file():
            path.unlink()
    metrics.unlink()


def _step_figures(step: orchestrator_pb2.StepStatus) -> dict[str, Any]:
    seconds = step.finished_at.ToNanoseconds() / 1e9 - step.started_at.ToNanoseconds() / 1e9
    return {
        "step": step.id,
        "operation": step.operation,
        "state": orchestrator_pb2.StepState.Name(step.state).removeprefix("STEP_STATE_").lower(),
        "tasks": step.tasks_total,
        "tasks_from_store": step.tasks_cached,
        "seconds": round(seconds, 3) if step.HasField("started_at") and step.HasField("finished_at") else None,
        "compute_seconds": round(step.compute_seconds, 3),
    }


def run_details(run: orchestrator_pb2.Run) -> str:
    """What each step of the run took, as an HTML section."""
    rows = []
    for figures in (_step_figures(step) for step in run.steps):
        took = "" if figures["seconds"] is None else f"{figures['seconds']:.1f}"
        cells = (
            figures["step"],
            figures["operation"],
            figures["state"],
            str(figures["tasks"]),
            str(figures["tasks_from_store"]),
            took,
            f"{figures['compute_seconds']:.1f}",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    headings = ("step", "operation", "state", "tasks", "from the store", "seconds", "seconds computed")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return (
        f"<section><h2>Run {html.escape(run.id)}</h2>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )
