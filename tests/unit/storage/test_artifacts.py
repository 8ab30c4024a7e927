from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cryofleet.artifacts import (
    BLOCK_BYTES,
    BlobEntry,
    Manifest,
    ResultWriter,
    canonical_json,
    complete,
    content_digest,
    contract,
    digest_file,
    digest_of,
    expand,
    find,
    identity,
    is_result_uri,
    manifest_for,
    open_blob,
    remove,
    result_uri,
    verify,
    versions,
)
from cryofleet.errors import DataLoss, InvalidArgument, NotFound, PermissionDenied, Unavailable
from cryofleet.storage import Data, Stat, Store, file_uri
from tests.unit.storage.conftest import KEY, path_of


def commit(writer: ResultWriter, **result: Any) -> Manifest:
    return writer.commit(
        operation="test.Make", version=1, parameters={"seed": 0}, inputs={}, result=result, seconds=1.5, device="cpu"
    )


def plain_digest(data: bytes) -> str:
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


def flip(store: Store, uri: str, position: int) -> None:
    path = path_of(uri)
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 1234)


# --- Digests and identity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
def test_digests_do_not_depend_on_the_pieces(content: bytes, size: int, tmp_path: Path) -> None:
    data = content[:size]
    expected = plain_digest(data)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert digest_file(path) == expected
    for step in (1_000_003, BLOCK_BYTES, 3 * BLOCK_BYTES):
        assert digest_of(data[start : start + step] for start in range(0, size, step)) == expected


def test_canonical_json() -> None:
    assert (
        canonical_json({"b": [1, 2.0, True, None], "a": {"ä": 0.1}}) == '{"a":{"ä":0.1},"b":[1,2.0,true,null]}'.encode()
    )
    assert canonical_json({"x": 1e-7, "y": (1,)}) == b'{"x":1e-07,"y":[1]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32(1), b"x", {1: 2}, {"a": {"b": [object()]}}])
def test_what_json_does_not_have_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument):
        canonical_json(value)
    with pytest.raises(InvalidArgument):
        identity("test.Make", 1, {"a": value}, {})


def test_identity_is_what_the_design_says() -> None:
    text = '{"inputs":{"t":["00"]},"operation":"a.B","parameters":{"x":1.5},"version":2}'
    assert identity("a.B", 2, {"x": 1.5}, {"t": ["00"]}) == hashlib.sha256(text.encode()).hexdigest()


def test_identity_depends_on_everything_but_the_order_of_names() -> None:
    base = identity("a.B", 1, {"x": 1.0, "y": 2}, {"f": ["1", "2"]})
    assert identity("a.B", 1, {"y": 2, "x": 1.0}, {"f": ["1", "2"]}) == base
    others = {
        identity("a.C", 1, {"x": 1.0, "y": 2}, {"f": ["1", "2"]}),
        identity("a.B", 2, {"x": 1.0, "y": 2}, {"f": ["1", "2"]}),
        identity("a.B", 1, {"x": 1.5, "y": 2}, {"f": ["1", "2"]}),
        identity("a.B", 1, {"x": 1.0, "y": 2}, {"f": ["2", "1"]}),
        identity("a.B", 1, {"x": 1.0, "y": 2}, {"g": ["1", "2"]}),
        identity("a.B", 1, {"x": 1.0, "y": 2}, {}),
    }
    assert len(others) == 6
    assert base not in others


# --- Writing and finding -------------------------------------------------------------------------------------------


def test_a_result_is_found_after_its_commit_only(store: Store, writer: ResultWriter, content: bytes) -> None:
    uri = writer.put("folder/data.bin", content)
    assert uri == f"{result_uri(store, 'default', KEY)}/folder/data.bin"
    assert find(store, "default", KEY) is None
    with pytest.raises(NotFound):
        open_blob(store, uri)
    with pytest.raises(NotFound):
        content_digest(store, uri)
    manifest = commit(writer, data_uri=uri)
    assert find(store, "default", KEY) == manifest
    assert manifest_for(store, uri) == manifest
    assert manifest_for(store, manifest.manifest_uri) == manifest
    assert complete(store, manifest)
    entry = manifest.blob("folder/data.bin")
    assert entry is not None
    assert (entry["size_bytes"], entry["digest"]) == (len(content), plain_digest(content))
    assert open_blob(store, uri).read() == content


