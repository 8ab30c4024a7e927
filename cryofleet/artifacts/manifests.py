"""Manifests: what a result is, where it came from, and the digests of its objects."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, TypedDict

from cryofleet.artifacts.digests import BLOCK_BYTES, combined_digest
from cryofleet.errors import DataLoss, Failure
from cryofleet.storage import checked_uri

MANIFEST = "manifest.json"
LEAVING = "_leaving"
"""An object in a result's folder that says it is about to be deleted, and must not be found any more."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class InputEntry(TypedDict):
    """One input of a result."""

    uri: str
    digest: str


class BlobEntry(TypedDict):
    """One object of a result: its name below the result's folder, and the digests of it and of its blocks."""

    name: str
    size_bytes: int
    digest: str
    blocks: list[str]


@dataclass(frozen=True)
class Manifest:
    """What a result is, where it came from and what it took."""

    key: str
    operation: str
    version: int
    parameters: dict[str, Any]
    inputs: dict[str, list[InputEntry]]
    blobs: list[BlobEntry]
    result: dict[str, Any]
    """The result message as JSON."""
    created_at: str
    """ISO 8601, UTC."""
    seconds: float
    device: str
    software: str
    host: str
    uri: str = field(default="", compare=False)
    """The result's folder; not kept in the file."""

    @property
    def manifest_uri(self) -> str:
        return f"{self.uri}/{MANIFEST}"

    def blob(self, name: str) -> BlobEntry | None:
        """The entry of one object."""
        return next((entry for entry in self.blobs if entry["name"] == name), None)

    def to_json(self) -> str:
        """As kept in the store; the URIs should be references by then."""
        content = {name: getattr(self, name) for name in _MANIFEST_FIELDS}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "manifest") -> Manifest:
        """Raises DataLoss naming `source` where the text is no manifest."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataLoss(f"{source} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise DataLoss(f"{source} is no manifest: it must be a JSON object")
        for name, kind in _MANIFEST_FIELDS.items():
            if name not in content or not isinstance(content[name], kind) or isinstance(content[name], bool):
                raise DataLoss(f"{source} is no manifest: {name} is missing or of a wrong type")
        for entry in content["blobs"]:
            _check_blob_entry(entry, source)
        for entries in content["inputs"].values():
            for entry in entries if isinstance(entries, list) else [None]:
                if not (isinstance(entry, dict) and {type(entry.get("uri")), type(entry.get("digest"))} == {str}):
                    raise DataLoss(f"{source} is no manifest: its inputs need uri and digest")
        return cls(**{name: content[name] for name in _MANIFEST_FIELDS})


_MANIFEST_FIELDS: dict[str, type | tuple[type, ...]] = {
    "key": str,
    "operation": str,
    "version": int,
    "parameters": dict,
    "inputs": dict,
    "blobs": list,
    "result": dict,
    "created_at": str,
    "seconds": (int, float),
    "device": str,
    "software": str,
    "host": str,
}


def _check_blob_entry(entry: Any, source: str) -> None:
    if not isinstance(entry, dict):
        raise DataLoss(f"{source} is no manifest: a blob must be a JSON object")
    name, size, digest, blocks = (entry.get(field_name) for field_name in ("name", "size_bytes", "digest", "blocks"))
    if not isinstance(name, str) or not is_object_name(name):
        raise DataLoss(f"{source} is no manifest: {name!r} is no name of a blob")
    if not isinstance(size, int) or size < 0 or not isinstance(blocks, list):
        raise DataLoss(f"{source} is no manifest: {name} needs size_bytes and blocks")
    if not all(isinstance(block, str) and _DIGEST.fullmatch(block) for block in [*blocks, digest]):
        raise DataLoss(f"{source} is no manifest: {name} has a digest that is not 64 hexadecimal digits")
    if len(blocks) != -(-size // BLOCK_BYTES) or combined_digest(map(bytes.fromhex, blocks)) != digest:
        raise DataLoss(f"{source}: size, digest and blocks of {name} contradict each other")


def is_object_name(name: str) -> bool:
    """Whether an object of a result may be called so: one or more names with slashes between them."""
    if name in ("", MANIFEST, LEAVING) or name.endswith("/") or len(name) > 512:
        return False
    try:
        return checked_uri(f"file:///{name}") == f"file:///{name}"
    except Failure:
        return False
