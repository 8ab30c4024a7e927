from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cryofleet.artifacts import LEAVING, ResultWriter, complete, contract, find
from cryofleet.errors import Unavailable
from cryofleet.storage import Stat, Store
from orchestrator import garbage
from orchestrator.garbage import Garbage, Held, collect, pin


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store")


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(garbage, "RECORD_SECONDS", 0.0)


def age(folder: Path) -> None:
    """Makes all that is stored two hours old."""
    two_hours_ago = time.time() - 7200
    for path in (folder / "store").rglob("*"):
        if path.is_file():
            os.utime(path, (two_hours_ago, two_hours_ago))


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
    age(tmp_path)
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
    age(tmp_path)
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


def there(store: Store, digit: str) -> bool:
    """Whether a look-up finds the result."""
    manifest = find(store, "default", digit * 64)
    return manifest is not None and complete(store, manifest)


def test_what_is_just_written_stays_however_small_the_age(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "GRACE_SECONDS", 60.0)
    result(store, "1")
    age(tmp_path)
    result(store, "2")
    assert keys(collect(store, lambda: Held([]), 0.0, "", delete=True)) == {"1"}
    assert there(store, "2")


class Slow(Store):
    """A store whose clock is two hours behind."""

    def stat(self, uri: str) -> Stat:
        found = super().stat(uri)
        return replace(found, modified=found.modified - 7200)

    def list(self, prefix_uri: str) -> Iterator[Stat]:
        for found in super().list(prefix_uri):
            yield replace(found, modified=found.modified - 7200)


def test_ages_are_those_of_the_stores_clock(store: Store, tmp_path: Path) -> None:
    slow = Slow(store.root)
    result(slow, "1")
    assert collect(slow, lambda: Held([]), 3600.0, "", delete=True) == []
    age(tmp_path)
    assert keys(collect(slow, lambda: Held([]), 3600.0, "", delete=True)) == {"1"}
    assert list(store.list(store.root)) == [], "nothing is left behind"


def test_nobody_finds_a_result_that_is_about_to_go(store: Store) -> None:
    found_before, found_by_nobody, pinned = result(store, "1"), result(store, "2"), result(store, "3")
    asked = 0

    def held() -> Held:
        nonlocal asked
        asked += 1
        if asked == 1:
            assert there(store, "1")
            assert there(store, "2")
            return Held([])
        # Who has found the result before says so now; nobody else finds it any more, but it can still be read.
        assert not there(store, "1")
        assert not there(store, "2")
        assert store.exists(found_before)
        pin(store, pinned, unpin=False)
        return Held([found_before])

    assert keys(collect(store, held, 0.0, "", delete=True)) == {"2"}
    assert there(store, "1")
    assert there(store, "3")
    assert not store.exists(found_by_nobody)
    assert not [each for each in store.list(store.root) if LEAVING in each.uri]


def test_a_result_that_is_made_again_meanwhile_stays(store: Store) -> None:
    result(store, "1")
    asked = 0

    def held() -> Held:
        nonlocal asked
        asked += 1
        if asked == 2:
            result(store, "1")
            assert there(store, "1"), "the mark is of the one before"
        return Held([])

    assert collect(store, held, 0.0, "", delete=True) == []
    assert there(store, "1")


def test_nothing_is_lost_where_the_record_does_not_answer(store: Store) -> None:
    result(store, "1")
    answers = iter([Held([])])

    def held() -> Held:
        for answer in answers:
            return answer
        raise Unavailable("the database is away")

    with pytest.raises(Unavailable):
        collect(store, held, 0.0, "", delete=True)
    assert there(store, "1")


class Racing(Store):
    """Something else happens before or after a deletion."""

    meanwhile: Callable[[], Any] | None = None
    first = True
    came_in = False

    def delete(self, uri: str) -> None:
        meanwhile = self.meanwhile if uri.endswith(".bin") else None
        if meanwhile is not None:
            self.meanwhile = None
            self.came_in = True
        if meanwhile is not None and self.first:
            meanwhile()
        super().delete(uri)
        if meanwhile is not None and not self.first:
            meanwhile()


@pytest.mark.parametrize("first", [True, False])
def test_of_a_commit_and_a_deletion_at_one_moment_one_sees_the_other(store: Store, first: bool) -> None:
    racing = Racing(store.root)
    writer = ResultWriter(store, "default", "1" * 64)
    uri = writer.put("data.bin", b"12345")
    refused = 0

    def commit() -> None:
        nonlocal refused
        try:
            writer.commit(operation="io.Filter", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=1.0)
        except Unavailable:
            refused += 1

    racing.first, racing.meanwhile = first, commit
    assert keys(collect(racing, lambda: Held([]), 0.0, "", delete=True)) == {"1"}
    assert refused == (0 if first else 1), "it came in between"
    assert racing.came_in
    assert list(store.list(store.root)) == [], "no manifest of an object that is gone"
