"""`python -m tests.faults.skewed SECONDS MODULE`: the module's process, whose clock is wrong by so many seconds.

What counts time from a point of its own (`time.monotonic`) is right, as on a machine whose clock is wrong.
"""

from __future__ import annotations

import runpy
import sys
import time


def shift_clock(seconds: float) -> None:
    """Before anything else is imported that could hold on to the right clock."""
    real, real_ns = time.time, time.time_ns

    def shifted() -> float:
        # Deadlines of calls go to gRPC's own code, which reads the machine's clock by itself.
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        return real() if caller.startswith("grpc") else real() + seconds

    time.time = shifted
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)


if __name__ == "__main__":
    shift_clock(float(sys.argv[1]))
    runpy.run_module(sys.argv[2], run_name="__main__", alter_sys=True)
