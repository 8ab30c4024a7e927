"""What projects may still store. Each process measures for itself how much there is, and adds what it writes.

A project's usage is the sum over its objects, found by listing them: no count is kept that could go wrong. A listing
holds for a minute, or longer where it took long, so that no more than a twentieth of the time goes into it. What other
processes write meanwhile is not seen: a project may end above its quota by what they write in that time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from cryofleet.errors import ResourceExhausted
from cryofleet.project_rules import ProjectRules
from cryofleet.storage import Stat, Store

_FRESH_SECONDS = 60.0
_LISTING_SHARE = 0.05
_REFUSAL_SECONDS = 5.0
"""Before a write is refused, what was measured longer ago than this is measured anew: something may be deleted now."""


@dataclass
class Usage:
    """What a project has in the store."""

    size_bytes: int = 0
    objects: int = 0


def usage_by_project(root: str, found: Iterable[Stat]) -> dict[str, Usage]:
    """The usage of each project that has any of the objects found under a store's root."""
    usage: dict[str, Usage] = {}
    for each in found:
        project, separator, _ = each.uri.removeprefix(root + "/").partition("/")
        if separator and not project.startswith("_"):
            of_project = usage.setdefault(project, Usage())
            of_project.size_bytes += each.size_bytes
            of_project.objects += 1
    return usage


@dataclass
class _Measured:
    size_bytes: int
    at: float
    fresh_seconds: float


class Quotas:
    """The quotas of one process's store. Any number of threads may ask."""

    def __init__(self, store: Store, rules: ProjectRules) -> None:
        self.rules = rules
        self._store = store
        self._measured: dict[str, _Measured] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def check(self, project: str, size_bytes: int = 0) -> None:
        """Raises ResourceExhausted where so many more bytes, or any, are above the project's quota."""
        quota = self.rules.of(project).quota_bytes
        if not quota or self._size(project, None) + max(1, size_bytes) <= quota:
            return
        size = self._size(project, _REFUSAL_SECONDS)
        if size + max(1, size_bytes) > quota:
            raise ResourceExhausted(
                f"project {project} has {size} bytes stored of the {quota} that it may have, and {size_bytes} more "
                "were to come; delete what is not needed (cryofleet forget, cryofleet gc --delete), or have the quota "
                "raised"
            )

    def wrote(self, project: str, size_bytes: int) -> None:
        """Counts bytes that are being written. Raises ResourceExhausted where they are above the quota."""
        self.count(project, size_bytes)
        self.check(project)

    def count(self, project: str, size_bytes: int) -> None:
        """Counts bytes that were written."""
        with self._lock:
            measured = self._measured.get(project)
            if measured is not None:
                measured.size_bytes += size_bytes

    def _size(self, project: str, oldest_seconds: float | None) -> int:
        """The project's bytes, measured not longer ago than asked for."""
        with self._lock:
            lock = self._locks.setdefault(project, threading.Lock())
        with lock:  # one of them measures, the others wait for it
            with self._lock:
                measured = self._measured.get(project)
            now = time.monotonic()
            if measured is None or now - measured.at > min(
                measured.fresh_seconds, oldest_seconds or measured.fresh_seconds
            ):
                size = sum(each.size_bytes for each in self._store.list(f"{self._store.root}/{project}"))
                took = time.monotonic() - now
                measured = _Measured(size, time.monotonic(), max(_FRESH_SECONDS, took / _LISTING_SHARE))
                with self._lock:
                    self._measured[project] = measured
            return measured.size_bytes
