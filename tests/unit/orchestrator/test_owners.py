"""Whose runs are whose in the record of runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from cryofleet.errors import ResourceExhausted
from orchestrator.database import make_database
from orchestrator.runs import RunRow, RunStore

RUN = RunRow("r", "apo", "p", "p.yaml", "name: p", {}, 1.0, owner="ana")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = make_database(f"sqlite:///{tmp_path}/runs.sqlite")
    yield engine
    engine.dispose()


def test_a_run_keeps_its_owner(database: sa.Engine) -> None:
    store = RunStore(database)
    assert store.create(RUN)
    assert store.run("r").owner == "ana"
    assert not store.create(replace(RUN, owner="ben")), "of one project, whoever asks again gets the same run"
    assert store.run("r").owner == "ana"


def test_the_newest_among_some_projects(database: sa.Engine) -> None:
    store = RunStore(database)
    for number, project in enumerate(("apo", "ribo", "apo", "tmv")):
        store.create(replace(RUN, run_id=f"r{number}", project=project, created_at=float(number)))

    def names(project: str, among: list[str] | None) -> list[str]:
        return [run.run_id for run, _ in store.newest(project, 10, among)]

    assert names("", None) == ["r3", "r2", "r1", "r0"]
    assert names("", ["apo", "ribo"]) == ["r2", "r1", "r0"]
    assert names("ribo", ["apo", "ribo"]) == ["r1"]
    assert names("tmv", ["apo", "ribo"]) == []
    assert names("", []) == []


def test_a_database_from_before_runs_had_owners(database: sa.Engine) -> None:
    RunStore(database).create(RUN)
    with database.begin() as connection:
        for index in sa.inspect(connection).get_indexes("cryofleet_runs"):
            if index["column_names"] == ["owner"]:
                connection.execute(sa.text(f"DROP INDEX {index['name']}"))
        connection.execute(sa.text("ALTER TABLE cryofleet_runs DROP COLUMN owner"))
        connection.execute(sa.text("DROP TABLE cryofleet_schema"))
    store = RunStore(database)
    assert store.run("r") == replace(RUN, owner="")
    assert store.create(replace(RUN, run_id="s"))
    assert store.run("s").owner == "ana"
    inspector = sa.inspect(database)
    assert ["owner"] in [index["column_names"] for index in inspector.get_indexes("cryofleet_runs")]
    RunStore(database)  # and nothing more is to be done


def test_runs_that_go_on_are_counted_by_owner(database: sa.Engine) -> None:
    store = RunStore(database)
    for number in range(3):
        store.create(replace(RUN, run_id=f"r{number}"), 3)
    with pytest.raises(ResourceExhausted, match="ana has 3 runs going on, and may have 3"):
        store.create(replace(RUN, run_id="r3"), 3)
    assert store.newest("", 10)[0][0].run_id != "r3", "nothing of it is kept"
    assert store.create(replace(RUN, run_id="b", owner="ben"), 3)
    assert not store.create(replace(RUN, run_id="r0"), 3), "what is there already is no further run"
    store.set_finished("r0", 1, "failed")
    assert store.create(replace(RUN, run_id="r3"), 3)
    with pytest.raises(ResourceExhausted):
        store.next_attempt("r0", 1, 3)
    store.set_finished("r1", 1, "succeeded")
    assert store.next_attempt("r0", 1, 3)
    assert store.create(replace(RUN, run_id="r4"), 0), "0 is no limit"


def test_runs_submitted_at_once_are_counted_one_by_one(database: sa.Engine) -> None:
    check_counted_one_by_one(RunStore(database))


def check_counted_one_by_one(store: RunStore) -> None:
    """Of twelve runs that a user submits at the same time, two are taken."""

    def submit(number: int) -> bool:
        try:
            return store.create(replace(RUN, run_id=f"at-once-{number}", owner="eve"), 2)
        except ResourceExhausted:
            return False

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(submit, range(12))) == 2
