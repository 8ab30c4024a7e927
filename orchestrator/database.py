"""The database: how it is opened, when its connections are tried before they are used, and what counts as lost.

Connections to PostgreSQL that were used a moment ago are taken for alive; others are tried first.

To try each at each use, as SQLAlchemy does by itself, doubles the transactions that a task takes. Where the server went
away in that moment, the statement fails as it would have a moment later, and whoever makes it tries again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

THREADS = 12
"""That use it at a time."""
_CONNECT_SECONDS = 5
_TRUSTED_SECONDS = 2.0
_USED_AT = "used_at"


def _note_use(_connection: Any, record: Any) -> None:
    record.info[_USED_AT] = time.monotonic()


def _try_first(connection: Any, record: Any, _proxy: Any) -> None:
    if time.monotonic() - record.info.get(_USED_AT, 0.0) < _TRUSTED_SECONDS:
        return
    try:
        # Without a transaction around it.
        connection.autocommit = True
        connection.execute("SELECT 1")
        connection.autocommit = False
    except psycopg.Error as error:
        # The pool then opens another one.
        raise sa.exc.DisconnectionError from error


@sa.event.listens_for(sa.Engine, "handle_error")
def _mark_lost(context: sa.engine.ExceptionContext) -> None:
    """What fails with no answer of the server's counts as a lost connection, whatever psycopg calls it.

    By its words alone DBOS knows some of these errors and not others ("connection is bad", of a socket that is gone),
    and gives a workflow up for what it doesn't know, instead of trying again.
    """
    error = context.original_exception
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
        context.is_disconnect = True


POOL: dict[str, Any] = {
    "pool_pre_ping": False,
    "pool_use_lifo": True,
    "pool_events": [(_note_use, "connect"), (_note_use, "checkin"), (_try_first, "checkout")],
}
"""Options of `sqlalchemy.create_engine`."""


def make_database(url: str) -> sa.Engine:
    """The database that URL names: sqlite:///path or postgresql://…"""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_size=4,
            max_overflow=4,
            **POOL,
            connect_args={"connect_timeout": _CONNECT_SECONDS},
        )
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = sa.create_engine(parsed, pool_size=THREADS, max_overflow=8)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # As DBOS itself sets it: writers queue up, instead of failing when a read becomes a write.
        connection.isolation_level = "IMMEDIATE"
        connection.execute("PRAGMA busy_timeout=30000")
        connection.execute("PRAGMA foreign_keys=ON")
        # A killed process loses nothing so. A machine that loses its power may lose the last steps, which are then
        # done again and found in the store.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    return engine


def clock(connection: sa.Connection) -> float:
    """Unix time by the database's clock, which all orchestrators share; SQLite's is this machine's."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
