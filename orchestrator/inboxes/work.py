"""Working the inboxes: each by one orchestrator, which looks what has arrived, starts runs in order and follows them.

The heartbeats of the orchestrators decide who works an inbox, as they do for runs: where its worker is gone, another
one takes it over. Nothing is kept in memory that the next one would need. A run's id follows from its file, and an item
is marked as being started before its run is made: so what a crash cuts off is done once more, and done once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import sqlalchemy as sa

from cryofleet.errors import (
    AlreadyExists,
    FailedPrecondition,
    Failure,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from cryofleet.server.quotas import Quotas
from cryofleet.storage import Stat, Store
from orchestrator import recovery, submission
from orchestrator.engine import Engine
from orchestrator.inboxes import arrival
from orchestrator.inboxes.completeness import HEAD_BYTES
from orchestrator.inboxes.ear import Ear
from orchestrator.inboxes.inbox import ARRIVING, DONE, SET_ASIDE, STARTED, STARTING, Inbox, Item
from orchestrator.inboxes.requests import values_of
from orchestrator.pipeline_reading import load
from orchestrator.runs import CANCELLED, FAILED, PARTIAL, SUCCEEDED, RunRow
from orchestrator.submission import check_inputs, check_space, run_row

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

ROUND_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""At most between two looks at an inbox."""
HEARD_LOOK_SECONDS = 60.0
"""Between looks at all of a bucket whose server tells what is new: what it may not have told is found so."""
_REST = 4.0
"""A look that takes long is followed by a pause of so many times that."""
_THREADS = 16
_LASTING = (AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied)
"""Why a run can't be started, now or later."""


@dataclass
class _Worked:
    """An inbox that this orchestrator works."""

    ear: Ear | None = None
    turn: asyncio.Task[None] | None = None
    heard: bool = False
    """Whether its bucket told what is new, at the last turn."""
    look_at: float = 0.0
    """When all of it is looked at next, by the loop's clock."""
    arriving: set[str] = field(default_factory=set)
    """What may still be being written, which a bucket that tells has told already."""
    arriving_at: float = 0.0
    """When this is looked at next."""
    problem: str = ""
    """What the last look broke off at."""


