"""Checks an installation: what is wrong and what to do about it."""

from __future__ import annotations

import os
import platform as machine
import socket
import sqlite3
import stat
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from cryofleet import __version__, local
from cryofleet.access.client_token import token_source
from cryofleet.channels import failure_from_rpc, open_blocking_channel
from cryofleet.errors import Failure
from cryofleet.settings import Settings
from cryofleet.space import free_bytes
from cryofleet.storage import Store
from cryofleet.v1 import runtime_pb2, runtime_pb2_grpc

_NEEDED = ("numpy", "scipy", "grpcio", "protobuf", "protovalidate", "mrcfile", "minio", "pyarrow", "pandas")
_BY_SERVICE = {
    "io": ("tifffile", "pillow"),
    "alignment": ("torch", "numba"),
    "learning": ("torch", "scikit-learn", "safetensors", "pillow"),
    "simulation": ("gemmi", "numba"),
    "orchestrator": ("dbos",),
}
_LEAST_FREE_BYTES = 5 * 1024**3


@dataclass(frozen=True)
class Finding:
    """What one check found; `advice` says what to do where it isn't well."""

    check: str
    ok: bool
    found: str
    advice: str = ""


def examine(settings: Settings) -> list[Finding]:
    """All checks, each of which reports rather than raises."""
    checks: list[Callable[[Settings], list[Finding]]] = [
        _check_versions,
        _check_devices,
        _check_disk,
        _check_store,
        _check_database,
        _check_sockets,
        _check_instances,
    ]
    return [finding for check in checks for finding in check(settings)]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_versions(settings: Settings) -> list[Finding]:
    found = [Finding("Cryofleet", True, f"{__version__}, Python {machine.python_version()}, {machine.platform()}")]
    groups = {"library": _NEEDED, **_BY_SERVICE}
    for group, packages in groups.items():
        versions = {package: _installed(package) for package in packages}
        missing = [package for package, installed in versions.items() if installed is None]
        if group in _BY_SERVICE and len(missing) == len(packages):
            found.append(Finding(f"packages of {group}", True, "not installed: this machine does not run it"))
            continue
        text = ", ".join(f"{package} {installed or 'missing'}" for package, installed in versions.items())
        advice = f"install them with: pip install 'cryofleet[{group}]'" if missing else ""
        found.append(Finding(f"packages of {group}", not missing, text, advice))
    return found


def _check_devices(settings: Settings) -> list[Finding]:
    if find_spec("torch") is None:
        return [Finding("GPU", True, "torch is not installed: no GPU is used")]
    import torch

    if not torch.cuda.is_available():
        return [Finding("GPU", True, f"none that torch {torch.__version__} can use; {os.cpu_count()} CPU cores")]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [Finding("GPU", True, ", ".join(names))]


def _check_disk(settings: Settings) -> list[Finding]:
    found = []
    least = max(_LEAST_FREE_BYTES, settings.reserve_bytes)
    places = {"CRYOFLEET_HOME": settings.home, "CRYOFLEET_SCRATCH": settings.scratch or Path(tempfile.gettempdir())}
    if settings.store.startswith("file://"):
        places["CRYOFLEET_STORE"] = Path(settings.store.removeprefix("file://"))
    for variable, folder in places.items():
        free = free_bytes(folder)
        advice = "" if free >= least else f"free some space, or point {variable} at a larger disk"
        found.append(Finding("disk", free >= least, f"{free / 1024**3:.1f} GiB free at {folder}", advice))
    return found


def _check_store(settings: Settings) -> list[Finding]:
    uri = f"{settings.store}/_doctor/{uuid.uuid4().hex}"
    try:
        store = Store.open(settings)
        store.put(uri, b"written by doctor")
        intact = store.get(uri) == b"written by doctor"
        store.delete(uri)
    except Failure as failure:
        advice = "check CRYOFLEET_STORE, the folder's permissions or CRYOFLEET_S3_* and that the bucket exists"
        return [Finding("store", False, failure.message, advice)]
    return [Finding("store", intact, f"{settings.store} takes and gives back an object")]


