"""Results in the store: their identity, their manifests, and reads that notice every changed byte.

A result's objects lie at ROOT/PROJECT/KEY/NAME, KEY being the result's identity; ROOT/PROJECT/KEY/manifest.json,
written last, lists them with their digests. A result without manifest does not exist.
"""

from cryofleet.artifacts.blobs import Blob, open_blob, verify
from cryofleet.artifacts.content import content_digest, versions
from cryofleet.artifacts.digests import BLOCK_BYTES, digest_file, digest_of
from cryofleet.artifacts.keys import canonical_json, identity
from cryofleet.artifacts.manifests import LEAVING, MANIFEST, BlobEntry, InputEntry, Manifest
from cryofleet.artifacts.references import contract, expand
from cryofleet.artifacts.results import complete, find, is_result_uri, manifest_for, remove, result_uri
from cryofleet.artifacts.writer import ResultWriter

__all__ = [
    "BLOCK_BYTES",
    "LEAVING",
    "MANIFEST",
    "Blob",
    "BlobEntry",
    "InputEntry",
    "Manifest",
    "ResultWriter",
    "canonical_json",
    "complete",
    "content_digest",
    "contract",
    "digest_file",
    "digest_of",
    "expand",
    "find",
    "identity",
    "is_result_uri",
    "manifest_for",
    "open_blob",
    "remove",
    "result_uri",
    "verify",
    "versions",
]