def test_put_takes_pieces_of_any_size(store: Store, writer: ResultWriter, content: bytes) -> None:
    pieces: dict[str, Data] = {
        "bytes": content,
        "view": memoryview(content),
        "small": (content[start : start + 1_000_003] for start in range(0, len(content), 1_000_003)),
        "blocks": (content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)),
        "large": iter([content[:5], content[5:]]),
    }
    for name, data in pieces.items():
        writer.put(name, data)
    manifest = commit(writer)
    assert {entry["digest"] for entry in manifest.blobs} == {plain_digest(content)}
    for name in pieces:
        assert store.get(f"{writer.uri}/{name}") == content


def test_uris_in_the_file_outlive_a_move(store: Store, writer: ResultWriter, tmp_path: Path) -> None:
    uri = writer.put("data", b"x")
    source = f"{store.root}/default/{'1' * 64}/in"
    manifest = writer.commit(
        operation="test.Make",
        version=1,
        parameters={},
        inputs={"f": [{"uri": source, "digest": "2" * 64}, {"uri": "file:///data/raw", "digest": "3" * 64}]},
        result={"uris": [uri], "nested": {"uri": uri}, "count": 1},
        seconds=0,
    )
    text = json.loads(store.get(manifest.manifest_uri))
    assert text["result"] == {
        "uris": [f"store:/default/{KEY}/data"],
        "nested": {"uri": f"store:/default/{KEY}/data"},
        "count": 1,
    }
    assert [each["uri"] for each in text["inputs"]["f"]] == [f"store:/default/{'1' * 64}/in", "file:///data/raw"]
    os.rename(tmp_path / "store", tmp_path / "moved")
    moved = Store(file_uri(tmp_path / "moved"))
    found = find(moved, "default", KEY)
    assert found is not None
    assert found.result["uris"] == [f"{moved.root}/default/{KEY}/data"]
    assert found.inputs["f"][0]["uri"] == f"{moved.root}/default/{'1' * 64}/in"
    assert open_blob(moved, found.result["uris"][0]).read() == b"x"


def test_references(store: Store) -> None:
    uri = f"{store.root}/default/x"
    assert contract(store, uri) == "store:/default/x"
    assert expand(store, "store:/default/x", f"{store.root}/other/index.json") == uri
    for other in ("file:///elsewhere/x", store.root + "-2/x", "text"):
        assert contract(store, other) == other
        assert expand(store, other, uri) == other
    with pytest.raises(PermissionDenied):
        store.get(expand(store, "store:/../../etc/passwd", uri))


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../b", "a//b", "a/", "manifest.json", "a\0", "%2e%2e/x"])
def test_bad_names_of_objects(writer: ResultWriter, name: str) -> None:
    with pytest.raises(InvalidArgument):
        writer.put(name, b"")


def test_bad_projects_and_keys(store: Store) -> None:
    for project, key in (("..", KEY), ("", KEY), ("_work", KEY), ("a/b", KEY), ("default", "x"), ("default", KEY[:-1])):
        with pytest.raises(InvalidArgument):
            find(store, project, key)


def test_an_object_is_written_once(writer: ResultWriter) -> None:
    writer.put("a", b"1")
    with pytest.raises(InvalidArgument, match="twice"):
        writer.put("a", b"2")


def test_a_failed_put_may_be_tried_again(store: Store, writer: ResultWriter) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(BLOCK_BYTES)
        yield bytes(BLOCK_BYTES)
        raise KeyError("broken")

    threads = threading.active_count()
    with pytest.raises(KeyError):
        writer.put("a", broken())
    assert threading.active_count() == threads
    assert list(store.list(store.root)) == []
    writer.put("a", b"good")
    commit(writer)
    assert store.get(f"{writer.uri}/a") == b"good"


def test_discard(store: Store, writer: ResultWriter) -> None:
    writer.put("a", b"1")
    writer.put("b/c", b"2")
    writer.discard()
    assert list(store.list(store.root)) == []


def test_remove(store: Store, writer: ResultWriter) -> None:
    writer.put("a", b"1")
    commit(writer)
    remove(store, "default", KEY)
    assert find(store, "default", KEY) is None
    assert list(store.list(store.root)) == []
    remove(store, "default", KEY)


