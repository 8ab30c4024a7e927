"""The runs view: what runs and ran, each run's steps, and a form to start another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import panel as pn
import param
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from cryofleet.client import ENDED, Client, RunHandle, state_name
from cryofleet.errors import Failure
from cryofleet.v1 import orchestrator_pb2
from cryofleet.views.buttons import button, button_row
from cryofleet.views.parameters import PipelineForm
from cryofleet.views.run_log import logged_lines, pool_row, run_log, running_lines, step_state
from cryofleet.views.slices import off_the_loop
from cryofleet.views.text import text

REFRESH_MS = 1500
PATIENCE_SECONDS = 3.0
"""A platform that answers later than this is said to be away."""
FIRST = "discover"
"""The pipeline that the form shows first."""
LOG_LINES = 500
"""The newest so many lines of the processes' logs are shown."""
_LOG_TAB = 1
FILES = "A file of your own gets its URI by: cryofleet put FILE"
_STATE_COLOURS = {
    "succeeded": "var(--success-text-color)", "partial": "var(--warning-text-color)",
    "failed": "var(--danger-text-color)", "running": "var(--primary-text-color)",
}  # fmt: skip
_RUN_COLUMNS = ["run", "pipeline", "state", "started", "took", "owner"]
_STEP_COLUMNS = ["step", "operation", "state", "done", "phase", "computed"]
_POOL_COLUMNS = ["pool", "state", "instances", "slots free", "memory free", "running", "queued"]
_WIDE = {"sizing_mode": "stretch_width"}
_TABLE = {
    "show_index": False,
    "disabled": True,
    "selectable": 1,
    "sizing_mode": "stretch_width",
    "layout": "fit_data_stretch",
    "sortable": False,
    "theme": "simple",
    "stylesheets": [Path(__file__).with_name("table.css").read_text()],
    # As text: names are shown, whatever they hold.
    "formatters": {name: {"type": "plaintext"} for name in {*_RUN_COLUMNS, *_STEP_COLUMNS, *_POOL_COLUMNS}},
}


def seconds_text(seconds: float) -> str:
    """As 42 s, 3:07 or 2:05:09."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def state_style(state: str) -> str:
    """What distinguishes a state in a table, as CSS, in light and in dark."""
    return f"color: {_STATE_COLOURS[state]}" if state in _STATE_COLOURS else ""


def run_row(run: orchestrator_pb2.Run) -> dict[str, str]:
    """A run as a line of the list."""
    took = ""
    if run.HasField("started_at"):
        end = run.finished_at if run.HasField("finished_at") else _now()
        took = seconds_text(max(0.0, end.ToNanoseconds() - run.started_at.ToNanoseconds()) / 1e9)
    started = run.started_at.ToDatetime().strftime("%Y-%m-%d %H:%M:%S") if run.HasField("started_at") else ""
    return {
        "run": run.id, "pipeline": run.pipeline, "state": state_name(run), "started": started, "took": took,
        "owner": run.owner,
    }  # fmt: skip


def step_row(step: orchestrator_pb2.StepStatus) -> dict[str, str]:
    """A step as a line of its run's table."""
    done = f"{step.tasks_done} of {step.tasks_total}" if step.tasks_total > 1 else f"{step.fraction:.0%}"
    if step.tasks_cached:
        done += f", {step.tasks_cached} known"
    if step.tasks_set_aside:
        done += f", {step.tasks_set_aside} set aside"
    computed = seconds_text(step.compute_seconds) if step.compute_seconds else ""
    return {
        "step": step.id, "operation": step.operation, "state": step_state(step), "done": done, "phase": step.phase,
        "computed": computed,
    }  # fmt: skip


def artifacts(run: orchestrator_pb2.Run) -> Iterator[tuple[str, str]]:
    """Name and URI of all that a run took and made, outputs first, each URI once."""
    seen = set()
    sources = [("", run.outputs), *((f"{step.id}: ", step.outputs) for step in run.steps), ("", run.arguments)]
    for prefix, values in sources:
        for name, value in json_format.MessageToDict(values).items():
            uris = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
            for number, uri in enumerate(uris):
                if "://" in uri and uri not in seen:
                    seen.add(uri)
                    yield prefix + name.removesuffix("_uri") + (f" {number + 1}" if len(uris) > 1 else ""), uri


