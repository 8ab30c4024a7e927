"""python -m benchmarks.platform [--quick] [--json]."""

from benchmarks.harness import main
from benchmarks.platform import measure

main("platform", measure)
