"""What an inbox is: a watched folder or bucket prefix, whose complete files each start a pipeline once."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from cryofleet.storage import Stat

ACTIVE, PAUSED = "active", "paused"
"""States of an inbox."""
ARRIVING, WAITING, STARTING, STARTED, DONE, SET_ASIDE, SKIPPED = (
    "arriving",
    "waiting",
    "starting",
    "started",
    "done",
    "set_aside",
    "skipped",
)
ITEM_STATES = (ARRIVING, WAITING, STARTING, STARTED, DONE, SET_ASIDE, SKIPPED)
"""States of an item. What is being started is at once a run that goes on, or, after a crash, tried again."""

VOLUMES = ("*.mrc", "*.mrc.gz", "*.rec", "*.map", "*.tif", "*.tiff", "*.em", "*.hdf")
"""Patterns of an inbox that names none."""
SETTLE_SECONDS = 10.0
"""Of a file that nobody says a time for; an object in a bucket appears whole."""
GIVE_UP_SECONDS = 600.0
AT_ONCE = 2
_TEMPORARY_ENDINGS = (".tmp", ".temp", ".part", ".partial", ".filepart", ".crdownload", "~")
_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_STEM_LETTERS = 20


@dataclass(frozen=True)
class Inbox:
    """A watched folder."""

    inbox_id: str
    """Another one for each inbox, also for one that is removed and added again under its name."""
    project: str
    name: str
    owner: str
    """The user who added it, and whose its runs are."""
    uri: str
    pipeline: str
    source: str
    """What messages call the pipeline's text."""
    definition: str
    """The pipeline's text as it was when the inbox was added, so that all of its files are treated alike."""
    arguments: dict[str, Any]
    input: str
    """The pipeline's input that gets the file."""
    patterns: tuple[str, ...]
    settle_seconds: float
    give_up_seconds: float
    ready_suffix: str
    at_once: int
    created_at: float
    state: str = ACTIVE
    problem: str = ""
    """What keeps it from going on just now."""
    worker: str = ""
    """The orchestrator that works it."""

    @property
    def in_bucket(self) -> bool:
        return self.uri.startswith("s3://")

    def takes(self, uri: str) -> bool:
        """Whether an object below the inbox's URI is meant: it has one of the patterns and no temporary name."""
        path = uri.removeprefix(self.uri).removeprefix("/")
        names = path.split("/")
        if any(name.startswith(".") for name in names) or names[-1].lower().endswith(_TEMPORARY_ENDINGS):
            return False
        if self.ready_suffix and names[-1].endswith(self.ready_suffix):
            return False
        return any(
            fnmatch.fnmatchcase((path if "/" in pattern else names[-1]).lower(), pattern.lower())
            for pattern in self.patterns
        )

    def markers(self, uri: str) -> tuple[str, str]:
        """What a file that says that this one is complete may be called."""
        folder, _, name = uri.rpartition("/")
        stem = name.rpartition(".")[0] or name
        return f"{uri}{self.ready_suffix}", f"{folder}/{stem}{self.ready_suffix}"


@dataclass(frozen=True)
class Item:
    """A file with one content; one that is replaced later is another item."""

    number: int
    uri: str
    size_bytes: int
    mark: str
    """With the size, what tells a content of the file from another one: `mark_of`."""
    state: str
    first_seen: float
    unchanged_since: float
    """When it was first seen as it is, by the database's clock."""
    complete_at: float | None = None
    run_id: str = ""
    attempt: int = 1
    """The attempt at its run that is wanted: one more at each retry."""
    cause: str = ""
    """Why it was set aside, or is not yet taken for complete."""

    def is_as(self, stat: Stat) -> bool:
        """Whether the file has not changed."""
        return (self.size_bytes, self.mark) == (stat.size_bytes, mark_of(stat))


@dataclass(frozen=True)
class Counts:
    """Items of an inbox by state."""

    by_state: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, state: str) -> int:
        return self.by_state.get(state, 0)


def mark_of(stat: Stat) -> str:
    """An object's ETag, a file's time: its inode may be another one after each mount."""
    return stat.version if stat.uri.startswith("s3://") else f"{stat.modified:.6f}"


def run_id_of(inbox: Inbox, item: Item) -> str:
    """The same for the same file of an inbox, so that to start its run twice does no harm."""
    name = item.uri.rpartition("/")[2]
    identity = "\n".join((inbox.inbox_id, item.uri, str(item.size_bytes), item.mark))
    stem = _NO_NAME.sub("-", name)[:_STEM_LETTERS]
    return f"{inbox.name}-{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
