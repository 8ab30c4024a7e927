"""A process in which a new thread found no memory ends, instead of waiting for that thread for ever."""

from __future__ import annotations

import subprocess
import sys

from cryofleet.server.bootstrap import EXIT_NO_MEMORY

# Raised where the interpreter itself starts a thread, as it is when there is no memory for the thread's first frame.
PROCESS = """
import _thread, sys, time
from cryofleet.server import bootstrap

def begin_a_thread():
    raise MemoryError

sys.unraisablehook = bootstrap._end_where_a_thread_died
_thread.start_new_thread(begin_a_thread, ())
time.sleep(60)
"""


def test_it_ends() -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_NO_MEMORY
    assert "MemoryError" in done.stderr
