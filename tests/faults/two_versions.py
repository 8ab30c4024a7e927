"""Another version of the processes: a copy of the code, in which some things are as a later version might have them.

It has a version number of its own, one more migration of the tables, one more field in a result, which its services
fill in, and, where asked for, another order of steps in its workflows.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from orchestrator.schema import MIGRATIONS
from tests.conftest import REPOSITORY

NEXT = "99.0.0"
"""The version's number."""
NEXT_TABLES = len(MIGRATIONS) + 1

_FIELD = "message SelfTestResult {\n"
_MIGRATIONS_END = ')\n"""In order'


def make_next_version(folder: Path, other_steps: bool) -> dict[str, str]:
    """Writes the code; what must be in the environment of a process that is to run it."""
    for package in ("cryofleet", "orchestrator", "services", "tests"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "data"))
    _change(folder / "cryofleet" / "__init__.py", '__version__ = version("cryofleet")', f'__version__ = "{NEXT}"')
    note = f"""    Migration(
        {NEXT_TABLES},
        "notes of runs",
        (Column("cryofleet_runs", "note", "TEXT NOT NULL DEFAULT ''"),),
    ),
"""
    _change(folder / "orchestrator" / "schema.py", _MIGRATIONS_END, note + _MIGRATIONS_END)
    if other_steps:
        _change(folder / "orchestrator" / "engine.py", 'APPLICATION_VERSION = "1"', 'APPLICATION_VERSION = "2"')
    protos = folder / "protos"
    shutil.copytree(REPOSITORY / "protos", protos)
    _change(protos / "cryofleet" / "v1" / "runtime.proto", _FIELD, f"{_FIELD}  string software = 100;\n")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{protos}",
            f"--python_out={folder}",
            "cryofleet/v1/runtime.proto",
        ],
        check=True,
    )
    generated = folder / "cryofleet" / "v1" / "runtime_pb2.py"
    _change(generated, "from buf.validate import", "from cryofleet.v1.buf.validate import")
    _change(
        folder / "cryofleet" / "server" / "runtime_service.py",
        "        instance=task.instance,\n",
        f'        instance=task.instance,\n        software="{NEXT}",\n',
    )
    # What is installed, and the folder that a process is started in, come after it.
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def _change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))
