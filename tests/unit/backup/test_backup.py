"""Backups of a store and an SQLite database, and what is restored from them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from cryofleet.artifacts import LEAVING, InputEntry, ResultWriter, identity, manifest_for, open_blob, verify
from cryofleet.backup import Vault, make_backup, making, restore_backup, restoring
from cryofleet.backup.databases import open_database
from cryofleet.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from cryofleet.settings import S3Settings, Settings
from cryofleet.storage import Store
from cryofleet.storage.s3 import S3Store

ANSWER = "é: "
"""What JSON writes otherwise than it is."""


def settings_in(home: Path, root: str = "", **more: Any) -> Settings:
    return Settings(
        home=home, store=root or f"file://{home}/store", database=f"sqlite:///{home}/orchestrator.sqlite", **more
    )


def put_result(store: Store, number: int, project: str = "apo", size: int = 1000, source: str = "") -> str:
    """A result of two objects; its folder."""
    key = identity("io.Upload", 1, {"number": number}, {})
    writer = ResultWriter(store, project, key)
    first = writer.put("data.bin", bytes([number % 256]) * size)
    writer.put("deeper/same.bin", b"the same in all of them")
    inputs = {"source": [InputEntry(uri=source, digest="0" * 64)]} if source else {}
    result = {"uri": first}
    writer.commit(operation="io.Upload", version=1, parameters={}, inputs=inputs, result=result, seconds=1.0)
    return writer.uri


def write_database(settings: Settings, *texts: str) -> None:
    path = Path(settings.database.removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE IF NOT EXISTS texts (number INTEGER PRIMARY KEY, content TEXT)")
        connection.executemany("INSERT INTO texts (content) VALUES (?)", [(text,) for text in texts])


def read_database(settings: Settings) -> list[str]:
    with closing(sqlite3.connect(settings.database.removeprefix("sqlite:///"))) as connection:
        return [text for (text,) in connection.execute("SELECT content FROM texts ORDER BY number")]


def objects(store: Store) -> dict[str, bytes]:
    return {found.uri[len(store.root) + 1 :]: store.get(found.uri) for found in store.list(store.root)}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Settings]:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = S3Settings(f"{host}:{port}", "key", "secret-key", secure=False)
        S3Store(settings)._client.make_bucket("backups")
        yield settings
    finally:
        server.stop()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A platform with three results, of which the second was made from the first, a pin and a database."""
    found = settings_in(tmp_path / "one")
    store = Store.open(found)
    first = put_result(store, 1)
    put_result(store, 2, source=f"{first}/data.bin")
    put_result(store, 3, project="ribo", size=9_000_000)
    store.put(f"{store.root}/apo/_pins/{first.rpartition('/')[2]}", b"store:/apo\n")
    write_database(found, json.dumps({"uri": f"{first}/data.bin", "note": ANSWER}), f"of {store.root}", "nothing")
    return found


@pytest.fixture
def destination(tmp_path: Path) -> str:
    return str(tmp_path / "backups")


def test_all_is_restored_elsewhere(settings: Settings, destination: str, tmp_path: Path) -> None:
    made = make_backup(settings, destination)
    assert made.statement.left_out == ()
    other = settings_in(tmp_path / "ötherwhere")
    restored = restore_backup(other, destination)
    assert restored.statement == made.statement
    old, new = Store.open(settings), Store.open(other)
    assert objects(new) == objects(old)
    for name in objects(new):
        manifest = manifest_for(new, f"{new.root}/{name}")
        if manifest is not None:
            assert verify(new, manifest) == []
            for entry in manifest.inputs.get("source", []):
                assert entry["uri"].startswith(f"{new.root}/apo/"), "what it was made from is in the new store"
                assert open_blob(new, entry["uri"]).read() == b"\1" * 1000
    first, second, third = read_database(other)
    assert json.loads(first)["uri"].startswith(f"{new.root}/apo/")
    assert json.loads(first)["note"] == ANSWER
    assert (second, third) == (f"of {old.root}", "nothing"), "a root with nothing below it is no URI of an artifact"
    assert Path(other.database.removeprefix("sqlite:///")).stat().st_mode & 0o777 == 0o600
    assert Path(destination).stat().st_mode & 0o777 == 0o700


