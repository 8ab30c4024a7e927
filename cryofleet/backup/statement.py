"""What a backup says of itself."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from cryofleet.errors import DataLoss, FailedPrecondition

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One object: its name below the store's root, and what it holds."""

    name: str
    size_bytes: int
    digest: str
    """The content digest, by which the backup keeps it."""

    @property
    def folder(self) -> str:
        """PROJECT/KEY of a result, PROJECT/_models and so on: objects that belong together."""
        return "/".join(self.name.split("/")[:2])


@dataclass(frozen=True)
class LeftOut:
    """A result that could not be copied, since it is damaged."""

    name: str
    cause: str


@dataclass(frozen=True)
class Statement:
    """One backup."""

    name: str
    software: str
    root: str
    """URI of the store that it is of."""
    database_kind: str
    """sqlite or postgresql."""
    database: Entry
    objects: tuple[Entry, ...]
    """In the order in which they must be restored: of each result the manifest comes last."""
    left_out: tuple[LeftOut, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of all its objects and the database."""
        return self.database.size_bytes + sum(entry.size_bytes for entry in self.objects)

    @property
    def entries(self) -> Iterable[Entry]:
        """All of them, the database's included."""
        return (self.database, *self.objects)

    def folders(self) -> Iterator[list[Entry]]:
        """The objects, in order, by what belongs together."""
        for _, entries in groupby(self.objects, key=lambda entry: entry.folder):
            yield list(entries)

    def to_bytes(self) -> bytes:
        content = {
            **asdict(self),
            "format": FORMAT,
            "database": _row(self.database),
            "objects": [_row(entry) for entry in self.objects],
        }
        return gzip.compress(json.dumps(content, ensure_ascii=False).encode(), mtime=0)

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Statement:
        """Raises DataLoss naming `source`, and FailedPrecondition where it is of a newer format."""
        try:
            content: dict[str, Any] = json.loads(gzip.decompress(data))
            if content.pop("format") != FORMAT:
                raise FailedPrecondition(f"{source} is of a format that this version of Cryofleet does not know")
            return cls(
                **{
                    **content,
                    "database": Entry(*content["database"]),
                    "objects": tuple(Entry(*row) for row in content["objects"]),
                    "left_out": tuple(LeftOut(**each) for each in content["left_out"]),
                }
            )
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise DataLoss(f"{source} is damaged: {error}") from error


def _row(entry: Entry) -> list[str | int]:
    """Without the fields' names: a backup may have a million of them."""
    return [entry.name, entry.size_bytes, entry.digest]
