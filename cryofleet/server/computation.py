"""From a request to its result in the store: identity, the look into the store, the computation, the manifest."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from cryofleet import tracing
from cryofleet.artifacts import (
    InputEntry,
    Manifest,
    ResultWriter,
    complete,
    content_digest,
    find,
    identity,
    versions,
)
from cryofleet.errors import DataLoss, Failure, Unavailable
from cryofleet.operations import (
    inputs_of,
    parameters_of,
    resolve_defaults,
    result_from_mapping,
    result_to_mapping,
)
from cryofleet.progress import Progress
from cryofleet.server.service import Method
from cryofleet.server.task import Task
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.storage import Store

logger = logging.getLogger(__name__)
_HOST = socket.gethostname()


@dataclass(frozen=True)
class Question:
    """A request with all that decides its result."""

    method: Method
    request: Any
    """With its defaults resolved."""
    store: Store
    """Closed to other projects."""
    project: str
    key: str
    parameters: dict[str, Any]
    inputs: dict[str, list[InputEntry]]
    versions: dict[str, dict[str, str]]
    """Of each input's files, before they were hashed (`cryofleet.artifacts.versions`)."""


def project_of(request: Any) -> str:
    """The project that a request's context names."""
    return request.context.project or DEFAULT_PROJECT


@tracing.spanned("identify")
def identify(method: Method, request: Message, store: Store) -> Question:
    """The identity of a validated request's result.

    Raises PermissionDenied, NotFound and so on for inputs that may not or cannot be read.
    """
    project = project_of(request)
    store = store.for_project(project)
    resolved = resolve_defaults(request)
    parameters = parameters_of(resolved)
    uris_of = inputs_of(resolved)
    seen = {uri: versions(store, uri) for uris in uris_of.values() for uri in uris if uri}
    inputs = {
        field: [InputEntry(uri=uri, digest=content_digest(store, uri) if uri else "") for uri in uris]
        for field, uris in uris_of.items()
    }
    digests = {field: [entry["digest"] for entry in entries] for field, entries in inputs.items()}
    operation = method.operation
    key = identity(operation.name, operation.version, parameters, digests)
    return Question(method, resolved, store, project, key, parameters, inputs, seen)


@tracing.spanned("look up")
def look_up(question: Question) -> Manifest | None:
    """The manifest of the result, if the store has it whole. What is damaged counts as not there: it is made anew."""
    try:
        manifest = find(question.store, question.project, question.key)
    except DataLoss as damage:
        logger.warning("computing a result again: %s", damage)
        return None
    if manifest is not None and not complete(question.store, manifest):
        logger.warning("computing a result again: not all of its objects are there: %s", manifest.uri)
        return None
    return manifest


def result_of(question: Question, manifest: Manifest) -> Message:
    """The result that a manifest records."""
    return result_from_mapping(question.method.operation, manifest.result)


def _portable(value: Any) -> Any:
    """JSON has no NaN and no infinity; protobuf's JSON reads them as these words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return value


def _check_inputs(question: Question) -> None:
    """Raises Unavailable where an input is no longer what was hashed: the result would lie under a wrong key."""
    for uri, seen in question.versions.items():
        if versions(question.store, uri) != seen:
            raise Unavailable(f"{uri} changed while it was read; try again")


def compute(
    question: Question,
    *,
    progress: Progress,
    device: str,
    threads: int,
    instance: str,
    software: str,
    new_scratch: Callable[[], Path],
    max_volume_bytes: int = 0,
) -> Manifest:
    """Runs the operation's function and keeps its result, the manifest last.

    Whatever it raises, nothing of the result stays in the store and no temporary file on disk.
    """
    writer = ResultWriter(question.store, question.project, question.key)
    task = Task(
        store=question.store,
        project=question.project,
        key=question.key,
        writer=writer,
        progress=progress,
        device=device,
        threads=threads,
        instance=instance,
        new_scratch=new_scratch,
        max_volume_bytes=max_volume_bytes,
    )
    operation = question.method.operation
    started = time.monotonic()
    try:
        with tracing.span("compute", operation=operation.name, device=device):
            result = question.method.function(question.request, task)
        _check_inputs(question)
        with tracing.span("commit"):
            manifest = writer.commit(
                operation=operation.name,
                version=operation.version,
                parameters=question.parameters,
                inputs=question.inputs,
                result=_portable(result_to_mapping(result)),
                seconds=time.monotonic() - started,
                device=device,
                software=software,
                host=_HOST,
            )
    except BaseException:
        try:
            writer.discard()
        except Failure as failure:
            # Without a manifest they count for nothing; the next collection of garbage removes them.
            logger.warning("unfinished blobs of %s stay behind: %s", question.key, failure)
        raise
    finally:
        task.close()
    task.checkpoints.remove()
    return manifest
