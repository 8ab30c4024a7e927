"""`python -m tests.faults.orchestrator_processes`: starts an orchestrator for each line it reads, and prints its pid.

The orchestrators are forked from a process that has loaded all code already, so that a test can kill and restart many;
each is otherwise the process that `python -m orchestrator` is.
"""

from __future__ import annotations

import os
import signal
import sys

from cryofleet.server import main
from orchestrator import engine, recovery
from orchestrator.inboxes import work
from orchestrator.service import service


def serve_forks() -> None:
    """Until standard input ends."""
    # So that a test need not wait as long as an operator would.
    recovery.EXPIRY_SECONDS = float(os.environ.get("TEST_EXPIRY_SECONDS", recovery.EXPIRY_SECONDS))
    engine.HEARTBEAT_SECONDS = min(engine.HEARTBEAT_SECONDS, recovery.EXPIRY_SECONDS / 4)
    engine.ANSWER_SECONDS = float(os.environ.get("TEST_ANSWER_SECONDS", engine.ANSWER_SECONDS))
    work.ROUND_SECONDS = float(os.environ.get("TEST_ROUND_SECONDS", work.ROUND_SECONDS))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # A name of its own for each, where one is given.
            if line.strip():
                os.environ["CRYOFLEET_INSTANCE"] = line.strip()
                os.environ["CRYOFLEET_ADDRESS"] = f"unix:{os.environ['CRYOFLEET_HOME']}/{line.strip()}/o.sock"
            main(service)
            os._exit(0)
        print(process, flush=True)


if __name__ == "__main__":
    serve_forks()
