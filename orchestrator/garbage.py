"""Results that nothing needs any more: not a run, not a pin, and no result that they keep.

Work goes on while they are looked for and deleted. What keeps it whole:

- What the store has had for less than `GRACE_SECONDS` stays, as does all that was written since the oldest run that
  goes on was submitted: it was perhaps committed just now, and no record names it yet.
- A run may find an old result just then. So each result is marked as leaving first, which no look-up finds any more;
  those who found it before have `RECORD_SECONDS` to say so in the record, which is then asked once more, as the pins
  are.
- Each folder is listed again just before it is deleted, and left alone where anything in it has changed. A writer that
  comes in even later finds objects missing when it commits, and starts again; or the manifest that it has put is seen
  here, and taken back.

What remains: an orchestrator that has found an old result and can't write so for longer than `RECORD_SECONDS`, since
the database is away or the machine is stuck, may lose it. A step that needs it then fails with NOT_FOUND, and the run,
resumed, makes it again. And whoever uploads a file that the store has had for long holds it only once the run is
submitted, which is refused where the file has just gone. The marks that a killed collection leaves cost no more than
that such a result is made anew when it is next asked for.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cryofleet.artifacts import LEAVING, MANIFEST, Manifest, complete, manifest_for, open_blob, remove
from cryofleet.errors import DataLoss, NotFound
from cryofleet.storage import Stat, Store

_KEY = re.compile(r"[0-9a-f]{64}")
_REFERENCE = re.compile(rb"store:/([a-z0-9][a-z0-9_-]{0,62}/[0-9a-f]{64})")
_ABANDONED_SECONDS = 86400.0
"""Files that a killed writer left are older than any write takes."""
GRACE_SECONDS = 60.0
"""What is younger stays, whatever age is asked for."""
RECORD_SECONDS = 3.0
"""Within this time the record of runs says what a task has found; orchestrators write it once a second."""
_CLOCK_SECONDS = 60.0
"""By how much the clocks of the store and of the orchestrators may differ."""
PINS = "_pins"
WORK = "_work"

ResultId = str
"""PROJECT/KEY."""


@dataclass(frozen=True)
class Held:
    """What the runs need."""

    uris: Iterable[str]
    since: float = math.inf
    """Unix time at which the oldest run that goes on was submitted. What was written since may be its work."""


@dataclass(frozen=True)
class Garbage:
    """A result's folder, or the checkpoints of work that was left."""

    uri: str
    operation: str
    size_bytes: int


@dataclass
class _Folder:
    size_bytes: int = 0
    modified: float = 0.0
    """By the store's clock."""
    objects: dict[str, Stat] = field(default_factory=dict)
    """By URI."""
    finished: bool = False

    def add(self, found: Stat, finishes: bool) -> None:
        self.size_bytes += found.size_bytes
        self.modified = max(self.modified, found.modified)
        self.objects[found.uri] = found
        self.finished |= finishes


def result_id(store: Store, uri: str) -> ResultId | None:
    """The result that a URI belongs to."""
    names = uri.removeprefix(store.root + "/").split("/") if uri.startswith(store.root + "/") else []
    return f"{names[0]}/{names[1]}" if len(names) >= 2 and _KEY.fullmatch(names[1]) else None


def pin(store: Store, uri: str, unpin: bool) -> None:
    """Keeps the result that an artifact belongs to, or no longer. Raises NotFound where there is no such result."""
    result = result_id(store, uri)
    if result is None or manifest_for(store, uri) is None:
        raise NotFound(f"{uri} is not in a result of this store")
    project, _, key = result.partition("/")
    place = f"{store.root}/{project}/{PINS}/{key}"
    if unpin:
        store.delete(place)
    else:
        store.put(place, f"store:/{result}\n".encode())


def collect(
    store: Store, held: Callable[[], Held], older_than_seconds: float, project: str, delete: bool
) -> list[Garbage]:
    """Finds, and deletes where asked to, what neither a run nor a pin leads to and is older than said. Blocks.

    `held` is asked again before anything is deleted. However short `older_than_seconds` is, what is younger than
    `GRACE_SECONDS` stays, and what may be the work of a run that goes on.
    """
    clock = _clock(store)
    folders, pins = _listed(store, f"{store.root}/{project}" if project else store.root)
    if delete:
        store.remove_abandoned(max(older_than_seconds, _ABANDONED_SECONDS))
    needed = held()
    limit = min(clock - max(older_than_seconds, GRACE_SECONDS), needed.since - _CLOCK_SECONDS)
    old = {name: folder for name, folder in folders.items() if folder.modified <= limit}
    if not old:
        return []
    reached = _reach(store, _roots(store, needed.uris, pins))
    garbage = {name: folder for name, folder in old.items() if name not in reached}
    found = {
        name: Garbage(f"{store.root}/{name}", _operation(store, name, folder), folder.size_bytes)
        for name, folder in sorted(garbage.items())
    }
    deleted = _delete_all(store, garbage, held, pins) if delete and garbage else set(found)
    return [each for name, each in found.items() if name in deleted]