def _check_database(settings: Settings) -> list[Finding]:
    if not settings.database.startswith("sqlite:///"):
        return [_check_postgresql(settings.database)]
    path = Path(settings.database.removeprefix("sqlite:///"))
    if not path.exists():
        return [Finding("database", True, f"{path} will be made when the orchestrator first starts")]
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        try:
            answer = connection.execute("PRAGMA quick_check").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.Error as error:
        return [
            Finding("database", False, f"{path}: {error}", "move the file away; finished results stay in the store")
        ]
    advice = "" if answer == "ok" else "move the file away; finished results stay in the store"
    return [Finding("database", answer == "ok", f"{path}: {answer}", advice)]


def _check_postgresql(url: str) -> Finding:
    parts = urlsplit(url)
    # Not the URL itself: it may hold a password in more than one place.
    where = f"{parts.hostname or 'this machine'}{parts.path}"
    try:
        import psycopg

        with psycopg.connect(url, connect_timeout=5) as connection:
            return Finding("database", True, f"PostgreSQL {connection.info.server_version} at {where}")
    except ImportError:
        return Finding("database", False, "psycopg is missing", "pip install 'cryofleet[orchestrator]'")
    except psycopg.Error as error:
        advice = "check CRYOFLEET_DATABASE and that the server is up"
        return Finding("database", False, f"{where}: {str(error).strip().splitlines()[0]}", advice)


def _check_sockets(settings: Settings) -> list[Finding]:
    folder = settings.run_folder
    if not folder.exists():
        return [Finding("sockets", True, f"{folder} will be made by: cryofleet up")]
    mode = stat.S_IMODE(folder.stat().st_mode)
    ok = mode & 0o077 == 0
    advice = "" if ok else f"others may enter it; run: chmod 700 {folder}"
    return [Finding("sockets", ok, f"{folder} has mode {mode:o}", advice)]


def _check_instances(settings: Settings) -> list[Finding]:
    addresses = {**settings.pools, "orchestrator": settings.orchestrator}
    own = f"unix:{settings.run_folder}/"
    if all(address.startswith(own) for address in addresses.values()) and not local.is_up(settings):
        return [Finding("services", True, "the platform on this machine is down; start it with: cryofleet up")]
    found: list[Finding] = []
    for name, pool in addresses.items():
        variable = "CRYOFLEET_ORCHESTRATOR" if name == "orchestrator" else f"CRYOFLEET_POOL_{name.upper()}"
        entries = [entry.strip() for entry in pool.split(",") if entry.strip()]
        if not entries:
            found.append(Finding(f"service {name}", False, "it has no address", f"set {variable}"))
        for entry in entries:
            try:
                instances = _resolved(entry)
            except (OSError, ValueError) as error:
                advice = f"check {variable} and the name server; a pool that is scaled to zero has no addresses either"
                found.append(Finding(f"service {name}", False, f"{entry}: {error}", advice))
                continue
            found += [_check_instance(name, address, host, settings) for address, host in instances]
    return found


def _resolved(entry: str) -> list[tuple[str, str | None]]:
    """The instances that an address stands for, each with the name that its certificate bears where that is another.

    Of dns:///name:port one for each of the name's addresses, as the orchestrator resolves it. Raises OSError where the
    name has none, and ValueError where the port is no number.
    """
    if not entry.startswith("dns:///"):
        return [(entry, None)]
    host, _, port = entry.removeprefix("dns:///").rpartition(":")
    found: dict[str, str | None] = {}
    for family, *_, place in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM):
        found[f"[{place[0]}]:{port}" if family is socket.AF_INET6 else f"{place[0]}:{port}"] = host
    return list(found.items())


def _check_instance(name: str, address: str, server_name: str | None, settings: Settings) -> Finding:
    check = f"service {name}"
    try:
        with open_blocking_channel(address, settings.tls, server_name, token_source(settings)) as channel:
            stub = runtime_pb2_grpc.RuntimeServiceStub(channel)
            answer = stub.GetCapacity(runtime_pb2.GetCapacityRequest(), timeout=5)
    except grpc.RpcError as error:
        return Finding(check, False, f"{address}: {failure_from_rpc(error).message}", f"see the log {name}.log")
    except Failure as failure:
        return Finding(check, False, failure.message)
    text = f"{answer.instance} {answer.version}, {answer.slots_free} of {answer.slots_total} slots free"
    same = answer.version == __version__
    advice = "" if same else f"it runs another version than this one, {__version__}: restart it"
    return Finding(check, same, text, advice)
