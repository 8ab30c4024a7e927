"""The record of runs: small tables beside those of DBOS, in the same database.

What a run is (`cryofleet_runs`) never changes. What became of it is kept by attempt (`cryofleet_attempts`). How far it
is, is kept by unit of work (`cryofleet_progress`): a step, an item of a foreach, a chunk of shards. Each unit has one
writer at a time, whichever orchestrator works on it, and a replay of its workflow writes the same again; so the run is
the sum of its units, and any orchestrator can tell it. All units that changed are written together, once a second. What
was logged about failed tasks stands beside them (`cryofleet_logs`).

What is here describes the tables as this version uses them; `schema` makes them, and changes those of older versions.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cryofleet.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted
from orchestrator.database import clock
from orchestrator.garbage import Held
from orchestrator.schema import migrate

QUEUED, RUNNING, SUCCEEDED, PARTIAL, FAILED, CANCELLED = (
    "queued",
    "running",
    "succeeded",
    "partial",
    "failed",
    "cancelled",
)
WAITING, SKIPPED = "waiting", "skipped"
ACTIVE = (QUEUED, RUNNING)

_metadata = sa.MetaData()
_runs = sa.Table(
    "cryofleet_runs",
    _metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("project", sa.Text, nullable=False, index=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("definition", sa.Text, nullable=False),
    sa.Column("arguments", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float(53), nullable=False, index=True),
    sa.Column("owner", sa.Text, nullable=False, server_default="", index=True),
)
_attempts = sa.Table(
    "cryofleet_attempts",
    _metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("error", sa.Text, nullable=False, default=""),
    sa.Column("outputs", sa.Text, nullable=False, default="{}"),
    sa.Column("queued_at", sa.Float(53), nullable=False),
    sa.Column("started_at", sa.Float(53)),
    sa.Column("finished_at", sa.Float(53)),
)
_progress = sa.Table(
    "cryofleet_progress",
    _metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("unit", sa.Text, primary_key=True),
    sa.Column("record", sa.Text, nullable=False),
)
_logs = sa.Table(
    "cryofleet_logs",
    _metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("task_key", sa.Text, primary_key=True),
    sa.Column("lines", sa.Text, nullable=False),
)
_orchestrators = sa.Table(
    "cryofleet_orchestrators",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("heartbeat", sa.Float(53), nullable=False),
    sa.Column("application_version", sa.Text, nullable=False, server_default="1"),
)
_pauses = sa.Table(
    "cryofleet_pauses",
    _metadata,
    sa.Column("pool", sa.Text, primary_key=True),
    sa.Column("paused_at", sa.Float(53), nullable=False),
    sa.Column("paused_by", sa.Text, nullable=False),
    sa.Column("because", sa.Text, nullable=False),
)


@dataclass(frozen=True)
class RunRow:
    """What a run is."""

    run_id: str
    project: str
    pipeline: str
    source: str
    definition: str
    arguments: dict[str, Any]
    created_at: float
    owner: str = ""
    """The user who submitted it."""


@dataclass(frozen=True)
class AttemptRow:
    """What became of one attempt at a run."""

    run_id: str
    attempt: int
    state: str
    error: str
    outputs: dict[str, Any]
    queued_at: float
    started_at: float | None
    finished_at: float | None


@dataclass(frozen=True)
class Pause:
    """A pool that begins nothing more."""

    pool: str
    paused_at: float
    paused_by: str
    because: str


@dataclass
class Unit:
    """How far a part of a run is."""

    path: str
    """The step's place in the pipeline, as boxes or tomograms.boxes."""
    state: str = ""
    """Empty for a part of a step, which has no state of its own."""
    total: int = 0
    done: int = 0
    cached: int = 0
    set_aside: int = 0
    compute_seconds: float = 0.0
    partial: float = 0.0
    """Sum of the fractions of the tasks that run."""
    phase: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    outputs: dict[str, Any] | None = None
    problems: list[dict[str, str]] = field(default_factory=list)
    """SetAside records."""
    results: list[str] = field(default_factory=list)
    """URIs of the results that its tasks have."""

    changed: bool = field(default=True, compare=False, repr=False)
    """Since it was last written; not part of the record."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        object.__setattr__(self, "changed", name != "changed" or value)

    def to_json(self) -> str:
        empty = Unit(self.path)
        values = {name: getattr(self, name) for name in _RECORDED}
        return json.dumps({k: v for k, v in values.items() if k == "path" or v != getattr(empty, k)})

    @staticmethod
    def from_json(text: str) -> Unit:
        return Unit(**{k: v for k, v in json.loads(text).items() if k in _RECORDED})


_RECORDED = tuple(f.name for f in fields(Unit) if f.name != "changed")
UnitKey = tuple[str, int, str]
"""Run, attempt, unit."""


class RunStore:
    """Reads and writes the tables. Its methods block; call them from a thread."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.on_ended: Callable[[str, int, str], None] = lambda run_id, attempt, state: None
        """Told an attempt and the state that it has ended in, when this store has recorded it."""
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        migrate(engine)

    # Runs and attempts

    def create(self, run: RunRow, most_active: int = 0) -> bool:
        """Keeps a new run with its first attempt. False where it is there already.

        Raises AlreadyExists where another run has the id, ResourceExhausted where its owner has `most_active` runs
        going on already; 0 is no limit.
        """
        with self._engine.begin() as connection:
            inserted = connection.execute(
                self._insert(_runs)
                .values(**{**asdict(run), "arguments": json.dumps(run.arguments)})
                .on_conflict_do_nothing()
                .returning(_runs.c.run_id)
            ).first()
            if inserted:
                self._check_active(connection, run.owner, most_active)
                self._add_attempt(connection, run.run_id, 1)
                return True
        known = self.run(run.run_id)
        if (known.project, known.definition, known.arguments) != (run.project, run.definition, run.arguments):
            raise AlreadyExists(f"run {run.run_id} exists, with another pipeline or other arguments")
        return False

    def _check_active(self, connection: sa.Connection, owner: str, most_active: int) -> None:
        """Raises ResourceExhausted where the owner may start no more runs."""
        if not most_active or not owner:
            return
        if connection.dialect.name != "sqlite":
            # One at a time for each owner, until the transaction's end; SQLite has one writer at a time as it is.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"cryofleet:{owner}"))))
        going_on = connection.execute(
            sa.select(sa.func.count())
            .select_from(_attempts)
            .join(_runs, _runs.c.run_id == _attempts.c.run_id)
            .where(_runs.c.owner == owner, _attempts.c.state.in_(ACTIVE))
        ).scalar_one()
        if going_on >= most_active:
            raise ResourceExhausted(
                f"{owner} has {going_on} runs going on, and may have {most_active} (CRYOFLEET_MAX_RUNS_PER_USER): "
                "wait until one has ended, or cancel one"
            )

    def _add_attempt(self, connection: sa.Connection, run_id: str, attempt: int) -> bool:
        # What is returned says it: not every driver counts the rows of such an insert.
        values = {
            "run_id": run_id,
            "attempt": attempt,
            "state": QUEUED,
            "error": "",
            "outputs": "{}",
            "queued_at": time.time(),
        }
        statement = self._insert_of_a_run(_attempts, list(values)).on_conflict_do_nothing()
        return connection.execute(statement.returning(_attempts.c.attempt), values).first() is not None

    def _insert_of_a_run(self, table: sa.Table, columns: list[str]) -> Any:
        """Inserts a row that belongs to a run; nothing where the run is not there, which cannot go meanwhile."""
        values = [sa.bindparam(name, type_=table.c[name].type) for name in columns]
        run = sa.select(_runs.c.run_id).where(_runs.c.run_id == values[columns.index("run_id")])
        # SQLite, which has one writer at a time, needs no lock and has none.
        there = sa.exists(run.with_for_update(read=True, key_share=True).subquery().select())
        return self._insert(table).from_select(columns, sa.select(*values).where(there))

    def next_attempt(self, run_id: str, after: int, most_active: int = 0) -> bool:
        """Adds the attempt that follows; false where somebody else just did.

        Raises NotFound, and ResourceExhausted as `create` does.
        """
        with self._engine.begin() as connection:
            owner = connection.execute(sa.select(_runs.c.owner).where(_runs.c.run_id == run_id)).scalar()
            self._check_active(connection, owner or "", most_active)
            added = self._add_attempt(connection, run_id, after + 1)
        if not added:
            self.run(run_id)
        return added

    def supersede(self, run_id: str, attempt: int, why: str) -> bool:
        """Ends an attempt that has not ended as failed, and adds the one that follows; false where it has ended.

        Both at once: nobody sees the run as failed in between.
        """
        with self._engine.begin() as connection:
            ended = connection.execute(
                sa.update(_attempts)
                .where(_attempts.c.run_id == run_id, _attempts.c.attempt == attempt, _attempts.c.state.in_(ACTIVE))
                .values(state=FAILED, error=why, finished_at=time.time())
            ).rowcount
            return bool(ended) and self._add_attempt(connection, run_id, attempt + 1)

    def forget(self, run_id: str) -> None:
        """Deletes all that is kept of a run that has ended.

        Raises NotFound, and FailedPrecondition where the run goes on.
        """
        with self._engine.begin() as connection:
            # First, so that nobody adds an attempt or a unit meanwhile.
            found = connection.execute(sa.delete(_runs).where(_runs.c.run_id == run_id).returning(_runs.c.run_id))
            if found.first() is None:
                raise NotFound(f"there is no run {run_id!r}")
            states = sa.select(_attempts.c.state).where(_attempts.c.run_id == run_id)
            for state in connection.execute(states).scalars():
                if state in ACTIVE:
                    raise still_going(run_id, state)
            for table in (_attempts, _progress, _logs):
                connection.execute(sa.delete(table).where(table.c.run_id == run_id))

    def run(self, run_id: str) -> RunRow:
        """Raises NotFound."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(_runs).where(_runs.c.run_id == run_id)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no run {run_id!r}")
        return _run_row(row)

    def attempt(self, run_id: str, number: int | None = None) -> AttemptRow:
        """The last attempt, or the one of that number. Raises NotFound."""
        query = sa.select(_attempts).where(_attempts.c.run_id == run_id).order_by(_attempts.c.attempt.desc()).limit(1)
        if number is not None:
            query = query.where(_attempts.c.attempt == number)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no run {run_id!r}")
        return _attempt_row(row)

    def newest(self, project: str, limit: int, among: Iterable[str] | None = None) -> list[tuple[RunRow, AttemptRow]]:
        """The newest runs of a project, or of all `among` these, each with its last attempt."""
        latest = _latest_attempts()
        query = sa.select(_runs).order_by(_runs.c.created_at.desc()).limit(limit)
        if project:
            query = query.where(_runs.c.project == project)
        if among is not None:
            query = query.where(_runs.c.project.in_(sorted(among)))
        with self._engine.connect() as connection:
            runs = [_run_row(row) for row in connection.execute(query).mappings()]
            rows = connection.execute(
                sa.select(_attempts)
                .join(latest, (latest.c.run_id == _attempts.c.run_id) & (latest.c.attempt == _attempts.c.attempt))
                .where(_attempts.c.run_id.in_([run.run_id for run in runs]))
            ).mappings()
            attempts = {row["run_id"]: _attempt_row(row) for row in rows}
        # One that was forgotten in between has none.
        return [(run, attempts[run.run_id]) for run in runs if run.run_id in attempts]

    def in_state(self, states: Iterable[str]) -> list[AttemptRow]:
        """All attempts in one of the states."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(_attempts).where(_attempts.c.state.in_(tuple(states)))).mappings()
            return [_attempt_row(row) for row in rows]

    def ended_before(self, project: str, before: float) -> list[str]:
        """A project's runs whose last attempt ended before that time, the oldest first."""
        latest = _latest_attempts()
        query = (
            sa.select(_attempts.c.run_id)
            .join(latest, (latest.c.run_id == _attempts.c.run_id) & (latest.c.attempt == _attempts.c.attempt))
            .join(_runs, _runs.c.run_id == _attempts.c.run_id)
            .where(_runs.c.project == project, _attempts.c.state.not_in(ACTIVE), _attempts.c.finished_at < before)
            .order_by(_attempts.c.finished_at)
        )
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def set_started(self, run_id: str, attempt: int) -> bool:
        """The attempt runs, since now unless it did already; false where it has ended."""
        since = sa.func.coalesce(_attempts.c.started_at, time.time())
        return self._change(run_id, attempt, ACTIVE, state=RUNNING, started_at=since)

    def set_finished(
        self, run_id: str, attempt: int, state: str, error: str = "", outputs: Mapping[str, Any] | None = None
    ) -> bool:
        """Ends an attempt that has not ended; false where it has."""
        ended = self._change(
            run_id,
            attempt,
            ACTIVE,
            state=state,
            error=error,
            outputs=json.dumps(outputs or {}),
            finished_at=time.time(),
        )
        if ended:
            self.on_ended(run_id, attempt, state)
        return ended

    def _change(self, run_id: str, attempt: int, states: tuple[str, ...], **values: Any) -> bool:
        with self._engine.begin() as connection:
            return bool(
                connection.execute(
                    sa.update(_attempts)
                    .where(_attempts.c.run_id == run_id, _attempts.c.attempt == attempt, _attempts.c.state.in_(states))
                    .values(**values)
                ).rowcount
            )

    # Progress

    def write_units(self, units: Mapping[UnitKey, str]) -> None:
        """Keeps the units' records, all in one transaction; not those of runs that were forgotten."""
        if not units:
            return
        statement = self._insert_of_a_run(_progress, ["run_id", "attempt", "unit", "record"])
        statement = statement.on_conflict_do_update(
            index_elements=["run_id", "attempt", "unit"], set_={"record": statement.excluded.record}
        )
        rows = [
            {"run_id": run_id, "attempt": attempt, "unit": unit, "record": record}
            for (run_id, attempt, unit), record in units.items()
        ]
        with self._engine.begin() as connection:
            connection.execute(statement, rows)

    def units(self, run_id: str, attempt: int) -> dict[str, Unit]:
        """All units of an attempt by name."""
        query = sa.select(_progress.c.unit, _progress.c.record).where(
            _progress.c.run_id == run_id, _progress.c.attempt == attempt
        )
        with self._engine.connect() as connection:
            return {unit: Unit.from_json(record) for unit, record in connection.execute(query)}

    def whole(self, run_id: str) -> tuple[RunRow, AttemptRow, dict[str, str]]:
        """A run, its last attempt, and the records of that one's units by name. Raises NotFound."""
        # One connection, and one transaction, for all that a caller is told.
        with self._engine.connect() as connection:
            run = connection.execute(sa.select(_runs).where(_runs.c.run_id == run_id)).mappings().one_or_none()
            attempts = sa.select(_attempts).where(_attempts.c.run_id == run_id).order_by(_attempts.c.attempt.desc())
            attempt = connection.execute(attempts.limit(1)).mappings().one_or_none()
            if run is None or attempt is None:
                raise NotFound(f"there is no run {run_id!r}")
            units = sa.select(_progress.c.unit, _progress.c.record).where(
                _progress.c.run_id == run_id, _progress.c.attempt == attempt["attempt"]
            )
            records = {row.unit: row.record for row in connection.execute(units)}
        return _run_row(run), _attempt_row(attempt), records

    def held(self, ended_before: float) -> Held:
        """What the runs hold: their inputs and results.

        A run that failed or was cancelled before `ended_before` holds its inputs only; resumed, it does its work once
        more. Of a run that succeeded before then the last attempt, which names all that it found in the store, holds.
        """
        uris: set[str] = set()
        since = math.inf
        with self._engine.connect() as connection:
            # A run that is submitted while this reads has no attempt here, and goes on.
            last: dict[str, Any] = {}
            columns = (_attempts.c.run_id, _attempts.c.attempt, _attempts.c.state, _attempts.c.finished_at)
            for row in connection.execute(sa.select(*columns).order_by(_attempts.c.attempt)):
                last[row.run_id] = row
            for run in connection.execute(sa.select(_runs.c.run_id, _runs.c.arguments, _runs.c.created_at)):
                uris.update(_uris(json.loads(run.arguments)))
                if run.run_id not in last or last[run.run_id].state in ACTIVE:
                    since = min(since, run.created_at)
            for unit in connection.execute(sa.select(_progress.c.run_id, _progress.c.attempt, _progress.c.record)):
                end = last.get(unit.run_id)
                if end is not None and _holds_nothing(end, unit.attempt, ended_before):
                    continue
                record = json.loads(unit.record)
                uris.update(record.get("results", ()))
                uris.update(_uris(record.get("outputs")))
        return Held(uris, since)

    # Logs

    def keep_log(self, run_id: str, attempt: int, task_key: str, lines: str) -> None:
        """Keeps what was logged about a task, in place of what was kept of it; not for a run that was forgotten."""
        values = {"run_id": run_id, "attempt": attempt, "task_key": task_key, "lines": lines}
        statement = self._insert_of_a_run(_logs, list(values))
        statement = statement.on_conflict_do_update(
            index_elements=["run_id", "attempt", "task_key"], set_={"lines": statement.excluded.lines}
        )
        with self._engine.begin() as connection:
            connection.execute(statement, values)

    def logs_kept(self, run_id: str, attempt: int) -> int:
        """For how many tasks of an attempt something is kept."""
        query = sa.select(sa.func.count()).where(_logs.c.run_id == run_id, _logs.c.attempt == attempt)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def kept_log(self, run_id: str) -> list[str]:
        """What is kept of each task, of all attempts."""
        with self._engine.connect() as connection:
            return list(connection.execute(sa.select(_logs.c.lines).where(_logs.c.run_id == run_id)).scalars())

    # Pools

    def pause(self, pause: Pause) -> None:
        """Keeps a pause, until the pool is resumed; of one that is paused already the first stays."""
        with self._engine.begin() as connection:
            connection.execute(self._insert(_pauses).values(**asdict(pause)).on_conflict_do_nothing())

    def resume(self, pool: str) -> None:
        """Ends a pool's pause, if it has one."""
        with self._engine.begin() as connection:
            connection.execute(sa.delete(_pauses).where(_pauses.c.pool == pool))

    def pauses(self) -> dict[str, Pause]:
        """Of the pools that are paused, by name."""
        with self._engine.connect() as connection:
            return {row["pool"]: Pause(**row) for row in connection.execute(sa.select(_pauses)).mappings()}

    # Orchestrators

    def beat(self, name: str, version: str = "1") -> None:
        """This orchestrator is alive, and goes on with runs whose steps have this version's order."""
        with self._engine.begin() as connection:
            values = {"heartbeat": clock(connection), "application_version": version}
            statement = self._insert(_orchestrators).values(name=name, **values)
            connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))

    def leave(self, name: str) -> None:
        """This orchestrator stops; others may take its runs over at once."""
        with self._engine.begin() as connection:
            connection.execute(sa.update(_orchestrators).where(_orchestrators.c.name == name).values(heartbeat=0.0))

    def alive(self, expiry_seconds: float) -> dict[str, str]:
        """The orchestrators whose heartbeat has not expired: their versions by their names."""
        with self._engine.begin() as connection:
            limit = clock(connection) - expiry_seconds
            columns = (_orchestrators.c.name, _orchestrators.c.application_version)
            query = sa.select(*columns).where(_orchestrators.c.heartbeat >= limit)
            return {row.name: row.application_version for row in connection.execute(query)}

    def claim_expired(self, own: str, owners: Iterable[str], expiry_seconds: float, version: str = "1") -> list[str]:
        """Of `owners`, those whose heartbeat has expired, claimed for adoption: no other orchestrator gets them too.

        An owner that never beat counts as expired once it has been seen for the expiry's time. One that is alive, but
        no longer of this version, was replaced, and never goes on with what its predecessor had; it is in the answer
        for everybody who asks.
        """
        claimed = []
        with self._engine.begin() as connection:
            now = clock(connection)
            for owner in sorted(set(owners) - {own}):
                connection.execute(
                    self._insert(_orchestrators)
                    .values(name=owner, heartbeat=now, application_version=version)
                    .on_conflict_do_nothing()
                )
                taken = connection.execute(
                    sa.update(_orchestrators)
                    .where(_orchestrators.c.name == owner, _orchestrators.c.heartbeat < now - expiry_seconds)
                    .values(heartbeat=now)
                ).rowcount
                of_owner = sa.select(_orchestrators.c.application_version).where(_orchestrators.c.name == owner)
                if taken or connection.execute(of_owner).scalar_one() != version:
                    claimed.append(owner)
        return claimed