def _clock(store: Store) -> float:
    """Unix time by the store's clock, which also says when its objects were written."""
    place = f"{store.root}/_clock-{secrets.token_hex(8)}"
    store.put(place, b"")
    now = store.stat(place).modified
    store.delete(place)
    return now


def _listed(store: Store, uri: str) -> tuple[dict[ResultId, _Folder], set[ResultId]]:
    """Below a URI: the folders of results and, as PROJECT/_work/KEY, of checkpoints; and what is pinned."""
    folders: dict[ResultId, _Folder] = {}
    pins: set[ResultId] = set()
    for found in store.list(uri):
        names = found.uri.removeprefix(store.root + "/").split("/")
        if len(names) < 3:
            continue
        if names[1] == PINS:
            pins.add(f"{names[0]}/{names[2]}")
        elif names[1] == WORK and len(names) >= 4:
            folders.setdefault("/".join(names[:3]), _Folder()).add(found, finishes=False)
        elif _KEY.fullmatch(names[1]) and names[2:] != [LEAVING]:
            folders.setdefault("/".join(names[:2]), _Folder()).add(found, finishes=names[2:] == [MANIFEST])
    return folders, pins


def _delete_all(
    store: Store, garbage: Mapping[ResultId, _Folder], held: Callable[[], Held], pins: set[ResultId]
) -> set[ResultId]:
    """Deletes what nobody has come to need meanwhile; the names of that."""
    marks = {name: f"{store.root}/{name}/{LEAVING}" for name, folder in garbage.items() if folder.finished}
    deleted: set[ResultId] = set()
    try:
        for mark in marks.values():
            store.put(mark, b"")
        time.sleep(RECORD_SECONDS)
        needed = held()
        for project in {name.partition("/")[0] for name in garbage}:
            pins = pins | _listed(store, f"{store.root}/{project}/{PINS}")[1]
        late = _reach(store, _roots(store, needed.uris, pins))
        late |= {name for name, folder in garbage.items() if folder.modified > needed.since - _CLOCK_SECONDS}
        for name in sorted(garbage.keys() - late):
            if _delete(store, name, garbage[name]):
                deleted.add(name)
    finally:
        for name in marks.keys() - deleted:
            store.delete(marks[name])
    return deleted


def _roots(store: Store, uris: Iterable[str], pins: set[ResultId]) -> set[ResultId]:
    return pins | {result for uri in uris if (result := result_id(store, uri)) is not None}


def _reach(store: Store, roots: set[ResultId]) -> set[ResultId]:
    """The results that `roots` are made from or refer to, themselves included.

    Raises DataLoss where one of them cannot be read: what it is made from is then not known, and might be deleted.
    """
    reached: set[ResultId] = set()
    left = sorted(roots)
    while left:
        result = left.pop()
        if result in reached:
            continue
        reached.add(result)
        manifest = manifest_for(store, f"{store.root}/{result}/{MANIFEST}")
        if manifest is not None:
            left += _references(store, manifest)
    return reached


def _references(store: Store, manifest: Manifest) -> Iterator[ResultId]:
    for entries in manifest.inputs.values():
        for entry in entries:
            result = result_id(store, entry["uri"])
            if result is not None:
                yield result
    for blob in manifest.blobs:
        # An index names the shards that it joins.
        if blob["name"].endswith(".json"):
            content = open_blob(store, f"{manifest.uri}/{blob['name']}", manifest).read()
            for match in set(_REFERENCE.findall(content)):
                yield match.decode()


def _operation(store: Store, name: str, folder: _Folder) -> str:
    if not folder.finished:
        return ""
    try:
        manifest = manifest_for(store, f"{store.root}/{name}/{MANIFEST}")
    except DataLoss:
        return ""
    return manifest.operation if manifest is not None else ""


def _delete(store: Store, name: ResultId, folder: _Folder) -> bool:
    """Deletes a folder; false where it is no longer as it was listed."""
    uri = f"{store.root}/{name}"
    now = _listed(store, uri)[0].get(name)
    if now is None or now.objects != folder.objects:
        return False
    if folder.finished:
        # Where the mark is gone, somebody may have found the result since.
        if not store.exists(f"{uri}/{LEAVING}"):
            return False
        remove(store, *name.split("/"))
    else:
        for each in folder.objects:
            store.delete(each)
    # Of one that commits a result there at this moment, and of this, one at least sees the other.
    manifest = manifest_for(store, f"{uri}/{MANIFEST}")
    if manifest is not None and not complete(store, manifest):
        store.delete(manifest.manifest_uri)
    return True
