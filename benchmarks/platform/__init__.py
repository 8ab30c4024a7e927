"""What the platform itself costs: orchestration per task, and data through the store."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Row
from benchmarks.platform import orchestration, storage


def measure(quick: bool) -> Iterator[Row]:
    """Both, one after the other."""
    yield from orchestration.measure(quick)
    yield from storage.measure(quick)
