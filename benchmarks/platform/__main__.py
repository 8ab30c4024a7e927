"""python -m benchmarks.platform [--quick] [--json] [--seconds N] [PART …]."""

import argparse

from benchmarks.harness import print_rows
from benchmarks.platform import PARTS, load, measure

parser = argparse.ArgumentParser(prog="python -m benchmarks.platform")
parser.add_argument("--quick", action="store_true", help="the same cases at smaller counts")
parser.add_argument("--json", action="store_true", help="one JSON object")
parser.add_argument("--seconds", type=float, help="how long the load lasts: ten minutes, 10 s where it is quick")
parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all where left out")
options = parser.parse_args()
if unknown := set(options.parts) - set(PARTS):
    parser.error(f"there is no part {', '.join(sorted(unknown))}")
if options.seconds is not None:
    load.SECONDS = load.QUICK_SECONDS = options.seconds
print_rows("platform", measure(options.quick, options.parts or PARTS), options.json)
