"""Runs as those see them who ask: each is read from the record at most twice a second, however many ask for it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator.run_message import run_message
from orchestrator.runs import AttemptRow, RunRow, Unit

if TYPE_CHECKING:
    from orchestrator.engine import Engine

AGE_SECONDS = 0.5
"""What is older is read anew; the record itself is written once a second."""
_SHARE = 0.2
"""Of the time at most is spent reading a run of many items; its view is then older."""
_MOST_KEPT = 256


@dataclass(frozen=True)
class _Read:
    """What the record said, and the message made of it."""

    row: RunRow
    attempt: AttemptRow
    records: dict[str, str]
    message: pb.Run
    seconds: float
    """It took to read."""


@dataclass(frozen=True)
class _View:
    began: float
    """By the loop's clock, when the record began to be read: what is changed from then on may be missing."""
    read: asyncio.Task[_Read]


class Views:
    """The runs that somebody has asked for lately."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._views: dict[str, _View] = {}

    async def run(self, run_id: str, age_seconds: float = AGE_SECONDS) -> pb.Run:
        """The run as the record told it at most so long ago; the message is not the caller's to change.

        Raises NotFound, and Unavailable where the database is away.
        """
        now = asyncio.get_running_loop().time()
        view = self._views.get(run_id)
        if view is None or now - view.began >= age_seconds * max(1.0, _seconds(view) / _SHARE / AGE_SECONDS):
            before = view.read if view is not None else None
            view = _View(now, asyncio.create_task(self._read(run_id, before)))
            view.read.add_done_callback(lambda read: self._drop_failed(run_id, read))
            self._keep(run_id, view)
        # Others may wait for it too.
        return (await asyncio.shield(view.read)).message

    def drop(self, run_id: str) -> None:
        """The run has changed here: who asks from now on is told so."""
        self._views.pop(run_id, None)

    def _keep(self, run_id: str, view: _View) -> None:
        self._views.pop(run_id, None)
        self._views[run_id] = view
        for oldest in list(self._views)[: max(0, len(self._views) - _MOST_KEPT)]:
            del self._views[oldest]

    def _drop_failed(self, run_id: str, read: asyncio.Task[_Read]) -> None:
        failed = read.cancelled() or read.exception() is not None
        view = self._views.get(run_id)
        if failed and view is not None and view.read is read:
            del self._views[run_id]

    async def _read(self, run_id: str, before: asyncio.Task[_Read] | None) -> _Read:
        engine = self._engine
        began = time.perf_counter()
        row, attempt, records = await engine.answer(engine.runs.whole, run_id)
        if before is not None and before.done() and not before.cancelled() and before.exception() is None:
            known = before.result()
            if (known.row, known.attempt, known.records) == (row, attempt, records):
                return known
        pipeline = (await engine.plan_of(row)).pipeline

        def make() -> pb.Run:
            units = {name: Unit.from_json(record) for name, record in records.items()}
            return run_message(row, attempt, pipeline, units)

        message = await engine.in_thread(make)
        return _Read(row, attempt, records, message, time.perf_counter() - began)


def _seconds(view: _View) -> float:
    """It took to read the run, where it was read."""
    read = view.read
    return read.result().seconds if read.done() and not read.cancelled() and read.exception() is None else 0.0
