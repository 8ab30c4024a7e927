"""Clusters joined into named classes: `membrane:1,4,8-10` makes one class of clusters 1, 4, 8, 9 and 10."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryofleet.errors import InvalidArgument

EXAMPLE = "a name, a colon, and cluster numbers or ranges, as membrane:1,4,8-10"
MAX_NUMBER = 2**31 - 1
_MEMBERS = re.compile(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?")


@dataclass(frozen=True)
class ClusterGroup:
    """A class: its name, and first and last number of each of its ranges of clusters, both included."""

    name: str
    ranges: tuple[tuple[int, int], ...]


def parse_groups(texts: Sequence[str]) -> tuple[ClusterGroup, ...]:
    """The groups of texts such as `membrane:1,4,8-10`; space around names and numbers is ignored.

    Raises InvalidArgument, naming the text, for another syntax, an empty name, the same name twice, a range that runs
    backwards, and a cluster that is given twice, in one group or in two.
    """
    groups: list[ClusterGroup] = []
    taken: list[tuple[int, int, str]] = []
    for text in texts:
        # A name may hold a colon, numbers may not.
        name, colon, numbers = (part.strip() for part in text.rpartition(":"))
        if not colon:
            raise InvalidArgument(f"groups: {text!r} has no colon; it must be {EXAMPLE}")
        if not name:
            raise InvalidArgument(f"groups: {text!r} has no name before the colon; it must be {EXAMPLE}")
        if any(name == group.name for group in groups):
            raise InvalidArgument(f"groups: there are two of the name {name!r}; put all their clusters into one")
        ranges: list[tuple[int, int]] = []
        for part in numbers.split(","):
            match = _MEMBERS.fullmatch(part)
            if match is None:
                raise InvalidArgument(f"groups: {part.strip()!r} in {text!r} is no cluster; it must be {EXAMPLE}")
            first = int(match[1])
            last = first if match[2] is None else int(match[2])
            if last < first:
                raise InvalidArgument(f"groups: {part.strip()!r} in {text!r} runs backwards; write {last}-{first}")
            if last > MAX_NUMBER:
                raise InvalidArgument(f"groups: {part.strip()!r} in {text!r}: clusters are numbered up to {MAX_NUMBER}")
            for begin, end, other in taken:
                if first <= end and begin <= last:
                    where = f"twice in {name!r}" if other == name else f"in {other!r} and in {name!r}"
                    raise InvalidArgument(f"groups: cluster {max(first, begin)} is {where}; it can be in one place")
            taken.append((first, last, name))
            ranges.append((first, last))
        groups.append(ClusterGroup(name, tuple(ranges)))
    return tuple(groups)


def group_numbers(
    clusters: NDArray[np.int32], groups: Sequence[ClusterGroup], source: str, allow_empty: bool = False
) -> NDArray[np.int32]:
    """For particles' clusters (n,), numbered from 1, the number of each one's group, from 1 in the groups' order; 0 for
    those of none.

    Raises InvalidArgument for a cluster of a group that no particle is in, unless `allow_empty`; `source` is what it
    calls the particles.
    """
    present = np.unique(clusters)
    numbers = np.zeros(len(clusters), np.int32)
    for number, group in enumerate(groups, start=1):
        for first, last in group.ranges:
            inside = present[(present >= first) & (present <= last)]
            if len(inside) != last - first + 1 and not allow_empty:
                expected = np.arange(first, min(last, first + len(inside)) + 1)
                missing = int(np.setdiff1d(expected, inside)[0])
                raise InvalidArgument(
                    f"groups: cluster {missing} of {group.name!r} is not there: the clusters of {source} are "
                    f"{ranges_text(present)}"
                )
            numbers[(clusters >= first) & (clusters <= last)] = number
    return numbers


def ranges_text(numbers: NDArray[np.int32]) -> str:
    """Rising numbers as text: 0-3, 5."""
    if not len(numbers):
        return "none"
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts = numbers[np.concatenate([[0], breaks + 1])]
    lasts = numbers[np.concatenate([breaks, [len(numbers) - 1]])]
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)]
    shown = parts if len(parts) <= 20 else [*parts[:19], "...", parts[-1]]
    return ", ".join(shown)
