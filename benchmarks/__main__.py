"""Runs all benchmarks, or those named: python -m benchmarks [--quick] [--json] [NAME …]."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from pathlib import Path

from benchmarks.harness import print_rows


def main() -> None:
    """Run every module of this folder that has a `measure`."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    subjects = sorted(set(names) - {"__main__", "harness"})
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(subjects))
    options = parser.parse_args()
    for name in options.names or subjects:
        module = importlib.import_module(f"benchmarks.{name}")
        if hasattr(module, "measure"):
            print_rows(name, module.measure(options.quick), options.json)


if __name__ == "__main__":
    main()
