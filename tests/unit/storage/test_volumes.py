from __future__ import annotations

import io
import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

from cryofleet import volumes
from cryofleet.artifacts import BLOCK_BYTES, ResultWriter, open_blob
from cryofleet.errors import DataLoss, FailedPrecondition, Failure, InvalidArgument, NotFound
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.volumes import (
    Array,
    Shard,
    VolumeInfo,
    VolumeWriter,
    encode_volume,
    encoded_volume,
    open_subtomograms,
    open_volume,
    write_subtomograms,
    write_subtomograms_index,
)
from tests.unit.storage.conftest import path_of

INFO = VolumeInfo((5, 6, 7), 13.48, "dark", -50, 70.25)
BOX = VolumeInfo((4, 4, 4), 2.5, "light", -60, 60)


def voxels(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32)


def commit(writer: ResultWriter) -> None:
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={}, seconds=0)


def keep(store: Store, data: bytes) -> str:
    """As a file of the user's."""
    uri = f"{store.root}/default/_pins/volume.mrc"
    store.put(uri, data)
    return uri


def validated(path: Path | None) -> bool:
    report = io.StringIO()
    assert mrcfile.validate(str(path), report), report.getvalue()
    return True


# --- Files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", ["dark", "light"])
def test_a_volume_is_a_valid_mrc_file(tmp_path: Path, contrast: str) -> None:
    array = voxels(INFO.shape)
    path = tmp_path / "volume.mrc"
    path.write_bytes(encode_volume(array, VolumeInfo(INFO.shape, 13.48, contrast)))
    assert validated(path)
    with mrcfile.open(path) as file:
        assert np.array_equal(file.data, array)
        assert file.is_volume()
        assert [float(file.voxel_size[axis]) for axis in "xyz"] == pytest.approx([13.48] * 3, rel=1e-6)
        header = file.header
        assert (int(header.mode), int(header.ispg), int(header.mz)) == (2, 1, 5)
        assert float(header.dmin) == array.min()
        assert float(header.dmax) == array.max()
        assert float(header.dmean) == pytest.approx(array.mean(dtype=np.float64), rel=1e-6)
        assert float(header.rms) == pytest.approx(array.std(dtype=np.float64), rel=1e-6)
        assert [label.rstrip() for label in file.get_labels()] == [
            f"cryofleet contrast={contrast} tilt=-90..90 voxel=13.48"
        ]


def test_a_stack_is_a_valid_mrc_file(tmp_path: Path) -> None:
    array = voxels((3, 4, 4, 4))
    path = tmp_path / "stack.mrc"
    path.write_bytes(encode_volume(array, VolumeInfo((4, 4, 4), 2.5, "dark", count=3)))
    assert validated(path)
    with mrcfile.open(path) as file:
        assert file.is_volume_stack()
        assert np.array_equal(file.data, array)
        assert (int(file.header.ispg), int(file.header.mz), int(file.header.nz)) == (401, 4, 12)


@pytest.mark.parametrize(
    "info", [INFO, VolumeInfo((1, 1, 1), 1 / 3, "light"), VolumeInfo((4, 4, 4), 5, "dark", count=1)]
)
def test_what_is_known_of_a_volume_survives(store: Store, info: VolumeInfo) -> None:
    array = voxels(info.array_shape)
    volume = open_volume(store, keep(store, encode_volume(array, info)))
    assert volume.info == info
    assert np.array_equal(volume.read(), array)


def test_same_voxels_same_bytes() -> None:
    array = voxels(INFO.shape)
    assert encode_volume(array, INFO) == encode_volume(array.copy(order="F").astype(np.float64), INFO)


@pytest.mark.parametrize("constant", [0.0, -1e30, 7.5])
def test_constant_volumes(tmp_path: Path, constant: float) -> None:
    path = tmp_path / "volume.mrc"
    path.write_bytes(encode_volume(np.full(INFO.shape, constant, np.float32), INFO))
    assert validated(path)


