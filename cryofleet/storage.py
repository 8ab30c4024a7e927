"""Object storage: whole objects under URIs, on a file system (`file:///path`) or in S3 (`s3://bucket/key`).

URIs are literal: nothing in them is percent-decoded, and the names `.` and `..` do not exist. A `Store`
opens only what lies under the roots it was made with.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import os
import re
import stat as stat_bits
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.datatypes import Part
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from cryofleet.errors import (
    AlreadyExists,
    FailedPrecondition,
    Failure,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from cryofleet.settings import PROJECT_PATTERN, S3Settings, Settings

CHUNK_BYTES = 8 * 1024 * 1024
"""What streams are read and written by."""

Data = bytes | bytearray | memoryview | Iterable[bytes]


@dataclass(frozen=True)
class Stat:
    """What a store knows of an object without reading it."""

    uri: str
    size_bytes: int
    modified: float
    """Unix time."""
    version: str = ""
    """Differs after every change of the object's bytes: S3's ETag, a file's inode and time."""


class ObjectStore(ABC):
    """Whole objects under URIs. Every method may raise PermissionDenied and Unavailable."""

    @abstractmethod
    def put(self, uri: str, data: Data) -> Stat:
        """Write an object, replacing one of that URI. All or nothing: until it is whole nobody sees it.

        Raises ResourceExhausted where there is no space, and whatever the iterable raises.
        """

    @abstractmethod
    def stream(self, uri: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The object's bytes from `offset`, in chunks of at most CHUNK_BYTES, fewer than `length` where it ends before.

        Raises NotFound at the first chunk.
        """

    @abstractmethod
    def stat(self, uri: str) -> Stat:
        """Raises NotFound."""

    @abstractmethod
    def list(self, prefix_uri: str) -> Iterator[Stat]:
        """All objects below a folder, and one of exactly that URI, in byte order of their URIs."""

    @abstractmethod
    def delete(self, uri: str) -> None:
        """Remove an object; no error where there is none."""

    def get(self, uri: str) -> bytes:
        """A whole object. Raises NotFound."""
        return b"".join(self.stream(uri))

    def get_range(self, uri: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer where the object ends before. Raises NotFound."""
        return b"".join(self.stream(uri, offset, length))

    def exists(self, uri: str) -> bool:
        """Whether there is such an object."""
        try:
            self.stat(uri)
        except NotFound:
            return False
        return True


# --- URIs ----------------------------------------------------------------------------------------------------------

_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def file_uri(path: str | os.PathLike[str]) -> str:
    """The URI of a local path: made absolute, its characters as they are."""
    return "file://" + os.path.abspath(path)


@functools.lru_cache(maxsize=4096)
def checked_uri(uri: str) -> str:
    """The URI without a trailing slash. Raises PermissionDenied where it could mean anything but what it says."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in ("file", "s3"):
        raise InvalidArgument(f"{uri!r} is no storage URI; it must begin with file:/// or s3://")
    if _CONTROL.search(uri):
        raise PermissionDenied(f"{uri!r} holds control characters")
    if _ENCODED.search(uri):
        raise PermissionDenied(f"{uri!r} is percent-encoded; URIs of the store are literal")
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise PermissionDenied(f"{uri!r} is not valid Unicode") from None
    if rest.endswith("/") and rest != "/":
        rest = rest[:-1]
    if scheme == "file" and not rest.startswith("/"):
        raise PermissionDenied(f"{uri!r} names a host; a file URI must begin with file:///")
    names = rest.removeprefix("/").split("/") if scheme == "file" else rest.split("/")
    if scheme == "s3" and not _BUCKET.fullmatch(names[0]):
        raise InvalidArgument(f"{uri!r} names no valid bucket")
    if rest != "/" and any(name in ("", ".", "..") for name in names):
        raise PermissionDenied(f"{uri!r} holds an empty name, '.' or '..'")
    if any(name.startswith(_TEMPORARY) for name in names):
        raise PermissionDenied(f"{uri!r} has a name that is kept for unfinished files")
    return f"{scheme}://{rest}"


def is_below(uri: str, root: str) -> bool:
    """Whether a checked URI is `root` or lies under it."""
    return uri == root or uri.startswith(root.rstrip("/") + "/")


def _checked_range(uri: str, offset: int, length: int | None) -> None:
    if offset < 0 or (length is not None and length < 0):
        raise InvalidArgument(f"{uri}: offset {offset} and length {length} must not be negative")


def _chunks(data: Data) -> Iterator[bytes | memoryview]:
    """The data in pieces of at most CHUNK_BYTES."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        data = [memoryview(data).cast("B")]  # type: ignore[list-item]
    for piece in data:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


# --- Files ---------------------------------------------------------------------------------------------------------

_TEMPORARY = ".cryofleet-unfinished-"

# Small objects are flushed to disk before they get their names: manifests and indices decide what exists. Of larger
# ones a power cut may leave a short file; its size and block digests tell, and it is computed again.
_FLUSHED_BYTES = CHUNK_BYTES


class FileStore(ObjectStore):
    """Objects are files under one folder."""

    def __init__(self, root_uri: str) -> None:
        """`root_uri` is a `file:///folder`, made on the first put."""
        self.root = checked_uri(root_uri)
        if not self.root.startswith("file://"):
            raise InvalidArgument(f"{root_uri!r} is no file URI")
        self._folder = Path(self.root.removeprefix("file://"))
        self._real_folder = os.path.realpath(self._folder)

    def put(self, uri: str, data: Data) -> Stat:
        path = self._path(uri)
        if path == self._folder:
            raise PermissionDenied(f"{uri} is the store's own root")
        chunks = _chunks(data)
        with _file_errors(uri):
            temporary, descriptor = self._create(uri, path.parent)
        try:
            size = 0
            while True:
                # The iterable's own errors must not be taken for the file system's.
                chunk = next(chunks, None)
                if chunk is None:
                    break
                with _file_errors(uri):
                    size += _write_all(descriptor, chunk)
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
        _checked_range(uri, offset, length)
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
            # Folders exist only for what is in them, as in S3.
            for folder in path.parents:
                if folder == self._folder:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def remove_abandoned(self, older_than_seconds: float = 86400.0) -> int:
        """Delete the unfinished files that killed writers left; how many there were."""
        count = 0
        oldest = time.time() - older_than_seconds
        for folder, _, names in os.walk(self._folder):
            for name in names:
                if name.startswith(_TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):
                        if os.lstat(os.path.join(folder, name)).st_mtime < oldest:
                            os.unlink(os.path.join(folder, name))
                            count += 1
        return count

    def local_path(self, uri: str) -> Path:
        """The file behind a URI; whether it exists is not checked."""
        return self._path(uri)

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
        temporary = folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
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
                entries = [entry for entry in found if not entry.name.startswith(_TEMPORARY)]
        except (FileNotFoundError, NotADirectoryError):
            return  # removed meanwhile
        # A folder sorts as its objects' URIs do: by its name and a slash.
        entries.sort(key=lambda entry: os.fsencode(entry.name) + (b"/" if _is_folder(entry) else b""))
        for entry in entries:
            child = f"{uri.rstrip('/')}/{entry.name}"
            if _is_folder(entry):
                yield from self._walk(child, folder / entry.name)
            else:
                # Removed meanwhile, a link to elsewhere, or a name that no URI can have: not an object of this store.
                with contextlib.suppress(NotFound, PermissionDenied):
                    yield self.stat(child)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _file_stat(uri: str, status: os.stat_result) -> Stat:
    return Stat(uri, status.st_size, status.st_mtime, f"{status.st_ino:x}-{status.st_mtime_ns:x}")


def _write_all(descriptor: int, chunk: bytes | memoryview) -> int:
    view = memoryview(chunk)
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


# --- S3 ------------------------------------------------------------------------------------------------------------

_PART_BYTES = 16 * 1024 * 1024  # S3 takes 10 000 parts at most: objects up to 156 GiB
_PARTS_IN_FLIGHT = 3
_READ_ATTEMPTS = 5

_CODES: dict[str, type[Failure]] = {
    "NoSuchKey": NotFound,
    "NoSuchBucket": NotFound,
    "ResourceNotFound": NotFound,
    "NoSuchUpload": Unavailable,
    "AccessDenied": PermissionDenied,
    "AllAccessDisabled": PermissionDenied,
    "InvalidAccessKeyId": PermissionDenied,
    "SignatureDoesNotMatch": PermissionDenied,
    "RequestTimeTooSkewed": PermissionDenied,
    "ExpiredToken": PermissionDenied,
    "SlowDown": Unavailable,
    "SlowDownRead": Unavailable,
    "SlowDownWrite": Unavailable,
    "ServiceUnavailable": Unavailable,
    "InternalError": Unavailable,
    "RequestTimeout": Unavailable,
    "OperationAborted": Unavailable,
    "XMinioServerNotInitialized": Unavailable,
    "XMinioBackendDown": Unavailable,
    "EntityTooLarge": ResourceExhausted,
    "QuotaExceeded": ResourceExhausted,
    "XMinioAdminBucketQuotaExceeded": ResourceExhausted,
    "XMinioStorageFull": ResourceExhausted,
    "KeyTooLongError": InvalidArgument,
    "XMinioInvalidObjectName": InvalidArgument,
    "PreconditionFailed": FailedPrecondition,
}


class S3Store(ObjectStore):
    """Objects in the buckets of one S3 service.

    Parts of uploads that were cut off together with their process are never visible; a life-cycle rule
    of the bucket removes them.
    """

    def __init__(self, settings: S3Settings) -> None:
        timeout = urllib3.Timeout(connect=5.0, read=60.0)
        retries = urllib3.Retry(total=3, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504])
        pool = {"timeout": timeout, "retries": retries, "maxsize": 16}
        if settings.secure and os.environ.get("SSL_CERT_FILE"):
            pool["ca_certs"] = os.environ["SSL_CERT_FILE"]
        self._endpoint = settings.endpoint
        self._client = Minio(
            settings.endpoint,
            access_key=settings.access_key or None,
            secret_key=settings.secret_key or None,
            secure=settings.secure,
            region=settings.region,
            http_client=urllib3.PoolManager(**pool),  # type: ignore[arg-type]
        )

    def put(self, uri: str, data: Data) -> Stat:
        bucket, key = _bucket_and_key(uri)
        parts = _parts(data)
        first = next(parts, b"")
        second = next(parts, None) if len(first) == _PART_BYTES else None
        if second is None:
            with self._errors(uri):
                result = self._client.put_object(bucket, key, io.BytesIO(first), len(first))
            return Stat(uri, len(first), time.time(), _tag(result.etag))
        size, tag = self._put_parts(uri, itertools.chain((first, second), parts))
        return Stat(uri, size, time.time(), tag)

    def _put_parts(self, uri: str, parts: Iterator[bytes]) -> tuple[int, str]:
        """A multipart upload with a few parts in flight.

        The client's own `put_object` would go on sending after a part failed, and leave its threads behind; so its
        single steps are called here.
        """
        client: Any = self._client
        bucket, key = _bucket_and_key(uri)
        with self._errors(uri):
            upload = client._create_multipart_upload(bucket, key, {"Content-Type": "application/octet-stream"})
        size, tags, waiting = 0, [], deque[Future[str]]()
        try:
            with ThreadPoolExecutor(_PARTS_IN_FLIGHT, thread_name_prefix="s3-part") as pool:
                try:
                    for number, part in enumerate(parts, start=1):
                        size += len(part)
                        waiting.append(pool.submit(client._upload_part, bucket, key, part, None, upload, number))
                        del part
                        if len(waiting) == _PARTS_IN_FLIGHT:
                            with self._errors(uri):
                                tags.append(waiting.popleft().result())
                    with self._errors(uri):
                        tags.extend(future.result() for future in waiting)
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            with self._errors(uri):
                done = client._complete_multipart_upload(
                    bucket, key, upload, [Part(number, tag) for number, tag in enumerate(tags, start=1)]
                )
        except BaseException:
            with contextlib.suppress(MinioException, urllib3.exceptions.HTTPError):
                client._abort_multipart_upload(bucket, key, upload)
            raise
        return size, _tag(done.etag)

    def stream(self, uri: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        _checked_range(uri, offset, length)
        bucket, key = _bucket_and_key(uri)
        if length == 0:
            self.stat(uri)
            return
        tag = ""
        position, end = offset, None if length is None else offset + length
        for attempt in range(_READ_ATTEMPTS):
            # A connection that breaks in the middle is taken up where it broke, if the object is still the same.
            headers: dict[str, str | list[str] | tuple[str]] | None = {"If-Match": f'"{tag}"'} if tag else None
            try:
                with self._errors(uri):
                    wanted = 0 if end is None else end - position
                    response = self._client.get_object(bucket, key, position, wanted, request_headers=headers)
            except _RangeEmpty:
                return
            except FailedPrecondition:
                raise Unavailable(f"{uri} was replaced while it was read") from None
            tag = tag or _tag(response.headers.get("etag"))
            try:
                while True:
                    chunk = response.read(CHUNK_BYTES)
                    if not chunk:
                        break
                    position += len(chunk)
                    yield chunk
                return
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if attempt == _READ_ATTEMPTS - 1:
                    raise Unavailable(f"{uri}: {self._endpoint} broke off at byte {position}: {error}") from error
                time.sleep(0.2 * 2**attempt)
            finally:
                response.close()
                response.release_conn()
            if position == end:
                return

    def stat(self, uri: str) -> Stat:
        bucket, key = _bucket_and_key(uri)
        with self._errors(uri):
            found = self._client.stat_object(bucket, key)
        modified = found.last_modified.timestamp() if found.last_modified else 0.0
        return Stat(uri, found.size or 0, modified, _tag(found.etag))

    def list(self, prefix_uri: str) -> Iterator[Stat]:
        prefix_uri = checked_uri(prefix_uri)
        bucket, _, folder = prefix_uri.removeprefix("s3://").partition("/")
        if folder:
            with contextlib.suppress(NotFound):
                yield self.stat(prefix_uri)
        with self._errors(prefix_uri):
            for found in self._client.list_objects(bucket, prefix=folder + "/" if folder else None, recursive=True):
                child = f"s3://{bucket}/{found.object_name}"
                if found.is_dir or found.object_name is None or not _is_exact(child):
                    continue
                modified = found.last_modified.timestamp() if found.last_modified else 0.0
                yield Stat(child, found.size or 0, modified, _tag(found.etag))

    def delete(self, uri: str) -> None:
        bucket, key = _bucket_and_key(uri)
        with contextlib.suppress(NotFound), self._errors(uri):
            self._client.remove_object(bucket, key)

    @contextlib.contextmanager
    def _errors(self, uri: str) -> Iterator[None]:
        """The client's errors as Failures that name the object."""
        try:
            yield
        except S3Error as error:
            self._raise_s3(uri, error)
        except (ServerError, InvalidResponseError) as error:
            raise Unavailable(f"{uri}: {self._endpoint} answered with an error of its own: {error}") from error
        except (urllib3.exceptions.HTTPError, OSError, ParseError) as error:
            raise Unavailable(f"{uri}: no connection to {self._endpoint}: {error}") from error
        except (ValueError, MinioException) as error:
            raise InvalidArgument(f"{uri}: {error}") from error

    def _raise_s3(self, uri: str, error: S3Error) -> NoReturn:
        if error.code == "InvalidRange":
            raise _RangeEmpty from error
        kind = _CODES.get(error.code or "", Internal)
        if kind is NotFound:
            raise NotFound(f"{uri} does not exist") from error
        raise kind(f"{uri}: {error.code}: {error.message}") from error


class _RangeEmpty(Exception):
    """A range that begins at the end of its object or after it."""


def _is_exact(uri: str) -> bool:
    """Whether a URI names the object it was made of: other programs' keys may end in a slash or hold '..'."""
    try:
        return checked_uri(uri) == uri
    except PermissionDenied:
        return False


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = checked_uri(uri).removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not key:
        raise InvalidArgument(f"{uri!r} names no object; it must be s3://bucket/key")
    return bucket, key


def _tag(etag: str | None) -> str:
    return (etag or "").strip('"')


def _parts(data: Data) -> Iterator[bytes]:
    """The data in parts of _PART_BYTES, the last one shorter."""
    gathered: list[bytes | memoryview] = []
    size = 0
    for chunk in _chunks(data):
        while len(chunk):
            taken = chunk[: _PART_BYTES - size]
            gathered.append(taken)
            size += len(taken)
            chunk = chunk[len(taken) :]
            if size == _PART_BYTES:
                yield b"".join(gathered)
                gathered, size = [], 0
    if size:
        yield b"".join(gathered)


# --- The configured roots ------------------------------------------------------------------------------------------


class Store(ObjectStore):
    """What a process may reach: one root to write under, and roots to read from."""

    def __init__(self, root: str, read_only_roots: Sequence[str] = (), s3: S3Settings | None = None) -> None:
        """`root` and `read_only_roots` are URIs of folders; `s3` is needed where one is in S3."""
        self.root = checked_uri(root)
        self.read_only_roots = tuple(checked_uri(uri) for uri in read_only_roots)
        self._s3 = s3
        self._project: str | None = None
        self._backends: dict[str, ObjectStore] = {}
        self._lock = threading.Lock()
        for uri in (self.root, *self.read_only_roots):
            if uri.startswith("s3://") and s3 is None:
                raise InvalidArgument(f"{uri} needs the S3 settings")

    @classmethod
    def open(cls, settings: Settings) -> Store:
        """The store of a process's settings."""
        return cls(settings.store, settings.read_only_roots, settings.s3)

    def for_project(self, project: str) -> Store:
        """The same store, closed to what other projects have under the root."""
        if not PROJECT_PATTERN.fullmatch(project):
            raise InvalidArgument(f"project {project!r} must match {PROJECT_PATTERN.pattern}")
        narrowed = Store(self.root, self.read_only_roots, self._s3)
        narrowed._project = project
        narrowed._backends, narrowed._lock = self._backends, self._lock
        return narrowed

    def put(self, uri: str, data: Data) -> Stat:
        return self._backend(uri, write=True).put(checked_uri(uri), data)

    def stream(self, uri: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        return self._backend(uri).stream(checked_uri(uri), offset, length)

    def get(self, uri: str) -> bytes:
        return self._backend(uri).get(checked_uri(uri))

    def get_range(self, uri: str, offset: int, length: int) -> bytes:
        return self._backend(uri).get_range(checked_uri(uri), offset, length)

    def stat(self, uri: str) -> Stat:
        return self._backend(uri).stat(checked_uri(uri))

    def list(self, prefix_uri: str) -> Iterator[Stat]:
        return self._backend(prefix_uri).list(checked_uri(prefix_uri))

    def delete(self, uri: str) -> None:
        self._backend(uri, write=True).delete(checked_uri(uri))

    def local_path(self, uri: str) -> Path | None:
        """The file behind a URI of a file store; None in S3."""
        backend = self._backend(uri)
        return backend.local_path(uri) if isinstance(backend, FileStore) else None

    def _backend(self, uri: str, write: bool = False) -> ObjectStore:
        uri = checked_uri(uri)
        own = self.root if self._project is None else f"{self.root}/{self._project}"
        if is_below(uri, own):
            return self._opened(self.root)
        if is_below(uri, self.root):
            raise PermissionDenied(f"{uri} is not of project {self._project}")
        for root in self.read_only_roots:
            if is_below(uri, root):
                if write:
                    raise PermissionDenied(f"{uri} is under {root}, which is read only")
                return self._opened(root)
        raise PermissionDenied(f"{uri} is outside the roots of this store")

    def _opened(self, root: str) -> ObjectStore:
        # All of S3 is one service and one connection pool.
        name = "s3" if root.startswith("s3://") else root
        with self._lock:
            if name not in self._backends:
                if name != "s3":
                    self._backends[name] = FileStore(root)
                elif self._s3 is not None:
                    self._backends[name] = S3Store(self._s3)
            return self._backends[name]
