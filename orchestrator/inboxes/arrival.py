"""What has arrived in an inbox: a look at its files, against what was known of them before.

A file may be seen while it is being written. It is complete once its size and its time have not changed over two looks
that are the inbox's settling time apart, or a marker beside it says so, and its header agrees with its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cryofleet.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable
from cryofleet.storage import Stat
from orchestrator.inboxes.completeness import Incomplete, check_whole
from orchestrator.inboxes.inbox import ARRIVING, SET_ASIDE, WAITING, Inbox, Item, mark_of


@dataclass
class Arrivals:
    """What a look has found."""

    new: list[Item] = field(default_factory=list)
    changed: dict[Item, Item] = field(default_factory=dict)
    """Items before and after."""
    gone: list[Item] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.gone)


def look(
    inbox: Inbox,
    known: Iterable[Item],
    listed: Iterable[Stat],
    read_head: Callable[[str], bytes],
    now: float,
    *,
    whole: bool = True,
) -> Arrivals:
    """Compares what is there now with the items that are known, in their order.

    Args:
        inbox: whose patterns and times hold.
        known: all of its items, by number; the last one of a file is what is known of it.
        listed: what is there, of all that lies in the inbox, or if not `whole` of some of it.
        read_head: the first bytes of an object, for `check_whole`; raises NotFound, PermissionDenied.
        now: Unix time.
        whole: items that no run was made for, and that are not listed, are gone.
    """
    newest = {item.uri: item for item in known}
    present = {stat.uri: stat for stat in listed}
    number = max((item.number for item in newest.values()), default=0)
    arrivals = Arrivals()
    for uri, stat in sorted(present.items()):
        if not inbox.takes(uri):
            continue
        before = newest.get(uri)
        fresh = Item(number + 1, uri, stat.size_bytes, mark_of(stat), ARRIVING, now, now)
        if before is None or (before.run_id and not before.is_as(stat)):
            number += 1
            arrivals.new.append(_judged(inbox, fresh, present, read_head, now))
            continue
        item = before
        if not before.is_as(stat):
            item = replace(fresh, number=before.number, first_seen=before.first_seen)
        if item.state == ARRIVING:
            item = _judged(inbox, item, present, read_head, now)
        if item != before:
            arrivals.changed[before] = item
    if whole:
        arrivals.gone = [
            item
            for item in newest.values()
            if item.state in (ARRIVING, WAITING) and not item.run_id and item.uri not in present
        ]
    return arrivals


def _judged(
    inbox: Inbox, item: Item, present: Mapping[str, Stat], read_head: Callable[[str], bytes], now: float
) -> Item:
    """The item as it stands now: still arriving, complete, or set aside."""
    if inbox.ready_suffix:
        if not any(m in present and present[m].modified >= present[item.uri].modified for m in inbox.markers(item.uri)):
            return replace(
                item, cause=f"waits for {' or '.join(m.rpartition('/')[2] for m in inbox.markers(item.uri))}"
            )
    elif now - item.unchanged_since < inbox.settle_seconds:
        return item
    name = item.uri.rpartition("/")[2]
    try:
        check_whole(read_head(item.uri), item.size_bytes, name)
    except (Incomplete, Unavailable) as missing:
        given_up = now - item.unchanged_since >= inbox.give_up_seconds
        return replace(item, state=SET_ASIDE if given_up else ARRIVING, cause=str(missing))
    except (InvalidArgument, PermissionDenied) as failure:
        return replace(item, state=SET_ASIDE, cause=failure.message)
    except NotFound:
        return item  # the next look finds it gone
    return replace(item, state=WAITING, complete_at=now, cause="")