class Inboxes:
    """The inboxes that this orchestrator works."""

    def __init__(self, engine: Engine, quotas: Quotas) -> None:
        self._engine = engine
        self._quotas = quotas
        # Of its own: a file system that hangs holds up inboxes, and nothing else.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="inboxes")
        self._worked: dict[str, _Worked] = {}
        self._by_state: Counter[str] = Counter()

    def items_in(self, state: str) -> int:
        """Items of all inboxes in a state, as last counted."""
        return self._by_state[state]

    async def keep_working(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._round()
            except (Failure, sa.exc.SQLAlchemyError) as error:
                logger.warning("the inboxes wait: %s", error)
            except Exception:
                # Were this to end, nothing would be started any more.
                logger.exception("working the inboxes failed")
            await asyncio.sleep(ROUND_SECONDS)

    async def stop(self) -> None:
        """What was begun is left as it is, for the next worker."""
        turns = [worked.turn for worked in self._worked.values() if worked.turn is not None]
        self._leave(set(self._worked))
        await asyncio.gather(*turns, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _round(self) -> None:
        """Takes up inboxes whose worker is gone, and has a turn at each of its own."""
        engine, own = self._engine, self._engine.settings.instance
        inboxes = await engine.answer(engine.inboxes.all)
        mine: dict[str, Inbox] = {}
        if inboxes:
            alive = await engine.answer(engine.runs.alive, recovery.EXPIRY_SECONDS)
            for inbox in inboxes:
                if inbox.worker == own or (
                    inbox.worker not in alive and await engine.answer(engine.inboxes.claim, inbox, own)
                ):
                    mine[inbox.inbox_id] = inbox
        self._leave(self._worked.keys() - mine.keys())
        for inbox_id, inbox in mine.items():
            worked = self._worked.setdefault(inbox_id, _Worked())
            if worked.turn is None or worked.turn.done():
                worked.turn = asyncio.create_task(self._turn(inbox, worked))
        counts = await engine.answer(engine.inboxes.counts) if inboxes else {}
        self._by_state = sum((Counter(count.by_state) for count in counts.values()), Counter())

    def _leave(self, inbox_ids: set[str]) -> None:
        for inbox_id in inbox_ids:
            worked = self._worked.pop(inbox_id)
            if worked.turn is not None:
                worked.turn.cancel()
            if worked.ear is not None:
                worked.ear.stop()

    async def _turn(self, inbox: Inbox, worked: _Worked) -> None:
        """Looks, follows the runs that go on, starts those whose turn it is."""
        try:
            problem = await self._problem(inbox, worked)
            if problem != inbox.problem:
                logger.warning("inbox %s of project %s %s", inbox.name, inbox.project, problem or "goes on")
                await self._engine.answer(self._engine.inboxes.set_problem, inbox, problem)
        except (Failure, sa.exc.SQLAlchemyError) as error:
            logger.warning("inbox %s of project %s waits: %s", inbox.name, inbox.project, error)
        except Exception:
            logger.exception("inbox %s of project %s failed", inbox.name, inbox.project)

    async def _problem(self, inbox: Inbox, worked: _Worked) -> str:
        """The turn itself; what kept it from its end, where that may pass."""
        await self._look(inbox, worked)
        try:
            # Also where the look went wrong: what had come before goes on.
            await self._follow(inbox)
            await self._start(inbox)
        except Failure as failure:
            return worked.problem or failure.message
        return worked.problem

    # Arrivals

    async def _look(self, inbox: Inbox, worked: _Worked) -> None:
        loop = asyncio.get_running_loop()
        if inbox.in_bucket and worked.ear is None:
            worked.ear = Ear(self._engine.store.for_project(inbox.project), inbox.uri)
        told = worked.ear.take() if worked.ear is not None else set()
        hears = worked.ear is not None and worked.ear.hears
        if hears != worked.heard:
            worked.heard, worked.look_at = hears, 0.0  # what was made before, or meanwhile, is not told
        began = loop.time()
        uris: set[str] | None = told
        if began >= worked.look_at or (told and inbox.ready_suffix):
            uris = None  # all: of a marker alone nothing can be said of its file
        elif hears and began >= worked.arriving_at:
            uris = told | worked.arriving
        if uris is not None and not uris:
            return
        usual = min(LOOK_SECONDS, max(ROUND_SECONDS, inbox.settle_seconds / 2))
        try:
            worked.arriving = await self._in_thread(self._look_at, inbox, uris)
            worked.problem = ""
        except Failure as failure:
            worked.problem, worked.look_at = failure.message, loop.time() + usual
            return
        worked.arriving_at = loop.time() + usual
        if uris is None:
            worked.look_at = loop.time() + max(HEARD_LOOK_SECONDS if hears else usual, _REST * (loop.time() - began))

    def _look_at(self, inbox: Inbox, uris: set[str] | None) -> set[str]:
        """Looks at all of an inbox, or at some of its objects, and keeps what was found; what arrives still. Blocks."""
        engine = self._engine
        store = engine.store.for_project(inbox.project)
        listed = list(store.list(inbox.uri)) if uris is None else _stats(store, sorted(uris))
        arrivals = arrival.look(
            inbox,
            engine.inboxes.items(inbox),
            listed,
            lambda uri: store.get_range(uri, 0, HEAD_BYTES),
            engine.inboxes.now(),
            whole=uris is None,
        )
        if arrivals:
            engine.inboxes.note(inbox, arrivals.new, arrivals.changed, arrivals.gone)
        for item in (*arrivals.new, *arrivals.changed.values()):
            if item.state == SET_ASIDE:
                logger.warning("inbox %s set %s aside: %s", inbox.name, item.uri, item.cause)
        return {item.uri for item in engine.inboxes.items(inbox, (ARRIVING,))}

    # Runs

    async def _follow(self, inbox: Inbox) -> None:
        """Takes note of runs that have ended."""
        engine = self._engine
        for item in await engine.answer(engine.inboxes.items, inbox, (STARTED,)):
            try:
                attempt = await engine.answer(engine.runs.attempt, item.run_id)
            except NotFound:
                await self._change(inbox, item, DONE, "its run was forgotten")
                continue
            if attempt.state == SUCCEEDED:
                await self._change(inbox, item, DONE)
            elif attempt.state == PARTIAL:
                await self._change(inbox, item, DONE, "its run ended with items set aside")
            elif attempt.state in (FAILED, CANCELLED):
                await self._change(inbox, item, SET_ASIDE, attempt.error)

    async def _start(self, inbox: Inbox) -> None:
        """Starts the runs whose turn it is, those first whose start was cut off."""
        engine = self._engine
        for item in await engine.answer(engine.inboxes.items, inbox, (STARTING,)):
            await self._begin(inbox, item)
        while True:
            following: Item | None = await engine.answer(engine.inboxes.take_next, inbox)
            if following is None:
                return
            await self._begin(inbox, following)

    async def _begin(self, inbox: Inbox, item: Item) -> None:
        """Starts an item's run; nothing where it was started already, or the inbox is not to start any.

        Raises a Failure that may pass; the item is then tried again.
        """
        engine = self._engine
        if not await engine.answer(engine.inboxes.is_active, inbox):
            return
        try:
            await self._begin_run(inbox, item)
        except _LASTING as failure:
            await self._change(inbox, item, SET_ASIDE, failure.message)
        else:
            await self._change(inbox, item, STARTED)

    async def _begin_run(self, inbox: Inbox, item: Item) -> None:
        engine = self._engine
        try:
            last = await engine.answer(engine.runs.attempt, item.run_id)
        except NotFound:
            run = await self._in_thread(self._checked_run, inbox, item)
            logger.info("inbox %s starts %s for %s", inbox.name, item.run_id, item.uri, extra={"run_id": item.run_id})
            await submission.start(engine, run)
            return
        if last.attempt < item.attempt and last.state in (FAILED, CANCELLED):
            limit = engine.settings.max_runs_per_user
            if await engine.answer(engine.runs.next_attempt, item.run_id, last.attempt, limit):
                await engine.start_attempt(item.run_id, last.attempt + 1)

    def _checked_run(self, inbox: Inbox, item: Item) -> RunRow:
        """The run of an item, after the checks that a submission makes. Blocks."""
        pipeline = load(inbox.definition, inbox.source)
        values = values_of(inbox, pipeline, item.uri)
        check_inputs(self._engine.store.for_project(inbox.project), pipeline, values)
        check_space(self._engine.store, self._quotas, inbox.project)
        return run_row(pipeline, inbox.definition, values, run_id=item.run_id, project=inbox.project, owner=inbox.owner)

    async def _change(self, inbox: Inbox, item: Item, state: str, cause: str = "") -> None:
        if state == SET_ASIDE:
            logger.warning("inbox %s set %s aside: %s", inbox.name, item.uri, cause, extra={"run_id": item.run_id})
        await self._engine.answer(self._engine.inboxes.change, inbox, item, replace(item, state=state, cause=cause))

    async def _in_thread(self, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def _stats(store: Store, uris: Iterable[str]) -> list[Stat]:
    """Of those that are there."""
    found = []
    for uri in uris:
        with contextlib.suppress(NotFound):
            found.append(store.stat(uri))
    return found
