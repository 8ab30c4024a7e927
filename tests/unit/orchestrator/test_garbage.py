from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cryofleet.artifacts import ResultWriter, contract
from cryofleet.storage import Store
from orchestrator.garbage import Garbage, Held, collect, pin


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


def result(store: Store, digit: str, *, inputs: tuple[str, ...] = (), index_of: tuple[str, ...] = ()) -> str:
    """A finished result whose key is 64 times `digit`; the URI of its one object."""
    writer = ResultWriter(store, "default", digit * 64)
    content = json.dumps({"shards": [{"ref": contract(store, uri)} for uri in index_of]}).encode()
    uri = writer.put("index.json" if index_of else "data.bin", content)
    writer.commit(
        operation="io.Filter",
        version=1,
        parameters={},
        inputs={"volume_uri": [{"uri": each, "digest": "0" * 64} for each in inputs]},
        result={"volume_uri": uri},
        seconds=1.0,
    )
    return uri


def keys(found: list[Garbage]) -> set[str]:
    return {each.uri.rpartition("/")[2][0] for each in found}


def test_what_a_needed_result_was_made_from_stays(store: Store) -> None:
    raw = result(store, "1")
    shard = result(store, "2", inputs=(raw,))
    other_shard = result(store, "3")
    merged = result(store, "4", inputs=(shard,), index_of=(shard, other_shard))
    result(store, "5", inputs=(merged,))
    loose = result(store, "6")
    assert keys(collect(store, lambda: Held([merged]), 0.0, "", delete=False)) == {"5", "6"}
    pin(store, loose, unpin=False)
    found = collect(store, lambda: Held([merged]), 0.0, "default", delete=True)
    assert [(each.operation, each.uri) for each in found] == [("io.Filter", f"{store.root}/default/{'5' * 64}")]
    assert store.exists(raw)
    assert store.exists(other_shard)
    assert not store.exists(f"{store.root}/default/{'5' * 64}/manifest.json")
    pin(store, loose, unpin=True)
    assert keys(collect(store, lambda: Held([merged]), 0.0, "", delete=False)) == {"6"}


def test_unfinished_results_and_checkpoints_go_when_they_are_old(store: Store, tmp_path: Path) -> None:
    unfinished = f"{store.root}/default/{'7' * 64}/half.mrc"
    checkpoint = f"{store.root}/default/_work/{'8' * 64}/state.bin"
    for uri in (unfinished, checkpoint):
        store.put(uri, b"12345")
    users = f"{store.root}/default/notes/mine.txt"
    store.put(users, b"not a result")
    assert collect(store, lambda: Held([]), 3600.0, "", delete=True) == [], "somebody may just be writing them"
    hours_ago = time.time() - 7200
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            os.utime(path, (hours_ago, hours_ago))
    found = collect(store, lambda: Held([]), 3600.0, "", delete=True)
    assert {each.uri: each.size_bytes for each in found} == {
        unfinished.rpartition("/")[0]: 5,
        checkpoint.rpartition("/")[0]: 5,
    }
    assert [each.uri for each in store.list(store.root)] == [users]


def test_a_result_that_a_run_has_found_meanwhile_stays(store: Store) -> None:
    old = result(store, "9")
    answers = iter([Held([]), Held([old])])
    assert collect(store, lambda: next(answers), 0.0, "", delete=True) == []
    assert store.exists(old)


def test_the_work_of_a_run_that_goes_on_stays_however_small_the_age(store: Store, tmp_path: Path) -> None:
    earlier = result(store, "a")
    hours_ago = time.time() - 7200
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            os.utime(path, (hours_ago, hours_ago))
    finished = result(store, "b")
    unfinished = f"{store.root}/default/{'c' * 64}/half.mrc"
    checkpoint = f"{store.root}/default/_work/{'d' * 64}/state.bin"
    for uri in (unfinished, checkpoint):
        store.put(uri, b"12345")
    submitted = time.time() - 1.0
    for delete in (False, True):
        assert keys(collect(store, lambda: Held([], submitted), 0.0, "", delete=delete)) == {"a"}
    assert not store.exists(earlier)
    assert all(store.exists(uri) for uri in (finished, unfinished, checkpoint))
    answers = iter([Held([]), Held([], submitted)])
    assert collect(store, lambda: next(answers), 0.0, "", delete=True) == [], "it was submitted meanwhile"
    assert keys(collect(store, lambda: Held([]), 0.0, "", delete=False)) == {"b", "c", "d"}
