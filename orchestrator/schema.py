"""Versions of the orchestrator's own tables, and the migrations from each to the next.

The tables of a database are at the version of the last migration that was applied there, which `cryofleet_schema`
records. What is missing is applied when an orchestrator starts: all in one transaction, by one orchestrator at a time,
so that it is done once and whole, or not at all. A database of a newer version is refused. DBOS looks after its tables
by itself.

Migrations only add. While orchestrators are replaced one by one, those of the version before go on with the new tables,
so whatever they read and write must stay: a new table, a column that may be left out, an index that forbids nothing.
What is no longer needed is taken away by a later version, once no orchestrator that used it is left.

To add a migration, append it to `MIGRATIONS` with the next number, and describe the new tables or columns in `runs`
or `inboxes.record`.
One that has been released is never changed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa

from cryofleet import __version__
from cryofleet.errors import FailedPrecondition

logger = logging.getLogger(__name__)

TABLE = "cryofleet_schema"


@dataclass(frozen=True)
class Column:
    """A column that a table gets. `definition` is its type, with a default where it is NOT NULL."""

    table: str
    name: str
    definition: str


@dataclass(frozen=True)
class Migration:
    """What leads from one version to the next."""

    version: int
    what: str
    changes: Sequence[str | Column]
    """SQL that SQLite and PostgreSQL both understand: CREATE TABLE or CREATE INDEX, IF NOT EXISTS; or columns."""


MIGRATIONS = (
    Migration(
        1,
        "runs, attempts, progress, orchestrators",
        (
            """CREATE TABLE IF NOT EXISTS cryofleet_runs (
                run_id TEXT NOT NULL PRIMARY KEY,
                project TEXT NOT NULL,
                pipeline TEXT NOT NULL,
                source TEXT NOT NULL,
                definition TEXT NOT NULL,
                arguments TEXT NOT NULL,
                created_at FLOAT(53) NOT NULL
            )""",
            "CREATE INDEX IF NOT EXISTS ix_cryofleet_runs_project ON cryofleet_runs (project)",
            "CREATE INDEX IF NOT EXISTS ix_cryofleet_runs_created_at ON cryofleet_runs (created_at)",
            """CREATE TABLE IF NOT EXISTS cryofleet_attempts (
                run_id TEXT NOT NULL,
                attempt INTEGER NOT NULL,
                state TEXT NOT NULL,
                error TEXT NOT NULL,
                outputs TEXT NOT NULL,
                queued_at FLOAT(53) NOT NULL,
                started_at FLOAT(53),
                finished_at FLOAT(53),
                PRIMARY KEY (run_id, attempt)
            )""",
            "CREATE INDEX IF NOT EXISTS ix_cryofleet_attempts_state ON cryofleet_attempts (state)",
            """CREATE TABLE IF NOT EXISTS cryofleet_progress (
                run_id TEXT NOT NULL,
                attempt INTEGER NOT NULL,
                unit TEXT NOT NULL,
                record TEXT NOT NULL,
                PRIMARY KEY (run_id, attempt, unit)
            )""",
            """CREATE TABLE IF NOT EXISTS cryofleet_orchestrators (
                name TEXT NOT NULL PRIMARY KEY,
                heartbeat FLOAT(53) NOT NULL
            )""",
        ),
    ),
    Migration(
        2,
        "owners of runs; those from before belong to nobody",
        (
            Column("cryofleet_runs", "owner", "TEXT NOT NULL DEFAULT ''"),
            "CREATE INDEX IF NOT EXISTS ix_cryofleet_runs_owner ON cryofleet_runs (owner)",
        ),
    ),
    Migration(
        3,
        "pauses of pools",
        (
            """CREATE TABLE IF NOT EXISTS cryofleet_pauses (
                pool TEXT NOT NULL PRIMARY KEY,
                paused_at FLOAT(53) NOT NULL,
                paused_by TEXT NOT NULL,
                because TEXT NOT NULL
            )""",
        ),
    ),
    Migration(
        4,
        "what version of the order of steps an orchestrator has; all from before had version 1",
        (Column("cryofleet_orchestrators", "application_version", "TEXT NOT NULL DEFAULT '1'"),),
    ),
    Migration(
        5,
        "inboxes and what has come into them",
        (
            """CREATE TABLE IF NOT EXISTS cryofleet_inboxes (
                project TEXT NOT NULL,
                name TEXT NOT NULL,
                inbox_id TEXT NOT NULL,
                owner TEXT NOT NULL,
                uri TEXT NOT NULL,
                pipeline TEXT NOT NULL,
                source TEXT NOT NULL,
                definition TEXT NOT NULL,
                arguments TEXT NOT NULL,
                input TEXT NOT NULL,
                patterns TEXT NOT NULL,
                settle_seconds FLOAT(53) NOT NULL,
                give_up_seconds FLOAT(53) NOT NULL,
                ready_suffix TEXT NOT NULL,
                at_once INTEGER NOT NULL,
                created_at FLOAT(53) NOT NULL,
                state TEXT NOT NULL,
                problem TEXT NOT NULL,
                worker TEXT NOT NULL,
                PRIMARY KEY (project, name)
            )""",
            """CREATE TABLE IF NOT EXISTS cryofleet_inbox_items (
                inbox_id TEXT NOT NULL,
                number INTEGER NOT NULL,
                uri TEXT NOT NULL,
                size_bytes BIGINT NOT NULL,
                mark TEXT NOT NULL,
                state TEXT NOT NULL,
                first_seen FLOAT(53) NOT NULL,
                unchanged_since FLOAT(53) NOT NULL,
                complete_at FLOAT(53),
                run_id TEXT NOT NULL,
                attempt INTEGER NOT NULL,
                cause TEXT NOT NULL,
                PRIMARY KEY (inbox_id, number)
            )""",
            "CREATE INDEX IF NOT EXISTS ix_cryofleet_inbox_items_state ON cryofleet_inbox_items (inbox_id, state)",
        ),
    ),
    Migration(
        6,
        "what was logged about failed tasks",
        (
            """CREATE TABLE IF NOT EXISTS cryofleet_logs (
                run_id TEXT NOT NULL,
                attempt INTEGER NOT NULL,
                task_key TEXT NOT NULL,
                lines TEXT NOT NULL,
                PRIMARY KEY (run_id, attempt, task_key)
            )""",
        ),
    ),
)
"""In order, numbered from 1. Databases from before there was this record have some of the first three already."""


def migrate(engine: sa.Engine, migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """Brings the database to the version of the last migration. How many were applied, 0 where it was there already.

    Raises FailedPrecondition where the database is of a newer version.
    """
    with _alone(engine) as connection:
        # After the lock: of two orchestrators that start at the same time, the second finds what the first has done.
        connection.exec_driver_sql(
            f"CREATE TABLE IF NOT EXISTS {TABLE} "
            "(version INTEGER NOT NULL PRIMARY KEY, applied_at FLOAT(53) NOT NULL, applied_by TEXT NOT NULL)"
        )
        found, newest = _version(connection), migrations[-1].version
        if found > newest:
            by = connection.execute(
                sa.text(f"SELECT applied_by FROM {TABLE} WHERE version = :version"), {"version": found}
            ).scalar_one()
            raise FailedPrecondition(
                f"the orchestrator's database has tables of version {found}, made by Cryofleet {by}; "
                f"this is Cryofleet {__version__}, which knows them up to version {newest}: "
                "start the newer Cryofleet, or restore a backup from before the upgrade"
            )
        for migration in migrations[found:]:
            _apply(connection, migration)
            logger.info("tables of version %d: %s", migration.version, migration.what)
        return newest - found


def version(engine: sa.Engine) -> int:
    """Of the database's tables; 0 where they are not there, or from before there was a record of it."""
    with engine.connect() as connection:
        return _version(connection) if sa.inspect(connection).has_table(TABLE) else 0


def _version(connection: sa.Connection) -> int:
    return int(connection.execute(sa.text(f"SELECT coalesce(max(version), 0) FROM {TABLE}")).scalar_one())


@contextmanager
def _alone(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that no other orchestrator's migration goes on beside."""
    with engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            # Said here, for Python's own driver would begin none for what changes tables.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(sa.text(f"SELECT pg_advisory_xact_lock(hashtext('{TABLE}'))"))
        yield connection


def _apply(connection: sa.Connection, migration: Migration) -> None:
    for change in migration.changes:
        if isinstance(change, str):
            connection.exec_driver_sql(change)
        elif change.name not in {each["name"] for each in sa.inspect(connection).get_columns(change.table)}:
            connection.exec_driver_sql(f"ALTER TABLE {change.table} ADD COLUMN {change.name} {change.definition}")
    connection.execute(
        sa.text(f"INSERT INTO {TABLE} (version, applied_at, applied_by) VALUES (:version, :at, :by)"),
        {"version": migration.version, "at": time.time(), "by": __version__},
    )
