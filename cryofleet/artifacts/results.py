"""Results in the store: where they lie, and whether they are there."""

from __future__ import annotations

import re
from dataclasses import replace

from cryofleet.artifacts.manifests import LEAVING, MANIFEST, Manifest
from cryofleet.artifacts.models import remove_entry
from cryofleet.artifacts.references import expand_all
from cryofleet.errors import DataLoss, InvalidArgument, NotFound, PermissionDenied
from cryofleet.settings import PROJECT_PATTERN
from cryofleet.storage import Store, checked_uri
from cryofleet.storage.uris import is_below

_KEY = re.compile(r"[0-9a-f]{64}")


def result_uri(store: Store, project: str, key: str) -> str:
    """The folder of a result. Raises InvalidArgument for what is no project or key."""
    if not PROJECT_PATTERN.fullmatch(project):
        raise InvalidArgument(f"project {project!r} must match {PROJECT_PATTERN.pattern}")
    if not _KEY.fullmatch(key):
        raise InvalidArgument(f"key {key!r} must be 64 hexadecimal digits")
    return f"{store.root}/{project}/{key}"


def find(store: Store, project: str, key: str) -> Manifest | None:
    """The manifest of a result, its URIs expanded; None where there is none.

    Raises DataLoss where it can't be read. Whether its objects are all there, `complete` says.
    """
    return load(store, result_uri(store, project, key))


def manifest_for(store: Store, uri: str) -> Manifest | None:
    """The manifest of the result that an object or folder belongs to; None for what is no result's."""
    place = place_of(store, uri)
    return load(store, place[0]) if place else None


def complete(store: Store, manifest: Manifest) -> bool:
    """Whether every object of a result is there in its size, and is to stay; one listing, nothing is read."""
    sizes = {found.uri: found.size_bytes for found in store.list(manifest.uri)}
    if f"{manifest.uri}/{LEAVING}" in sizes:
        return False
    return all(sizes.get(f"{manifest.uri}/{entry['name']}") == entry["size_bytes"] for entry in manifest.blobs)


def remove(store: Store, project: str, key: str) -> None:
    """Delete a result, its manifest first, so that it is computed again when it is asked for."""
    folder = result_uri(store, project, key)
    remove_entry(store, folder)
    store.delete(f"{folder}/{MANIFEST}")
    for found in list(store.list(folder)):
        store.delete(found.uri)


def load(store: Store, folder: str) -> Manifest | None:
    """The manifest in a result's folder, its URIs expanded; None where there is none. Raises DataLoss."""
    uri = f"{folder}/{MANIFEST}"
    try:
        text = store.get(uri)
    except NotFound:
        return None
    manifest = Manifest.from_json(text, uri)
    if manifest.key != folder.rpartition("/")[2]:
        raise DataLoss(f"{uri} is the manifest of another result, {manifest.key}")
    inputs, result = (expand_all(store, value, uri) for value in (manifest.inputs, manifest.result))
    return replace(manifest, inputs=inputs, result=result, uri=folder)


def place_of(store: Store, uri: str) -> tuple[str, str] | None:
    """The result's folder and the name below it, for a URI under a result, of this store or in a read-only root."""
    uri = checked_uri(uri)
    try:
        root = store.root_of(uri)
    except PermissionDenied:
        return None  # which a reader is told when it opens the object
    project, _, rest = uri[len(root) + 1 :].partition("/")
    key, _, name = rest.partition("/")
    if not PROJECT_PATTERN.fullmatch(project) or not _KEY.fullmatch(key):
        return None
    return f"{root}/{project}/{key}", name


def is_result_uri(store: Store, uri: str) -> bool:
    """Whether a URI is of one of this store's own results, whose content never changes.

    False for other files, and for what lies in a read-only root, of which others dispose.
    """
    return is_below(checked_uri(uri), store.root) and place_of(store, uri) is not None
