"""Results that are found, and damaged ones that are taken back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cryofleet.artifacts import ResultWriter
from cryofleet.operations import find_operation
from cryofleet.particles import Particles
from cryofleet.storage import Store, file_uri
from cryofleet.v1 import runtime_pb2
from orchestrator.cache import ResultCache

OPERATION = find_operation("runtime.SelfTest")
KEY = "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(file_uri(tmp_path / "store"))


def _result(store: Store, key: str, name: str = "particles.parquet") -> str:
    """A stored result of one object; the object's URI."""
    writer = ResultWriter(store, "default", key)
    uri = writer.put(name, Particles.from_positions(np.zeros((3, 3)), 10.0).to_parquet())
    writer.commit(
        operation=OPERATION.name, version=1, parameters={}, inputs={}, result={"index": 7}, seconds=0.0, device="cpu"
    )
    return uri


def _flip_a_byte(uri: str) -> None:
    path = Path(uri.removeprefix("file://"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_result_without_its_objects_counts_as_not_there(store: Store) -> None:
    cache = ResultCache(store)
    request = runtime_pb2.SelfTestRequest(index=7)
    uri = _result(store, cache.key(OPERATION, request, "default"))
    assert cache.look_up(OPERATION, request, "default")[1] is not None
    Path(uri.removeprefix("file://")).unlink()
    assert cache.look_up(OPERATION, request, "default")[1] is None


def test_a_broken_manifest_counts_as_not_there(store: Store) -> None:
    cache = ResultCache(store)
    request = runtime_pb2.SelfTestRequest(index=7)
    uri = _result(store, cache.key(OPERATION, request, "default"))
    manifest = Path(uri.removeprefix("file://")).parent / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    assert cache.look_up(OPERATION, request, "default")[1] is None


def test_a_damaged_input_is_taken_back_and_an_intact_one_stays(store: Store) -> None:
    cache = ResultCache(store)
    damaged, intact = _result(store, KEY), _result(store, "cd" * 32)
    _flip_a_byte(damaged)
    request = runtime_pb2.SelfTestRequest(particles_uri=damaged)
    assert cache.take_back_damaged(request, "default", "") == [damaged]
    assert not store.exists(damaged.replace("particles.parquet", "manifest.json"))
    request = runtime_pb2.SelfTestRequest(particles_uri=intact)
    assert cache.take_back_damaged(request, "default", "") == []
    assert store.exists(intact)


def test_a_shard_that_only_the_message_names_is_taken_back(store: Store) -> None:
    cache = ResultCache(store)
    damaged = _result(store, KEY)
    _flip_a_byte(damaged)
    cause = f"{damaged}: block 0 is not what was written"
    assert cache.take_back_damaged(runtime_pb2.SelfTestRequest(), "default", cause) == [damaged]


def test_files_of_the_user_are_never_taken_for_results(store: Store, tmp_path: Path) -> None:
    """Their digests are not remembered either: they may change."""
    folder = tmp_path / "theirs" / "session" / "default" / KEY
    folder.mkdir(parents=True)
    theirs = Store(store.root, [file_uri(tmp_path / "theirs")])
    cache = ResultCache(theirs)
    request = runtime_pb2.SelfTestRequest(particles_uri=file_uri(folder / "t.parquet"))
    (folder / "t.parquet").write_bytes(b"one")
    before = cache.key(OPERATION, request, "default")
    (folder / "t.parquet").write_bytes(b"two")
    assert cache.key(OPERATION, request, "default") != before
