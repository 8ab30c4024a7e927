"""Objects as files under one folder."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat as stat_bits
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from cryofleet.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from cryofleet.space import SMALL_BYTES, check_free, free_bytes
from cryofleet.storage.object_store import CHUNK_BYTES, Data, ObjectStore, Stat, checked_range, pieces_of
from cryofleet.storage.uris import UNFINISHED, checked_uri, is_below

# Small objects are flushed to disk before they get their names: manifests and indices decide what exists. Of larger
# ones a power cut may leave a short file; its size and block digests tell, and it is computed again.
_FLUSHED_BYTES = CHUNK_BYTES


class FileStore(ObjectStore):
    """Objects are files under one folder."""

    def __init__(self, root_uri: str, reserve_bytes: int = 0) -> None:
        """`root_uri` is a `file:///folder`, made on the first put; so much of its disk is kept free."""
        self.root = checked_uri(root_uri)
        if not self.root.startswith("file://"):
            raise InvalidArgument(f"{root_uri!r} is no file URI")
        self._folder = Path(self.root.removeprefix("file://"))
        self._real_folder = os.path.realpath(self._folder)
        self._reserve_bytes = reserve_bytes

    def put(self, uri: str, data: Data) -> Stat:
        path = self._path(uri)
        if path == self._folder:
            raise PermissionDenied(f"{uri} is the store's own root")
        with _file_errors(uri):
            temporary, descriptor = self._create(uri, path.parent)
        try:
            size = 0
            # The iterable's own errors must not be taken for the file system's.
            for piece in pieces_of(data):
                with _file_errors(uri):
                    if size + len(piece) > SMALL_BYTES:
                        check_free(self._folder, len(piece), self._reserve_bytes)
                    size += _write_all(descriptor, piece)
            with _file_errors(uri):
                if size <= _FLUSHED_BYTES:
                    os.fsync(descriptor)
                status = os.fstat(descriptor)
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)
        return _file_stat(uri, status)

    def stream(self, uri: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        checked_range(uri, offset, length)
        with _file_errors(uri):
            descriptor = self._open(uri)
        try:
            position, end = offset, None if length is None else offset + length
            while end is None or position < end:
                wanted = CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - position)
                with _file_errors(uri):
                    chunk = os.pread(descriptor, wanted, position)
                if not chunk:
                    break
                position += len(chunk)
                yield chunk
        finally:
            os.close(descriptor)

    def stat(self, uri: str) -> Stat:
        with _file_errors(uri):
            descriptor = self._open(uri)
            try:
                return _file_stat(uri, os.fstat(descriptor))
            finally:
                os.close(descriptor)

    def list(self, prefix_uri: str) -> Iterator[Stat]:
        prefix_uri = checked_uri(prefix_uri)
        path = self._path(prefix_uri)
        with _file_errors(prefix_uri):
            if path.is_dir():
                yield from self._walk(prefix_uri, path)
            elif path.is_file():
                yield self.stat(prefix_uri)

    def delete(self, uri: str) -> None:
        path = self._path(uri)
        with _file_errors(uri):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
            except (IsADirectoryError, PermissionError):
                if path.is_dir():
                    return
                raise
            self._remove_empty(path.parent)

    def remove_abandoned(self, older_than_seconds: float) -> int:
        oldest = time.time() - older_than_seconds
        count = 0
        with _file_errors(self.root):
            for folder, _, names in os.walk(self._folder):
                for name in names:
                    if not name.startswith(UNFINISHED):
                        continue
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):  # finished or removed meanwhile
                        if path.lstat().st_mtime <= oldest:
                            path.unlink()
                            count += 1
                            self._remove_empty(path.parent)
        return count

    def free_bytes(self) -> int:
        with _file_errors(self.root):
            return free_bytes(self._folder)

    def check_space(self, size_bytes: int) -> None:
        if size_bytes > SMALL_BYTES:
            with _file_errors(self.root):
                check_free(self._folder, size_bytes, self._reserve_bytes)

    def _remove_empty(self, folder: Path) -> None:
        """Folders exist only for what is in them, as in S3."""
        while folder != self._folder:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    def _path(self, uri: str) -> Path:
        """The file of a URI; no link on the way there leaves the root."""
        uri = checked_uri(uri)
        if not is_below(uri, self.root):
            raise PermissionDenied(f"{uri} is outside {self.root}")
        path = Path(uri.removeprefix("file://"))
        if len(os.fsencode(path)) > 4095 or any(len(os.fsencode(name)) > 255 for name in path.parts):
            raise InvalidArgument(f"{uri} is too long a name for a file system")
        with _file_errors(uri):
            real = os.path.realpath(path)
        if real != self._real_folder and not real.startswith(self._real_folder.rstrip("/") + "/"):
            raise PermissionDenied(f"{uri} is a link to outside {self.root}")
        return path

    def _create(self, uri: str, folder: Path) -> tuple[Path, int]:
        """A new unfinished file in a folder, which is made; the file's name and descriptor."""
        temporary = folder / f"{UNFINISHED}{uuid.uuid4().hex}"
        for attempt in itertools.count():
            folder.mkdir(parents=True, exist_ok=True)
            self._path(uri)  # again: now that the folders exist, none of them may be a link to elsewhere
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                return temporary, os.open(temporary, flags, 0o644)
            except FileNotFoundError:
                # A delete took the empty folder away in between.
                if attempt == 10:
                    raise
        raise AssertionError

    def _open(self, uri: str) -> int:
        path = self._path(uri)
        # Not blocking: opening a pipe that somebody put there would wait for ever.
        descriptor = os.open(os.path.realpath(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat_bits.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(errno.ENOENT, "not a file", str(path))
        return descriptor

    def _walk(self, uri: str, folder: Path) -> Iterator[Stat]:
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not entry.name.startswith(UNFINISHED)]
        except (FileNotFoundError, NotADirectoryError):
            return  # removed meanwhile
        # A folder sorts as its objects' URIs do: by its name and a slash.
        entries.sort(key=lambda entry: os.fsencode(entry.name) + (b"/" if _is_folder(entry) else b""))
        for entry in entries:
            child = f"{uri.rstrip('/')}/{entry.name}"
            if _is_folder(entry):
                # A folder below that may not be entered, as lost+found, does not hide all others.
                with contextlib.suppress(PermissionError):
                    yield from self._walk(child, folder / entry.name)
            else:
                # Removed meanwhile, a link to elsewhere, or a name that no URI can have: not an object of this store.
                with contextlib.suppress(NotFound, PermissionDenied):
                    yield self._listed(child, entry)

    def _listed(self, uri: str, entry: os.DirEntry[str]) -> Stat:
        """A file that may not be opened is listed all the same, so that whoever reads it is told why it can't be."""
        try:
            return self.stat(uri)
        except PermissionDenied as refusal:
            if isinstance(refusal.__cause__, PermissionError) and entry.is_file(follow_symlinks=False):
                return _file_stat(uri, entry.stat(follow_symlinks=False))
            raise


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _file_stat(uri: str, status: os.stat_result) -> Stat:
    return Stat(uri, status.st_size, status.st_mtime, f"{status.st_ino:x}-{status.st_mtime_ns:x}")


def _write_all(descriptor: int, piece: bytes | bytearray | memoryview) -> int:
    view = memoryview(piece).cast("B")
    written = 0
    while written < len(view):
        written += os.write(descriptor, view[written:])
    return written


@contextlib.contextmanager
def _file_errors(uri: str) -> Iterator[None]:
    """Operating system errors as Failures that name the object."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise NotFound(f"{uri} does not exist") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP):
            raise PermissionDenied(f"{uri}: {reason}") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise ResourceExhausted(f"{uri} could not be written or read: {reason}") from error
        if error.errno == errno.EEXIST:
            raise AlreadyExists(f"{uri}: a file stands where a folder must be") from error
        if error.errno == errno.ENAMETOOLONG:
            raise InvalidArgument(f"{uri} is too long a name") from error
        if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN):
            raise Unavailable(f"{uri}: {reason}") from error
        raise Internal(f"{uri}: {reason}") from error
