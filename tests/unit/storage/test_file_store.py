"""What only the file store has to take care of: links, full disks, killed writers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryofleet.errors import AlreadyExists, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from cryofleet.storage import FileStore, Store, checked_uri, file_uri
from tests.unit.storage.conftest import path_of


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(file_uri(tmp_path / "store"))


def test_links_to_outside_are_refused(files: FileStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "inside").write_bytes(b"inside")
    (folder / "file").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "relative").symlink_to("../secret")
    (folder / "good").symlink_to("inside")
    for name in ("file", "relative", "folder/x"):
        with pytest.raises(PermissionDenied):
            files.get(f"{files.root}/{name}")
        with pytest.raises(PermissionDenied):
            files.put(f"{files.root}/{name}", b"changed")
    with pytest.raises(PermissionDenied):
        list(files.list(f"{files.root}/folder"))
    assert files.get(f"{files.root}/good") == b"inside"
    assert [found.uri.rpartition("/")[2] for found in files.list(files.root)] == ["good", "inside"]
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_root_behind_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files = FileStore(file_uri(tmp_path / "link"))
    files.put(f"{files.root}/a/b", b"x")
    assert files.get(f"{files.root}/a/b") == b"x"
    assert [found.uri for found in files.list(files.root)] == [f"{files.root}/a/b"]


def test_a_sibling_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    store = Store(file_uri(tmp_path / "store"))
    with pytest.raises(PermissionDenied):
        store.put(file_uri(tmp_path / "store-2" / "x"), b"")


def test_pipes_and_folders_are_no_objects(files: FileStore, tmp_path: Path) -> None:
    (tmp_path / "store" / "folder").mkdir(parents=True)
    os.mkfifo(tmp_path / "store" / "pipe")
    for name in ("pipe", "folder"):
        with pytest.raises(NotFound):
            files.get(f"{files.root}/{name}")  # would hang on the pipe
    assert list(files.list(files.root)) == []


@pytest.mark.parametrize(
    ("number", "failure"),
    [
        (errno.ENOSPC, ResourceExhausted),
        (errno.EDQUOT, ResourceExhausted),
        (errno.EROFS, PermissionDenied),
        (errno.EIO, Unavailable),
    ],
)
def test_errors_of_the_disk_name_the_object(
    files: FileStore, monkeypatch: pytest.MonkeyPatch, number: int, failure: type[Exception]
) -> None:
    def write(descriptor: int, data: object) -> int:
        raise OSError(number, os.strerror(number))

    uri = f"{files.root}/a"
    files.put(uri, b"old")
    with monkeypatch.context() as patch:
        patch.setattr("cryofleet.storage.files.os.write", write)
        with pytest.raises(failure, match=uri):
            files.put(uri, b"new")
    assert files.get(uri) == b"old"
    assert len(os.listdir(path_of(files.root))) == 1


def test_a_really_full_disk(files: FileStore) -> None:
    """/dev/full is a disk without space."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="space"):
            os.write(descriptor, b"x")
    finally:
        os.close(descriptor)
    script = (
        "import resource, signal, sys; from cryofleet.storage import FileStore;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "store = FileStore(sys.argv[1]); store.put(store.root + '/a', (bytes(50_000) for _ in range(4)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, files.root], capture_output=True, text=True, check=False, timeout=60
    )
    assert f"ResourceExhausted: {files.root}/a could not be written" in ended.stderr
    assert os.listdir(path_of(files.root)) == []


def test_short_writes_are_continued(files: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("cryofleet.storage.files.os.write", lambda descriptor, data: write(descriptor, data[:7]))
    files.put(f"{files.root}/a", bytes(range(100)))
    monkeypatch.undo()
    assert files.get(f"{files.root}/a") == bytes(range(100))


def test_a_killed_writer_leaves_nothing_visible(files: FileStore) -> None:
    uri = f"{files.root}/a/b"
    script = (
        "import sys, time; from cryofleet.storage import FileStore\n"
        "def data():\n"
        "    yield bytes(100_000)\n"
        "    print('half', flush=True)\n"
        "    time.sleep(60)\n"
        "FileStore(sys.argv[1]).put(sys.argv[2], data())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, files.root, uri], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        assert not files.exists(uri)
        process.kill()
    left = os.listdir(path_of(f"{files.root}/a"))
    assert len(left) == 1
    assert list(files.list(files.root)) == []
    with pytest.raises(NotFound):
        files.get(uri)
    with pytest.raises(PermissionDenied):
        files.get(f"{files.root}/a/{left[0]}")
    files.put(f"{files.root}/b", b"whole")
    assert files.remove_abandoned(older_than_seconds=3600) == 0
    assert os.listdir(path_of(f"{files.root}/a")) == left
    assert files.remove_abandoned(older_than_seconds=0) == 1
    assert os.listdir(path_of(files.root)) == ["b"], "with the folder that is empty now"


def test_folders_go_with_their_last_object(files: FileStore) -> None:
    files.put(f"{files.root}/a/b/c", b"")
    files.put(f"{files.root}/a/d", b"")
    files.delete(f"{files.root}/a/b/c")
    assert os.listdir(path_of(f"{files.root}/a")) == ["d"]
    files.delete(f"{files.root}/a/d")
    assert os.listdir(path_of(files.root)) == []


def test_a_folder_that_is_deleted_meanwhile_is_made_again(files: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{files.root}/a/b"
    real = os.open
    calls: list[os.PathLike[str]] = []

    def late(path: os.PathLike[str], *rest: int) -> int:
        if not calls:
            calls.append(path)
            os.rmdir(path_of(f"{files.root}/a"))
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("cryofleet.storage.files.os.open", late)
        files.put(uri, b"x")
    assert files.get(uri) == b"x"
    assert len(calls) == 1


def test_names_that_a_file_system_refuses(files: FileStore) -> None:
    with pytest.raises(InvalidArgument, match="too long"):
        files.put(f"{files.root}/{'x' * 300}", b"")
    files.put(f"{files.root}/a", b"")
    with pytest.raises((AlreadyExists, NotFound)):
        files.put(f"{files.root}/a/b", b"")


def test_the_root_is_no_object(files: FileStore) -> None:
    with pytest.raises(PermissionDenied):
        files.put(files.root, b"")


def test_uris_are_literal(files: FileStore) -> None:
    for name in ("50% of it", "a b", "what?", "a#b", "ä", "back\\slash"):
        uri = f"{files.root}/{name}"
        files.put(uri, name.encode())
        assert path_of(uri).read_bytes() == name.encode()
    assert file_uri("/a/../b c") == "file:///b c"


@pytest.mark.parametrize("uri", ["file://host/x", "file://x", "file:///a/..", "s3://bucket/../x", "s3://bucket//x"])
def test_ambiguous_uris(uri: str) -> None:
    with pytest.raises(PermissionDenied):
        checked_uri(uri)


@pytest.mark.parametrize("uri", ["", "x", "http://x/y", "s3://B_ucket/x", "file:/x"])
def test_no_uris(uri: str) -> None:
    with pytest.raises(InvalidArgument):
        checked_uri(uri)


def test_a_file_store_does_not_load_the_s3_client(files: FileStore) -> None:
    script = (
        "import sys; import cryofleet.artifacts; from cryofleet.storage import Store;"
        "Store(sys.argv[1]).put(sys.argv[1] + '/a', b'x'); assert not {'minio', 'urllib3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, files.root], check=True, timeout=60)
    assert files.get(f"{files.root}/a") == b"x"


def test_a_reserve_of_the_disk_is_left_to_small_objects(tmp_path: Path) -> None:
    store = FileStore(f"file://{tmp_path}/store", reserve_bytes=2**62)
    store.put(f"{store.root}/small", bytes(2**20))
    store.check_space(2**20)
    with pytest.raises(ResourceExhausted, match=r"store has \d+ bytes free: 1048577 more .*CRYOFLEET_RESERVE_BYTES"):
        store.check_space(2**20 + 1)
    with pytest.raises(ResourceExhausted):
        store.put(f"{store.root}/large", bytes(2**20 + 1))
    taken = []

    def pieces() -> Iterator[bytes]:
        for number in range(8):
            taken.append(number)
            yield bytes(2**18)

    with pytest.raises(ResourceExhausted):
        store.put(f"{store.root}/large", pieces())
    assert taken == [0, 1, 2, 3, 4], "it ends at the first piece that is too much"
    assert [path.name for path in (tmp_path / "store").rglob("*")] == ["small"], "nothing half-written remains"
    assert FileStore(store.root).free_bytes() > 0
