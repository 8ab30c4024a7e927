"""Enough of systemctl to start the units of deploy/systemd: `systemctl.py UNITS HOME enable --now TARGET`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def section(path: Path, name: str) -> dict[str, list[str]]:
    """The settings of a unit's section; each may be there several times."""
    found: dict[str, list[str]] = {}
    inside = False
    for line in path.read_text().splitlines():
        if line.startswith("["):
            inside = line == f"[{name}]"
        elif inside and line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def assignments(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            yield key, value


def start(units: Path, home: Path, name: str) -> None:
    stem, _, of = name.removesuffix(".service").partition("@")
    service = section(units / (f"{stem}@.service" if of else name), "Service")

    def values(key: str) -> list[str]:
        return [value.replace("%i", of) for value in service.get(key, [])]

    # A service of systemd starts with an environment of its own.
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    environment |= dict(value.split("=", 1) for value in values("Environment"))
    for value in values("EnvironmentFile"):
        path = Path(value.removeprefix("-"))
        if path.exists() or not value.startswith("-"):
            environment |= dict(assignments(path))
    home.mkdir(mode=int(values("StateDirectoryMode")[0], 8), exist_ok=True)
    with (home.parent / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            shlex.split(values("ExecStart")[0]),
            env=environment,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    with (home.parent / "pids").open("a") as pids:
        print(process.pid, file=pids)


def main() -> None:
    units, home, command, *rest = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    if command == "enable":
        assert rest[0] == "--now", rest
        target = section(units / rest[1], "Unit")
        for wanted in target["Wants"]:
            for name in wanted.split():
                start(units, home, name)


if __name__ == "__main__":
    main()
