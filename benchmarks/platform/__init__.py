"""What the platform itself costs: orchestration per task, and data through the store."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Row


def measure(quick: bool) -> Iterator[Row]:
    """Both, one after the other."""
    # Not above: the processes whose memory is measured load this package too.
    from benchmarks.platform import orchestration, storage

    yield from orchestration.measure(quick)
    yield from storage.measure(quick)