# --- Several writers -----------------------------------------------------------------------------------------------


def test_two_writers_of_the_same_bytes_are_harmless(store: Store) -> None:
    one, two = (ResultWriter(store, "default", KEY) for _ in range(2))
    uri = one.put("a", b"same")
    two.put("a", b"same")
    first = commit(one)
    second = commit(two)
    assert second == first
    assert open_blob(store, uri).read() == b"same"


def test_the_first_commit_wins(store: Store) -> None:
    one, two = (ResultWriter(store, "default", KEY) for _ in range(2))
    two.put("early", b"two")
    uri = one.put("a", b"one")
    first = commit(one)
    two.put("a", b"two")
    assert commit(two) == first
    two.discard()
    assert open_blob(store, uri).read() == b"one"


def test_objects_changed_by_another_writer_are_not_committed(store: Store) -> None:
    one, two = (ResultWriter(store, "default", KEY) for _ in range(2))
    one.put("a", b"one")
    uri = two.put("a", b"two")
    with pytest.raises(Unavailable, match="another writer"):
        commit(one)
    assert find(store, "default", KEY) is None
    commit(two)
    assert open_blob(store, uri).read() == b"two"


def test_objects_removed_by_another_writer_are_not_committed(store: Store) -> None:
    one, two = (ResultWriter(store, "default", KEY) for _ in range(2))
    one.put("a", b"same")
    two.put("a", b"same")
    two.discard()
    with pytest.raises(Unavailable):
        commit(one)


def test_many_threads_write_one_result(store: Store) -> None:
    manifests: list[Manifest] = []
    start = threading.Barrier(6)

    def work() -> None:
        start.wait()
        writer = ResultWriter(store, "default", KEY)
        for name in ("a", "b", "c"):
            writer.put(name, name.encode() * 1000)
        manifests.append(commit(writer))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(manifests) == 6
    found = find(store, "default", KEY)
    assert found is not None
    assert complete(store, found)
    for name in ("a", "b", "c"):
        assert open_blob(store, f"{found.uri}/{name}").read() == name.encode() * 1000


def test_a_slow_put_does_not_replace_an_object_of_a_result_that_was_committed_meanwhile(store: Store) -> None:
    one, two = (ResultWriter(store, "default", KEY) for _ in range(2))
    first: list[Manifest] = []

    def slow() -> Iterator[bytes]:
        yield b"tw"
        one.put("a", b"one")
        first.append(commit(one))
        yield b"o"

    uri = two.put("a", slow())
    assert two.entry("a")["size_bytes"] == 3
    assert two.entry("a")["digest"] == plain_digest(b"two")
    assert commit(two) == first[0]
    assert open_blob(store, uri).read() == b"one"


def test_a_result_whose_object_was_replaced_is_taken_back_by_who_replaced_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit falls between the last look at the manifest and the end of the put."""
    one, two = (ResultWriter(store, "default", KEY) for _ in range(2))
    one.put("a", b"one")
    put = Store.put

    def late(self: Store, uri: str, data: Data) -> Stat:
        content = data if isinstance(data, bytes) else b"".join(bytes(piece) for piece in data)
        if uri.endswith("/a"):
            monkeypatch.setattr(Store, "put", put)
            commit(one)
        return put(self, uri, content)

    monkeypatch.setattr(Store, "put", late)
    uri = two.put("a", b"two")
    assert find(store, "default", KEY) is None
    commit(two)
    assert open_blob(store, uri).read() == b"two"


def test_a_result_whose_object_was_replaced_is_taken_back_by_who_committed_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's put, and its look at the manifest, fall just before the manifest is written."""
    one = ResultWriter(store, "default", KEY)
    uri = one.put("a", b"one")
    untouched = one._check_untouched
    replaced: list[Stat] = []

    def check(entries: list[BlobEntry]) -> None:
        untouched(entries)
        if not replaced:
            replaced.append(store.put(uri, b"two"))

    monkeypatch.setattr(one, "_check_untouched", check)
    with pytest.raises(Unavailable, match="another writer"):
        commit(one)
    assert find(store, "default", KEY) is None


