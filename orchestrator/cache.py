"""Looking results up in the store before anything is queued or called."""

from __future__ import annotations

import re
from typing import Any

from google.protobuf.message import Message

from cryofleet.artifacts import Manifest, content_digest, find, identity
from cryofleet.operations import Operation, inputs_of, parameters_of
from cryofleet.storage import Store

_IMMUTABLE = re.compile(r"/[0-9a-f]{64}/")
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

    def find(self, operation: Operation, request: Message, project: str) -> Manifest | None:
        """The manifest of the request's result, if the store has it. Blocks; raises the store's failures."""
        key = self.key(operation, request, project)
        return find(self._store.for_project(project), project, key)

    def _digest(self, store: Store, project: str, uri: str) -> str:
        known = self._digests.get((project, uri))
        if known is not None:
            return known
        digest = content_digest(store, uri)
        if _IMMUTABLE.search(uri):
            if len(self._digests) >= _REMEMBERED:
                self._digests.clear()
            self._digests[project, uri] = digest
        return digest


def portable(value: Any) -> Any:
    """A result's JSON without the numbers that JSON does not have."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: portable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return value
