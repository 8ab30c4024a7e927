"""Both stores, file system and S3 over HTTP, keep the same contract."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cryofleet.artifacts import ResultWriter
from cryofleet.errors import Failure, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from cryofleet.settings import S3Settings, Settings
from cryofleet.storage import CHUNK_BYTES, S3Store, Store, file_uri
from cryofleet.storage import s3 as s3_module
from orchestrator import garbage
from tests.moto import client_of, s3_server

PART = 5 * 1024 * 1024  # the least that S3 takes


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Settings]:
    with s3_server("cryofleet-test") as settings:
        yield settings


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return Store(file_uri(tmp_path / "store"))
    settings = request.getfixturevalue("s3")
    client = client_of(settings)
    for found in client.list_objects("cryofleet-test", recursive=True):
        client.remove_object("cryofleet-test", found.object_name)
    return Store("s3://cryofleet-test/root", s3=settings)


@pytest.fixture
def uri(store: Store) -> str:
    return f"{store.root}/default/folder/object.bin"


def names(store: Store, prefix: str) -> list[str]:
    return [found.uri.removeprefix(store.root + "/") for found in store.list(prefix)]


def test_what_is_put_is_got(store: Store, uri: str) -> None:
    store.put(uri, b"some bytes")
    assert store.get(uri) == b"some bytes"
    store.put(uri, b"")
    assert store.get(uri) == b""
    assert store.stat(uri).size_bytes == 0


def test_put_takes_iterables_and_buffers(store: Store, uri: str) -> None:
    store.put(uri, (bytes([index]) * 3 for index in range(4)))
    assert store.get(uri) == b"\0\0\0\1\1\1\2\2\2\3\3\3"
    store.put(uri, memoryview(bytearray(b"abcd")))
    assert store.get(uri) == b"abcd"


def test_put_of_many_parts(store: Store, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)
    content = os.urandom(4 * PART + 12345)
    step = 700_001
    stat = store.put(uri, (content[start : start + step] for start in range(0, len(content), step)))
    assert stat.size_bytes == len(content)
    assert store.get(uri) == content
    assert store.stat(uri).version == stat.version


def test_ranges(store: Store, uri: str) -> None:
    content = bytes(range(256)) * 40
    store.put(uri, content)
    assert store.get_range(uri, 100, 300) == content[100:400]
    assert store.get_range(uri, len(content) - 5, 100) == content[-5:]
    assert store.get_range(uri, 7, 0) == b""
    assert store.get_range(uri, len(content), 10) == b""
    assert store.get_range(uri, len(content) + 10, 10) == b""
    assert b"".join(store.stream(uri, 9000)) == content[9000:]
    for offset, length in ((-1, 5), (0, -5)):
        with pytest.raises(InvalidArgument, match="must not be negative"):
            store.get_range(uri, offset, length)


def test_streams_come_in_chunks(store: Store, uri: str) -> None:
    content = os.urandom(CHUNK_BYTES + 1000)
    store.put(uri, content)
    chunks = list(store.stream(uri))
    assert b"".join(chunks) == content
    assert max(map(len, chunks)) <= CHUNK_BYTES


def test_stat_tells_size_time_and_version(store: Store, uri: str) -> None:
    put = store.put(uri, b"12345")
    stat = store.stat(uri)
    assert (stat.uri, stat.size_bytes) == (uri, 5)
    assert abs(stat.modified - put.modified) < 120
    assert stat.version == put.version
    assert [found.version for found in store.list(uri)] == [put.version]
    store.put(uri, b"54321")
    assert store.stat(uri).version != stat.version


@pytest.mark.parametrize("method", ["get", "stat", "stream", "get_range"])
def test_missing_objects_are_named(store: Store, uri: str, method: str) -> None:
    call: dict[str, Callable[[], Any]] = {
        "get": lambda: store.get(uri),
        "stat": lambda: store.stat(uri),
        "stream": lambda: list(store.stream(uri)),
        "get_range": lambda: store.get_range(uri, 0, 0),
    }
    with pytest.raises(NotFound) as error:
        call[method]()
    assert uri in error.value.message
    assert not store.exists(uri)


def test_a_folder_is_no_object(store: Store, uri: str) -> None:
    store.put(uri, b"x")
    for call in (store.get, store.stat):
        with pytest.raises(NotFound):
            call(f"{store.root}/default/folder")


def test_lists_are_recursive_and_in_order(store: Store) -> None:
    # A name that continues with a byte below the slash sorts before what is in the folder.
    expected = ["p/a", "p/a-b", "p/a/x", "p/a/y/z", "p/a0", "p/b", "p/é"]
    for name in reversed(expected):
        if name != "p/a":  # a file system can't have both p/a and p/a/x
            store.put(f"{store.root}/{name}", name.encode())
    expected.remove("p/a")
    assert names(store, f"{store.root}/p") == expected
    assert names(store, f"{store.root}/p/") == expected
    assert names(store, store.root) == expected
    assert names(store, f"{store.root}/p/a") == ["p/a/x", "p/a/y/z"]
    assert names(store, f"{store.root}/p/b") == ["p/b"]
    assert names(store, f"{store.root}/nothing") == []
    sizes = {found.uri: found.size_bytes for found in store.list(f"{store.root}/p")}
    assert sizes[f"{store.root}/p/a/y/z"] == len("p/a/y/z")


def test_delete(store: Store, uri: str) -> None:
    other = f"{store.root}/default/folder/other"
    store.put(uri, b"x")
    store.put(other, b"y")
    store.delete(uri)
    store.delete(uri)
    assert names(store, store.root) == ["default/folder/other"]
    store.delete(f"{store.root}/default/folder")  # a folder is no object
    assert store.get(other) == b"y"


@pytest.mark.parametrize("size", [10, 3 * PART])
def test_a_put_that_fails_leaves_nothing(store: Store, uri: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)

    class Broken(Exception):
        pass

    def data() -> Iterator[bytes]:
        yield bytes(size)
        raise Broken

    threads = threading.active_count()
    with pytest.raises(Broken):
        store.put(uri, data())
    assert not store.exists(uri)
    assert names(store, store.root) == []
    assert threading.active_count() <= threads + 1  # the test server may keep one for its connection
    store.put(uri, b"old")
    with pytest.raises(Broken):
        store.put(uri, data())
    assert store.get(uri) == b"old"
    assert names(store, store.root) == [uri.removeprefix(store.root + "/")]


def test_an_object_is_seen_only_when_whole(store: Store, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)
    seen = []

    def data() -> Iterator[bytes]:
        for _ in range(4):
            yield bytes(PART)
            seen.append((store.exists(uri), names(store, store.root)))

    store.put(uri, data())
    assert seen == [(False, [])] * 4
    assert store.stat(uri).size_bytes == 4 * PART


def test_concurrent_puts_of_one_object(store: Store, uri: str) -> None:
    contents = [bytes([index]) * 1_000_003 for index in range(4)]
    threads = [threading.Thread(target=store.put, args=(uri, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get(uri) in contents
    assert len(names(store, store.root)) == 1


@pytest.mark.parametrize(
    "tail",
    [
        "../other",
        "default/../../other",
        "default/./x",
        "default//x",
        "%2e%2e/other",
        "default/%2E%2e/x",
        "..%2fother",
        "default/a\0b",
        "default/a\nb",
        "default/.cryofleet-unfinished-0",
        "\udcff",
    ],
)
def test_tricks_in_uris_are_refused(store: Store, tail: str) -> None:
    trick = f"{store.root}/{tail}"
    for call in (store.get, store.stat, store.delete, lambda uri: list(store.list(uri)), lambda u: store.put(u, b"")):
        with pytest.raises(PermissionDenied):
            call(trick)
    assert names(store, store.root) == []


@pytest.mark.parametrize("outside", ["file:///etc/passwd", "s3://another-bucket/key", "s3://cryofleet-test/rootless/x"])
def test_other_roots_are_refused(store: Store, outside: str) -> None:
    for call in (store.get, store.stat, store.delete, lambda uri: list(store.list(uri)), lambda u: store.put(u, b"")):
        with pytest.raises(PermissionDenied, match="outside the roots"):
            call(outside)


@pytest.mark.parametrize("text", ["/etc/passwd", "http://host/x", "", "file:", "s3://"])
def test_what_is_no_uri_is_refused(store: Store, text: str) -> None:
    with pytest.raises((InvalidArgument, PermissionDenied)):
        store.get(text)


def test_a_project_sees_only_its_own(store: Store) -> None:
    mine, other = f"{store.root}/mine/x", f"{store.root}/other/x"
    store.put(other, b"secret")
    narrowed = store.for_project("mine")
    assert narrowed.root == store.root
    narrowed.put(mine, b"open")
    assert narrowed.get(mine) == b"open"
    for uri in (other, store.root, f"{store.root}/minesweeper/x"):
        with pytest.raises(PermissionDenied, match="project mine"):
            list(narrowed.list(uri))
        with pytest.raises(PermissionDenied):
            narrowed.get(uri)
    with pytest.raises(InvalidArgument):
        store.for_project("../other")


def test_read_only_roots(store: Store, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "raw.mrc").write_bytes(b"raw")
    both = Store(store.root, [file_uri(data)], store._s3)
    uri = file_uri(data / "raw.mrc")
    assert both.get(uri) == b"raw"
    assert [found.uri for found in both.list(file_uri(data))] == [uri]
    for change in (lambda: both.put(uri, b"x"), lambda: both.delete(uri)):
        with pytest.raises(PermissionDenied, match="read only"):
            change()
    assert (data / "raw.mrc").read_bytes() == b"raw"


def test_read_only_roots_and_the_own_one_must_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "real" / "store").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    own = file_uri(tmp_path / "real" / "store")
    linked = file_uri(tmp_path / "link")
    for uri in (own, own + "/other", file_uri(tmp_path), "file:///", linked, linked + "/store/other"):
        with pytest.raises(InvalidArgument, match=r"CRYOFLEET_READ_ONLY_ROOTS has .* and CRYOFLEET_STORE is"):
            Store(own, [file_uri("/elsewhere"), uri])
    Store(own, [own + "-2", file_uri(tmp_path / "real" / "data")])
    s3 = S3Settings(endpoint="localhost:9", secure=False)
    for uri in ("s3://bucket", "s3://bucket/store", "s3://bucket/store/other"):
        with pytest.raises(InvalidArgument, match="CRYOFLEET_READ_ONLY_ROOTS"):
            Store("s3://bucket/store", [uri], s3)
    Store("s3://bucket/store", ["s3://bucket/data", "s3://another", own], s3)


def test_links_out_of_a_read_only_root_are_refused(tmp_path: Path) -> None:
    own = Store(file_uri(tmp_path / "store"))
    own.put(f"{own.root}/other/secret", b"secret")
    data = tmp_path / "data"
    data.mkdir()
    (data / "folder").symlink_to(tmp_path / "store")
    (data / "file").symlink_to(tmp_path / "store" / "other" / "secret")
    both = Store(own.root, [file_uri(data)]).for_project("mine")
    for name in ("file", "folder/other/secret"):
        with pytest.raises(PermissionDenied, match="link"):
            both.get(file_uri(data / name))
    with pytest.raises(PermissionDenied, match="link"):
        list(both.list(file_uri(data / "folder")))
    assert list(both.list(file_uri(data))) == []


def test_abandoned_writes_are_removed_under_the_own_root_only(store: Store, uri: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / ".cryofleet-unfinished-1").write_bytes(b"half")
    both = Store(store.root, [file_uri(data)], store._s3)
    both.put(uri, b"whole")
    count = 0
    if store.root.startswith("file://"):
        (tmp_path / "store" / ".cryofleet-unfinished-2").write_bytes(b"half")
        count = 1
    assert both.for_project("default").remove_abandoned(older_than_seconds=-1) == count
    assert both.remove_abandoned(older_than_seconds=-1) == 0
    assert both.get(uri) == b"whole"
    assert len(list(data.iterdir())) == 1


def test_opened_from_settings(store: Store, uri: str) -> None:
    environment = {"CRYOFLEET_STORE": store.root, "CRYOFLEET_S3_SECURE": "false"}
    if store._s3 is not None:
        environment["CRYOFLEET_S3_ENDPOINT"] = store._s3.endpoint
        environment["CRYOFLEET_S3_ACCESS_KEY"] = store._s3.access_key
        environment["CRYOFLEET_S3_SECRET_KEY"] = store._s3.secret_key
    opened = Store.open(Settings.from_environment(environment))
    opened.put(uri, b"x")
    assert store.get(uri) == b"x"


# --- S3 alone ------------------------------------------------------------------------------------------------------


def test_failed_uploads_leave_no_parts(s3: S3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)

    def data() -> Iterator[bytes]:
        yield bytes(3 * PART)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        S3Store(s3).put("s3://cryofleet-test/cut-off", data())
    with urllib.request.urlopen(f"http://{s3.endpoint}/cryofleet-test?uploads") as answer:
        assert b"<UploadId>" not in answer.read()


def test_keys_that_no_uri_can_name_are_not_listed(s3: S3Settings) -> None:
    client = client_of(s3)
    for key in ("odd/", "odd/a%2Fb", "odd/good"):
        client.put_object("cryofleet-test", key, io.BytesIO(b""), 0)
    assert [found.uri for found in S3Store(s3).list("s3://cryofleet-test/odd")] == ["s3://cryofleet-test/odd/good"]


def test_a_missing_bucket_is_not_found(s3: S3Settings) -> None:
    store = S3Store(s3)
    with pytest.raises(NotFound, match="s3://no-such-bucket/x"):
        store.get("s3://no-such-bucket/x")
    with pytest.raises(NotFound, match="s3://no-such-bucket/x"):
        store.put("s3://no-such-bucket/x", b"")


def test_no_server_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *_: None)
    store = S3Store(S3Settings(endpoint=endpoint, access_key="a", secret_key="b", secure=False))
    uri = "s3://bucket/key"
    for call in (store.get, store.stat, store.delete, lambda uri: list(store.list(uri)), lambda u: store.put(u, b"")):
        with pytest.raises(Unavailable, match=endpoint):
            call(uri)


@contextlib.contextmanager
def scripted_server(answers: list[bytes]) -> Iterator[S3Settings]:
    """Answers one connection after another with the given bytes, then closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []

    def serve() -> None:
        for answer in answers:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                requests.append(connection.recv(65536))
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    settings = S3Settings(endpoint=f"127.0.0.1:{port}", access_key="a", secret_key="b", secure=False)
    try:
        yield settings
    finally:
        listener.close()
        thread.join(5)
    scripted_server.requests = requests  # type: ignore[attr-defined]


