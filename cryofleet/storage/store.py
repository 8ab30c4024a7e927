"""The roots that a process may reach."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator, Sequence

from cryofleet.errors import InvalidArgument, PermissionDenied
from cryofleet.settings import PROJECT_PATTERN, S3Settings, Settings
from cryofleet.storage.files import FileStore
from cryofleet.storage.object_store import Data, ObjectStore, Stat
from cryofleet.storage.uris import checked_uri, is_below


class Store(ObjectStore):
    """What a process may reach: one root to write under, and roots to read from."""

    def __init__(
        self,
        root: str,
        read_only_roots: Sequence[str] = (),
        s3: S3Settings | None = None,
        reserve_bytes: int = 0,
    ) -> None:
        """`root` and `read_only_roots` are URIs of folders; `s3` is needed where one is in S3.

        Of the disk of a root that is a folder, `reserve_bytes` are kept free.

        Raises InvalidArgument where a read-only root and `root` overlap: what is read only is open to all projects.
        """
        self.root = checked_uri(root)
        self.read_only_roots = tuple(checked_uri(uri) for uri in read_only_roots)
        self._s3 = s3
        self._reserve_bytes = reserve_bytes
        self._project: str | None = None
        self._backends: dict[str, ObjectStore] = {}
        self._lock = threading.Lock()
        for uri in (self.root, *self.read_only_roots):
            if uri.startswith("s3://") and s3 is None:
                raise InvalidArgument(f"{uri} needs the S3 settings")
        for uri in self.read_only_roots:
            if _overlap(uri, self.root):
                raise InvalidArgument(
                    f"CRYOFLEET_READ_ONLY_ROOTS has {uri} and CRYOFLEET_STORE is {self.root}: "
                    "one must not lie within the other, for read-only roots are open to all projects"
                )

    @classmethod
    def open(cls, settings: Settings) -> Store:
        """The store of a process's settings."""
        return cls(settings.store, settings.read_only_roots, settings.s3, settings.reserve_bytes)

    def for_project(self, project: str) -> Store:
        """The same store, closed to what other projects have under the root."""
        if not PROJECT_PATTERN.fullmatch(project):
            raise InvalidArgument(f"project {project!r} must match {PROJECT_PATTERN.pattern}")
        narrowed = copy.copy(self)  # with the same connections
        narrowed._project = project
        return narrowed

    def root_of(self, uri: str) -> str:
        """The root that a URI lies under, the innermost of several. Raises PermissionDenied where there is none."""
        uri = checked_uri(uri)
        roots = [root for root in (self.root, *self.read_only_roots) if is_below(uri, root)]
        if not roots:
            raise PermissionDenied(f"{uri} is outside the roots of this store")
        return max(roots, key=len)

    def put(self, uri: str, data: Data) -> Stat:
        return self._backend(uri, write=True).put(checked_uri(uri), data)

    def stream(self, uri: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        return self._backend(uri).stream(checked_uri(uri), offset, length)

    def stat(self, uri: str) -> Stat:
        return self._backend(uri).stat(checked_uri(uri))

    def list(self, prefix_uri: str) -> Iterator[Stat]:
        return self._backend(prefix_uri).list(checked_uri(prefix_uri))

    def listen(self, prefix_uri: str) -> Iterator[tuple[str, ...]] | None:
        return self._backend(prefix_uri).listen(checked_uri(prefix_uri))

    def delete(self, uri: str) -> None:
        self._backend(uri, write=True).delete(checked_uri(uri))

    def remove_abandoned(self, older_than_seconds: float) -> int:
        """What killed writers left under the root, of whatever project."""
        return self._opened(self.root).remove_abandoned(older_than_seconds)

    def free_bytes(self) -> int | None:
        return self._opened(self.root).free_bytes()

    def check_space(self, size_bytes: int) -> None:
        self._opened(self.root).check_space(size_bytes)

    def _backend(self, uri: str, write: bool = False) -> ObjectStore:
        uri = checked_uri(uri)
        root = self.root_of(uri)
        if root != self.root and write:
            raise PermissionDenied(f"{uri} is under {root}, which is read only")
        if root == self.root and self._project is not None and not is_below(uri, f"{root}/{self._project}"):
            raise PermissionDenied(f"{uri} is not of project {self._project}")
        return self._opened(root)

    def _opened(self, root: str) -> ObjectStore:
        # All of S3 is one service and one connection pool.
        name = "s3" if root.startswith("s3://") else root
        with self._lock:
            if name not in self._backends:
                if name == "s3" and self._s3 is not None:
                    from cryofleet.storage.s3 import S3Store  # slow to load, and most stores are folders

                    self._backends[name] = S3Store(self._s3)
                else:
                    self._backends[name] = FileStore(root, self._reserve_bytes)
            return self._backends[name]


def _overlap(one: str, other: str) -> bool:
    """Whether one root lies within the other, by its name or through links."""
    one, other = (
        "file://" + os.path.realpath(root.removeprefix("file://")) if root.startswith("file://") else root
        for root in (one, other)
    )
    return is_below(one, other) or is_below(other, one)
