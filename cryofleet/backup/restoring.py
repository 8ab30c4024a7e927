"""Restoring a backup."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryofleet.artifacts import digest_of
from cryofleet.backup.databases import open_database
from cryofleet.backup.statement import Entry, Statement
from cryofleet.backup.vault import Vault
from cryofleet.errors import FailedPrecondition
from cryofleet.settings import Settings
from cryofleet.storage import Store

RESTORING = "_restoring"
"""An object in the store's root that says which backup is being restored there."""
_THREADS = 4


@dataclass(frozen=True)
class Restored:
    """A backup that was restored."""

    statement: Statement
    root: str
    """URI of the store that it is in."""
    copied_objects: int
    """The others were there, from a restore that was cut off."""
    copied_bytes: int


def restore_backup(
    settings: Settings, source: str, name: str = "", is_up: Callable[[], bool] = lambda: False
) -> Restored:
    """Restores a backup, the newest where no name is given, into an empty store and an empty database.

    Every object is verified, the manifest of each result comes last, and the database after all of them. Where it is
    cut off in the middle it can be repeated: what is there is verified, not copied again. `is_up` says whether the
    platform is.

    Raises FailedPrecondition where the platform is up, the store or the database is not empty, or the database is of
    another kind; DataLoss naming the object where the backup is damaged.
    """
    vault = Vault(source, settings)
    statement = vault.statement(name)
    database = open_database(settings.database)
    if database.kind != statement.database_kind:
        raise FailedPrecondition(
            f"backup {statement.name} has a {statement.database_kind} database, "
            f"and CRYOFLEET_DATABASE is {database.kind}"
        )
    if is_up():
        raise FailedPrecondition("the platform is up: stop it first, with `cryofleet down`")
    store = Store.open(settings)
    present = _present(store, statement)
    database.check_empty()
    store.put(f"{store.root}/{RESTORING}", _mark(statement))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="restore") as threads:
        copied = [
            entry
            for entries in threads.map(partial(_restore, store, vault, present), list(statement.folders()))
            for entry in entries
        ]
    with tempfile.TemporaryDirectory(dir=settings.scratch, prefix="cryofleet-restore-") as scratch:
        dump = Path(scratch) / statement.database.name
        with dump.open("wb") as file:
            file.writelines(vault.read(statement.database))
        database.load(dump, (statement.root, store.root))
    store.delete(f"{store.root}/{RESTORING}")
    return Restored(statement, store.root, len(copied), sum(entry.size_bytes for entry in copied))


def _mark(statement: Statement) -> bytes:
    return f"{statement.name} {statement.database.digest}\n".encode()


def _present(store: Store, statement: Statement) -> dict[str, int]:
    """Sizes of the objects that an earlier restore of the same backup has left there, by their names."""
    found = {each.uri[len(store.root) + 1 :]: each.size_bytes for each in store.list(store.root)}
    if not found:
        return {}
    mark = found.pop(RESTORING, None)
    if mark is None:
        raise FailedPrecondition(
            f"the store {store.root} is not empty, it has {min(found)}; a backup is restored into an empty one"
        )
    if store.get(f"{store.root}/{RESTORING}") != _mark(statement):
        raise FailedPrecondition(f"another backup is half restored to {store.root}: delete what is there first")
    strangers = found.keys() - {entry.name for entry in statement.objects}
    if strangers:
        raise FailedPrecondition(f"{store.root}/{min(strangers)} is not of the backup that is half restored there")
    return found


def _restore(store: Store, vault: Vault, present: dict[str, int], entries: list[Entry]) -> list[Entry]:
    """Restores objects that belong together; those that were copied."""
    copied = []
    for entry in entries:
        uri = f"{store.root}/{entry.name}"
        if present.get(entry.name) == entry.size_bytes and digest_of(store.stream(uri)) == entry.digest:
            continue
        store.put(uri, vault.read(entry))
        copied.append(entry)
    return copied
