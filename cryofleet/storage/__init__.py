"""Object storage: whole objects under URIs, on a file system (`file:///path`) or in S3 (`s3://bucket/key`).

URIs are literal: nothing in them is percent-decoded, and the names `.` and `..` do not exist. A `Store`
opens only what lies under the roots it was made with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryofleet.storage.files import FileStore
from cryofleet.storage.object_store import CHUNK_BYTES, Data, ObjectStore, Stat
from cryofleet.storage.store import Store
from cryofleet.storage.uris import checked_uri, file_uri

if TYPE_CHECKING:
    from cryofleet.storage.s3 import S3Store

__all__ = ["CHUNK_BYTES", "Data", "FileStore", "ObjectStore", "S3Store", "Stat", "Store", "checked_uri", "file_uri"]


def __getattr__(name: str) -> object:
    # The S3 client takes longer to load than all the rest; processes whose store is a folder do without.
    if name == "S3Store":
        from cryofleet.storage.s3 import S3Store

        return S3Store
    raise AttributeError(f"module 'cryofleet.storage' has no attribute {name!r}")