def test_statistics_of_many_pieces_are_those_of_the_whole(writer: ResultWriter, store: Store) -> None:
    """A mean far from 0 and slabs of different sizes: the naive sum of squares would lose all digits."""
    info = VolumeInfo((40, 30, 20), 1.0, "dark")
    array = voxels(info.shape) + np.float32(1e4)
    with VolumeWriter(writer, "v.mrc", info) as target:
        for start, stop in ((0, 1), (1, 20), (20, 20), (20, 40)):
            target.write(array[start:stop])
    header = store.get(target.uri)[:1024]
    low, high, mean = struct.unpack_from("<3f", header, 76)
    rms = struct.unpack_from("<f", header, 216)[0]
    assert (low, high) == (array.min(), array.max())
    assert mean == pytest.approx(array.mean(dtype=np.float64), rel=1e-7)
    assert rms == pytest.approx(array.std(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused(writer: ResultWriter, store: Store, bad: float) -> None:
    array = voxels(INFO.shape)
    array[2, 3, 4] = bad
    with pytest.raises(InvalidArgument, match="1 voxels"):
        encode_volume(array, INFO)
    with pytest.raises(InvalidArgument, match="NaN or infinite"), VolumeWriter(writer, "v.mrc", INFO) as target:
        target.write(array)
    assert list(store.list(store.root)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (0, 1, 1)}, "shape"),
        ({"shape": (1, 1)}, "shape"),
        ({"shape": (1, 1, 70000)}, "shape"),
        ({"voxel_size_angstrom": 0}, "voxels of"),
        ({"voxel_size_angstrom": float("nan")}, "voxels of"),
        ({"contrast": "bright"}, "dark or light"),
        ({"tilt_min_degrees": 60, "tilt_max_degrees": -60}, "tilts"),
        ({"tilt_min_degrees": -91}, "tilts"),
        ({"count": 0}, "stack"),
        ({"count": 2**30}, "stack"),
    ],
)
def test_impossible_volumes(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"shape": (4, 4, 4), "voxel_size_angstrom": 1.0, "contrast": "dark", **changes}
    with pytest.raises(InvalidArgument, match=message):
        VolumeInfo(**given)


def test_the_shapes_must_agree() -> None:
    with pytest.raises(InvalidArgument, match="shape"):
        encode_volume(voxels((5, 7, 6)), INFO)


# --- Reading -------------------------------------------------------------------------------------------------------


def test_slabs(store: Store, writer: ResultWriter) -> None:
    array = voxels(INFO.shape)
    uri = writer.put("v.mrc", encoded_volume(array, INFO))
    commit(writer)
    volume = open_volume(store, uri)
    for first, last in ((0, 5), (0, 1), (2, 4), (4, 5), (3, 3)):
        slab = volume.slab(first, last)
        assert np.array_equal(slab, array[first:last])
        assert slab.dtype == np.float32
        assert slab.flags.writeable
        assert slab.flags.c_contiguous
    for first, last in ((-1, 2), (0, 6), (3, 2)):
        with pytest.raises(InvalidArgument, match="5 planes"):
            volume.slab(first, last)
    with pytest.raises(FailedPrecondition, match="stack"):
        volume.boxes(0, 1)


def test_boxes_of_a_stack(store: Store) -> None:
    array = voxels((3, 4, 4, 4))
    volume = open_volume(store, keep(store, encode_volume(array, VolumeInfo((4, 4, 4), 2.5, "dark", count=3))))
    assert np.array_equal(volume.boxes(1, 3), array[1:])
    assert np.array_equal(volume.slab(0, 1), array[:1])
    with pytest.raises(InvalidArgument, match="3 boxes"):
        volume.boxes(0, 4)


def test_a_slab_reads_only_its_blocks_and_verifies_them(store: Store, writer: ResultWriter) -> None:
    info = VolumeInfo((24, 512, 512), 1.0, "dark")  # a plane is 1 MiB
    uri = writer.put("v.mrc", encoded_volume(np.zeros(info.shape, np.float32), info))
    commit(writer)
    path = path_of(uri)
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES + 100)
        file.write(b"\1")
    volume = open_volume(store, uri)
    assert not volume.slab(0, 7).any()  # bytes of block 0 alone
    assert not volume.slab(16, 24).any()
    with pytest.raises(DataLoss, match=f"{uri}: block 1"):
        volume.slab(9, 10)
    with pytest.raises(DataLoss, match="block 1"):
        volume.read()


def test_an_extended_header_is_skipped(store: Store) -> None:
    array = voxels(INFO.shape)
    data = bytearray(encode_volume(array, INFO))
    struct.pack_into("<i", data, 92, 80)
    volume = open_volume(store, keep(store, bytes(data[:1024] + bytes(80) + data[1024:])))
    assert np.array_equal(volume.read(), array)


