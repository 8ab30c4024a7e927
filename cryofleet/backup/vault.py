"""Where backups are kept: a folder, or a place in S3."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cryofleet.artifacts.digests import combined_digest, digest_of, digested_blocks
from cryofleet.backup.statement import Entry, Statement
from cryofleet.errors import DataLoss, InvalidArgument, NotFound
from cryofleet.settings import Settings
from cryofleet.storage import Store, file_uri
from cryofleet.storage.uris import is_below

_SUFFIX = ".json.gz"
_ABANDONED_SECONDS = 86400.0


class Vault:
    """Backups at one place. Any number of threads may add to it."""

    def __init__(self, place: str, settings: Settings) -> None:
        """`place` is a folder or the URI of one. Raises InvalidArgument where it overlaps the platform's own store."""
        uri = place if "://" in place else file_uri(Path(place).expanduser())
        self._store = Store(uri, s3=settings.s3)
        self.root = self._store.root
        own, other = _real(settings.store), _real(self.root)
        if is_below(own, other) or is_below(other, own):
            raise InvalidArgument(f"{self.root} and the store {settings.store} must not lie within each other")
        self._sizes: dict[str, int] | None = None
        self._lock = threading.Lock()

    def create(self) -> None:
        """Makes the folder, which its owner alone may enter; removes what a backup that was killed has left there."""
        if self.root.startswith("file://"):
            Path(self.root.removeprefix("file://")).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._store.remove_abandoned(_ABANDONED_SECONDS)

    def names(self) -> list[str]:
        """Of the backups, the oldest first."""
        found = (each.uri.rpartition("/")[2] for each in self._store.list(f"{self.root}/backups"))
        return [name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX)]

    def statement(self, name: str = "") -> Statement:
        """That of a backup, of the newest where no name is given. Raises NotFound and DataLoss."""
        names = self.names()
        if not names:
            raise NotFound(f"there is no backup at {self.root}")
        if name and name not in names:
            raise NotFound(f"there is no backup {name!r} at {self.root}; there are {', '.join(names)}")
        uri = self._statement_uri(name or names[-1])
        return Statement.from_bytes(self._store.get(uri), uri)

    def finish(self, statement: Statement) -> None:
        """Keeps a backup whose objects are all there."""
        self._store.put(self._statement_uri(statement.name), statement.to_bytes())

    def add(self, entry: Entry, data: Callable[[], Iterable[bytes]], verify: bool = False) -> bool:
        """Keeps an object; false where it is there already. With `verify`, what is there is read to see that it is.

        Raises DataLoss where the data is not what the entry says; nothing is kept then.
        """
        uri = self._object_uri(entry)
        if self._known().get(entry.digest) == entry.size_bytes and not (verify and self._is_damaged(entry)):
            return False
        self._store.put(uri, _checked(data(), entry, f"{entry.name} is not what it was when its digest was taken"))
        with self._lock:
            self._known()[entry.digest] = entry.size_bytes
        return True

    def read(self, entry: Entry) -> Iterator[bytes]:
        """An object's bytes; raises DataLoss at their end where they are not what was written."""
        uri = self._object_uri(entry)
        try:
            yield from _checked(self._store.stream(uri), entry, f"{entry.name}: {uri} is damaged")
        except NotFound:
            raise DataLoss(f"{entry.name}: {uri} is missing from the backup") from None

    def keep_newest(self, count: int) -> int:
        """Deletes all backups but the newest, and the objects that no other has; how many backups that were."""
        names = self.names()
        kept, old = names[-count:], names[:-count]
        needed = {entry.digest for name in kept for entry in self.statement(name).entries}
        for name in old:
            self._store.delete(self._statement_uri(name))
        for found in list(self._store.list(f"{self.root}/objects")):
            if found.uri.rpartition("/")[2] not in needed:
                self._store.delete(found.uri)
        self._sizes = None
        return len(old)

    def _known(self) -> dict[str, int]:
        """Sizes of the objects that are there, by digest, as listed once."""
        if self._sizes is None:
            found = self._store.list(f"{self.root}/objects")
            self._sizes = {each.uri.rpartition("/")[2]: each.size_bytes for each in found}
        return self._sizes

    def _is_damaged(self, entry: Entry) -> bool:
        return digest_of(self._store.stream(self._object_uri(entry))) != entry.digest

    def _object_uri(self, entry: Entry) -> str:
        return f"{self.root}/objects/{entry.digest[:2]}/{entry.digest}"

    def _statement_uri(self, name: str) -> str:
        return f"{self.root}/backups/{name}{_SUFFIX}"


def _checked(data: Iterable[bytes], entry: Entry, otherwise: str) -> Iterator[bytes]:
    """The data; raises DataLoss at its end, before a store has made an object of it, where it is not the entry's."""
    size, digests = 0, []
    for block, digest in digested_blocks(data):
        size += len(block)
        digests.append(digest)
        yield block
    if size != entry.size_bytes or combined_digest(digests) != entry.digest:
        raise DataLoss(otherwise)


def _real(uri: str) -> str:
    return "file://" + os.path.realpath(uri.removeprefix("file://")) if uri.startswith("file://") else uri
