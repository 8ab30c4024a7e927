"""What is taken for a complete file of an inbox, and what the record keeps of it."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cryofleet.errors import AlreadyExists, InvalidArgument, NotFound, PermissionDenied, Unavailable
from cryofleet.storage import FileStore, Stat, Store, file_uri
from orchestrator.database import make_database
from orchestrator.inboxes import arrival
from orchestrator.inboxes.completeness import HEAD_BYTES, Incomplete, check_whole
from orchestrator.inboxes.inbox import (
    ARRIVING,
    DONE,
    PAUSED,
    SET_ASIDE,
    SKIPPED,
    STARTED,
    STARTING,
    VOLUMES,
    WAITING,
    Inbox,
    Item,
    mark_of,
    run_id_of,
)
from orchestrator.inboxes.record import InboxRecord
from orchestrator.schema import migrate

INBOX = Inbox(
    inbox_id="krios-1",
    project="apo",
    name="krios",
    owner="ana",
    uri="file:///data",
    pipeline="p",
    source="p.yaml",
    definition="name: p",
    arguments={"threshold": 3},
    input="tomogram",
    patterns=VOLUMES,
    settle_seconds=10.0,
    give_up_seconds=600.0,
    ready_suffix="",
    at_once=2,
    created_at=1.0,
)


def mrc_bytes(sections: int = 4) -> bytes:
    header = bytearray(HEAD_BYTES)
    struct.pack_into("<7i", header, 0, 8, 8, sections, 2, 0, 0, 0)
    struct.pack_into("<3i6f3i", header, 28, 8, 8, sections, 80.0, 80.0, 10.0 * sections, 90.0, 90.0, 90.0, 1, 2, 3)
    header[208:216] = b"MAP \x44\x44\0\0"
    return bytes(header) + bytes(sections * 8 * 8 * 4)


# Which files


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        ("a.mrc", True),
        ("night 2/TS_1/rec/A.MRC", True),
        ("a.mrc.gz", True),
        ("a.txt", False),
        ("a.mrc.part", False),
        ("a.mrc.tmp", False),
        (".a.mrc.Xd3f", False),
        (".a.mrc", False),
        (".snapshots/a.mrc", False),
    ],
)
def test_which_files_are_taken(path: str, taken: bool) -> None:
    assert INBOX.takes(f"file:///data/{path}") is taken


def test_a_pattern_with_a_slash_is_of_paths() -> None:
    inbox = replace(INBOX, patterns=("*/rec/*.mrc",))
    assert inbox.takes("file:///data/TS_1/rec/a.mrc")
    assert not inbox.takes("file:///data/TS_1/raw/a.mrc")


# What is whole


@pytest.mark.parametrize("missing", [1, 500, 4 * 8 * 8 * 4, 4 * 8 * 8 * 4 + 1000])
def test_a_part_of_an_mrc_file_is_incomplete(missing: int) -> None:
    data = mrc_bytes()
    check_whole(data[:HEAD_BYTES], len(data), "a.mrc")
    part = data[:-missing]
    with pytest.raises(Incomplete, match=r"a\.mrc"):
        check_whole(part[:HEAD_BYTES], len(part), "a.mrc")


def test_a_header_that_comes_last_is_waited_for() -> None:
    with pytest.raises(Incomplete, match="without an MRC header"):
        check_whole(bytes(HEAD_BYTES), len(mrc_bytes()), "a.mrc")
    counting = mrc_bytes(1)[:HEAD_BYTES]
    with pytest.raises(Incomplete, match="the header's size is wrong"):
        check_whole(counting, len(mrc_bytes(4)), "a.mrc")


def test_what_can_be_no_mrc_file_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="a PNG image, not an MRC file"):
        check_whole(b"\x89PNG" + bytes(2000), 3000, "a.mrc")
    check_whole(b"\x89PNG" + bytes(2000), 3000, "a.png")  # other files are the pipeline's to judge


def test_formats_that_say_less() -> None:
    packed = gzip.compress(mrc_bytes())
    check_whole(packed[:HEAD_BYTES], len(packed), "a.mrc")
    for order, magic, layout, at in (("<", b"II*\0", "I", 4), (">", b"MM\0+", "Q", 8)):
        head = bytearray(HEAD_BYTES)
        head[:4] = magic
        struct.pack_into(order + layout, head, at, 5000)
        check_whole(bytes(head), 6000, "a.tif")
        for size_bytes in (1024, 5000):
            with pytest.raises(Incomplete, match="without its directory"):
                check_whole(bytes(head), size_bytes, "a.tif")
        with pytest.raises(Incomplete):
            check_whole(magic, 4, "a.tif")
    with pytest.raises(Incomplete, match="an empty file"):
        check_whole(b"", 0, "a.tif")


# What has arrived


class Folder:
    """An inbox's files, a clock, and what was known at the last look."""

    def __init__(self, inbox: Inbox = INBOX) -> None:
        self.inbox = inbox
        self.files: dict[str, tuple[bytes, float]] = {}
        self.now = 1000.0
        self.items: list[Item] = []
        self.refuse: dict[str, Exception] = {}

    def write(self, name: str, data: bytes) -> None:
        self.files[f"{self.inbox.uri}/{name}"] = (data, self.now)

    def look(self, after: float = 0.0, only: Iterable[str] | None = None) -> dict[str, tuple[str, str]]:
        """States and causes of the items by name, as each is known last."""
        self.now += after
        listed = [Stat(uri, len(data), modified, "tag") for uri, (data, modified) in self.files.items()]
        if only is not None:
            listed = [stat for stat in listed if stat.uri.rpartition("/")[2] in only]
        found = arrival.look(self.inbox, self.items, listed, self._head, self.now, whole=only is None)
        self.items = [found.changed.get(item, item) for item in self.items if item not in found.gone] + found.new
        return {item.uri.rpartition("/")[2]: (item.state, item.cause) for item in self.items}

    def _head(self, uri: str) -> bytes:
        if uri in self.refuse:
            raise self.refuse[uri]
        if uri not in self.files:
            raise NotFound(uri)
        return self.files[uri][0][:HEAD_BYTES]

    def set(self, state: str, run_id: str = "run") -> None:
        self.items = [replace(item, state=state, run_id=run_id) for item in self.items]