def test_a_corrected_cell_counts_more_than_the_label(store: Store) -> None:
    data = bytearray(encode_volume(voxels(INFO.shape), INFO))
    struct.pack_into("<3f", data, 40, 70, 60, 50)
    assert open_volume(store, keep(store, bytes(data))).info.voxel_size_angstrom == 10


def patch(form: str, offset: int, *values: Any) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(form, data, offset, *values)


def cut(length: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        del data[length:]

    return change


@pytest.mark.parametrize(
    ("change", "failure", "message"),
    [
        (cut(0), DataLoss, "has 0 bytes"),
        (cut(1000), DataLoss, "has 1000 bytes"),
        (cut(1500), DataLoss, "cut short"),
        (lambda data: data.extend(b"\0"), FailedPrecondition, "asks for"),
        (patch("4s", 208, b"    "), FailedPrecondition, "MAP"),
        (patch("<i", 12, 1), FailedPrecondition, "mode 1"),
        (patch("4B", 212, 0x11, 0x11, 0, 0), FailedPrecondition, "little-endian"),
        (patch("<3i", 64, 2, 1, 3), FailedPrecondition, "order"),
        (patch("<i", 0, -7), DataLoss, "damaged"),
        (patch("<3i", 0, 60000, 60000, 2**31 - 1), DataLoss, "cut short"),
        (patch("<i", 92, -80), DataLoss, "damaged"),
        (patch("<i", 92, 2**31 - 1), DataLoss, "cut short"),
        (patch("<3f", 40, 0, 0, 0), FailedPrecondition, "no voxel size"),
        (patch("<3f", 40, np.nan, 1, 1), FailedPrecondition, "no voxel size"),
        (patch("<3i", 28, 0, 0, 0), FailedPrecondition, "no voxel size"),
        (patch("<3f", 40, 10, 60, 50), FailedPrecondition, "cubes"),
        (patch("<i", 220, 0), FailedPrecondition, "contrast"),
        (patch("80s", 224, b"made by another program"), FailedPrecondition, "contrast"),
        (patch("80s", 224, b"cryofleet contrast=dark tilt=60..-60 voxel=1"), DataLoss, "label"),
        (patch("80s", 224, b"cryofleet contrast=grey tilt=-60..60 voxel=1"), DataLoss, "label"),
        (patch("80s", 224, b"cryofleet contrast=dark tilt=-..60 voxel=1"), DataLoss, "label"),
        (patch("<i", 88, 401), None, ""),  # one box of all planes
        (lambda data: (patch("<i", 88, 401)(data), patch("<i", 36, 2)(data)), DataLoss, "boxes"),
        (lambda data: (patch("<i", 88, 401)(data), patch("<i", 36, 0)(data)), DataLoss, "boxes"),
    ],
)
def test_damaged_and_foreign_headers(
    store: Store, change: Callable[[bytearray], None], failure: type[Failure] | None, message: str
) -> None:
    data = bytearray(encode_volume(voxels(INFO.shape), INFO))
    change(data)
    uri = keep(store, bytes(data))
    if failure is None:
        assert open_volume(store, uri).info.count == 1
        return
    with pytest.raises(failure, match=message) as error:
        open_volume(store, uri)
    assert uri in error.value.message


def test_random_headers_never_crash(store: Store) -> None:
    """Whatever the header's bytes, there is a Failure or a volume whose size is that of the object."""
    generator = np.random.default_rng(1)
    good = encode_volume(voxels(INFO.shape), INFO)
    for _ in range(300):
        data = bytearray(good)
        for position in generator.integers(0, 300, generator.integers(1, 6)):
            data[position] = generator.integers(0, 256)
        uri = keep(store, bytes(data))
        try:
            volume = open_volume(store, uri)
        except Failure as failure:
            assert uri in failure.message  # noqa: PT017
        else:
            assert volume.info.data_bytes <= len(data)
            volume.read()


def test_a_missing_volume(store: Store) -> None:
    with pytest.raises(NotFound, match="nothing"):
        open_volume(store, f"{store.root}/nothing.mrc")


# --- Writing slab by slab ------------------------------------------------------------------------------------------


def test_slabs_give_the_same_bytes(writer: ResultWriter, store: Store) -> None:
    array = voxels(INFO.shape)
    with VolumeWriter(writer, "v.mrc", INFO) as target:
        target.write(array[:2])
        target.write(array[2:].astype(np.float64))
    assert target.uri == f"{writer.uri}/v.mrc"
    assert store.get(target.uri) == encode_volume(array, INFO)


def test_a_stack_takes_boxes(writer: ResultWriter, store: Store, tmp_path: Path) -> None:
    info = VolumeInfo((4, 4, 4), 2.5, "dark", count=3)
    array = voxels(info.array_shape)
    with VolumeWriter(writer, "v.mrc", info, tmp_path) as target:
        target.write(array[:2])
        target.write(array[2])
    assert store.get(target.uri) == encode_volume(array, info)


def test_wrong_slabs_write_nothing(writer: ResultWriter, store: Store) -> None:
    array = voxels(INFO.shape)

    def too_few(target: VolumeWriter) -> None:
        target.write(array[:4])

    def too_many(target: VolumeWriter) -> None:
        target.write(array)
        target.write(array[:1])

    def other_shape(target: VolumeWriter) -> None:
        target.write(array[:, :5])

    def broken(target: VolumeWriter) -> None:
        target.write(array)
        raise KeyError("broken")

    for act, failure in (
        (too_few, InvalidArgument),
        (too_many, InvalidArgument),
        (other_shape, InvalidArgument),
        (broken, KeyError),
    ):
        target = VolumeWriter(writer, "v.mrc", INFO)
        with pytest.raises(failure), target:
            act(target)
        assert target.uri == ""
    assert list(store.list(store.root)) == []
    with VolumeWriter(writer, "v.mrc", INFO) as target:
        target.write(array)
    assert target.uri


def test_memory_of_the_writer_is_bounded(writer: ResultWriter, tmp_path: Path) -> None:
    info = VolumeInfo((96, 512, 512), 1.0, "dark")  # 96 MiB
    slab = np.zeros((4, 512, 512), np.float32)
    tracemalloc.start()
    try:
        with VolumeWriter(writer, "v.mrc", info, tmp_path) as target:
            for _ in range(24):
                target.write(slab)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * BLOCK_BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["store"]  # the temporary file is gone


# --- Subtomograms --------------------------------------------------------------------------------------------------


def particles(count: int, **columns: Any) -> Particles:
    return Particles.from_positions(np.arange(3.0 * count).reshape(-1, 3), 2.5, "tomogram", (50, 60, 70), **columns)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "SHARD_BYTES", 4 * BOX.data_bytes)