class RunsView(pn.viewable.Viewer):
    """Lists runs, follows the one that is chosen, and starts others."""

    run_id = param.String("", doc="The run that is looked at.")
    problem = param.String("", doc="Why the platform did not answer last.")

    def __init__(self, client: Client, **params: Any) -> None:
        super().__init__(**params)
        self._client = client
        self.on_look: Callable[[str, str, str], None] | None = None
        """Is told of a run, a volume and a table of particles that somebody wants to look at."""
        self.on_failure: Callable[[Failure], None] | None = None
        self.record = orchestrator_pb2.Run()
        self._form: PipelineForm | None = None
        self._pipelines: dict[str, orchestrator_pb2.PipelineDescription] = {}
        self._list = pn.widgets.Tabulator(_frame([], _RUN_COLUMNS), height=230, **_TABLE)
        self._steps, self._pools = (
            pn.widgets.Tabulator(_frame([], columns), **{**_TABLE, "sizing_mode": "stretch_both"}, min_height=200)
            for columns in (_STEP_COLUMNS, _POOL_COLUMNS)
        )
        for style in (self._list.style, self._steps.style):
            assert style is not None
            style.map(state_style, subset=["state"])
        self._log, self._logged = text(font_size="12px"), text(font_size="12px")
        self._log_is_whole = False
        """Whether all is shown that will ever be logged."""
        log = pn.Column(self._log, self._logged, sizing_mode="stretch_both", min_height=200, scroll="y")
        self._details = pn.Tabs(
            ("Steps", self._steps), ("Log", log), ("Pools", self._pools), sizing_mode="stretch_both", min_height=240
        )
        self._details.param.watch(self._turned_to, "active")
        self._list.on_click(self._clicked)  # type: ignore[arg-type]  # Panel awaits it
        self._title, self._why, self._start_said = text(font_weight="bold"), text(), text()
        self._progress = pn.indicators.Progress(value=0, max=100, sizing_mode="stretch_width", height=8)
        self._cancel, self._resume, self._retry = (
            self._button(name, action)
            for name, action in (("Cancel", "cancel"), ("Resume", "resume"), ("Retry", "retry"))
        )
        self._volumes = pn.widgets.Select(label="Volume", options={}, sizing_mode="stretch_width")
        self._tables = pn.widgets.Select(label="Particles", options={"none": ""}, sizing_mode="stretch_width")
        self._look = button("Look at it", self._looked, "primary", margin=(24, 10, 5, 10))
        self._nothing = text("Choose a run above to see its steps, log and results, or start one at the left.")
        self._which = pn.widgets.Select(label="Pipeline", options=[], sizing_mode="stretch_width")
        self._which.param.watch(lambda _: self._fill_form(), "value")
        self._form_place = pn.Column(sizing_mode="stretch_width")
        self._start = button("Start", self._started, "success")
        look = pn.Row(self._volumes, self._tables, self._look, **_WIDE)
        actions = button_row(self._cancel, self._resume, self._retry)
        actions.justify_content = "flex-end"
        head = pn.Row(self._title, actions, **_WIDE)
        self._run = pn.Column(
            head,
            self._progress,
            self._why,
            look,
            self._details,
            sizing_mode="stretch_both",
            visible=False,
        )
        self._layout = pn.Column(self._list, self._nothing, self._run, sizing_mode="stretch_both", scroll="y")

    def _button(self, name: str, action: str) -> Any:
        async def act(_: Any) -> None:
            await self._act(action)

        return button(name, act, disabled=True)

    def __panel__(self) -> pn.viewable.Viewable:
        return self._layout

    def form(self) -> pn.Column:
        """What starts a run, to stand beside the list."""
        return pn.Column(
            text("Start a run", font_weight="bold"),
            self._which, self._form_place, text(FILES, font_size="12px"), button_row(self._start), self._start_said,
            sizing_mode="stretch_width",
        )  # fmt: skip

    async def refresh(self) -> None:
        """Ask for what has changed. What the platform answers instead is in `problem`, and that it does not answer."""
        asking = asyncio.ensure_future(self._refresh())
        done, _ = await asyncio.wait({asking}, timeout=PATIENCE_SECONDS)
        if not done:
            # One that hangs, or is just being started again, refuses nothing.
            self.problem = "the platform does not answer; waiting for it …"
        await asking
        await self._read_log()

    async def _turned_to(self, _: Any) -> None:
        await self._read_log()

    async def _read_log(self) -> None:
        """What the processes logged, while somebody looks at it; of a run that has ended until nothing more comes."""
        run = self.record
        if self._details.active != _LOG_TAB or not run.id or self._log_is_whole:
            return
        try:
            log = await off_the_loop(self._client.log, run.id, LOG_LINES)
        except Failure as failure:
            self._logged.object = f"what was logged cannot be read: {failure}"
            return
        if run.id != self.record.id:
            return  # another one was chosen meanwhile
        lines = "\n".join(["", *logged_lines(log)])
        self._log_is_whole = run.state in ENDED and not log.unread and lines == self._logged.object
        self._logged.object = lines

    async def _refresh(self) -> None:
        try:
            if not self._pipelines:
                await self._open_pipelines()
            runs = await off_the_loop(self._client.runs, 100)
            pools = await off_the_loop(self._client.pools)
            _put(self._pools, _frame([pool_row(pool) for pool in pools], _POOL_COLUMNS))
            if self.run_id:
                handle = await off_the_loop(self._client.get, self.run_id)
                self._show(handle.record)
                self._log.object = "\n".join([*run_log(handle.record), *running_lines(handle.record, pools)])
        except Failure as failure:
            self._fail(failure)
            if failure.status != "NOT_FOUND":
                return
            runs = await off_the_loop(self._client.runs, 100)
        else:
            self.problem = ""
        _put(self._list, _frame([run_row(run) for run in runs], _RUN_COLUMNS))
        chosen = [number for number, run in enumerate(runs) if run.id == self.run_id]
        if self._list.selection != chosen:
            self._list.selection = chosen

    async def choose(self, run_id: str) -> None:
        """Look at another run."""
        self.run_id = run_id
        await self.refresh()

    async def _open_pipelines(self) -> None:
        described = await off_the_loop(self._client.pipelines)
        self._pipelines = {each.name: each for each in described}
        names = sorted(self._pipelines)
        self._which.param.update(options=names, value=FIRST if FIRST in names else names[0])

    def _fill_form(self) -> None:
        pipeline = self._pipelines.get(self._which.value or "")
        if pipeline is None:
            return
        same = json_format.MessageToDict(self.record.arguments) if self.record.pipeline == pipeline.name else {}
        self._form = PipelineForm(pipeline, same)
        self._form_place[:] = [self._form]

    async def _clicked(self, event: Any) -> None:
        await self.choose(str(self._list.value["run"].iloc[event.row]))

    async def _started(self, _: Any) -> None:
        if self._form is None:
            return
        self._start_said.object = ""
        self._start.disabled = True
        try:
            arguments = self._form.arguments()
            handle: RunHandle = await off_the_loop(self._client.run, self._form.pipeline.name, **arguments)
            self._start_said.object = f"{handle.id} is started"
            await self.choose(handle.id)
        except Failure as failure:
            self._start_said.object = str(failure)
        finally:
            self._start.disabled = False

    async def _act(self, action: str) -> None:
        try:
            handle = await off_the_loop(self._client.get, self.run_id)
            await off_the_loop(getattr(handle, action))
        except Failure as failure:
            self._fail(failure)
        await self.refresh()

    def _looked(self, _: Any) -> None:
        if self.on_look is not None and self._volumes.value:
            self.on_look(self.run_id, self._volumes.value, self._tables.value or "")

    def _show(self, run: orchestrator_pb2.Run) -> None:
        if run == self.record:
            return
        if run.id != self.record.id:
            self._logged.object = ""
        self._log_is_whole = False
        self.record = run
        state = state_name(run)
        self._title.object = f"{run.id}: {state}" + (f", attempt {run.attempt}" if run.attempt > 1 else "")
        steps = [step for step in run.steps if step.state != orchestrator_pb2.STEP_STATE_SKIPPED]
        fraction = sum(1.0 if step.HasField("finished_at") else step.fraction for step in steps) / max(1, len(steps))
        self._progress.value = 100 if state == "succeeded" else int(100 * fraction)
        aside = [f"{each.step} {each.item}: {each.status} {each.cause}" for each in run.set_aside[:20]]
        self._why.object = "\n".join([run.error, *aside]).strip()
        self._nothing.visible, self._run.visible = False, True
        self._cancel.disabled = run.state in ENDED
        self._resume.disabled = state not in ("failed", "cancelled")
        self._retry.disabled = state != "partial"
        self._steps.value = _frame([step_row(step) for step in run.steps], _STEP_COLUMNS)
        found = list(artifacts(run))
        # What a run was about before what it made of that.
        volumes = sorted(found, key=lambda each: "tomogram" not in each[0])
        _offer(self._volumes, {name: uri for name, uri in volumes if uri.endswith(".mrc")})
        _offer(self._tables, {**{name: uri for name, uri in found if uri.endswith(".parquet")}, "none": ""})
        self._look.disabled = not self._volumes.options

    def _fail(self, failure: Failure) -> None:
        self.problem = str(failure)
        if self.on_failure is not None:
            self.on_failure(failure)


def _offer(select: Any, options: dict[str, str]) -> None:
    if select.options != options:
        known = select.value and select.value in options.values()
        kept = select.value if known else next(iter(options.values()), None)
        select.param.update(options=options, value=kept)


def _put(table: Any, rows: pd.DataFrame) -> None:
    """Other rows, where they differ: a table that is drawn anew scrolls back."""
    if not rows.equals(table.value):
        table.value = rows


def _frame(rows: list[dict[str, str]], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns)


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now