def test_a_discard_that_takes_objects_of_a_committed_result_takes_back_its_manifest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (ResultWriter(store, "default", KEY) for _ in range(2))
    one.put("a", b"same")
    two.put("a", b"same")
    delete = Store.delete

    def late(self: Store, uri: str) -> None:
        monkeypatch.setattr(Store, "delete", delete)
        commit(one)
        delete(self, uri)

    monkeypatch.setattr(Store, "delete", late)
    two.discard()
    assert find(store, "default", KEY) is None


# --- Damage --------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_in_its_block(store: Store, writer: ResultWriter, content: bytes) -> None:
    uri = writer.put("data", content)
    manifest = commit(writer)
    flip(store, uri, BLOCK_BYTES + 17)
    assert complete(store, manifest)  # a stat does not see it
    blob = open_blob(store, uri)
    assert blob.read(0, BLOCK_BYTES) == content[:BLOCK_BYTES]
    assert blob.read(2 * BLOCK_BYTES) == content[2 * BLOCK_BYTES :]
    for read in (lambda: blob.read(BLOCK_BYTES + 5000, 10), blob.read, lambda: list(blob.stream())):
        with pytest.raises(
            DataLoss, match=re.escape(f"{uri}: block 1 (bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES}) is not")
        ):
            read()
    given: list[bytes] = []
    with pytest.raises(DataLoss):
        given.extend(blob.stream())


@pytest.mark.parametrize("length", [0, 5, BLOCK_BYTES])
def test_a_truncated_object_is_found(store: Store, writer: ResultWriter, content: bytes, length: int) -> None:
    uri = writer.put("data", content)
    manifest = commit(writer)
    path = path_of(uri)
    os.truncate(path, length)
    assert not complete(store, manifest)
    with pytest.raises(DataLoss, match=uri):
        open_blob(store, uri)


def test_truncated_after_opening(store: Store, writer: ResultWriter, content: bytes) -> None:
    uri = writer.put("data", content)
    commit(writer)
    blob = open_blob(store, uri)
    path = path_of(uri)
    os.truncate(path, BLOCK_BYTES)
    with pytest.raises(DataLoss, match=uri):
        blob.read(BLOCK_BYTES, 10)
    with pytest.raises(DataLoss, match=uri):
        blob.read()


def test_a_missing_object_is_found_and_made_again(store: Store, writer: ResultWriter) -> None:
    uri = writer.put("a", b"1")
    manifest = commit(writer)
    store.delete(uri)
    assert not complete(store, manifest)
    with pytest.raises(DataLoss, match="missing"):
        open_blob(store, uri)
    again = ResultWriter(store, "default", KEY)
    assert find(store, "default", KEY) is None  # a damaged result is taken back
    again.put("a", b"1")
    assert complete(store, commit(again))
    assert open_blob(store, uri).read() == b"1"


def test_verify_names_what_is_damaged_or_missing(store: Store, writer: ResultWriter, content: bytes) -> None:
    for name in ("good", "folder/flipped", "missing", "short", "empty"):
        writer.put(name, b"" if name == "empty" else content)
    manifest = commit(writer)
    assert verify(store, manifest) == []
    flip(store, f"{writer.uri}/folder/flipped", BLOCK_BYTES + 1)
    store.delete(f"{writer.uri}/missing")
    os.truncate(path_of(f"{writer.uri}/short"), 3)
    assert verify(store, manifest) == ["folder/flipped", "missing", "short"]
    remove(store, "default", KEY)
    assert find(store, "default", KEY) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"key": NaN}',
    ],
)
def test_a_damaged_manifest_is_data_loss(store: Store, writer: ResultWriter, text: bytes) -> None:
    uri = writer.put("a", b"1")
    manifest = commit(writer)
    store.put(manifest.manifest_uri, text)
    for call in (lambda: find(store, "default", KEY), lambda: manifest_for(store, uri), lambda: open_blob(store, uri)):
        with pytest.raises(DataLoss, match=r"manifest\.json"):
            call()
    again = ResultWriter(store, "default", KEY)
    again.put("a", b"1")
    commit(again)
    assert open_blob(store, uri).read() == b"1"


def change_digest(manifest: dict[str, Any]) -> None:
    manifest["blobs"][0]["digest"] = "0" * 64


def change_block(manifest: dict[str, Any]) -> None:
    manifest["blobs"][0]["blocks"][0] = "0" * 64


def change_size(manifest: dict[str, Any]) -> None:
    manifest["blobs"][0]["size_bytes"] = 10**15


