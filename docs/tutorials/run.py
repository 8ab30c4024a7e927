"""Runs the tutorials, each in a fresh kernel, on a platform of their own: python docs/tutorials/run.py [NAME …].

What came out is left in build/tutorials, from where the site takes it. The notebooks themselves have no outputs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from cryofleet import local
from cryofleet.settings import Settings

FOLDER = Path(__file__).resolve().parent
EXECUTED = FOLDER.parents[1] / "build" / "tutorials"
LONGEST_CELL_SECONDS = 600


def run(path: Path, working_folder: Path) -> str:
    """Execute a notebook and leave it with its outputs in EXECUTED; what went wrong, or nothing."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LONGEST_CELL_SECONDS,
        startup_timeout=LONGEST_CELL_SECONDS,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(working_folder)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return str(error)
    EXECUTED.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, EXECUTED / path.name)
    return ""


def main(names: list[str]) -> int:
    """Run those whose names begin so, or all; 1 if any failed."""
    paths = [p for p in sorted(FOLDER.glob("*.ipynb")) if not names or p.name.startswith(tuple(names))]
    # Short, for Unix sockets lie in it.
    home = Path(tempfile.mkdtemp(prefix="tutorials-"))
    for name in [name for name in os.environ if name.startswith("CRYOFLEET_")]:
        del os.environ[name]
    os.environ |= {
        "CRYOFLEET_HOME": str(home),
        "CRYOFLEET_PAGE": "off",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    failed = 0
    try:
        # Not in the first notebook's time, and with time enough where the machine has other things to do.
        local.start(Settings.from_environment(), wait_seconds=LONGEST_CELL_SECONDS)
        began = time.monotonic()
        for path in paths:
            started = time.monotonic()
            (home / "work" / path.stem).mkdir(parents=True)
            failure = run(path, home / "work" / path.stem)
            print(f"{time.monotonic() - started:6.0f} s  {path.name}{'  FAILED' if failure else ''}", flush=True)
            if failure:
                failed += 1
                print(failure, file=sys.stderr, flush=True)
    finally:
        subprocess.run([sys.executable, "-m", "cryofleet", "down"], check=False)
        shutil.rmtree(home, ignore_errors=True)
    print(f"{time.monotonic() - began:6.0f} s  all {len(paths)}")
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
