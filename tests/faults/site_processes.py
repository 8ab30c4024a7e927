"""`python -m tests.faults.site_processes MODULE...`: starts an instance of a service for each line it reads.

A line is JSON: `module`, `environment`, `log`. The instances are forked from a process that has loaded all code
already, so that a test can kill and restart many; each is otherwise the process that `python -m MODULE` is. Their
process ids are printed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any

from cryofleet.server import main


def _become(order: dict[str, Any], service: Any) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(order["environment"])
    if order["module"] == "orchestrator":
        from orchestrator import tasks

        # So that a test need not wait as long as an operator would.
        tasks.SILENCE_SECONDS = float(os.environ.get("TEST_SILENCE_SECONDS", tasks.SILENCE_SECONDS))
    main(service)


def serve_forks(modules: list[str]) -> None:
    """Until standard input ends."""
    services = {module: importlib.import_module(f"{module}.service").service for module in modules}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            try:
                _become(order, services[order["module"]])
            finally:
                os._exit(0)
        print(process, flush=True)


if __name__ == "__main__":
    serve_forks(sys.argv[1:])