def change_name(manifest: dict[str, Any]) -> None:
    manifest["blobs"][0]["name"] = "../../other/x"


def change_key(manifest: dict[str, Any]) -> None:
    manifest["key"] = "0" * 64


def change_version(manifest: dict[str, Any]) -> None:
    manifest["version"] = True


def change_inputs(manifest: dict[str, Any]) -> None:
    manifest["inputs"] = {"f": [{"uri": 1}]}


@pytest.mark.parametrize(
    "change", [change_digest, change_block, change_size, change_name, change_key, change_version, change_inputs]
)
def test_a_manifest_that_contradicts_itself_is_data_loss(store: Store, writer: ResultWriter, change: Any) -> None:
    writer.put("a", b"1")
    manifest = commit(writer)
    text = json.loads(store.get(manifest.manifest_uri))
    change(text)
    store.put(manifest.manifest_uri, json.dumps(text).encode())
    with pytest.raises(DataLoss):
        find(store, "default", KEY)


# --- Reading -------------------------------------------------------------------------------------------------------


def test_ranges_of_a_blob(store: Store, writer: ResultWriter, content: bytes) -> None:
    uri = writer.put("data", content)
    commit(writer)
    blob = open_blob(store, uri)
    size = len(content)
    assert blob.size_bytes == size
    for offset, length in (
        (0, 10),
        (BLOCK_BYTES - 5, 10),
        (BLOCK_BYTES, BLOCK_BYTES),
        (3, size),
        (size - 1, 5),
        (size, 5),
        (size + 5, 5),
        (7, 0),
        (5, 2 * BLOCK_BYTES),
    ):
        assert blob.read(offset, length) == content[offset : offset + length]
        assert b"".join(blob.stream(offset, length)) == content[offset : offset + length]
    assert blob.read(100) == content[100:]
    target = bytearray(BLOCK_BYTES + 100)
    blob.read_into(BLOCK_BYTES - 50, memoryview(target))
    assert target == content[BLOCK_BYTES - 50 : 2 * BLOCK_BYTES + 50]
    with pytest.raises(DataLoss, match="ends at byte"):
        blob.read_into(size - 5, memoryview(bytearray(6)))
    with pytest.raises(InvalidArgument):
        blob.read(-1, 5)