@pytest.mark.usefixtures("small_shards")
def test_subtomograms_span_shards(store: Store, writer: ResultWriter) -> None:
    boxes = voxels((10, 4, 4, 4))
    uri = write_subtomograms(writer, store, "set", boxes, BOX, particles(10, score=np.arange(10.0)))
    commit(writer)
    found = open_subtomograms(store, uri)
    assert (found.count, len(found), found.box_size, found.info) == (10, 10, 4, BOX)
    assert [shard.count for shard in found.shards] == [4, 4, 2]
    for first, count in ((0, 10), (0, 4), (4, 4), (3, 6), (9, 1), (2, 0), (10, 0), (7, 3)):
        assert np.array_equal(found.read(first, count), boxes[first : first + count])
    for first, count in ((-1, 2), (8, 3), (0, -1)):
        with pytest.raises(InvalidArgument, match="10 boxes"):
            found.read(first, count)
    assert found.particles().table["score"].tolist() == list(range(10))
    for shard in found.shards:
        assert validated(path_of(shard.uri))
        assert shard.digest == open_blob(store, shard.uri).digest


@pytest.mark.usefixtures("small_shards")
def test_boxes_come_in_any_batches(store: Store, writer: ResultWriter) -> None:
    boxes = voxels((10, 4, 4, 4))

    def batches() -> Iterator[Array]:
        yield boxes[0]
        yield boxes[1:8]
        yield boxes[8:8]
        buffer = boxes[8].copy()
        yield buffer
        buffer[:] = boxes[9]  # a buffer that is used again must have been copied
        yield buffer

    uri = write_subtomograms(writer, store, "set", batches(), BOX, particles(10))
    commit(writer)
    assert np.array_equal(open_subtomograms(store, uri).read(0, 10), boxes)