def test_a_read_that_breaks_off_goes_on_where_it_was() -> None:
    head = b'HTTP/1.1 %b\r\nETag: "tag"\r\nContent-Length: %d\r\nConnection: close\r\n\r\n'
    content = os.urandom(CHUNK_BYTES) + b"0123456789"
    answers = [
        head % (b"200 OK", len(content)) + content[:-6],
        head % (b"206 Partial Content", 10) + content[CHUNK_BYTES:],
    ]
    with scripted_server(answers) as settings:
        assert S3Store(settings).get("s3://bucket/key") == content
    second = scripted_server.requests[1].lower()  # type: ignore[attr-defined]
    assert b"range: bytes=%d-" % CHUNK_BYTES in second
    assert b'if-match: "tag"' in second


@pytest.mark.parametrize(
    ("status", "code", "failure"),
    [
        (b"403 Forbidden", b"AccessDenied", PermissionDenied),
        (b"403 Forbidden", b"SignatureDoesNotMatch", PermissionDenied),
        (b"404 Not Found", b"NoSuchKey", NotFound),
        (b"507 Insufficient Storage", b"XMinioStorageFull", ResourceExhausted),
        (b"429 Too Many Requests", b"SlowDown", Unavailable),
    ],
)
def test_error_codes(status: bytes, code: bytes, failure: type[Failure]) -> None:
    body = b"<Error><Code>%b</Code><Message>text</Message><Resource>/b/k</Resource></Error>" % code
    head = b"HTTP/1.1 %b\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    with (
        scripted_server([head % (status, len(body)) + body]) as settings,
        pytest.raises(failure, match="s3://bucket/key"),
    ):
        S3Store(settings).get("s3://bucket/key")


def test_garbage_is_collected_in_either_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "RECORD_SECONDS", 0.0)
    monkeypatch.setattr(garbage, "GRACE_SECONDS", -2.0)  # a server may tell its time in whole seconds
    made = {}
    for digit in "123":
        writer = ResultWriter(store, "default", digit * 64)
        made[digit] = writer.put("data.bin", b"12345")
        if digit != "3":
            writer.commit(operation="io.Upload", version=1, parameters={}, inputs={}, result={}, seconds=0.0)
    answers = iter([garbage.Held([]), garbage.Held([made["1"]])])
    found = garbage.collect(store, lambda: next(answers), -2.0, "", delete=True)
    assert [each.uri for each in found] == [f"{store.root}/default/{digit * 64}" for digit in "23"]
    assert names(store, store.root) == [f"default/{'1' * 64}/data.bin", f"default/{'1' * 64}/manifest.json"]