def still_going(run_id: str, state: str) -> FailedPrecondition:
    """Why a run's record cannot be deleted."""
    return FailedPrecondition(f"run {run_id} is {state}: only a run that has ended can be forgotten; cancel it first")


def _holds_nothing(end: sa.Row[Any], attempt: int, ended_before: float) -> bool:
    """Of a run's attempt, `end` being the run's last one."""
    ended = end.state not in ACTIVE and end.finished_at < ended_before
    return ended and (end.state in (FAILED, CANCELLED) or attempt < end.attempt)


def _latest_attempts() -> sa.Subquery:
    """Each run's number of its last attempt."""
    last = sa.func.max(_attempts.c.attempt).label("attempt")
    return sa.select(_attempts.c.run_id, last).group_by(_attempts.c.run_id).subquery()


def _run_row(row: Mapping[Any, Any]) -> RunRow:
    return RunRow(**{**row, "arguments": json.loads(row["arguments"])})


def _attempt_row(row: Mapping[Any, Any]) -> AttemptRow:
    return AttemptRow(**{**row, "outputs": json.loads(row["outputs"])})


def _uris(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        if "://" in value:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _uris(item)
    elif isinstance(value, list):
        for item in value:
            yield from _uris(item)


def is_away(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether the database did not answer, as where it is restarted, rather than that it did not like the question."""
    return isinstance(error, sa.exc.OperationalError) or (
        isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    )
