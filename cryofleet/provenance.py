"""Tracing a result back to the raw data, manifest by manifest."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryofleet.errors import NotFound

if TYPE_CHECKING:
    from cryofleet.client import Client

_REFERENCE = "store:"
_RESULT = re.compile(r"(?P<root>.+)/[^/]+/[0-9a-f]{64}(?=/|$)")
"""The folder of a result, ROOT/PROJECT/KEY, at the beginning of what is in it."""


@dataclass(frozen=True)
class Origin:
    """What an artifact was made by, and from what."""

    uri: str
    operation: str | None = None
    """None for a file that no operation made."""
    version: int = 0
    key: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[Origin]] = field(default_factory=dict)
    repeated: bool = False
    """True where this result's inputs stand at another place of the same trace."""

    def to_mapping(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "uri": self.uri,
            "operation": self.operation,
            "version": self.version,
            "key": self.key,
            "parameters": self.parameters,
            "inputs": {name: [source.to_mapping() for source in sources] for name, sources in self.inputs.items()},
            "repeated": self.repeated,
        }


def trace(client: Client, uri: str, seen: set[str] | None = None) -> Origin:
    """The whole ancestry of `uri`. A result that several others were made from is followed once.

    `seen` holds the keys of results that were followed before, where several artifacts are traced together. Raises
    NotFound where nothing is stored at `uri`.
    """
    seen = set() if seen is None else seen
    match = _RESULT.match(uri)
    root = match["root"] if match else ""

    def follow(uri: str) -> Origin:
        if uri.startswith(_REFERENCE):
            uri = root + uri.removeprefix(_REFERENCE)
        manifest = _manifest(client, uri)
        if manifest is None:
            return Origin(uri)
        repeated = manifest["key"] in seen
        seen.add(manifest["key"])
        inputs = {}
        if not repeated:
            inputs = {
                name: [follow(source["uri"]) for source in sources if source["uri"]]
                for name, sources in manifest["inputs"].items()
            }
        return Origin(
            uri=uri,
            operation=manifest["operation"],
            version=manifest["version"],
            key=manifest["key"],
            parameters=manifest["parameters"],
            inputs=inputs,
            repeated=repeated,
        )

    if not any(True for _ in client.list(uri)):
        raise NotFound(f"nothing is stored at {uri}")
    return follow(uri)


def _manifest(client: Client, uri: str) -> dict[str, Any] | None:
    """The manifest of the result that `uri` belongs to; None for a file from elsewhere."""
    match = _RESULT.match(uri)
    if match is None:
        return None
    try:
        data = client.artifact(f"{match[0]}/manifest.json").read()
    except NotFound:
        return None
    return dict(json.loads(data))
