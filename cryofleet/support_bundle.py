"""One archive with what somebody needs who is to find out what is wrong with an installation, and no secret.

Each part is bounded. A part that can't be had says why, and the others are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform as machine
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from cryofleet import __version__, local
from cryofleet.client import Client, state_name
from cryofleet.doctor import examine
from cryofleet.errors import AlreadyExists, Failure, InvalidArgument
from cryofleet.redaction import Redaction, shown_settings
from cryofleet.settings import Settings, available_cores
from cryofleet.v1 import orchestrator_pb2

_PART_BYTES = 2 * 1024**2
"""The most that a part other than logs may have."""
_TEXT = 2000
_SET_ASIDE = 100

README = """\
Made by: cryofleet support-bundle

about.json      when and by which version it was made; parts that could not be had, and why
doctor.json     what cryofleet doctor found
versions.json   Python and the packages that are installed
settings.json   settings of the process that made this by name; values only of those known to be harmless
machine.json    cores, memory, disk
processes.json  processes of the platform on this machine
pools.json      pools and their instances, as the orchestrator sees them
runs.json       the newest runs: states, steps, causes; without arguments and outputs
logs/           the ends of the logs of this machine's processes

Runs, causes and logs name users, projects and files. Passwords, tokens and keys are left out; (hidden) stands for them.
"""


def write_bundle(
    path: Path, settings: Settings, environment: Mapping[str, str], runs: int = 50, log_bytes: int = 10 * 1024**2
) -> dict[str, str]:
    """Writes the archive; gives the parts that could not be had, and why.

    Raises AlreadyExists where the file is there already, and InvalidArgument where it can't be made.
    """
    redaction = Redaction(environment)
    missing: dict[str, str] = {}
    temporary = path.with_name(path.name + ".part")
    if path.exists():
        raise AlreadyExists(f"{path} exists")
    # Its owner alone reads it: what it says of users and files is not for everybody on the machine.
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise InvalidArgument(f"can't write {path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("README.txt", README)
            with Client(settings, start=False) as client:
                parts: dict[str, Callable[[], Any]] = {
                    "doctor.json": lambda: [asdict(finding) for finding in examine(settings)],
                    "versions.json": _versions,
                    "settings.json": lambda: shown_settings(environment),
                    "machine.json": lambda: _machine(settings),
                    "processes.json": lambda: local.process_ids(settings),
                    "pools.json": lambda: [_mapping(pool) for pool in client.pools()],
                    "runs.json": lambda: _runs(client, runs),
                }
                for name, collect in parts.items():
                    try:
                        content = collect()
                    except Failure as failure:
                        missing[name] = redaction.hide(failure.message)
                        continue
                    except Exception as error:
                        # One part that fails must not cost the others.
                        missing[name] = redaction.hide(f"{type(error).__name__}: {error}")
                        continue
                    archive.writestr(name, redaction.hide(_bounded(content)))
            for name, text in _log_ends(settings.log_folder, log_bytes, missing).items():
                archive.writestr(f"logs/{name}", redaction.hide(text))
            about = {"made_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "version": __version__, "missing": missing}
            archive.writestr("about.json", json.dumps(about, indent=1, ensure_ascii=False))
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return missing


def _bounded(content: Any) -> str:
    """As JSON; of a list that is too long its first entries."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    while len(text) > _PART_BYTES and isinstance(content, list) and content:
        content = content[: len(content) // 2]
        text = json.dumps([*content, "and more, left out for their size"], indent=1, ensure_ascii=False, default=str)
    return text[:_PART_BYTES]


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}… ({len(text)} characters)"


def _mapping(message: Message) -> dict[str, Any]:
    mapping: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return mapping


def _versions() -> dict[str, Any]:
    packages = {found.name: found.version for found in distributions()}
    return {
        "cryofleet": __version__,
        "python": sys.version,
        "platform": machine.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _machine(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {
        "architecture": machine.machine(),
        "cores": os.cpu_count(),
        "usable_cores": available_cores(),
    }
    with contextlib.suppress(OSError):
        found["load"] = os.getloadavg()
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
        wanted = ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree")
        found["memory_kib"] = {name: int(value.split()[0]) for name, _, value in lines if name in wanted}
    folders = {"home": settings.home, "scratch": settings.scratch}
    if settings.store.startswith("file://"):
        folders["store"] = Path(settings.store.removeprefix("file://"))
    found["disks"] = {}
    for what, folder in folders.items():
        if folder is not None:
            with contextlib.suppress(OSError):
                usage = shutil.disk_usage(folder)
                found["disks"][what] = {"folder": str(folder), "total_bytes": usage.total, "free_bytes": usage.free}
    return found


def _runs(client: Client, count: int) -> list[dict[str, Any]]:
    newest = client.orchestrate("ListRuns", orchestrator_pb2.ListRunsRequest(limit=count)).runs
    return [_run(client, run) for run in newest]


def _run(client: Client, run: orchestrator_pb2.Run) -> dict[str, Any]:
    """What became of it. Arguments and outputs are the user's, and stay out."""
    with contextlib.suppress(Failure):  # forgotten meanwhile, or of a pipeline that can't be read any more
        run = client.get(run.id).record
    times = {
        name: getattr(run, name).ToJsonString()
        for name in ("created_at", "started_at", "finished_at")
        if run.HasField(name)
    }
    steps = []
    for step in run.steps:
        told = _mapping(step)
        told.pop("outputs", None)
        steps.append({name: _short(value) if isinstance(value, str) else value for name, value in told.items()})
    return {
        "id": run.id,
        "pipeline": run.pipeline,
        "project": run.project,
        "owner": run.owner,
        "state": state_name(run),
        "attempt": run.attempt,
        **times,
        "error": _short(run.error),
        "steps": steps,
        "set_aside": [
            {"step": each.step, "item": each.item, "status": each.status, "cause": _short(each.cause)}
            for each in run.set_aside[:_SET_ASIDE]
        ],
        "set_aside_in_all": len(run.set_aside),
    }


def _log_ends(folder: Path, budget: int, missing: dict[str, str]) -> dict[str, str]:
    """The end of each log, all of them together within the budget; short ones leave the others more."""
    files = [path for path in folder.glob("*.log") if path.is_file() and not path.is_symlink()]
    if not files:
        missing["logs"] = f"no process of this machine keeps logs in {folder}"
    ends = {}
    for number, path in enumerate(sorted(files, key=lambda path: path.stat().st_size)):
        share = budget // (len(files) - number)
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                start = file.seek(max(0, size - share))
                end = file.read(share)
        except OSError as error:
            missing[f"logs/{path.name}"] = str(error)
            continue
        if start:
            # A line that is cut in two might hold half of a secret, which nobody would recognise.
            end = end.partition(b"\n")[2]
        budget -= len(end)
        ends[path.name] = end.decode(errors="replace")
    return ends