def test_a_file_that_grows_is_complete_once_it_has_settled() -> None:
    folder, data = Folder(), mrc_bytes()
    for size in range(100, len(data), 500):
        folder.write("a.mrc", data[:size])
        assert folder.look(9.0)["a.mrc"] == (ARRIVING, "")
    folder.write("a.mrc", data)
    assert folder.look(5.0)["a.mrc"] == (ARRIVING, "")
    assert folder.look(9.9)["a.mrc"] == (ARRIVING, "")
    assert folder.look(0.1)["a.mrc"] == (WAITING, "")
    (item,) = folder.items
    assert (item.number, item.complete_at, item.size_bytes) == (1, folder.now, len(data))


def test_a_file_whose_writer_pauses_is_not_complete() -> None:
    folder, data = Folder(), mrc_bytes()
    folder.write("a.mrc", data[:-1])
    folder.look()
    state, cause = folder.look(300.0)["a.mrc"]
    assert state == ARRIVING
    assert "truncated: the header says 8 x 8 x 4 voxels" in cause
    folder.write("a.mrc", data)
    assert folder.look(10.0)["a.mrc"] == (ARRIVING, "")
    assert folder.look(10.0)["a.mrc"] == (WAITING, "")


def test_a_truncated_file_is_given_up_and_taken_up_again() -> None:
    folder, data = Folder(), mrc_bytes()
    folder.write("a.mrc", data[:-1])
    folder.write("b.mrc", data)
    folder.look()
    assert folder.look(10.0)["b.mrc"] == (WAITING, ""), "the others go on"
    assert folder.look(589.0)["a.mrc"][0] == ARRIVING
    state, cause = folder.look(1.0)["a.mrc"]
    assert (state, "truncated" in cause) == (SET_ASIDE, True)
    assert folder.look(1000.0)["a.mrc"] == (state, cause)
    folder.write("a.mrc", data)
    assert folder.look(1.0)["a.mrc"] == (ARRIVING, "")
    assert folder.look(10.0)["a.mrc"] == (WAITING, "")
    assert [item.number for item in folder.items] == [1, 2]


