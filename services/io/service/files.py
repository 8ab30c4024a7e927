"""Upload, Download and List: files up and down."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import cryofleet
from cryofleet.artifacts import Manifest, ResultWriter, complete, find, identity, open_blob
from cryofleet.errors import Cancelled, DataLoss, Failure, InvalidArgument
from cryofleet.server import CallContext
from cryofleet.server.limits import check_file_bytes
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.storage import Stat, Store
from cryofleet.v1 import io_pb2
from services.io import upload as uploading
from services.io.service.registry import service

_CHUNK_BYTES = 2 << 20
_LISTED_AT_ONCE = 256
_UPLOAD = "io.Upload"
_UPLOAD_VERSION = 1


@service.rpc("Upload")
async def upload(requests: AsyncIterator[io_pb2.UploadRequest], call: CallContext) -> io_pb2.UploadResponse:
    """Store a file as a result of its own, whose identity is its name and content.

    A header alone asks whether the store has the file: `present` is false, and there is no URI, where it has not. What
    would not be taken is refused then: a refusal amid the bytes may reach a caller as an error of its own sending.
    """
    first = await anext(requests, None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidArgument("the first message of an upload must be its header")
    header = first.header
    check_file_bytes(header.name, header.size_bytes, call.settings.max_volume_bytes)
    store = call.store_of(header.context)
    project = header.context.project or DEFAULT_PROJECT
    name = uploading.safe_name(header.name)
    parameters = {"name": name, "size_bytes": header.size_bytes, "digest": header.digest}
    key = identity(_UPLOAD, _UPLOAD_VERSION, parameters, {})
    manifest = await call.in_thread(_finished, store, project, key)
    if manifest is not None:
        return io_pb2.UploadResponse(uri=f"{manifest.uri}/{name}", present=True)
    message = await anext(requests, None)
    await call.in_thread(_check_space, call, project, header.size_bytes)
    if message is None and header.size_bytes:
        return io_pb2.UploadResponse(present=False)

    feed = uploading.Feed(header.name, header.size_bytes)
    storing = asyncio.create_task(
        call.in_thread(_store_upload, store, project, key, parameters, feed, call.instance.name)
    )

    def stored(done: asyncio.Task[str]) -> None:
        feed.close()
        if not done.cancelled():
            done.exception()  # seen here, should the caller have left meanwhile

    storing.add_done_callback(stored)
    failure: Failure | None = Cancelled(f"{header.name}: the upload was broken off")
    try:
        while message is not None:
            if message.WhichOneof("part") != "chunk":
                raise InvalidArgument(f"{header.name}: a second header came where bytes were expected")
            if not await feed.send(message.chunk):
                break
            message = await anext(requests, None)
        failure = None
    finally:
        feed.end(failure)
    uri = await asyncio.shield(storing)
    call.instance.quotas.count(project, header.size_bytes)
    return io_pb2.UploadResponse(uri=uri, present=False)


def _check_space(call: CallContext, project: str, size_bytes: int) -> None:
    call.instance.quotas.check(project, size_bytes)
    call.store.check_space(size_bytes)


def _finished(store: Store, project: str, key: str) -> Manifest | None:
    try:
        manifest = find(store, project, key)
    except DataLoss:
        return None  # what is damaged is written anew
    return manifest if manifest is not None and complete(store, manifest) else None


def _store_upload(
    store: Store, project: str, key: str, parameters: dict[str, str | int], feed: uploading.Feed, host: str
) -> str:
    """Writes the bytes and, if they are those announced, the manifest, without which they count for nothing."""
    started = time.monotonic()
    writer = ResultWriter(store, project, key)
    name = str(parameters["name"])
    try:
        uri = writer.put(name, feed)
        digest = writer.entry(name)["digest"]
        if digest != parameters["digest"]:
            raise InvalidArgument(
                f"{name}: the bytes that came have digest {digest}, announced was {parameters['digest']}"
            )
        writer.commit(
            operation=_UPLOAD,
            version=_UPLOAD_VERSION,
            parameters=parameters,
            inputs={},
            result={"uri": uri},
            seconds=time.monotonic() - started,
            device="cpu",
            software=f"cryofleet {cryofleet.__version__}",
            host=host,
        )
    except BaseException:
        writer.discard()
        raise
    return uri


@service.rpc("Download")
async def download(request: io_pb2.DownloadRequest, call: CallContext) -> AsyncIterator[io_pb2.DownloadResponse]:
    """Stream an object, or a range of it, each piece verified before it leaves."""
    blob = await call.in_thread(open_blob, call.store_of(request.context), request.uri)
    if request.offset_bytes > blob.size_bytes:
        raise InvalidArgument(f"offset_bytes is {request.offset_bytes}; {request.uri} has {blob.size_bytes} bytes")
    length = request.length_bytes or None
    pieces = blob.stream(request.offset_bytes, length)
    sent = False
    while piece := await call.in_thread(next, pieces, b""):
        for start in range(0, len(piece), _CHUNK_BYTES):
            yield io_pb2.DownloadResponse(size_bytes=blob.size_bytes, chunk=piece[start : start + _CHUNK_BYTES])
            sent = True
    if not sent:
        yield io_pb2.DownloadResponse(size_bytes=blob.size_bytes)


@service.rpc("List")
async def list_objects(request: io_pb2.ListRequest, call: CallContext) -> AsyncIterator[io_pb2.ListResponse]:
    """Name the objects under a URI, in order."""
    found = call.store_of(request.context).list(request.uri)

    def some() -> list[Stat]:
        return list(itertools.islice(found, _LISTED_AT_ONCE))

    while listed := await call.in_thread(some):
        for each in listed:
            yield io_pb2.ListResponse(uri=each.uri, size_bytes=each.size_bytes)
