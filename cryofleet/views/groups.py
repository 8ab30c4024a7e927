"""Clusters put into named groups, as segmenting by them takes these: membrane:1,4,8-10."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from cryofleet.errors import InvalidArgument
from cryofleet.numerics.label_colours import CLASS_COLOURS, OTHER_CLASSES_COLOUR

BACKGROUND = "background"
"""A group of this name is what ice is; it comes last, so that the others keep their numbers."""
LONGEST_NAME = 100


class Groups:
    """Which clusters, numbered from 1, are in the group of which name; each is in one at most."""

    def __init__(self) -> None:
        self._clusters: dict[str, set[int]] = {}

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the groups."""
        return iter(sorted(self._clusters, key=lambda name: name == BACKGROUND))

    def __len__(self) -> int:
        return len(self._clusters)

    def put(self, name: str, clusters: Collection[int]) -> None:
        """Put clusters into a group, out of the ones that they were in; what was in it already stays.

        Raises InvalidArgument where there is no name, or no cluster.
        """
        name = name.strip()
        if not name or len(name) > LONGEST_NAME:
            raise InvalidArgument(f"give the group a name of 1 to {LONGEST_NAME} characters")
        if not clusters:
            raise InvalidArgument("choose some clusters first")
        self.release(clusters)
        self._clusters.setdefault(name, set()).update(clusters)

    def release(self, clusters: Collection[int]) -> None:
        """Take clusters out of their groups; a group that is left empty goes."""
        kept = {name: members - set(clusters) for name, members in self._clusters.items()}
        self._clusters = {name: members for name, members in kept.items() if members}

    def members(self, name: str) -> list[int]:
        """The clusters of a group, rising."""
        return sorted(self._clusters[name])

    def of(self, cluster: int) -> str:
        """The name of a cluster's group; empty where it is in none."""
        return next((name for name, members in self._clusters.items() if cluster in members), "")

    def colour(self, name: str) -> str:
        """A colour of its own for each of the first seven."""
        rank = list(self).index(name)
        return CLASS_COLOURS[rank] if rank < len(CLASS_COLOURS) else OTHER_CLASSES_COLOUR

    def texts(self) -> list[str]:
        """Each group as a pipeline's parameter `groups` has it."""
        return [f"{name}:{ranges_text(self.members(name))}" for name in self]


def ranges_text(numbers: Sequence[int]) -> str:
    """Rising numbers as 1,4,8-10."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
