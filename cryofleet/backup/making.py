"""Making a backup."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from pathlib import Path

from cryofleet import __version__
from cryofleet.artifacts import LEAVING, MANIFEST, Manifest, digest_file, digest_of, open_blob
from cryofleet.backup.databases import open_database
from cryofleet.backup.restoring import RESTORING
from cryofleet.backup.statement import Entry, LeftOut, Statement
from cryofleet.backup.vault import Vault
from cryofleet.errors import DataLoss, FailedPrecondition, NotFound
from cryofleet.settings import Settings
from cryofleet.storage import CHUNK_BYTES, Store

DATABASE = "database"
"""What a backup calls the copy of the database."""
_WORK = "_work"
_KEY = re.compile(r"[0-9a-f]{64}")
_THREADS = 4


@dataclass(frozen=True)
class Made:
    """A backup that was made."""

    statement: Statement
    copied_objects: int
    copied_bytes: int
    """What was not at the destination yet."""
    deleted: int
    """Older backups that were deleted."""


@dataclass
class _Found:
    """What a folder of the store gave."""

    entries: list[Entry] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    copied: list[Entry] = field(default_factory=list)


def make_backup(settings: Settings, destination: str, *, verify: bool = False, keep: int = 0) -> Made:
    """Copies the database and then the store, whatever goes on meanwhile; what is there already isn't copied again.

    With `verify` all that is at the destination already is read, and copied once more where it is damaged. With `keep`
    only so many of the newest backups are left there. A result that is damaged in the store is left out, and named.

    Raises NotFound where there is no database, FailedPrecondition where the store is half restored.
    """
    store, vault = Store.open(settings), Vault(destination, settings)
    if store.exists(f"{store.root}/{RESTORING}"):
        raise FailedPrecondition(f"{store.root} is half restored: `cryofleet restore` must end first")
    database = open_database(settings.database)
    with tempfile.TemporaryDirectory(dir=settings.scratch, prefix="cryofleet-backup-") as scratch:
        dump = Path(scratch) / DATABASE
        database.dump(dump)
        vault.create()
        entry = Entry(DATABASE, dump.stat().st_size, digest_file(dump))
        new = [entry] if vault.add(entry, partial(_pieces, dump), verify) else []
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="backup") as threads:
        found = list(threads.map(partial(_copy, store, vault, verify), _folders(store)))
    new += [entry for each in found for entry in each.copied]
    statement = Statement(
        name=f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}"[:-3] + "Z",
        software=f"cryofleet {__version__}",
        root=store.root,
        database_kind=database.kind,
        database=entry,
        objects=tuple(entry for each in found for entry in each.entries),
        left_out=tuple(problem for each in found for problem in each.left_out),
    )
    vault.finish(statement)
    deleted = vault.keep_newest(keep) if keep else 0
    return Made(statement, len(new), sum(entry.size_bytes for entry in new), deleted)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def _folders(store: Store) -> Iterator[list[str]]:
    """Names of objects below the root, by the folder they lie in, PROJECT/KEY and so on; without what is not copied."""
    names = (found.uri[len(store.root) + 1 :] for found in store.list(store.root))
    for folder, together in groupby(names, key=lambda name: "/".join(name.split("/")[:2])):
        # Checkpoints change while they are copied, and what they are of is computed again without them.
        if folder.rpartition("/")[2] != _WORK and not folder.startswith("_clock-"):
            yield [name for name in together if not name.endswith(f"/{LEAVING}")]


def _copy(store: Store, vault: Vault, verify: bool, names: list[str]) -> _Found:
    found = _Found()
    if not names:
        return found
    parts = names[0].split("/")
    is_result = len(parts) > 2 and bool(_KEY.fullmatch(parts[1]))
    try:
        if not is_result:
            for name in names:
                _copy_plain(store, vault, verify, name, found)
        elif f"{parts[0]}/{parts[1]}/{MANIFEST}" in names:
            _copy_result(store, vault, verify, f"{parts[0]}/{parts[1]}", found)
        # Otherwise it is not finished: it does not exist.
    except NotFound:
        # Deleted meanwhile: by `cryofleet gc`, or a pin by its user. What is half there is as good as not there.
        return _Found() if is_result else found
    except DataLoss as problem:
        if is_result and not store.exists(f"{store.root}/{parts[0]}/{parts[1]}/{MANIFEST}"):
            return _Found()
        return _Found(left_out=[LeftOut("/".join(parts[:2]), problem.message)])
    return found


def _copy_plain(store: Store, vault: Vault, verify: bool, name: str, found: _Found) -> None:
    """A pin, an entry of the index of models, or whatever else somebody put there."""
    uri = f"{store.root}/{name}"
    entry = Entry(name, store.stat(uri).size_bytes, digest_of(store.stream(uri)))
    _add(vault, verify, entry, partial(store.stream, uri), found)


def _copy_result(store: Store, vault: Vault, verify: bool, folder: str, found: _Found) -> None:
    """A result's objects, verified as they are read, and then its manifest."""
    uri = f"{store.root}/{folder}/{MANIFEST}"
    text = store.get(uri)
    manifest = replace(Manifest.from_json(text, uri), uri=f"{store.root}/{folder}")
    if manifest.key != folder.partition("/")[2]:
        raise DataLoss(f"{uri} is the manifest of another result, {manifest.key}")
    for blob in manifest.blobs:
        # Where the backup has it, its content is not looked at here; that its size is right is.
        opened = open_blob(store, f"{manifest.uri}/{blob['name']}", manifest)
        _add(vault, verify, Entry(f"{folder}/{blob['name']}", blob["size_bytes"], blob["digest"]), opened.stream, found)
    _add(vault, verify, Entry(f"{folder}/{MANIFEST}", len(text), digest_of(text)), lambda: [text], found)


def _add(vault: Vault, verify: bool, entry: Entry, data: Callable[[], Iterable[bytes]], found: _Found) -> None:
    if vault.add(entry, data, verify):
        found.copied.append(entry)
    found.entries.append(entry)
