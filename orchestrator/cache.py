"""Looking results up in the store before anything is queued or called."""

from __future__ import annotations

import logging
import re
from typing import Any

from google.protobuf.message import Message

from cryofleet.artifacts import (
    MANIFEST,
    Manifest,
    complete,
    content_digest,
    find,
    identity,
    is_result_uri,
    manifest_for,
    remove,
    verify,
)
from cryofleet.errors import DataLoss
from cryofleet.operations import Operation, inputs_of, parameters_of
from cryofleet.storage import Store

logger = logging.getLogger(__name__)
# An object in a result, as messages name it.
_URI = re.compile(r"(?:file|s3)://\S+?/[0-9a-f]{64}(?=[/:,\s]|$)")
_REMEMBERED = 20_000


class ResultCache:
    """Finds finished results. Digests of artifacts, which never change, are remembered."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._digests: dict[tuple[str, str], str] = {}

    def key(self, operation: Operation, request: Message, project: str) -> str:
        """The identity of the request's result. Raises NotFound and so on for inputs that cannot be read."""
        store = self._store.for_project(project)
        digests = {
            field: [self._digest(store, project, uri) if uri else "" for uri in uris]
            for field, uris in inputs_of(request).items()
        }
        return identity(operation.name, operation.version, parameters_of(request), digests)

    def look_up(self, operation: Operation, request: Message, project: str) -> tuple[str, Manifest | None]:
        """The identity of the request's result, and its manifest if the store has it.

        Blocks; raises the store's failures.
        """
        key = self.key(operation, request, project)
        return key, self.kept(project, key)

    def kept(self, project: str, key: str) -> Manifest | None:
        """The manifest of the result of that identity, if the store has it whole. Blocks."""
        store = self._store.for_project(project)
        try:
            manifest = find(store, project, key)
        except DataLoss as damage:
            logger.warning("a damaged result counts as not there: %s", damage)
            return None
        return manifest if manifest is not None and complete(store, manifest) else None

    def take_back_damaged(self, request: Message, project: str, cause: str) -> list[str]:
        """Take back the manifests of damaged results among the inputs, and of those that `cause` names.

        They are then made anew when they are next asked for. Blocks, and reads all of them. The URIs of the damaged
        objects.
        """
        store = self._store.for_project(project)
        uris = {uri for uris in inputs_of(request).values() for uri in uris if uri} | set(_URI.findall(cause))
        folders = {result_folder(store, uri) for uri in uris if is_result_uri(store, uri)}
        damaged = []
        for folder in sorted(folders):
            try:
                manifest = manifest_for(store, f"{folder}/{MANIFEST}")
                names = verify(store, manifest) if manifest is not None else []
            except DataLoss:
                names = [MANIFEST]
            if names:
                remove(store, *folder.rsplit("/", 2)[1:])
                self._digests = {place: digest for place, digest in self._digests.items() if folder not in place[1]}
                damaged += [f"{folder}/{name}" for name in names]
        return damaged

    def _digest(self, store: Store, project: str, uri: str) -> str:
        known = self._digests.get((project, uri))
        if known is not None:
            return known
        digest = content_digest(store, uri)
        if is_result_uri(store, uri):
            if len(self._digests) >= _REMEMBERED:
                self._digests.clear()
            self._digests[project, uri] = digest
        return digest


def result_folder(store: Store, uri: str) -> str:
    """The folder ROOT/PROJECT/KEY of the result of ours that a URI belongs to."""
    names = uri.removeprefix(store.root + "/").split("/")
    return "/".join([store.root, *names[:2]])


def portable(value: Any) -> Any:
    """A result's JSON without the numbers that JSON does not have."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: portable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return value
