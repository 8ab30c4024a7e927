"""The orchestrator at work: DBOS, the record of runs, placement, and what keeps an eye on them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, SetWorkflowID

from cryofleet.errors import Failure, Unavailable
from cryofleet.logs import log_context
from cryofleet.operations import Operation
from cryofleet.server.recent_log import RecentLog
from cryofleet.settings import Settings
from cryofleet.storage import Store
from orchestrator import database, run_trace, workflows
from orchestrator.cache import ResultCache
from orchestrator.endings import Endings
from orchestrator.inboxes.record import InboxRecord
from orchestrator.pipeline import Pipeline, Step
from orchestrator.pipeline_reading import load
from orchestrator.placement import Placement
from orchestrator.recovery import Recovery
from orchestrator.row_count import count_rows
from orchestrator.run_log import RunLog
from orchestrator.runs import (
    ACTIVE,
    CANCELLED,
    RUNNING,
    Pause,
    RunRow,
    RunStore,
    Unit,
    is_away,
    still_going,
)
from orchestrator.tasks import Outcome, TaskRequest, TaskRunner
from orchestrator.tracker import Tracker
from orchestrator.views import Views

logger = logging.getLogger(__name__)

APPLICATION_VERSION = "1"
"""Of the order of steps in `workflows`; runs go on with an orchestrator of the version that began them, while there is
one, and otherwise begin anew with another's."""
HEARTBEAT_SECONDS = 3.0
PROGRESS_SECONDS = 1.0
QUEUE_WORKERS = 16
"""Chunks that an orchestrator works on at a time, for each pool and user."""
ITEM_WORKERS = 64
"""Items of a foreach that it works on at a time, for each user and each depth of foreach in foreach: as many as tasks
that follow each other can be under way at once."""
QUEUE_POLL_SECONDS = 0.2
ANSWER_SECONDS = 10.0
"""How long a caller waits for a database that is away; runs wait longer."""
_PATIENCE_SECONDS = 600.0
_RETRY_SECONDS = 0.5
_GOING = ["PENDING", "ENQUEUED", "DELAYED"]
"""States of workflows that have not ended."""
_ENDING_SECONDS = 0.5
_CANCELLING_SECONDS = 3.0
"""Calls end within this time after the workflow that made them was cancelled; were it deleted before, they'd go on."""
_DELETED_TOGETHER = 500

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Plan:
    """A run as its workflows need it: it follows from the run's unchanging record."""

    run_id: str
    project: str
    pipeline: Pipeline
    values: dict[str, Any]
    user: str = ""
    """Whose turn its tasks take: its owner, or its project where it has none."""

    def step(self, path: str) -> Step:
        """The step at a path as tomograms.boxes."""
        steps = self.pipeline.steps
        found: Step | None = None
        for name in path.split("."):
            found = next(step for step in steps if step.id == name)
            steps = found.steps
        assert found is not None
        return found

    def task(self, attempt: int, place: str, operation: Operation, fields: Mapping[str, Any]) -> TaskRequest:
        """The task of an operation at a place in the run."""
        key = f"{self.run_id}:{attempt}/{place}"
        return TaskRequest(key, self.run_id, self.project, operation.name, dict(fields), self.user)


class _Quiet(logging.Filter):
    """Drops what DBOS says of workflows that were cancelled or taken over, which is as it should be."""

    _EXPECTED_TEXTS = ("Asyncio task cancelled", "Workflow already exists in queue")
    _EXPECTED = ("DBOSAwaitedWorkflowCancelledError", "DBOSWorkflowCancelledError", "DBOSWorkflowConflictIDError")

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        return kind not in self._EXPECTED and not record.getMessage().startswith(self._EXPECTED_TEXTS)


