"""What is asked of inboxes: to add one, and to retry what it has set aside."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from google.protobuf import json_format

from cryofleet.errors import InvalidArgument, NotFound, PermissionDenied
from cryofleet.settings import DEFAULT_PROJECT
from cryofleet.storage import Store, checked_uri
from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator.inboxes.inbox import (
    ARRIVING,
    AT_ONCE,
    GIVE_UP_SECONDS,
    SETTLE_SECONDS,
    SKIPPED,
    VOLUMES,
    WAITING,
    Inbox,
    Item,
    mark_of,
)
from orchestrator.inboxes.record import InboxRecord
from orchestrator.pipeline import Pipeline
from orchestrator.runs import CANCELLED, FAILED, RunStore
from orchestrator.submission import check_inputs

_USUAL_INPUT = "tomogram"


def opened(store: Store, request: pb.AddInboxRequest, pipeline: Pipeline, definition: str, owner: str) -> Inbox:
    """The inbox that a request describes. Blocks.

    Raises InvalidArgument for arguments that the pipeline does not take, and for a URI that can't be watched;
    PermissionDenied where the project may not read there; NotFound for a bucket or another input that is not there.
    """
    project, uri = request.project or DEFAULT_PROJECT, checked_uri(request.uri)
    arguments = json_format.MessageToDict(request.arguments)
    inbox = Inbox(
        inbox_id=f"{request.name}-{secrets.token_hex(6)}",
        project=project,
        name=request.name,
        owner=owner,
        uri=uri,
        pipeline=pipeline.name,
        source=pipeline.source,
        definition=definition,
        arguments=arguments,
        input=_input_of(pipeline, request.input),
        patterns=tuple(request.patterns) or VOLUMES,
        settle_seconds=_given(request, "settle_seconds", 0.0 if uri.startswith("s3://") else SETTLE_SECONDS),
        give_up_seconds=_given(request, "give_up_seconds", GIVE_UP_SECONDS),
        ready_suffix=request.ready_suffix,
        at_once=_given(request, "at_once", AT_ONCE),
        created_at=time.time(),
    )
    if inbox.input in arguments:
        raise InvalidArgument(f"{inbox.input} is what the inbox gives each run: leave it out, or name another --input")
    values = values_of(inbox, pipeline, f"{uri}/file")
    _check_place(store, inbox)
    check_inputs(store.for_project(project), pipeline, {**values, inbox.input: None})
    return inbox


def values_of(inbox: Inbox, pipeline: Pipeline, uri: str) -> dict[str, Any]:
    """All values of the pipeline's arguments for a file. Raises InvalidArgument."""
    repeated = next(argument.repeated for argument in pipeline.arguments if argument.name == inbox.input)
    return pipeline.bind({**inbox.arguments, inbox.input: [uri] if repeated else uri})


def present(store: Store, inbox: Inbox) -> list[Item]:
    """Items for what is there already, to be passed over. Blocks."""
    listed = [stat for stat in store.for_project(inbox.project).list(inbox.uri) if inbox.takes(stat.uri)]
    now = time.time()
    return [
        Item(number, stat.uri, stat.size_bytes, mark_of(stat), SKIPPED, now, now)
        for number, stat in enumerate(listed, start=1)
    ]


def retry(record: InboxRecord, runs: RunStore, inbox: Inbox, numbers: Collection[int]) -> int:
    """Lets items that were set aside, of these numbers or all, wait for their turn once more; how many. Blocks.

    Raises NotFound, naming a number of which nothing was set aside.
    """
    retried = 0
    for item in record.set_aside(inbox, numbers):
        if not item.run_id:
            again = replace(item, state=ARRIVING, unchanged_since=record.now(), cause="")
        else:
            again = replace(item, state=WAITING, attempt=_next_attempt(runs, item.run_id), cause="")
        retried += record.change(inbox, item, again)
    return retried


def _next_attempt(runs: RunStore, run_id: str) -> int:
    try:
        last = runs.attempt(run_id)
    except NotFound:
        return 1
    # One that somebody has resumed meanwhile is only followed.
    return last.attempt + 1 if last.state in (FAILED, CANCELLED) else last.attempt


def _input_of(pipeline: Pipeline, wanted: str) -> str:
    inputs = {argument.name: argument for argument in pipeline.arguments if argument.is_input}
    if wanted:
        if wanted not in inputs:
            raise InvalidArgument(f"{pipeline.name} has no input {wanted!r}; it has {', '.join(inputs) or 'none'}")
        return wanted
    if _USUAL_INPUT in inputs:
        return _USUAL_INPUT
    required = [name for name, argument in inputs.items() if argument.required]
    if len(required) != 1:
        raise InvalidArgument(
            f"say which input of {pipeline.name} gets the file, with --input: {', '.join(inputs) or 'it has none'}"
        )
    return required[0]


def _given(request: pb.AddInboxRequest, field: str, default: Any) -> Any:
    return getattr(request, field) if request.HasField(field) else default  # type: ignore[arg-type]


def _check_place(store: Store, inbox: Inbox) -> None:
    """Raises where the inbox's folder can't be watched."""
    try:
        root = store.root_of(inbox.uri)
    except PermissionDenied as failure:
        raise PermissionDenied(
            f"{failure}: add {inbox.uri} to CRYOFLEET_READ_ONLY_ROOTS of all processes of the platform, and restart it "
            "(cryofleet down)"
        ) from None
    if root == store.root and inbox.uri in (root, f"{root}/{inbox.project}"):
        raise InvalidArgument(
            f"{inbox.uri} is where results are kept, which would start runs again: name a folder in it"
        )
    own = store.for_project(inbox.project)
    if own.exists(inbox.uri):
        raise InvalidArgument(f"{inbox.uri} is a file: an inbox is a folder, or a prefix of a bucket")
    next(iter(own.list(inbox.uri)), None)