def test_what_cannot_be_read_is_set_aside_with_its_cause() -> None:
    folder = Folder()
    folder.write("text.mrc", b"not an MRC file " * 100)
    folder.write("secret.mrc", mrc_bytes())
    folder.write("broken.mrc", mrc_bytes())
    folder.write("good.mrc", mrc_bytes())
    folder.refuse["file:///data/secret.mrc"] = PermissionDenied("secret.mrc: Permission denied")
    folder.refuse["file:///data/broken.mrc"] = Unavailable("broken.mrc: Input/output error")
    folder.look()
    found = folder.look(10.0)
    assert found["text.mrc"][0] == SET_ASIDE
    assert "text that begins 'not an MRC file" in found["text.mrc"][1]
    assert found["secret.mrc"] == (SET_ASIDE, "secret.mrc: Permission denied")
    assert found["broken.mrc"] == (ARRIVING, "broken.mrc: Input/output error")
    assert found["good.mrc"] == (WAITING, "")
    assert folder.look(590.0)["broken.mrc"] == (SET_ASIDE, "broken.mrc: Input/output error")


def test_a_file_that_is_replaced_is_a_new_item() -> None:
    folder = Folder()
    folder.write("a.mrc", mrc_bytes())
    folder.look()
    folder.look(10.0)
    folder.set(DONE)
    assert folder.look(100.0)["a.mrc"][0] == DONE, "once"
    folder.write("a.mrc", mrc_bytes())
    folder.look(1.0)
    assert [(item.number, item.state, item.run_id) for item in folder.items] == [(1, DONE, "run"), (2, ARRIVING, "")]
    assert run_id_of(INBOX, folder.items[0]) != run_id_of(INBOX, folder.items[1])
    folder.look(10.0)
    assert folder.items[1].state == WAITING
    # Changed before its turn has come, it arrives once more.
    folder.write("a.mrc", mrc_bytes(5))
    folder.look(1.0)
    assert [(item.number, item.state) for item in folder.items] == [(1, DONE), (2, ARRIVING)]


def test_files_that_go_are_forgotten_unless_a_run_was_made() -> None:
    folder = Folder()
    for name in ("a.mrc", "b.mrc"):
        folder.write(name, mrc_bytes())
    folder.look()
    folder.look(10.0)
    folder.items[0] = replace(folder.items[0], state=STARTED, run_id="run")
    folder.files.clear()
    assert folder.look(1.0, only=["c.mrc"]) == {"a.mrc": (STARTED, ""), "b.mrc": (WAITING, "")}, "only some were listed"
    assert folder.look(1.0) == {"a.mrc": (STARTED, "")}


def test_what_was_there_before_is_passed_over_until_it_changes() -> None:
    folder = Folder()
    folder.write("a.mrc", mrc_bytes())
    folder.look()
    folder.set(SKIPPED, run_id="")
    assert folder.look(100.0)["a.mrc"] == (SKIPPED, "")
    folder.write("a.mrc", mrc_bytes(5))
    assert folder.look(1.0)["a.mrc"] == (ARRIVING, "")
    assert folder.look(10.0)["a.mrc"] == (WAITING, "")


