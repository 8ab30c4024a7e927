"""Writing a result."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cryofleet.artifacts.digests import combined_digest, digest_of, digested_blocks
from cryofleet.artifacts.keys import canonical_json
from cryofleet.artifacts.manifests import LEAVING, MANIFEST, BlobEntry, InputEntry, Manifest, is_object_name
from cryofleet.artifacts.models import put_entry
from cryofleet.artifacts.references import contract_all
from cryofleet.artifacts.results import complete, load, result_uri
from cryofleet.errors import DataLoss, InvalidArgument, NotFound, Unavailable
from cryofleet.storage import Data, Stat, Store


class ResultWriter:
    """Writes one result. Its objects are seen by nobody until `commit`, which publishes them with one atomic put.

    Where several write one result, the first to commit wins: the others then keep their hands off its objects, and
    their `commit` gives the manifest that is there. No store can put an object on the condition that another, the
    manifest, is absent; so each writer looks at the manifest after each of its puts, and at the objects after its
    manifest. Of two whose bytes differ, one at least sees the other, and takes the manifest back: the result is then
    made again.
    """

    def __init__(self, store: Store, project: str, key: str) -> None:
        """A manifest of that key whose objects are not all there is taken back."""
        self.uri = result_uri(store, project, key)
        self.key = key
        self._store = store
        self._manifest_uri = f"{self.uri}/{MANIFEST}"
        self._entries: dict[str, BlobEntry] = {}
        self._versions: dict[str, str] = {}
        self._lock = threading.Lock()
        self._published()

    def put(self, name: str, data: Data) -> str:
        """Store one object, hashing it on the way; its URI. Any number of threads may put different names."""
        if not is_object_name(name):
            raise InvalidArgument(f"{name!r} is no name for an object of a result")
        with self._lock:
            if name in self._entries:
                raise InvalidArgument(f"{self.uri}: {name} is written twice")
            self._entries[name] = {"name": name, "size_bytes": 0, "digest": "", "blocks": []}
        uri = f"{self.uri}/{name}"
        digests: list[bytes] = []
        try:
            with contextlib.closing(_blocks(data, digests)) as blocks:
                size, version = self._store_blocks(uri, blocks)
        except BaseException:
            with self._lock:
                del self._entries[name]
            raise
        entry = BlobEntry(
            name=name, size_bytes=size, digest=combined_digest(digests), blocks=[digest.hex() for digest in digests]
        )
        with self._lock:
            self._entries[name] = entry
            self._versions[uri] = version
        if version:
            self._published()
        return uri

    def _store_blocks(self, uri: str, blocks: Iterator[bytes]) -> tuple[int, str]:
        """The object's size and version; of a result that somebody committed, nothing is written over."""
        size = 0

        def counted() -> Iterator[bytes]:
            nonlocal size
            for block in blocks:
                size += len(block)
                yield block
            # The last moment: the bytes are written, but the object is not yet there.
            if self._store.exists(self._manifest_uri):
                raise _Committed

        try:
            if not self._store.exists(self._manifest_uri):
                stored = self._store.put(uri, counted())
                return size, stored.version
            for _ in counted():
                pass
        except _Committed:
            pass
        return size, ""

    def _has_replaced(self, manifest: Manifest) -> bool:
        """Whether an object of another writer's result is now one of ours, whose bytes differ."""
        with self._lock:
            ours, versions = dict(self._entries), dict(self._versions)
        for theirs in manifest.blobs:
            name, uri = theirs["name"], f"{self.uri}/{theirs['name']}"
            if versions.get(uri) and ours[name]["digest"] != theirs["digest"]:
                with contextlib.suppress(NotFound):
                    if self._store.stat(uri).version == versions[uri]:
                        return True
        return False

    def entry(self, name: str) -> BlobEntry:
        """Size and digests of an object that was put."""
        with self._lock:
            return self._entries[name]

    def commit(
        self,
        *,
        operation: str,
        version: int,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, Sequence[InputEntry]],
        result: Mapping[str, Any],
        seconds: float,
        device: str = "",
        software: str = "",
        host: str = "",
    ) -> Manifest:
        """Publish the result.

        `result` is its message as JSON, URIs in full. Raises Unavailable where another writer of the same
        result, whose bytes differ, came in between: trying again finds or makes a whole result.
        """
        existing = self._published()
        if existing is not None:
            return existing
        with self._lock:
            blobs = [self._entries[name] for name in sorted(self._entries)]
        self._check_untouched(blobs)
        manifest = Manifest(
            key=self.key,
            operation=operation,
            version=version,
            parameters=dict(parameters),
            inputs={name: list(entries) for name, entries in inputs.items()},
            blobs=blobs,
            result=dict(result),
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=seconds,
            device=device,
            software=software,
            host=host,
            uri=self.uri,
        )
        kept = replace(
            manifest,
            inputs=contract_all(self._store, manifest.inputs),
            result=contract_all(self._store, manifest.result),
        )
        canonical_json(kept.result)
        canonical_json(kept.parameters)
        text = kept.to_json().encode()
        names = [blob["name"] for blob in blobs]
        put_entry(self._store, self.uri, names, operation, manifest.created_at)
        self._store.put(self._manifest_uri, text)
        try:
            self._check_untouched(blobs)
        except Unavailable:
            with contextlib.suppress(NotFound):
                if self._store.get(self._manifest_uri) == text:
                    self._store.delete(self._manifest_uri)
            raise
        return manifest

    def discard(self) -> None:
        """Delete what was put, unless somebody committed the result."""
        if self._published() is not None:
            return
        with self._lock:
            names, self._entries, self._versions = list(self._entries), {}, {}
        for name in names:
            self._store.delete(f"{self.uri}/{name}")
        self._published()  # takes back what was committed meanwhile and has lost its objects

    def _published(self) -> Manifest | None:
        """The result as somebody else committed it; one that is damaged, or that we have damaged, is taken back."""
        try:
            manifest = load(self._store, self.uri)
        except DataLoss:
            manifest = None
            self._store.delete(self._manifest_uri)
        if manifest is not None and (not complete(self._store, manifest) or self._has_replaced(manifest)):
            self._store.delete(self._manifest_uri)
            # Whoever was about to delete the result sees by this that it is written anew.
            self._store.delete(f"{self.uri}/{LEAVING}")
            return None
        return manifest

    def _check_untouched(self, entries: list[BlobEntry]) -> None:
        """The objects are still the ones that were put here, or have the same content."""
        found: dict[str, Stat] = {each.uri: each for each in self._store.list(self.uri)}
        for entry in entries:
            uri = f"{self.uri}/{entry['name']}"
            if uri in found and found[uri].version == self._versions[uri]:
                continue
            if uri not in found or digest_of(self._store.stream(uri)) != entry["digest"]:
                raise Unavailable(f"{uri} was changed by another writer of the same result; try again")


class _Committed(Exception):
    """Another writer has committed the result while an object of it was being written."""


def _blocks(data: Data, digests: list[bytes]) -> Generator[bytes, None, None]:
    """The data in blocks; their digests are put into the list."""
    for block, digest in digested_blocks(data):
        digests.append(digest)
        yield block