def test_an_empty_set(store: Store, writer: ResultWriter) -> None:
    uri = write_subtomograms(writer, store, "set", [], BOX, particles(0))
    commit(writer)
    found = open_subtomograms(store, uri)
    assert found.count == 0
    assert found.read(0, 0).shape == (0, 4, 4, 4)
    assert len(found.particles()) == 0


def test_boxes_and_rows_must_be_as_many(store: Store, writer: ResultWriter) -> None:
    with pytest.raises(InvalidArgument, match="3 boxes for 2 particles"):
        write_subtomograms(writer, store, "set", voxels((3, 4, 4, 4)), BOX, particles(2))
    with pytest.raises(InvalidArgument, match="shape"):
        write_subtomograms(writer, store, "other", voxels((3, 4, 4, 5)), BOX, particles(3))


@pytest.mark.usefixtures("small_shards")
def test_sets_are_merged_without_copying(store: Store) -> None:
    boxes = voxels((10, 4, 4, 4))
    found = []
    for key, (first, last) in (("1" * 64, (0, 6)), ("2" * 64, (6, 10))):
        writer = ResultWriter(store, "default", key)
        uri = write_subtomograms(writer, store, "set", boxes[first:last], BOX, particles(last - first))
        commit(writer)
        found.append(open_subtomograms(store, uri))
    writer = ResultWriter(store, "default", "3" * 64)
    table = writer.put("p.parquet", Particles.concat([each.particles() for each in found]).to_parquet())
    about = {"uri": table, "digest": writer.entry("p.parquet")["digest"]}
    shards = [shard for each in found for shard in each.shards]
    uri = write_subtomograms_index(writer, "all.json", store, BOX, about, shards)
    commit(writer)
    assert store.root not in store.get(uri).decode()
    merged = open_subtomograms(store, uri)
    assert np.array_equal(merged.read(0, 10), boxes)
    assert merged.particles().table["id"].tolist() == list(range(10))
    store.delete(shards[0].uri)
    with pytest.raises(DataLoss, match="missing"):
        open_subtomograms(store, uri).read(0, 1)


@pytest.mark.usefixtures("small_shards")
def test_damage_in_a_set_is_found(store: Store, writer: ResultWriter) -> None:
    uri = write_subtomograms(writer, store, "set", voxels((10, 4, 4, 4)), BOX, particles(10))
    commit(writer)
    shard = open_subtomograms(store, uri).shards[1]
    path = path_of(shard.uri)
    with path.open("r+b") as file:
        file.seek(1200)
        file.write(b"\xff")
    found = open_subtomograms(store, uri)
    assert found.read(0, 4).any()
    with pytest.raises(DataLoss, match=shard.uri):
        found.read(3, 2)


def test_an_index_must_agree_with_its_objects(store: Store, writer: ResultWriter) -> None:
    uri = write_subtomograms(writer, store, "set", voxels((3, 4, 4, 4)), BOX, particles(3))
    commit(writer)
    index = json.loads(store.get(uri))
    other = f"{store.root}/default/_pins/set.json"

    def opened(**changes: Any) -> volumes.Subtomograms:
        store.put(other, json.dumps({**index, **changes}).encode())
        return open_subtomograms(store, other)

    assert opened().read(0, 3).shape == (3, 4, 4, 4)
    shard = index["shards"][0]
    with pytest.raises(DataLoss, match="made with"):
        opened(shards=[{**shard, "digest": "0" * 64}]).read(0, 1)
    with pytest.raises(DataLoss, match="says otherwise"):
        opened(shards=[{**shard, "count": 2}]).read(0, 1)
    with pytest.raises(DataLoss, match="made with"):
        opened(particles={**index["particles"], "digest": "0" * 64}).particles()
    with pytest.raises(DataLoss, match="rows"):
        opened(shards=[shard, shard]).particles()
    mistakes: list[dict[str, Any]] = [
        {"box_size": "x"},
        {"contrast": 1},
        {"shards": [{}]},
        {"shards": [{**shard, "count": 0}]},
        {"particles": 1},
    ]
    for wrong in mistakes:
        with pytest.raises(InvalidArgument, match="no index"):
            opened(**wrong)
    for text in (b"", b"[]", b"\xff", b"{}"):
        store.put(other, text)
        with pytest.raises(InvalidArgument, match="no index"):
            open_subtomograms(store, other)


def test_shards_are_values() -> None:
    assert Shard("a", "b", 1) == Shard("a", "b", 1)
