"""Objects in the buckets of an S3 service."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn
from urllib.parse import unquote_plus
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.datatypes import Object, Part
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from cryofleet.errors import (
    FailedPrecondition,
    Failure,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from cryofleet.settings import S3Settings
from cryofleet.storage.object_store import CHUNK_BYTES, Data, ObjectStore, Stat, checked_range, in_blocks
from cryofleet.storage.uris import checked_uri, is_below

_PART_BYTES = 16 * 1024 * 1024  # S3 takes 10 000 parts at most: objects up to 156 GiB
_PARTS_IN_FLIGHT = 3
_READ_ATTEMPTS = 5
_PING_SECONDS = 10
"""How often a server that tells of events says that it is still there."""
_EVENT_BYTES = 1024 * 1024

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

    Parts of uploads that were cut off together with their process are never visible; MinIO removes them after a day,
    elsewhere a life-cycle rule of the bucket does. `remove_abandoned` leaves them: MinIO lists no uploads by folder.
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
        parts = in_blocks(data, _PART_BYTES)
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
        checked_range(uri, offset, length)
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
        return _stat(uri, found)

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
                yield _stat(child, found)

    def listen(self, prefix_uri: str) -> Iterator[tuple[str, ...]] | None:
        """By MinIO's own call, which other servers take for a listing or refuse.

        The client's `listen_bucket_notification` would ask those again and again without end, so the call is made here.
        """
        prefix_uri = checked_uri(prefix_uri)
        bucket, _, folder = prefix_uri.removeprefix("s3://").partition("/")
        query = {
            "prefix": f"{folder}/" if folder else "",
            "suffix": "",
            "events": ("s3:ObjectCreated:*",),
            "ping": str(_PING_SECONDS),
        }
        client: Any = self._client
        try:
            with self._errors(prefix_uri):
                response = client._execute("GET", bucket, query_params=query, preload_content=False)
        except Unavailable:
            raise
        except Failure:
            return None
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            response.close()
            return None
        return self._heard(prefix_uri, response)

    def _heard(self, prefix_uri: str, response: Any) -> Iterator[tuple[str, ...]]:
        waiting = b""
        try:
            with self._errors(prefix_uri):
                while chunk := response.read1(_EVENT_BYTES):
                    *lines, waiting = (waiting + chunk).split(b"\n")
                    # Older servers send blanks, and no end of line, to keep the connection.
                    waiting = waiting.lstrip()
                    if len(waiting) > _EVENT_BYTES:
                        raise Unavailable(f"{prefix_uri}: {self._endpoint} tells of an event without an end")
                    yield tuple(uri for line in lines for uri in _created(line) if is_below(uri, prefix_uri))
        finally:
            response.close()

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


def _created(line: bytes) -> Iterator[str]:
    """URIs of the objects that a line of events tells of; none where it is no such line."""
    try:
        for record in json.loads(line)["Records"]:
            of = record["s3"]
            uri = f"s3://{of['bucket']['name']}/{unquote_plus(of['object']['key'])}"
            if _is_exact(uri):
                yield uri
    except (ValueError, KeyError, TypeError, InvalidArgument):
        return


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


def _stat(uri: str, found: Object) -> Stat:
    modified = found.last_modified.timestamp() if found.last_modified else 0.0
    return Stat(uri, found.size or 0, modified, _tag(found.etag))


def _tag(etag: str | None) -> str:
    return (etag or "").strip('"')
