"""How fast the store moves data, against the plainest code that does the same.

Files: a loop that copies and hashes, and one that reads and hashes. S3: the minio client's own put and get, which hash
nothing; the server is moto in a process of its own. Each ratio is of the best of several runs, taken in turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from minio import Minio

from benchmarks.harness import Row
from cryofleet.artifacts import BLOCK_BYTES, ResultWriter, find, open_blob, remove
from cryofleet.settings import S3Settings
from cryofleet.storage import Store, file_uri

MIB = 1024 * 1024
_KEY = "0" * 64
_PROJECT = "benchmark"
_BUCKET = "cryofleet-benchmark"


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _write(store: Store, source: Path) -> None:
    """What a service does: the object with its digests, then the manifest."""
    writer = ResultWriter(store, _PROJECT, _KEY)
    writer.put("data", _blocks(source))
    writer.commit(operation="benchmark.Move", version=1, parameters={}, inputs={}, result={}, seconds=0.0)


def _read(store: Store) -> int:
    """All of the object, verified."""
    return sum(len(piece) for piece in open_blob(store, f"{store.root}/{_PROJECT}/{_KEY}/data").stream())


def _plain_write(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # a new file each time, as in the store
    digest = hashlib.sha256()
    with target.open("wb", buffering=0) as file:
        for block in _blocks(source):
            digest.update(block)
            file.write(block)
    assert digest.digest()


def _plain_read(target: Path) -> None:
    digest = hashlib.sha256()
    for block in _blocks(target):
        digest.update(block)
    assert digest.digest()


def _client(settings: S3Settings) -> Any:
    return Minio(settings.endpoint, settings.access_key, settings.secret_key, secure=False, region=settings.region)


def _client_write(client: Any, source: Path) -> None:
    with source.open("rb") as file:
        client.put_object(_BUCKET, "plain", file, source.stat().st_size, part_size=16 * MIB)


def _client_read(client: Any) -> None:
    response = client.get_object(_BUCKET, "plain")
    try:
        while response.read(BLOCK_BYTES):
            pass
    finally:
        response.close()
        response.release_conn()


def _seconds(action: Callable[[], Any]) -> float:
    os.sync()  # what was written before must not slow down what is measured
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _peak_of_moving(root: str, settings: S3Settings | None, source: Path, sender: Any) -> None:
    """In a process of its own: its peak memory in bytes after writing and reading."""
    store = Store(root, s3=settings)
    _write(store, source)
    _read(store)
    remove(store, _PROJECT, _KEY)
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM"))
    sender.send(int(peak.split()[1]) * 1024)


def _peak_memory(root: str, settings: S3Settings | None, source: Path) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_of_moving, args=(root, settings, source, sender))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    finally:
        process.join()


def _compare(
    case: str,
    store: Store,
    settings: S3Settings | None,
    source: Path,
    plain_write: Callable[[], None],
    plain_read: Callable[[], None],
    rounds: int,
    target: float,
) -> Iterator[Row]:
    names = ("plain write", "write", "plain read", "read")
    best = dict.fromkeys(names, float("inf"))
    for _ in range(rounds):
        if find(store, _PROJECT, _KEY) is not None:
            remove(store, _PROJECT, _KEY)
        actions = (plain_write, lambda: _write(store, source), plain_read, lambda: _read(store))
        for name, action in zip(names, actions, strict=True):
            best[name] = min(best[name], _seconds(action))
    remove(store, _PROJECT, _KEY)
    size = source.stat().st_size
    ours, plain = best["write"] + best["read"], best["plain write"] + best["plain read"]
    yield Row(case, "time over plain code's", ours / plain, "", "lower", target)
    yield Row(case, "writing, time over plain", best["write"] / best["plain write"], "", "lower")
    yield Row(case, "reading, time over plain", best["read"] / best["plain read"], "", "lower")
    yield Row(case, "writing", size / MIB / best["write"], "MiB/s", "higher")
    yield Row(case, "reading, verified", size / MIB / best["read"], "MiB/s", "higher")
    yield Row(case, "peak memory of the process", _peak_memory(store.root, settings, source) / MIB, "MiB", "lower", 256)


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[S3Settings]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield S3Settings(f"127.0.0.1:{port}", "key", "secret", secure=False)
        finally:
            process.terminate()


def _files(folder: Path, source: Path, rounds: int) -> Iterator[Row]:
    copy = folder / "plain-copy"
    store = Store(file_uri(folder / "store"))
    case = f"file store, {source.stat().st_size // MIB} MiB"
    yield from _compare(
        case,
        store,
        None,
        source,
        lambda: _plain_write(source, copy),
        lambda: _plain_read(copy),
        rounds,
        1.3,
    )
    copy.unlink()


def _s3(folder: Path, source: Path, rounds: int) -> Iterator[Row]:
    with _server(folder) as settings:
        client = _client(settings)
        client.make_bucket(_BUCKET)
        yield from _compare(
            f"S3, {source.stat().st_size // MIB} MiB",
            Store(f"s3://{_BUCKET}/root", s3=settings),
            settings,
            source,
            lambda: _client_write(client, source),
            lambda: _client_read(client),
            rounds,
            1.25,
        )


def measure(quick: bool) -> Iterator[Row]:
    """1 GiB through each store; 256 MiB, and 128 MiB of S3, in a quick run."""
    with tempfile.TemporaryDirectory(prefix="cryofleet-benchmark-") as name:
        folder = Path(name)
        source = folder / "source"
        generator = np.random.default_rng(0)
        with source.open("wb") as file:
            for _ in range((256 if quick else 1024) * MIB // BLOCK_BYTES):
                file.write(generator.bytes(BLOCK_BYTES))
        yield from _files(folder, source, rounds=5 if quick else 3)
        if quick:
            os.truncate(source, 128 * MIB)
        yield from _s3(folder, source, rounds=2)
