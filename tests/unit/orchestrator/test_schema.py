"""Versions of the orchestrator's tables: each leads to the next, and the version before goes on with what it finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cryofleet import __version__
from cryofleet.errors import FailedPrecondition
from orchestrator import runs, schema
from orchestrator.database import make_database
from orchestrator.inboxes import record
from orchestrator.runs import RunRow, RunStore
from orchestrator.schema import MIGRATIONS, Column, Migration, migrate, version

TABLES = {**runs._metadata.tables, **record.metadata.tables}
NEXT = Migration(len(MIGRATIONS) + 1, "notes", (Column("cryofleet_runs", "note", "TEXT NOT NULL DEFAULT ''"),))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = make_database(f"sqlite:///{tmp_path}/runs.sqlite")
    yield engine
    engine.dispose()


def test_they_are_numbered_in_order() -> None:
    assert [migration.version for migration in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


def test_they_only_add() -> None:
    for migration in MIGRATIONS:
        for change in migration.changes:
            if isinstance(change, Column):
                needs = "NOT NULL" in change.definition and "DEFAULT" not in change.definition
                assert not needs, f"{change.name}: orchestrators of the version before would not give it"
                assert not re.search("UNIQUE|REFERENCES|CHECK", change.definition), f"{change.name} forbids something"
            else:
                assert re.match("CREATE (TABLE|INDEX) IF NOT EXISTS ", change), f"this does not only add: {change}"


def test_the_tables_are_as_the_records_describe_them(database: sa.Engine) -> None:
    check_tables(database)


def check_tables(database: sa.Engine) -> None:
    """What the migrations make is what `runs` and `inboxes.record` describe."""
    assert migrate(database) in (0, len(MIGRATIONS))
    inspector = sa.inspect(database)
    own = {name for name in inspector.get_table_names() if name.startswith("cryofleet_")}
    assert own == {*TABLES, schema.TABLE}
    for name, table in TABLES.items():
        found = {column["name"]: column for column in inspector.get_columns(name)}
        assert list(found) == [column.name for column in table.columns]
        for column in table.columns:
            assert isinstance(found[column.name]["type"], type(column.type)), f"{name}.{column.name}"
            assert found[column.name]["nullable"] == column.nullable, f"{name}.{column.name}"
        assert inspector.get_pk_constraint(name)["constrained_columns"] == [c.name for c in table.primary_key]
        indexed = {(index["name"], tuple(index["column_names"])) for index in inspector.get_indexes(name)}
        assert indexed == {(index.name, tuple(column.name for column in index.columns)) for index in table.indexes}


def rows(connection: sa.Connection, run: str) -> dict[str, list[str]]:
    """Adds a row to each table, giving the columns that there are and have no default; these columns by table."""
    given: dict[str, list[str]] = {}
    for name in sorted(TABLES):
        if not sa.inspect(connection).has_table(name):
            continue
        columns = [each for each in sa.inspect(connection).get_columns(name) if each["default"] is None]
        values: dict[str, Any] = {
            each["name"]: run if isinstance(each["type"], sa.Text | sa.String) else 1 for each in columns
        }
        insert(connection, name, values)
        given[name] = list(values)
    return given


def insert(connection: sa.Connection, name: str, values: dict[str, Any]) -> None:
    marks = ", ".join(f":{column}" for column in values)
    connection.execute(sa.text(f"INSERT INTO {name} ({', '.join(values)}) VALUES ({marks})"), values)


@pytest.mark.parametrize("before", range(1, len(MIGRATIONS) + 1))
def test_the_version_before_goes_on(database: sa.Engine, before: int) -> None:
    check_goes_on(database, before)


def check_goes_on(database: sa.Engine, before: int) -> None:
    """Rows of a version are kept by all later ones, and its statements still work there."""
    assert migrate(database, MIGRATIONS[:before]) == before
    with database.begin() as connection:
        given = rows(connection, "before")
    assert migrate(database, (*MIGRATIONS, NEXT)) == len(MIGRATIONS) + 1 - before
    with database.begin() as connection:
        for name, columns in given.items():
            text = f"SELECT {', '.join(columns)} FROM {name}"
            (kept,) = connection.execute(sa.text(text)).all()
            assert set(kept) <= {"before", 1}
            again = {column: "after" if value == "before" else 2 for column, value in kept._mapping.items()}
            insert(connection, name, again)
            assert len(connection.execute(sa.text(text)).all()) == 2


def test_a_version_before_writes_to_the_next_ones_tables(database: sa.Engine) -> None:
    store = RunStore(database)
    assert migrate(database, (*MIGRATIONS, NEXT)) == 1
    row = RunRow("r", "apo", "p", "p.yaml", "name: p", {}, 1.0)
    assert store.create(row)
    assert store.run("r") == row
    store.beat("one")
    assert store.alive(60.0) == {"one": "1"}


def test_a_newer_database_is_refused(database: sa.Engine) -> None:
    migrate(database, (*MIGRATIONS, NEXT))
    with pytest.raises(FailedPrecondition) as caught:
        RunStore(database)
    assert f"tables of version {len(MIGRATIONS) + 1}, made by Cryofleet {__version__}" in caught.value.message
    assert f"knows them up to version {len(MIGRATIONS)}" in caught.value.message
    assert version(database) == len(MIGRATIONS) + 1


def test_what_fails_in_the_middle_changes_nothing(database: sa.Engine) -> None:
    check_nothing_changes(database)


def check_nothing_changes(database: sa.Engine) -> None:
    migrate(database)
    broken = Migration(
        NEXT.version + 1, "broken", ("CREATE TABLE IF NOT EXISTS cryofleet_more (x TEXT)", "CREATE nonsense")
    )
    with pytest.raises(sa.exc.DBAPIError):
        migrate(database, (*MIGRATIONS, NEXT, broken))
    assert version(database) == len(MIGRATIONS)
    inspector = sa.inspect(database)
    assert not inspector.has_table("cryofleet_more")
    assert "note" not in {column["name"] for column in inspector.get_columns("cryofleet_runs")}


def test_several_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    check_migrated_once(f"sqlite:///{tmp_path}/runs.sqlite")


def check_migrated_once(url: str) -> None:
    """Of six orchestrators that start at the same time one applies everything, on connections of its own."""
    engines = [make_database(url) for _ in range(6)]
    try:
        with ThreadPoolExecutor(len(engines)) as threads:
            assert sorted(threads.map(migrate, engines)) == [0] * 5 + [len(MIGRATIONS)]
        assert version(engines[0]) == len(MIGRATIONS)
    finally:
        for engine in engines:
            engine.dispose()


def test_a_database_without_a_version(database: sa.Engine) -> None:
    assert version(database) == 0
    migrate(database)
    with database.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {schema.TABLE}"))
        connection.execute(sa.text("DROP TABLE cryofleet_pauses"))
    assert version(database) == 0
    check_tables(database)