def test_to_s3_and_back(settings: Settings, s3: S3Settings, tmp_path: Path) -> None:
    place = "s3://backups/to-s3"
    make_backup(replace(settings, s3=s3), place)
    other = settings_in(tmp_path / "two", "s3://backups/store", s3=s3)
    restored = restore_backup(other, place)
    assert restored.root == "s3://backups/store"
    assert objects(Store.open(other)) == objects(Store.open(settings))
    assert "s3://backups/store/apo/" in read_database(other)[0]
    assert make_backup(other, place).copied_objects <= 1, "of another store: only the database is another"


def test_what_is_there_is_not_copied_again(
    settings: Settings, destination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two that copy the same at the same time both copy it, which does no harm.
    monkeypatch.setattr(making, "_THREADS", 1)
    first = make_backup(settings, destination)
    # The database, three blobs, one that is the same in all, three manifests, a pin.
    assert first.copied_objects == 9
    again = make_backup(settings, destination)
    assert (again.copied_objects, again.copied_bytes) == (0, 0)
    put_result(Store.open(settings), 4)
    write_database(settings, "more")
    third = make_backup(settings, destination)
    assert third.copied_objects == 3, "the database, a blob, a manifest"
    assert Vault(destination, settings).names() == sorted(each.statement.name for each in (first, again, third))


def test_an_older_backup_is_whole(settings: Settings, destination: str, tmp_path: Path) -> None:
    before = objects(Store.open(settings))
    first = make_backup(settings, destination)
    put_result(Store.open(settings), 4)
    make_backup(settings, destination)
    other = settings_in(tmp_path / "two")
    restore_backup(other, destination, first.statement.name)
    assert objects(Store.open(other)) == before
    with pytest.raises(NotFound, match=f"no backup 'x' at .*there are {first.statement.name}, "):
        restore_backup(settings_in(tmp_path / "three"), destination, "x")


def test_old_backups_are_deleted(settings: Settings, destination: str, tmp_path: Path) -> None:
    store = Store.open(settings)
    gone = put_result(store, 4)
    make_backup(settings, destination)
    for found in list(store.list(gone)):
        store.delete(found.uri)
    before = objects(Store(f"file://{destination}"))
    made = make_backup(settings, destination, keep=1)
    assert made.deleted == 1
    after = objects(Store(f"file://{destination}"))
    assert len(before.keys() - after.keys()) == 3, "the statement, and the blob and the manifest that are gone"
    restore_backup(settings_in(tmp_path / "two"), destination)


def test_what_is_no_result_is_not_copied(settings: Settings, destination: str) -> None:
    store = Store.open(settings)
    unfinished = f"apo/{'a' * 64}/data.bin"
    leaving = f"{put_result(store, 5)}/{LEAVING}"
    for name in (unfinished, f"apo/_work/{'b' * 64}/checkpoint", "_clock-1"):
        store.put(f"{store.root}/{name}", b"x")
    store.put(leaving, b"")
    names = {entry.name for entry in make_backup(settings, destination).statement.objects}
    assert len(names) == 13
    assert not {name for name in names if "_work" in name or "_clock" in name or name.endswith(LEAVING)}
    assert unfinished not in names


def test_the_manifest_of_a_result_comes_last(settings: Settings, destination: str) -> None:
    for folder in make_backup(settings, destination).statement.folders():
        names = [entry.name.rpartition("/")[2] for entry in folder]
        assert "manifest.json" not in names[:-1]


def test_a_damaged_result_is_left_out_and_named(settings: Settings, destination: str, tmp_path: Path) -> None:
    store = Store.open(settings)
    bad = put_result(store, 6)
    store.put(f"{bad}/data.bin", b"?" * 1000)
    made = make_backup(settings, destination)
    (problem,) = made.statement.left_out
    assert problem.name == bad[len(store.root) + 1 :]
    assert f"{bad}/data.bin: block 0" in problem.cause
    other = settings_in(tmp_path / "two")
    restore_backup(other, destination)
    assert not [name for name in objects(Store.open(other)) if name.startswith(problem.name)]


def test_results_that_are_deleted_meanwhile(
    settings: Settings, destination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(settings)
    gone = put_result(store, 7)
    real = open_blob

    def late(of: Store, uri: str, manifest: Any) -> Any:
        if uri.startswith(gone):
            for found in list(store.list(gone)):
                store.delete(found.uri)
        return real(of, uri, manifest)

    monkeypatch.setattr(making, "open_blob", late)
    statement = make_backup(settings, destination).statement
    assert statement.left_out == ()
    assert not [entry for entry in statement.objects if gone.endswith(entry.folder)]
    assert len(statement.objects) == 10


def test_the_database_is_copied_before_the_store(
    settings: Settings, destination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = open_database

    def watched(url: str) -> Any:
        database = real(url)
        dump = database.dump

        def dump_and_go_on(target: Path) -> None:
            dump(target)
            late = put_result(Store.open(settings), 8)
            write_database(settings, f"{late}/data.bin")

        monkeypatch.setattr(database, "dump", dump_and_go_on)
        return database

    monkeypatch.setattr(making, "open_database", watched)
    statement = make_backup(settings, destination).statement
    assert len(statement.objects) == 13, "what came later is there too"
    copied = b"".join(Vault(destination, settings).read(statement.database))
    assert b"nothing" in copied
    late = json.dumps({"number": 8})
    assert identity("io.Upload", 1, json.loads(late), {}).encode() not in copied


def damage(destination: str, digest: str) -> Path:
    path = Path(destination, "objects", digest[:2], digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_backup_is_refused_and_named(settings: Settings, destination: str, tmp_path: Path) -> None:
    statement = make_backup(settings, destination).statement
    entry = next(entry for entry in statement.objects if entry.name.startswith("ribo") and "data" in entry.name)
    path = damage(destination, entry.digest)
    other = settings_in(tmp_path / "two")
    with pytest.raises(DataLoss, match=f"{entry.name}: file://{path} is damaged"):
        restore_backup(other, destination)
    store = Store.open(other)
    assert not store.exists(f"{store.root}/{entry.name}")
    assert not Path(other.database.removeprefix("sqlite:///")).exists(), "a platform must not begin with half of it"
    with pytest.raises(FailedPrecondition, match="half restored"):
        make_backup(other, str(tmp_path / "more"))
    # Made good from the original, it is taken up where it was.
    assert make_backup(settings, destination).copied_objects == 0, "by its size it is there"
    assert make_backup(settings, destination, verify=True).copied_objects == 1
    restored = restore_backup(other, destination, statement.name)
    assert 0 < restored.copied_objects < len(statement.objects)
    assert objects(store) == objects(Store.open(settings))
    path.unlink()
    with pytest.raises(DataLoss, match=f"{entry.name}: .* is missing from the backup"):
        restore_backup(settings_in(tmp_path / "three"), destination, statement.name)


def test_a_damaged_database_and_a_damaged_statement(settings: Settings, destination: str, tmp_path: Path) -> None:
    statement = make_backup(settings, destination).statement
    damage(destination, statement.database.digest)
    with pytest.raises(DataLoss, match=r"database: .* is damaged"):
        restore_backup(settings_in(tmp_path / "two"), destination)
    place = Path(destination, "backups", f"{statement.name}.json.gz")
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)
    with pytest.raises(DataLoss, match=rf"{statement.name}.json.gz is damaged"):
        restore_backup(settings_in(tmp_path / "three"), destination)


def test_a_backup_that_is_cut_off_is_none(
    settings: Settings, destination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_backup(settings, destination)
    put_result(Store.open(settings), 4)
    put_result(Store.open(settings), 5, project="tmv")
    write_database(settings, "more")
    monkeypatch.setattr(making, "_THREADS", 1)
    real, calls = Vault.add, 0

    def cut_off(vault: Vault, *arguments: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls > 13:
            raise KeyboardInterrupt
        return real(vault, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Vault, "add", cut_off)
        with pytest.raises(KeyboardInterrupt):
            make_backup(settings, destination)
    vault = Vault(destination, settings)
    assert vault.names() == [first.statement.name]
    assert vault.statement() == first.statement
    again = make_backup(settings, destination)
    assert 0 < again.copied_objects < 5, "the rest of five"


def test_a_restore_that_is_cut_off_goes_on(
    settings: Settings, destination: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statement = make_backup(settings, destination).statement
    other = settings_in(tmp_path / "two")
    monkeypatch.setattr(restoring, "_THREADS", 1)
    real, calls = Vault.read, 0

    def cut_off(vault: Vault, entry: Any) -> Iterator[bytes]:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return real(vault, entry)

    with monkeypatch.context() as patched:
        patched.setattr(Vault, "read", cut_off)
        with pytest.raises(KeyboardInterrupt):
            restore_backup(other, destination)
    # What was changed since is noticed, and restored again.
    store = Store.open(other)
    place = next(found.uri for found in store.list(store.root) if found.uri.endswith("data.bin"))
    store.put(place, b"?" * len(store.get(place)))
    restored = restore_backup(other, destination)
    assert restored.copied_objects == len(statement.objects) - 3
    assert objects(store) == objects(Store.open(settings))


def test_a_target_that_is_not_empty(settings: Settings, destination: str, tmp_path: Path) -> None:
    make_backup(settings, destination)
    other = settings_in(tmp_path / "two")
    mine = put_result(Store.open(other), 9)
    with pytest.raises(FailedPrecondition, match=r"the store .* is not empty, it has apo/"):
        restore_backup(other, destination)
    assert sorted(objects(Store.open(other))) == [
        f"apo/{mine.rpartition('/')[2]}/{name}" for name in ("data.bin", "deeper/same.bin", "manifest.json")
    ]
    third = settings_in(tmp_path / "three")
    third.home.mkdir()
    write_database(third, "mine")
    with pytest.raises(FailedPrecondition, match=r"there is a database .*orchestrator.sqlite already"):
        restore_backup(third, destination)
    assert objects(Store.open(third)) == {}
    with pytest.raises(FailedPrecondition, match="the platform is up"):
        restore_backup(settings_in(tmp_path / "four"), destination, is_up=lambda: True)
    with pytest.raises(FailedPrecondition, match="has a sqlite database, and CRYOFLEET_DATABASE is postgresql"):
        restore_backup(replace(other, database="postgresql://localhost/x"), destination)


def test_half_of_another_backup(settings: Settings, destination: str, tmp_path: Path) -> None:
    make_backup(settings, destination)
    other = settings_in(tmp_path / "two")
    store = Store.open(other)
    store.put(f"{store.root}/{restoring.RESTORING}", b"of another\n")
    with pytest.raises(FailedPrecondition, match="another backup is half restored"):
        restore_backup(other, destination)


def test_places_that_can_hold_no_backup(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="must not lie within each other"):
        make_backup(settings, f"{settings.store}/backups")
    with pytest.raises(InvalidArgument, match="must not lie within each other"):
        make_backup(settings, str(tmp_path))
    with pytest.raises(PermissionDenied):
        make_backup(settings, "file:///tmp/../backups")
    with pytest.raises(NotFound, match="no backup at"):
        restore_backup(settings_in(tmp_path / "two"), str(tmp_path / "nothing"))
    with pytest.raises(NotFound, match="there is no database"):
        make_backup(settings_in(tmp_path / "three"), str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