@pytest.mark.parametrize("marker", ["a.mrc.done", "a.done"])
def test_a_marker_says_that_a_file_is_complete(marker: str) -> None:
    folder = Folder(replace(INBOX, ready_suffix=".done", patterns=("*",)))
    folder.write("a.mrc", mrc_bytes())
    folder.look()
    assert folder.look(1000.0)["a.mrc"] == (ARRIVING, "waits for a.mrc.done or a.done")
    folder.write(marker, b"")
    assert folder.look(0.1) == {"a.mrc": (WAITING, "")}
    folder.set(DONE)
    folder.now += 1.0
    folder.write("a.mrc", mrc_bytes(5))
    assert folder.look()["a.mrc"][0] == ARRIVING, "the marker is of the file before"
    folder.write(marker, b"")
    assert folder.look()["a.mrc"][0] == WAITING


def test_an_object_of_a_bucket_is_complete_as_it_appears() -> None:
    folder = Folder(replace(INBOX, uri="s3://bucket/in", settle_seconds=0.0))
    folder.write("a.mrc", mrc_bytes())
    assert folder.look() == {"a.mrc": (WAITING, "")}
    assert mark_of(Stat("s3://bucket/in/a.mrc", 1, 5.0, "etag")) == "etag"


def test_a_files_mark_is_its_time_and_not_its_inode() -> None:
    assert mark_of(Stat("file:///a", 1, 5.25, "1-2")) == mark_of(Stat("file:///a", 1, 5.25, "9-2"))
    assert mark_of(Stat("file:///a", 1, 5.25, "1-2")) != mark_of(Stat("file:///a", 1, 5.25001, "1-2"))


def test_run_ids_are_ids() -> None:
    item = Item(1, "file:///data/Größe & 'so' (1).mrc", 5, "m", WAITING, 0.0, 0.0)
    run_id = run_id_of(replace(INBOX, name="k" * 63), item)
    assert len(run_id) <= 100
    assert run_id.isascii()
    assert not set(run_id) & set(" &'()/")
    assert run_id_of(INBOX, item) == run_id_of(INBOX, replace(item, number=7, state=DONE))
    others = [replace(item, size_bytes=6), replace(item, mark="n"), replace(item, uri=item.uri + "x")]
    assert len({run_id_of(INBOX, each) for each in (item, *others)}) == 4
    assert run_id_of(replace(INBOX, inbox_id="krios-2"), item) != run_id_of(INBOX, item)


def test_a_file_that_may_not_be_opened_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mrc").write_bytes(b"12345")
    (tmp_path / "link.mrc").symlink_to("/etc/passwd")
    store = FileStore(file_uri(tmp_path))
    usual = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("a.mrc"):
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    (found,) = store.list(file_uri(tmp_path))
    assert (found.uri, found.size_bytes) == (file_uri(tmp_path / "a.mrc"), 5)
    with pytest.raises(PermissionDenied, match="Permission denied"):
        store.get(found.uri)


def test_a_folder_that_may_not_be_entered_hides_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "lost+found", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.mrc").write_bytes(b"12345")
    usual = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(os, "scandir", refuse)
    store, uri = FileStore(file_uri(tmp_path)), file_uri(tmp_path)
    assert [found.uri for found in store.list(uri)] == [f"{uri}/a/t.mrc", f"{uri}/z/t.mrc"]
    with pytest.raises(PermissionDenied, match=r"lost\+found"):
        list(store.list(f"{uri}/lost+found"))


def test_a_store_of_files_tells_of_nothing(tmp_path: Path) -> None:
    assert Store(file_uri(tmp_path)).listen(file_uri(tmp_path / "in")) is None


# The record


@pytest.fixture
def record(tmp_path: Path) -> Iterator[InboxRecord]:
    engine = make_database(f"sqlite:///{tmp_path}/runs.sqlite")
    yield from opened(engine)


def opened(engine: sa.Engine) -> Iterator[InboxRecord]:
    migrate(engine)
    yield InboxRecord(engine)
    engine.dispose()


def items(*states: str) -> list[Item]:
    return [
        Item(number, f"file:///data/{number}.mrc", 5, "m", state, 1.0, 1.0, 10.0)
        for number, state in enumerate(states, start=1)
    ]


