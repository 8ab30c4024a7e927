"""An inbox and its items as the contract tells them."""

from __future__ import annotations

from google.protobuf.struct_pb2 import Struct

from cryofleet.v1 import orchestrator_pb2 as pb
from orchestrator.inboxes.inbox import (
    ACTIVE,
    ARRIVING,
    DONE,
    PAUSED,
    SET_ASIDE,
    SKIPPED,
    STARTED,
    STARTING,
    WAITING,
    Counts,
    Inbox,
    Item,
)
from orchestrator.run_message import timestamp

_INBOX_STATES = {ACTIVE: pb.INBOX_STATE_ACTIVE, PAUSED: pb.INBOX_STATE_PAUSED}
_ITEM_STATES = {
    ARRIVING: pb.INBOX_ITEM_STATE_ARRIVING,
    WAITING: pb.INBOX_ITEM_STATE_WAITING,
    STARTING: pb.INBOX_ITEM_STATE_STARTED,
    STARTED: pb.INBOX_ITEM_STATE_STARTED,
    DONE: pb.INBOX_ITEM_STATE_DONE,
    SET_ASIDE: pb.INBOX_ITEM_STATE_SET_ASIDE,
    SKIPPED: pb.INBOX_ITEM_STATE_SKIPPED,
}


def inbox_message(inbox: Inbox, counts: Counts | None) -> pb.Inbox:
    """The inbox; no counts where it has no items."""
    counts = counts or Counts()
    arguments = Struct()
    arguments.update(inbox.arguments)
    return pb.Inbox(
        name=inbox.name,
        project=inbox.project,
        owner=inbox.owner,
        uri=inbox.uri,
        pipeline=inbox.pipeline,
        input=inbox.input,
        arguments=arguments,
        patterns=inbox.patterns,
        settle_seconds=inbox.settle_seconds,
        give_up_seconds=inbox.give_up_seconds,
        ready_suffix=inbox.ready_suffix,
        at_once=inbox.at_once,
        state=_INBOX_STATES[inbox.state],
        items=pb.InboxCounts(
            arriving=counts[ARRIVING],
            waiting=counts[WAITING],
            started=counts[STARTING] + counts[STARTED],
            done=counts[DONE],
            set_aside=counts[SET_ASIDE],
            skipped=counts[SKIPPED],
        ),
        problem=inbox.problem,
        created_at=timestamp(inbox.created_at),
        orchestrator=inbox.worker,
    )


def item_message(item: Item) -> pb.InboxItem:
    """One that is being started is a started one to all others."""
    return pb.InboxItem(
        number=item.number,
        uri=item.uri,
        size_bytes=item.size_bytes,
        state=_ITEM_STATES[item.state],
        cause=item.cause,
        run_id=item.run_id,
        first_seen_at=timestamp(item.first_seen),
    )


def states_of(wanted: int) -> tuple[str, ...]:
    """The record's words for a state of the contract; none for the unspecified one."""
    return tuple(word for word, state in _ITEM_STATES.items() if state == wanted)