def test_small_reads_touch_only_their_block(
    store: Store, writer: ResultWriter, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = writer.put("data", content)
    commit(writer)
    blob = open_blob(store, uri)
    asked: list[tuple[Any, ...]] = []
    stream = store.stream

    def recorded(*what: Any) -> Iterator[bytes]:
        asked.append(what)
        return stream(*what)

    monkeypatch.setattr(store, "stream", recorded)
    for start in range(BLOCK_BYTES, BLOCK_BYTES + 10_000, 1000):
        assert blob.read(start, 1000) == content[start : start + 1000]
    assert asked == [(uri, BLOCK_BYTES, BLOCK_BYTES)]


def test_many_threads_read_one_blob(store: Store, writer: ResultWriter, content: bytes) -> None:
    uri = writer.put("data", content)
    commit(writer)
    blob = open_blob(store, uri)
    good = []

    def work(start: int) -> None:
        good.append(
            all(
                blob.read(offset, 100_000) == content[offset : offset + 100_000]
                for offset in range(start, len(content), 1_500_000)
            )
        )

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 100_000, BLOCK_BYTES - 50_000, 3_000_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 4


def test_files_outside_of_results_are_read_as_they_are(store: Store, content: bytes) -> None:
    uri = f"{store.root}/default/_pins/x"
    store.put(uri, content)
    assert manifest_for(store, uri) is None
    blob = open_blob(store, uri)
    assert blob.digest is None
    assert blob.read(5, 10) == content[5:15]
    assert content_digest(store, uri) == plain_digest(content)
    with pytest.raises(NotFound):
        content_digest(store, uri + "y")
    with pytest.raises(NotFound):
        open_blob(store, uri + "y")


def test_digest_of_an_object_comes_from_the_manifest(store: Store, writer: ResultWriter, monkeypatch: Any) -> None:
    uri = writer.put("data", b"x" * 100)
    commit(writer)
    monkeypatch.setattr("cryofleet.artifacts.content.digest_of", lambda *_: pytest.fail("was read"))
    assert content_digest(store, uri) == plain_digest(b"x" * 100)
    with pytest.raises(NotFound):
        content_digest(store, uri + "y")


def test_digest_of_a_folder_depends_on_names_and_content_only(store: Store, tmp_path: Path) -> None:
    def model(key: str, folder: str, config: bytes) -> str:
        writer = ResultWriter(store, "default", key)
        writer.put(f"{folder}/weights.safetensors", b"weights")
        writer.put(f"{folder}/config.json", config)
        writer.put("losses.json", os.urandom(5))
        commit(writer)
        return content_digest(store, f"{writer.uri}/{folder}")

    first = model("1" * 64, "model", b"{}")
    assert model("2" * 64, "network", b"{}") == first
    assert model("3" * 64, "model", b"[]") != first
    outside = tmp_path / "data" / "model"
    outside.mkdir(parents=True)
    (outside / "weights.safetensors").write_bytes(b"weights")
    (outside / "config.json").write_bytes(b"{}")
    both = Store(store.root, [file_uri(tmp_path / "data")])
    assert content_digest(both, file_uri(outside)) == first
    assert content_digest(both, file_uri(outside) + "/") == first


def test_another_projects_result_is_closed(store: Store) -> None:
    writer = ResultWriter(store, "other", KEY)
    uri = writer.put("a", b"secret")
    commit(writer)
    mine = store.for_project("mine")
    for call in (lambda: open_blob(mine, uri), lambda: content_digest(mine, uri), lambda: find(mine, "other", KEY)):
        with pytest.raises(PermissionDenied):
            call()


# --- Other platforms' stores, read only -----------------------------------------------------------------------------


def other_platform(tmp_path: Path) -> Store:
    return Store(file_uri(tmp_path / "other"))


def test_a_result_in_a_read_only_root_is_verified(store: Store, tmp_path: Path) -> None:
    other = other_platform(tmp_path)
    writer = ResultWriter(other, "default", KEY)
    uri = writer.put("data", b"theirs")
    unfinished = ResultWriter(other, "default", "1" * 64).put("data", b"half")
    manifest = commit(writer, data_uri=uri)
    both = Store(store.root, [other.root]).for_project("mine")
    found = manifest_for(both, uri)
    assert found == manifest
    assert found.result == {"data_uri": uri}, "not the same name under our own root"
    assert content_digest(both, uri) == plain_digest(b"theirs")
    assert open_blob(both, uri).read() == b"theirs"
    with pytest.raises(NotFound, match="no finished result"):
        open_blob(both, unfinished)
    flip(other, uri, 2)
    with pytest.raises(DataLoss, match=uri):
        open_blob(both, uri).read()


def test_what_may_change_and_what_may_not(store: Store, tmp_path: Path) -> None:
    other = other_platform(tmp_path)
    own, theirs = (ResultWriter(each, "default", KEY) for each in (store, other))
    uris = [each.put("data", b"same") for each in (own, theirs)]
    for each in (own, theirs):
        commit(each)
    both = Store(store.root, [other.root])
    files = [f"{store.root}/default/inputs/{KEY}/x", f"{store.root}/default/x", f"{other.root}/x"]
    assert [is_result_uri(both, uri) for uri in [*uris, *files]] == [True, False, False, False, False]
    assert is_result_uri(both, own.uri)
    assert versions(both, uris[0]) == {}
    before = versions(both, uris[1])
    assert list(before) == [f"{theirs.uri}/manifest.json"]
    remove(other, "default", KEY)
    assert versions(both, uris[1]) != before
    store.put(files[1], b"1")
    before = versions(both, files[1])
    store.put(files[1], b"2")
    assert list(versions(both, files[1])) == list(before) == [files[1]]
    assert versions(both, files[1]) != before


def test_the_manifest_is_written_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every object is in place before the manifest is written."""
    order: list[str] = []
    put = Store.put

    def recorded(self: Store, uri: str, data: Data) -> Stat:
        stat = put(self, uri, data)
        order.append(uri.rpartition("/")[2])
        return stat

    monkeypatch.setattr(Store, "put", recorded)
    writer = ResultWriter(store, "default", KEY)
    writer.put("z", b"1")
    writer.put("a", b"2")
    commit(writer)
    assert order == ["z", "a", "manifest.json"]
