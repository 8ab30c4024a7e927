"""What all benchmarks share: rows of figures, printed as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One figure."""

    case: str
    metric: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    target: float | None = None
    """What the figure should reach; None where it is only for information."""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


Measure = Callable[[bool], Iterable[Row]]
"""Measures a subject; the argument asks for a quick run: the same cases at smaller counts."""


def machine() -> str:
    """The processor, its cores, and the system."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def print_rows(name: str, rows: Iterable[Row], as_json: bool) -> None:
    """A table, or one JSON object."""
    rows = list(rows)
    if as_json:
        print(json.dumps({"name": name, "machine": machine(), "rows": [asdict(row) for row in rows]}))
        return
    print(f"{name} on {machine()}")
    width = max((len(row.case) for row in rows), default=0)
    for row in rows:
        target = "" if row.target is None else f"  target {row.target:g} {'reached' if row.reached else 'MISSED'}"
        print(f"  {row.case:{width}}  {row.metric:28} {row.value:12.4g} {row.unit:8}{target}")


def main(name: str, measure: Measure) -> None:
    """The command line of one benchmark: --quick and --json."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="the same cases at smaller counts, within a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    print_rows(name, measure(options.quick), options.json)
