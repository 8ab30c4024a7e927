"""What the platform itself costs: orchestration per task and at scale, callers who look on, data through the store."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence

from benchmarks.harness import Row

PARTS = ("orchestration", "throughput", "load", "simulation", "storage")


def measure(quick: bool, parts: Sequence[str] = PARTS) -> Iterator[Row]:
    """The parts, one after the other."""
    for part in parts:
        # Not above: the processes whose memory is measured load this package too.
        yield from importlib.import_module(f"benchmarks.platform.{part}").measure(quick)
