"""Runs as callers see them: read once for all who ask, anew where they have changed; progress that is written once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cryofleet.errors import NotFound
from orchestrator.runs import Unit
from orchestrator.tracker import Tracker
from orchestrator.views import Views

DEFINITION = "name: p\nsteps:\n  - {id: one, op: runtime.SelfTest, with: {index: 1}}\n"


class Record:
    """An engine, as far as views use it, with one run; counts how often that is read."""

    def __init__(self) -> None:
        self.reads = 0
        self.records = {"one": Unit("one", "running", total=3).to_json()}
        self.known = True
        self.runs: Any = self

    def whole(self, run_id: str) -> Any:
        from orchestrator.runs import AttemptRow, RunRow

        self.reads += 1
        if not self.known:
            raise NotFound(f"there is no run {run_id!r}")
        row = RunRow(run_id, "default", "p", "p.yaml", DEFINITION, {}, 1.0)
        return row, AttemptRow(run_id, 1, "running", "", {}, 1.0, 2.0, None), dict(self.records)

    async def answer(self, function: Any, *arguments: Any) -> Any:
        await asyncio.sleep(0.01)
        return function(*arguments)

    async def in_thread(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    async def plan_of(self, row: Any) -> Any:
        from orchestrator.engine import Plan
        from orchestrator.pipeline_reading import load

        return Plan(row.run_id, row.project, load(row.definition, row.source), {})


async def test_many_who_ask_share_one_reading() -> None:
    record = Record()
    views = Views(record)  # type: ignore[arg-type]
    first, *others = await asyncio.gather(*(views.run("r", 0.5) for _ in range(50)))
    assert record.reads == 1
    assert all(run is first for run in others)
    assert first.steps[0].tasks_total == 3
    assert (await views.run("r", 0.0)) is first, "read anew, and nothing has changed"
    assert record.reads == 2
    record.records["one"] = Unit("one", "running", total=4).to_json()
    assert (await views.run("r", 0.5)) is first
    views.drop("r")
    assert (await views.run("r", 0.5)).steps[0].tasks_total == 4


async def test_a_reading_that_failed_is_not_kept() -> None:
    record = Record()
    views = Views(record)  # type: ignore[arg-type]
    record.known = False
    found = await asyncio.gather(*(views.run("r", 0.5) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(each, NotFound) for each in found)
    assert record.reads == 1
    record.known = True
    assert (await views.run("r", 0.5)).id == "r"


async def test_a_caller_who_leaves_does_not_end_the_reading_of_others() -> None:
    record = Record()
    views = Views(record)  # type: ignore[arg-type]
    leaving, staying = (asyncio.create_task(views.run("r", 0.5)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).id == "r"
    assert record.reads == 1


class Written:
    def __init__(self) -> None:
        self.away = False
        self.units: list[set[str]] = []

    def write_units(self, units: dict[Any, str]) -> None:
        if self.away:
            raise OSError("away")
        self.units.append({key[2] for key in units})


def test_only_units_that_changed_are_written_and_none_is_lost_where_the_database_is_away() -> None:
    written = Written()
    tracker = Tracker(written)  # type: ignore[arg-type]
    units = [tracker.unit("r", 1, name, "step") for name in ("a", "b")]
    tracker.flush()
    tracker.flush()
    units[1].done += 1
    tracker.flush()
    assert written.units == [{"a", "b"}, set(), {"b"}]
    units[0].results.append("uri")
    units[0].finished_at = 2.0
    written.away = True
    with pytest.raises(OSError, match="away"):
        tracker.flush()
    written.away = False
    tracker.flush()
    assert written.units[-1] == {"a"}
    assert "changed" not in units[0].to_json()
    assert Unit.from_json(units[0].to_json()) == units[0]
