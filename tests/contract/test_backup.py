"""A backup that is made while a run goes on: restored elsewhere, the run goes on there and loses nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from cryofleet.artifacts import ResultWriter, manifest_for
from cryofleet.backup import Vault, databases, make_backup, restore_backup
from cryofleet.errors import FailedPrecondition, Unavailable
from cryofleet.particles import Particles
from cryofleet.settings import Settings
from cryofleet.storage import Store
from cryofleet.v1 import runtime_pb2
from orchestrator.database import make_database
from orchestrator.engine import Engine
from orchestrator.runs import RunRow, RunStore
from tests.postgres import new_database, postgres_programs, running_postgres
from tests.unit.orchestrator.fake import FakeService, settings_in, short_folder

SHARDS = 40
ROWS = 5
PIPELINE = """
name: sharded
inputs:
  table: {kind: particles}
steps:
  - id: parts
    op: runtime.SelfTest
    with: {particles_uri: "${table}", index: 7}
    shards: {over: particles_uri, size: 5}
  - id: again
    op: runtime.SelfTest
    foreach: ${parts.first_row}
    as: row
    with: {particles_uri: "${table}", index: "${row}"}
outputs:
  first_rows: ${parts.first_row}
  rows: ${again.index}
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture
async def home() -> AsyncIterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Site:
    """A home, a database, an engine and a service of its own."""

    def __init__(self, home: Path, database: str) -> None:
        home.mkdir(mode=0o700)
        self.settings: Settings = replace(
            settings_in(home, pools={"io": f"unix:{home}/s.sock"}, instance=home.name), database=database
        )
        self.store = Store.open(self.settings)
        self.service = FakeService("worker", 4, self.store)
        self.engine = Engine(self.settings, self.store)

    async def start(self) -> None:
        await self.service.start(self.settings.pools["io"])
        await self.engine.start()

    async def stop(self) -> None:
        await self.engine.stop()
        await self.service.kill()

    def results(self) -> int:
        return sum(found.uri.endswith("/manifest.json") for found in self.store.list(self.store.root))

    def recorded(self) -> set[str]:
        """The tasks whose outcomes DBOS has kept."""
        database = make_database(self.settings.database)
        table = "operation_outputs" if database.dialect.name == "sqlite" else "dbos.operation_outputs"
        with database.connect() as connection:
            texts = connection.execute(sa.text(f"SELECT output FROM {table} WHERE function_name = 'task'")).scalars()
            tasks = {json.loads(text)["task"] for text in texts}
        database.dispose()
        return tasks


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_run_goes_on_from_its_backup(
    kind: str, home: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.engine.HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr("orchestrator.recovery.EXPIRY_SECONDS", 2.0)
    if kind == "sqlite":
        urls = [f"sqlite:///{home}/{name}.sqlite" for name in ("old", "new")]
    else:
        monkeypatch.setenv("PATH", f"{postgres_programs()}:{os.environ['PATH']}")
        server: str = request.getfixturevalue("postgres")
        urls = [await asyncio.to_thread(new_database, server, name) for name in ("old", "new")]
    old, new = Site(home / "old", urls[0]), Site(home / "new", urls[1])
    table = pd.DataFrame({"id": np.arange(SHARDS * ROWS), "x": 1.0, "y": 1.0, "z": 1.0})
    table_uri = f"{old.store.root}/default/table.parquet"
    old.store.put(table_uri, Particles(table, 10.0, "t", None).to_parquet())

    async def take_a_while(request: runtime_pb2.SelfTestRequest, context: Any) -> None:
        await asyncio.sleep(0.1)

    old.service.behave = take_a_while
    destination = str(home / "backups")
    await old.start()
    try:
        row = RunRow("run", "default", "sharded", "p.yaml", PIPELINE, {"table": table_uri}, time.time())
        assert await old.engine.in_thread(old.engine.runs.create, row)
        await old.engine.start_attempt("run", 1)
        async with asyncio.timeout(60):
            while len(old.service.done) < SHARDS // 2:
                await asyncio.sleep(0.01)
        made = await asyncio.to_thread(make_backup, old.settings, destination)
        assert made.statement.database_kind == kind
        assert old.engine.runs.attempt("run").state == "running", "the run went on meanwhile"
    finally:
        await old.stop()
    # Nothing of the old platform is left.
    shutil.rmtree(old.settings.home)
    await asyncio.to_thread(restore_backup, new.settings, destination)
    with pytest.raises(FailedPrecondition, match="not empty"):
        restore_backup(new.settings, destination)
    if kind == "postgresql":
        with pytest.raises(FailedPrecondition, match="the database has the table"):
            databases.open_database(new.settings.database).check_empty()
    recorded, results = new.recorded(), new.results()
    assert len(recorded) >= SHARDS // 4
    assert results >= len(recorded), "what the database names is in the store"
    await new.start()
    try:
        async with asyncio.timeout(60):
            while (attempt := new.engine.runs.attempt("run")).state in ("queued", "running"):
                await new.engine.wait_for_change("run", 0.1)
        units = new.engine.runs.units("run", 1)
    finally:
        await new.stop()
    assert (attempt.state, attempt.attempt) == ("succeeded", 1), attempt.error
    assert attempt.outputs["first_rows"] == attempt.outputs["rows"] == list(range(0, SHARDS * ROWS, ROWS))
    assert not recorded & set(new.service.calls), "what was recorded is not done again"
    assert len(new.service.calls) == 2 * SHARDS - results, "nor what the store had, though nobody had recorded it"
    named = {uri for unit in units.values() for uri in unit.results}
    assert len(named) == 2 * SHARDS
    assert all(uri.startswith(new.store.root) for uri in named), "the results are those of the new store"
    assert all(manifest_for(new.store, uri) is not None for uri in named)


def test_programs_and_servers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = databases.open_database("postgresql+psycopg://me:se%40cret@localhost:9/x?connect_timeout=1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="pg_dump is not installed here"):
        database.dump(tmp_path / "dump")
    monkeypatch.setenv("PATH", str(postgres_programs()))
    with pytest.raises(Unavailable) as caught:
        database.dump(tmp_path / "dump")
    assert "cret" not in caught.value.message
    # A program that prints its arguments and the password that its environment has.
    program = tmp_path / "pg_dump"
    program.write_text('#!/bin/sh\necho "$@" "$PGPASSWORD" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(FailedPrecondition) as told:
        database.dump(tmp_path / "dump")
    assert told.value.message.endswith("postgresql://me@localhost:9/x?connect_timeout=1 se@cret")


def test_on_the_command_line(tmp_path: Path) -> None:
    home, place = tmp_path / "home", str(tmp_path / "backups")
    environment = {**os.environ, "CRYOFLEET_HOME": str(home)}

    def cryofleet(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cryofleet", *words],
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
        )

    settings = Settings.from_environment({"CRYOFLEET_HOME": str(home)})
    store = Store.open(settings)
    writer = ResultWriter(store, "default", "a" * 64)
    uri = writer.put("data.bin", b"x" * 10)
    writer.commit(operation="io.Upload", version=1, parameters={}, inputs={}, result={}, seconds=0.0)
    database = make_database(settings.database)
    RunStore(database)
    database.dispose()
    done = cryofleet("backup", place, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["objects"], made["copied_objects"], made["database"]) == (2, 3, "sqlite")
    listed = cryofleet("restore", place, "--list")
    assert made["backup"] in listed.stdout
    refused = cryofleet("restore", place)
    assert refused.returncode == 7
    assert "is not empty" in refused.stderr
    restored = cryofleet("restore", place, CRYOFLEET_HOME=str(tmp_path / "other"))
    assert restored.returncode == 0, restored.stderr
    assert "the database and 2 objects" in restored.stdout
    assert "all verified" in restored.stdout
    store.put(uri, b"y" * 10)
    assert cryofleet("backup", place).returncode == 0, "the backup has it as it was"
    assert len(Vault(place, settings).names()) == 2
    partly = cryofleet("backup", str(tmp_path / "more"))
    assert partly.returncode == 3
    assert f"left out default/{'a' * 64}: {uri}: block 0" in partly.stderr