def test_inboxes_are_kept(record: InboxRecord) -> None:
    record.add(INBOX)
    assert record.get("apo", "krios") == INBOX
    other = replace(INBOX, inbox_id="other", project="ribo")
    record.add(other)
    with pytest.raises(AlreadyExists, match="project apo has an inbox 'krios'"):
        record.add(replace(INBOX, inbox_id="krios-2"))
    assert record.all() == [INBOX, other]
    assert record.all("ribo") == record.all(among=["ribo"]) == [other]
    assert record.all(among=[]) == []
    record.note(INBOX, items(WAITING), {}, [])
    record.remove(INBOX)
    with pytest.raises(NotFound, match="project apo has no inbox 'krios'"):
        record.get("apo", "krios")
    assert record.items(INBOX) == []
    record.note(INBOX, items(WAITING), {}, [])
    assert record.counts() == {}, "nobody would ever delete them"


def test_they_start_in_order_and_so_many_at_a_time(record: InboxRecord) -> None:
    check_order(record)


def check_order(record: InboxRecord) -> None:
    record.add(INBOX)
    first, second, third, late = items(WAITING, WAITING, WAITING, WAITING)
    second = replace(second, uri="file:///data/0.mrc")
    first = replace(first, complete_at=30.0)
    record.note(INBOX, [first, second, third, late], {}, [])
    taken = record.take_next(INBOX)
    assert taken is not None
    assert taken == replace(second, state=STARTING, run_id=run_id_of(INBOX, second))
    assert record.change(INBOX, taken, replace(taken, state=STARTED))
    assert not record.change(INBOX, taken, replace(taken, state=DONE)), "it is not being started any more"
    following = record.take_next(INBOX)
    assert following is not None
    assert following.number == 3
    assert record.take_next(INBOX) is None, "two at once"
    record.change(INBOX, following, replace(following, state=SET_ASIDE))
    record.set_state(INBOX, PAUSED)
    assert record.take_next(INBOX) is None
    assert not record.is_active(INBOX)
    record.set_state(INBOX, "active")
    assert record.counts()["krios-1"].by_state == {WAITING: 2, STARTED: 1, SET_ASIDE: 1}
    (aside,) = record.set_aside(INBOX, [3])
    assert aside.number == 3
    with pytest.raises(NotFound, match="inbox krios has set aside no item 1"):
        record.set_aside(INBOX, [1, 3])
    assert [item.number for item in record.items(INBOX, (WAITING,))] == [1, 4]
    assert [item.number for item in record.items(INBOX, newest=2)] == [4, 3]
    record.remove(INBOX)
    assert record.take_next(INBOX) is None


def test_several_at_a_time_take_no_more_than_may_go_on(record: InboxRecord) -> None:
    check_several_take(record)


def check_several_take(record: InboxRecord) -> None:
    """Those who take themselves for the worker at the same time get different items, and together not too many."""
    inbox = replace(INBOX, inbox_id="several", name="several", at_once=5)
    record.add(inbox, items(*[WAITING] * 20))
    with ThreadPoolExecutor(8) as threads:
        taken = [item for item in threads.map(record.take_next, [inbox] * 16) if item is not None]
    assert sorted(item.number for item in taken) == [1, 10, 11, 12, 13]
    assert record.counts()["several"].by_state == {STARTING: 5, WAITING: 15}


def test_one_of_several_becomes_the_worker(record: InboxRecord) -> None:
    record.add(INBOX)
    assert record.claim(INBOX, "one")
    assert not record.claim(INBOX, "two"), "it was read before the other claimed it"
    (inbox,) = record.all()
    assert inbox.worker == "one"
    assert record.claim(inbox, "two")


def test_a_look_overwrites_nothing_that_was_asked_for_meanwhile(record: InboxRecord) -> None:
    record.add(INBOX)
    (aside,) = items(SET_ASIDE)
    record.note(INBOX, [aside], {}, [])
    retried = replace(aside, state=WAITING)
    assert record.change(INBOX, aside, retried)
    record.note(INBOX, [], {aside: replace(aside, state=ARRIVING)}, [aside])
    assert record.items(INBOX) == [retried]