class Engine:
    """One orchestrator. There can be one in a process, since DBOS is one per process."""

    def __init__(self, settings: Settings, store: Store, recent_log: RecentLog | None = None) -> None:
        """`recent_log` has what this process has logged; where left out, nothing of that is known."""
        self.settings = settings
        self.store = store
        self.cache = ResultCache(store)
        self.placement = Placement(settings)
        self.tasks = TaskRunner(settings, self.cache, self.placement)
        self._database: sa.Engine | None = None
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="runs")
        self._plans: dict[str, tuple[RunRow, Plan]] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._background: list[asyncio.Task[None]] = []
        self._changed: dict[str, asyncio.Event] = {}
        self.views = Views(self)
        self.run_log = RunLog(self, recent_log or RecentLog("orchestrator", settings.instance))
        self.endings = Endings()
        self.pauses: dict[str, Pause] = {}
        """Of the pools that are paused, as last read."""
        self._left: dict[tuple[str, str], int] = {}
        self.runs_by_state: Counter[str] = Counter()
        """Runs of all orchestrators that go on, as last counted."""
        self.recovery = Recovery(self, APPLICATION_VERSION)
        self._stopping = False

    # Life

    async def start(self) -> None:
        """Opens the database, takes up the runs that this orchestrator had, and begins to look after all."""
        self._database = database.make_database(self.settings.database)
        self.runs: RunStore = await self.in_thread(RunStore, self._database)
        self.inboxes = InboxRecord(self._database)
        self.tracker = Tracker(self.runs)
        await self.placement.start()
        await self.read_pauses()
        workflows.use_engine(self)
        config: DBOSConfig = {
            "name": "cryofleet",
            "system_database_url": self.settings.database,
            "application_version": APPLICATION_VERSION,
            "executor_id": self.settings.instance,
            "serializer": DBOSPortableJSONSerializer(),
            "enable_otlp": False,
            "log_level": "WARNING",
            "max_executor_threads": database.THREADS,
            "sys_db_pool_size": database.THREADS + 4,
        }
        if self._database.dialect.name == "sqlite":
            config["system_database_engine"] = self._database
        else:
            config["db_engine_kwargs"] = database.POOL
        await self.in_thread(self.runs.beat, self.settings.instance, APPLICATION_VERSION)
        self.dbos = DBOS(config=config)
        _use_own_logs()
        # Launched on the loop, so that workflows run here, beside the channels they use.
        DBOS.launch()
        # Items were in the queue of chunks once; those that an earlier version has left there are still done.
        for queue, workers in ((workflows.QUEUE, QUEUE_WORKERS), (workflows.ITEMS, ITEM_WORKERS)):
            await DBOS.register_queue_async(
                queue,
                partition_worker_concurrency=workers,
                polling_interval_sec=QUEUE_POLL_SECONDS,
                on_conflict="always_update",
            )
        self._background = [
            asyncio.create_task(self._write_progress()),
            asyncio.create_task(self._look_after_runs()),
            asyncio.create_task(self.endings.keep_asking()),
        ]

    async def stop(self) -> None:
        """Leaves the runs to others, or to the next start: nothing of them is recorded as failed."""
        self._stopping = True
        for task in (*self._background, *self._running):
            task.cancel()
        self.endings.stop()
        await asyncio.gather(*self._background, *self._running, return_exceptions=True)
        await asyncio.sleep(0.05)  # those who waited for endings come to their own end
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, DBOS.destroy)
        # DBOS had made its own executor the loop's, and has just closed it.
        loop.set_default_executor(ThreadPoolExecutor())
        workflows.use_engine(None)
        await self.placement.close()
        self.tasks.close()
        if self._database is not None:
            try:
                await self.in_thread(self.runs.leave, self.settings.instance)
            except sa.exc.DBAPIError as error:
                logger.warning("the database is away: %s", error.orig)
            self._database.dispose()
        self._threads.shutdown(wait=False)

    async def in_thread(self, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Runs blocking work on the database."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def with_record(
        self, function: Callable[..., ResultT], *arguments: Any, seconds: float = _PATIENCE_SECONDS
    ) -> ResultT:
        """The same, again and again where the database is away; holds no thread meanwhile.

        Raises Unavailable once it has been away for so many seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            try:
                return await self.in_thread(function, *arguments)
            except sa.exc.DBAPIError as error:
                if not is_away(error):
                    raise
                reason = " ".join(str(error.orig).split())
                if loop.time() >= deadline:
                    raise Unavailable(
                        f"the orchestrator's database is away: {reason}; runs go on once it is back"
                    ) from None
                logger.warning("the database is away: %s", reason)
            await asyncio.sleep(_RETRY_SECONDS)

    async def answer(self, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """The same for a caller who waits. Raises Unavailable."""
        return await self.with_record(function, *arguments, seconds=ANSWER_SECONDS)

    # What the workflows use

    async def plan(self, run_id: str, seconds: float = _PATIENCE_SECONDS) -> Plan:
        """The run's pipeline and arguments. Raises Unavailable where the database is away for so many seconds."""
        return await self.plan_of(await self.with_record(self.runs.run, run_id, seconds=seconds))

    async def plan_of(self, row: RunRow) -> Plan:
        """The same from the run's record."""
        known = self._plans.get(row.run_id)
        # A run that was forgotten, here or elsewhere, may have left its id to another one.
        if known is not None and known[0] == row:
            return known[1]
        # It takes a tenth of a second.
        pipeline = await self.in_thread(load, row.definition, row.source)
        plan = Plan(row.run_id, row.project, pipeline, pipeline.bind(row.arguments), row.owner or row.project)
        if len(self._plans) >= 256:
            self._plans.clear()
        self._plans[row.run_id] = (row, plan)
        return plan

    def unit(self, run_id: str, attempt: int, name: str, path: str, state: str) -> Unit:
        """A fresh unit of progress."""
        unit = self.tracker.unit(run_id, attempt, name, path)
        unit.state = state
        if state == RUNNING:
            unit.started_at = time.time()
        return unit

    async def settle(self, run_id: str) -> None:
        """Writes the run's progress now, since what follows may run elsewhere."""
        await self.with_record(self.tracker.flush, run_id)

    async def do(self, task: TaskRequest, unit: Unit) -> Outcome:
        """The body of a task's step."""
        fraction = 0.0

        def report(now: float, phase: str) -> None:
            nonlocal fraction
            unit.partial += now - fraction
            fraction = now
            if phase:
                unit.phase = phase

        about = {"run_id": task.run_id, "task_key": task.key, "operation": task.operation, "project": task.project}
        with self._stoppable(), run_trace.inside(task), log_context(**about):
            try:
                outcome = await self.tasks.run(task, report)
            finally:
                unit.partial -= fraction
            if outcome["status"] != "OK":
                logger.warning("the task failed: %s: %s", outcome["status"], outcome["cause"])
                await self.run_log.keep(task, outcome)
        run_trace.task_ended(task, outcome)
        return outcome

    async def count(self, project: str, place: str, kind: str, uri: str) -> dict[str, Any]:
        """The body of a step that counts the rows of particles or subtomograms."""
        with self._stoppable():
            try:
                count = await self.tasks.in_thread(count_rows, self.store.for_project(project), kind, uri)
                return {"task": place, "status": "OK", "count": count}
            except Failure as failure:
                return {"task": place, "status": failure.status, "cause": str(failure)}

    @run_trace.of_run
    async def begin(self, run_id: str, attempt: int) -> dict[str, Any]:
        """The body of a run's first step: says so where the attempt was ended before it began."""
        if not await self.with_record(self.runs.set_started, run_id, attempt):
            logger.info("attempt %d was ended before it began", attempt, extra={"run_id": run_id})
            return {"ended": True}
        logger.info("attempt %d begins", attempt, extra={"run_id": run_id})
        self.announce(run_id)
        return {}

    @run_trace.of_run
    async def finish(
        self, run_id: str, attempt: int, state: str, error: str, outputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The body of a run's last step."""
        await self.settle(run_id)
        await self.with_record(self.runs.set_finished, run_id, attempt, state, error, outputs)
        self.tracker.forget(run_id)
        ended = f": {error}" if error else ""
        logger.info("attempt %d ended as %s%s", attempt, state, ended, extra={"run_id": run_id})
        self.announce(run_id)
        return {}

    def stoppable(self, body: Callable[[], Coroutine[Any, Any, ResultT]]) -> Callable[[], Coroutine[Any, Any, ResultT]]:
        """The step's body, ended without a result when this orchestrator stops."""

        async def run() -> ResultT:
            with self._stoppable():
                return await body()

        return run

    def _stoppable(self) -> _Registered:
        if self._stopping:
            raise asyncio.CancelledError
        return _Registered(self._running)

    # Changes

    def announce(self, run_id: str) -> None:
        """Tells those who watch the run that it has changed."""
        self.views.drop(run_id)
        event = self._changed.pop(run_id, None)
        if event is not None:
            event.set()

    async def wait_for_change(self, run_id: str, seconds: float) -> None:
        """Returns when the run has changed here, or after `seconds`: it may have changed elsewhere."""
        event = self._changed.setdefault(run_id, asyncio.Event())
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            pass

    async def start_attempt(self, run_id: str, attempt: int) -> None:
        """Starts an attempt's workflow; nothing happens where it was started already."""
        with run_trace.starting(run_id, attempt), SetWorkflowID(workflows.workflow_id(run_id, attempt)):
            await DBOS.start_workflow_async(workflows.run_workflow, run_id, attempt)

    async def cancel_attempt(self, run_id: str, attempt: int) -> bool:
        """Ends an attempt: its workflows and the calls they make. False where it had ended."""
        changed = await self.answer(self.runs.set_finished, run_id, attempt, CANCELLED, "the run was cancelled")
        await self.cancel_workflows(run_id, attempt)
        if changed:
            await self.settle(run_id)
            self.tracker.forget(run_id)
            self.announce(run_id)
        return changed

    async def cancel_workflows(self, run_id: str, attempt: int) -> None:
        """Ends an attempt's workflows and the calls they make; its record stays as it is."""
        # A part that was being started escapes the first look.
        for _ in range(5):
            active = await self._workflow_ids(run_id, attempt, _GOING)
            if not active:
                return
            await DBOS.cancel_workflows_async(active)
            await asyncio.sleep(0.1)

    async def _workflow_ids(self, run_id: str, attempt: int, status: list[str] | None = None) -> list[str]:
        """An attempt's workflow and its parts: those in one of the states, or all."""
        whole = workflows.workflow_id(run_id, attempt)
        found = await DBOS.list_workflows_async(
            workflow_id_prefix=whole, status=status, load_input=False, load_output=False
        )
        return [w.workflow_id for w in found if w.workflow_id == whole or w.workflow_id.startswith(whole + "/")]

    async def forget(self, run_id: str) -> None:
        """Deletes the record of a run that has ended, and its workflows.

        The workflows go first: where this is cut off in the middle, the run is still there, and is forgotten when it is
        asked for once more.

        Raises NotFound, FailedPrecondition where the run goes on, Unavailable.
        """
        last = await self.answer(self.runs.attempt, run_id)
        if last.state in ACTIVE:
            raise still_going(run_id, last.state)
        attempts = range(1, last.attempt + 1)
        if any([await self._workflow_ids(run_id, attempt, _GOING) for attempt in attempts]):
            # A run says that it has ended just before its workflow does.
            await asyncio.sleep(_ENDING_SECONDS)
        for attempt in attempts:
            if await self._workflow_ids(run_id, attempt, _GOING):
                await self.cancel_workflows(run_id, attempt)
                await asyncio.sleep(_CANCELLING_SECONDS)
        if last.state == CANCELLED and last.finished_at is not None:
            await asyncio.sleep(min(_CANCELLING_SECONDS, last.finished_at + _CANCELLING_SECONDS - time.time()))
        # Of these attempts only: somebody may resume the run meanwhile, which then isn't forgotten.
        for attempt in attempts:
            ids = await self._workflow_ids(run_id, attempt)
            for first in range(0, len(ids), _DELETED_TOGETHER):
                await DBOS.delete_workflows_async(ids[first : first + _DELETED_TOGETHER])
        await self.answer(self.runs.forget, run_id)
        self.tracker.forget(run_id)
        self._plans.pop(run_id, None)
        logger.info("the run was forgotten", extra={"run_id": run_id})
        self.announce(run_id)

    # Looking after runs

    async def _write_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            try:
                await self.in_thread(self.tracker.flush)
            except sa.exc.SQLAlchemyError as error:
                logger.warning("progress waits for the database: %s", error)

    async def _look_after_runs(self) -> None:
        while True:
            try:
                await self.in_thread(self.runs.beat, self.settings.instance, APPLICATION_VERSION)
                await self.recovery.look()
                await self.read_pauses()
                await self.count_tasks()
            except sa.exc.DBAPIError as error:
                logger.warning("the database is away: %s", error.orig)
            except Unavailable as error:
                logger.warning("%s", error)
            except Exception:
                # Without the heartbeat others would take over what goes on here.
                logger.exception("looking after the runs failed")
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def read_pauses(self) -> None:
        """Pauses and resumes pools as the database says. Raises Unavailable."""
        self.pauses = await self.answer(self.runs.pauses)
        for name, pool in self.placement.pools.items():
            if pool.paused != (name in self.pauses):
                pool.set_paused(name in self.pauses)
                logger.info("pool %s is %s", name, "paused" if pool.paused else "resumed")

    async def count_tasks(self) -> None:
        """Counts what is left to do for each pool, in the record of all runs. Raises Unavailable."""
        left: dict[tuple[str, str], int] = {}
        going_on = await self.answer(self.runs.in_state, ACTIVE)
        self.runs_by_state = Counter(attempt.state for attempt in going_on)
        for attempt in going_on:
            try:
                plan = await self.plan(attempt.run_id, ANSWER_SECONDS)
            except Unavailable:
                raise
            except Failure:
                # Kept by a version that read pipelines otherwise; its own workflow will say so.
                continue
            units = await self.answer(self.runs.units, attempt.run_id, attempt.attempt)
            for unit in units.values():
                operation = plan.step(unit.path).operation
                if operation is not None:
                    place = (operation.service, operation.pool)
                    left[place] = left.get(place, 0) + unit.total - unit.done - unit.set_aside
        self._left = left

    def runs_going_on(self, state: str) -> int:
        """Those in the state, as last counted."""
        return self.runs_by_state[state]

    def tasks_left(self, pool: str) -> int:
        """Tasks that wait for the pool or run there, as last counted."""
        return sum(self.tasks_left_by_kind(pool).values())

    def tasks_left_by_kind(self, pool: str) -> dict[str, int]:
        """The same in two parts: of operations that can use a GPU, and of all others."""
        return {kind: max(0, self._left.get((pool, kind), 0)) for kind in ("cpu", "gpu")}


class _Registered:
    """Holds the current task in a set while it runs."""

    def __init__(self, tasks: set[asyncio.Task[Any]]) -> None:
        self._tasks = tasks
        self._task = asyncio.current_task()

    def __enter__(self) -> None:
        if self._task is not None:
            self._tasks.add(self._task)

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._tasks.discard(self._task)


def _use_own_logs() -> None:
    """Sends what DBOS logs where all other logs go."""
    dbos_logger = logging.getLogger("dbos")
    for handler in dbos_logger.handlers[:]:
        dbos_logger.removeHandler(handler)
    dbos_logger.addHandler(logging.NullHandler())  # so that DBOS does not add its own again
    dbos_logger.propagate = True
    if not any(isinstance(known, _Quiet) for known in dbos_logger.filters):
        dbos_logger.addFilter(_Quiet())
