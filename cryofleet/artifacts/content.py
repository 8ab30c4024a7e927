"""The digest of an artifact's content, by which results know their inputs."""

from __future__ import annotations

import hashlib

from cryofleet.artifacts.digests import digest_of
from cryofleet.artifacts.keys import canonical_json
from cryofleet.artifacts.manifests import MANIFEST
from cryofleet.artifacts.results import is_result_uri, load, place_of
from cryofleet.errors import NotFound
from cryofleet.storage import Store, checked_uri


def content_digest(store: Store, uri: str) -> str:
    """The digest of an artifact's content.

    That of an object of a result is read from the manifest; a file outside of results is hashed. A folder's (a
    model's) is SHA-256 over the canonical JSON of [name, digest] of its objects. Raises NotFound.
    """
    uri = checked_uri(uri)
    place = place_of(store, uri)
    if place is not None:
        manifest = load(store, place[0])
        if manifest is None:
            raise NotFound(f"{uri} does not exist: there is no finished result {place[0]}")
        entry = manifest.blob(place[1])
        if entry is not None:
            return entry["digest"]
        folder = place[1] + "/" if place[1] else ""
        members = [
            [entry["name"].removeprefix(folder), entry["digest"]]
            for entry in manifest.blobs
            if entry["name"].startswith(folder)
        ]
    else:
        found = list(store.list(uri))
        if [each.uri for each in found] == [uri]:
            return digest_of(store.stream(uri))
        members = [[each.uri[len(uri) + 1 :], digest_of(store.stream(each.uri))] for each in found if each.uri != uri]
    if not members:
        raise NotFound(f"{uri} does not exist")
    return hashlib.sha256(canonical_json(sorted(members))).hexdigest()


def versions(store: Store, uri: str) -> dict[str, str]:
    """The present versions of the files whose change would change an artifact, by their URIs.

    None of a result of this store, which never changes; of a result in a read-only root, its manifest's. To be asked
    for before `content_digest`, and again once the artifact was read: the same answer means that what was read is what
    was hashed.
    """
    uri = checked_uri(uri)
    if is_result_uri(store, uri):
        return {}
    place = place_of(store, uri)
    return {found.uri: found.version for found in store.list(f"{place[0]}/{MANIFEST}" if place else uri)}
