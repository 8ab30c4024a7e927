"""Results that nothing needs any more: not a run, not a pin, and no result that they keep."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cryofleet.artifacts import MANIFEST, Manifest, manifest_for, open_blob, remove
from cryofleet.errors import DataLoss, NotFound
from cryofleet.storage import Store

_KEY = re.compile(r"[0-9a-f]{64}")
_REFERENCE = re.compile(rb"store:/([a-z0-9][a-z0-9_-]{0,62}/[0-9a-f]{64})")
_ABANDONED_SECONDS = 86400.0
"""Files that a killed writer left are older than any write takes."""
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
    objects: list[str] = field(default_factory=list)
    finished: bool = False


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

    `held` is asked again just before anything is deleted: a run may have found an old result meanwhile. However short
    `older_than_seconds` is, what may be the work of a run that goes on stays.
    """
    root = f"{store.root}/{project}" if project else store.root
    folders: dict[str, _Folder] = {}
    pins: set[ResultId] = set()
    for found in store.list(root):
        names = found.uri.removeprefix(store.root + "/").split("/")
        if len(names) < 3:
            continue
        if names[1] == PINS:
            pins.add(f"{names[0]}/{names[2]}")
            continue
        if names[1] == WORK and len(names) >= 4:
            name = "/".join(names[:3])
        elif _KEY.fullmatch(names[1]):
            name = "/".join(names[:2])
        else:
            continue
        folder = folders.setdefault(name, _Folder())
        folder.size_bytes += found.size_bytes
        folder.modified = max(folder.modified, found.modified)
        folder.objects.append(found.uri)
        folder.finished |= names[2:] == [MANIFEST]
    if delete:
        store.remove_abandoned(max(older_than_seconds, _ABANDONED_SECONDS))
    needed = held()
    limit = min(time.time() - older_than_seconds, needed.since - _CLOCK_SECONDS)
    old = {name: folder for name, folder in folders.items() if folder.modified <= limit}
    if not old:
        return []
    reached = _reach(store, _roots(store, needed.uris, pins))
    garbage = {name: folder for name, folder in old.items() if name not in reached}
    listed = [
        Garbage(f"{store.root}/{name}", _operation(store, name, folder), folder.size_bytes)
        for name, folder in sorted(garbage.items())
    ]
    if delete and garbage:
        needed = held()
        late = _reach(store, _roots(store, needed.uris, pins))
        late |= {name for name, folder in garbage.items() if folder.modified > needed.since - _CLOCK_SECONDS}
        listed = [each for each in listed if each.uri.removeprefix(store.root + "/") not in late]
        for each in listed:
            _delete(store, each.uri.removeprefix(store.root + "/"), garbage)
    return listed


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


def _delete(store: Store, name: str, folders: dict[str, _Folder]) -> None:
    project, _, key = name.partition("/")
    # Looked up again: an unfinished result may have been finished meanwhile, and is then a new one.
    finished = store.exists(f"{store.root}/{name}/{MANIFEST}")
    if finished != folders[name].finished:
        return
    if finished:
        remove(store, project, key)
        return
    for uri in folders[name].objects:
        store.delete(uri)
