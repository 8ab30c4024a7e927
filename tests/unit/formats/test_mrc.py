"""MRC files of every mode and habit, broken ones, and those of other programs."""

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.errors import FailedPrecondition, Failure, InvalidArgument
from cryofleet.formats import mrc
from cryofleet.formats.statistics import RunningStatistics
from cryofleet.formats.volume import open_volume_file
from cryofleet.formats.volumes.frame import VolumeFrame
from tests.unit.formats.volumes.volumes import noise, volume_of

RNG = np.random.default_rng(11)
SHAPE = (5, 4, 6)


def header(shape: tuple[int, int, int] = SHAPE, mode: int = 2, order: str = "<", **changed: Any) -> bytearray:
    """A plain header; `changed` are (offset, struct format, values) by any name."""
    head = bytearray(1024)
    columns, rows, sections = shape[::-1]
    struct.pack_into(f"{order}10i", head, 0, columns, rows, sections, mode, 0, 0, 0, columns, rows, sections)
    struct.pack_into(f"{order}6f", head, 40, columns * 7.5, rows * 7.5, sections * 7.5, 90, 90, 90)
    struct.pack_into(f"{order}3i", head, 64, 1, 2, 3)
    struct.pack_into(f"{order}i", head, 88, 1)
    head[208:212] = b"MAP "
    head[212:216] = b"\x44\x44\0\0" if order == "<" else b"\x11\x11\0\0"
    for offset, form, *values in changed.values():
        struct.pack_into(order + form, head, offset, *values)
    return head


def voxels(dtype: str, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.generic]:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return RNG.normal(0, 100, shape).astype(kind)
    limits = np.iinfo(kind)
    return RNG.integers(limits.min, limits.max, shape, endpoint=True).astype(kind)


def write(folder: Path, head: bytes | bytearray, body: bytes, name: str = "tomo.mrc") -> Path:
    path = folder / name
    path.write_bytes(bytes(head) + body)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("mode", "kind"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
def test_every_mode_in_both_byte_orders(tmp_path: Path, mode: int, kind: str, order: str) -> None:
    stored = voxels(order + kind)
    path = write(tmp_path, header(mode=mode, order=order), stored.tobytes())
    with mrc.MrcVolume(path) as volume:
        assert volume.shape == SHAPE
        assert volume.voxel_size_angstrom == pytest.approx((7.5, 7.5, 7.5))
        np.testing.assert_array_equal(volume.slab(0, 5), stored.astype(np.float32))
        np.testing.assert_array_equal(volume.slab(2, 4), stored[2:4].astype(np.float32))
        assert volume.slab(0, 1).dtype == np.float32


@pytest.mark.parametrize("changed", [(152, "2i", 1146047817, 0), (76, "2f", 0.0, 255.0)])
def test_unsigned_bytes_by_imods_stamp_or_by_the_range(tmp_path: Path, changed: tuple[object, ...]) -> None:
    stored = voxels("u1")
    path = write(tmp_path, header(mode=0, changed=changed), stored.tobytes())
    with mrc.MrcVolume(path) as volume:
        np.testing.assert_array_equal(volume.slab(0, 5), stored.astype(np.float32))


def test_signed_bytes_by_imods_flag(tmp_path: Path) -> None:
    stored = voxels("i1")
    path = write(tmp_path, header(mode=0, changed=(152, "2i", 1146047817, 1)), stored.tobytes())
    with mrc.MrcVolume(path) as volume:
        np.testing.assert_array_equal(volume.slab(0, 5), stored.astype(np.float32))


def test_a_wrong_or_absent_machine_stamp_is_overruled_by_a_header_that_makes_sense(tmp_path: Path) -> None:
    stored = voxels(">f4")
    for stamp in (b"\x44\x44\0\0", b"\0\0\0\0"):
        head = header(order=">")
        head[212:216] = stamp
        with mrc.MrcVolume(write(tmp_path, head, stored.tobytes())) as volume:
            np.testing.assert_array_equal(volume.slab(0, 5), stored.astype(np.float32))


def test_the_extended_header_is_skipped(tmp_path: Path) -> None:
    stored = voxels("<f4")
    path = write(tmp_path, header(changed=(92, "i", 1312)), b"x" * 1312 + stored.tobytes())
    with mrc.MrcVolume(path) as volume:
        np.testing.assert_array_equal(volume.slab(1, 3), stored[1:3])


@pytest.mark.parametrize("columns", [6, 7])
@pytest.mark.parametrize("axes", [(1, 2, 3), (1, 3, 2), (3, 1, 2)])
def test_four_bits_a_voxel_the_lower_half_first_and_rows_in_whole_bytes(
    columns: int, axes: tuple[int, int, int], tmp_path: Path
) -> None:
    stored = RNG.integers(0, 16, (5, 4, columns)).astype("u1")
    padded = np.pad(stored, [(0, 0), (0, 0), (0, columns % 2)])
    packed = padded[..., ::2] | padded[..., 1::2] << 4
    head = header((5, 4, columns), 101, axes=(64, "3i", *axes))
    path = write(tmp_path, head, packed.tobytes())
    along = {1: 2, 2: 1, 3: 0}
    truth = np.moveaxis(stored, [2, 1, 0], [along[axis] for axis in axes]).astype(np.float32)
    with mrc.MrcVolume(path) as volume:
        np.testing.assert_array_equal(volume.slab(0, volume.shape[0]), truth)
        np.testing.assert_array_equal(volume.slab(2, 4), truth[2:4])
        assert volume.data().stored_as == "uint4"


@pytest.mark.parametrize("kind", ["f4", "i2"])
def test_voxels_of_another_byte_order_than_the_header(kind: str, tmp_path: Path) -> None:
    stored = (RNG.normal(0, 20, SHAPE)).astype(">" + kind)
    mode = {"f4": 2, "i2": 1}[kind]
    # nothing in the header tells: the user does
    path = write(tmp_path, header(mode=mode, a=(76, "3f", 0.0, -1.0, -2.0)), stored.tobytes())
    with mrc.MrcVolume(path, byte_order="big") as volume:
        np.testing.assert_array_equal(volume.slab(0, 5), stored.astype(np.float32))
    with mrc.MrcVolume(path) as volume:
        assert not np.array_equal(volume.slab(0, 5), stored.astype(np.float32))
    # its extremes tell
    extremes = (76, "2f", float(stored.min()), float(stored.max()))
    path = write(tmp_path, header(mode=mode, a=extremes), stored.tobytes())
    with mrc.MrcVolume(path) as volume:
        np.testing.assert_array_equal(volume.slab(0, 5), stored.astype(np.float32))
        assert "the other byte order than its header" in volume.data().warnings[0]
    with mrc.MrcVolume(path, byte_order="little") as volume:
        assert not np.array_equal(volume.slab(0, 5), stored.astype(np.float32))
    with pytest.raises(InvalidArgument, match="unknown byte order 'middle'"):
        mrc.MrcVolume(path, byte_order="middle")


@pytest.mark.parametrize(
    ("changed", "origin"),
    [
        ({"a": (196, "3f", 10.0, -20.0, 30.0)}, (10, -20, 30)),
        # IMOD's own sign, and its flag for the other
        ({"a": (196, "3f", 10.0, -20.0, 30.0), "b": (152, "2i", 1146047817, 0)}, (-10, 20, -30)),
        ({"a": (196, "3f", 10.0, -20.0, 30.0), "b": (152, "2i", 1146047817, 4)}, (10, -20, 30)),
        # the starts count in voxels of 7.5 Å
        ({"a": (16, "3i", -2, 3, 4)}, (-15, 22.5, 30)),
        ({"a": (16, "3i", -2, 3, 4), "b": (196, "3f", 1.0, 0.0, 0.0)}, (1, 0, 0)),
        ({"a": (196, "3f", np.nan, 0.0, 0.0)}, (0, 0, 0)),
    ],
)
def test_where_the_first_voxel_lies(changed: Any, origin: tuple[float, ...], tmp_path: Path) -> None:
    with mrc.MrcVolume(write(tmp_path, header(**changed), voxels("<f4").tobytes())) as volume:
        assert volume.data().frame.origin_angstrom == pytest.approx(origin)


@pytest.mark.parametrize("axes", [(1, 2, 3), (2, 1, 3), (3, 1, 2), (3, 2, 1), (1, 3, 2), (2, 3, 1)])
def test_axes_in_every_order(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    # In the file [section, row, column]; columns run along axes[0], and so on.
    truth = voxels("<f4", (3, 4, 5))  # z, y, x
    by_axis = {1: 2, 2: 1, 3: 0}
    order = (by_axis[axes[2]], by_axis[axes[1]], by_axis[axes[0]])
    stored = np.ascontiguousarray(truth.transpose(order))
    sizes: Any = {
        "mapped": (64, "3i", *axes),
        "cell": (40, "3f", 5 * 2.0, 4 * 3.0, 3 * 4.0),
        "grid": (28, "3i", 5, 4, 3),
    }
    with mrc.MrcVolume(write(tmp_path, header(stored.shape, **sizes), stored.tobytes())) as volume:
        assert volume.shape == (3, 4, 5)
        assert volume.voxel_size_angstrom == pytest.approx((2.0, 3.0, 4.0))
        np.testing.assert_array_equal(volume.slab(0, 3), truth)
        np.testing.assert_array_equal(volume.slab(1, 2), truth[1:2])


@pytest.mark.parametrize(
    "cell", [(0.0, 0.0, 0.0), (45.0, 30.0, 0.0), (6.0, 4.0, 5.0), (-45.0, 30.0, 37.5), (np.nan, 30.0, 37.5)]
)
def test_an_absent_or_impossible_voxel_size_is_none(tmp_path: Path, cell: tuple[float, float, float]) -> None:
    path = write(tmp_path, header(changed=(40, "3f", *cell)), voxels("<f4").tobytes())
    with mrc.MrcVolume(path) as volume:
        assert volume.voxel_size_angstrom is None


def test_the_voxel_size_is_per_sampling_interval_not_per_voxel(shared_data: Path, tmp_path: Path) -> None:
    # 100 voxels over a cell of 99 intervals: the EMDB's own file of GroEL says 2.7 Å.
    with open_volume_file(shared_data / "maps/groel_11.5A_emdb.mrc.gz", "groel.mrc.gz", tmp_path) as volume:
        assert volume.shape == (100, 100, 100)
        assert volume.voxel_size_angstrom == pytest.approx((2.7, 2.7, 2.7), rel=1e-6)


BROKEN: dict[str, tuple[bytes, str]] = {
    "truncated": (
        bytes(header()) + bytes(4 * 119),
        r"truncated.*6 x 4 x 5 voxels.*1504 bytes in all; the file has 1500",
    ),
    "header too small": (bytes(header()) + bytes(4 * 120 + 96), "the header's size is wrong"),
    "billions": (bytes(header((10**9,) * 3)) + bytes(480), "truncated.*1000000000 x 1000000000 x 1000000000"),
    "negative": (bytes(header((5, -4, 6))) + bytes(480), "size is 6 x -4 x 5 voxels"),
    "zero": (bytes(header((5, 4, 0))), "size is 0 x 4 x 5 voxels"),
    "complex": (bytes(header(mode=4)) + bytes(960), r"mode 4 \(complex float32\)"),
    "unknown mode": (bytes(header(mode=77)) + bytes(480), r"mode 77 \(unknown\)"),
    "axes": (bytes(header(a=(64, "3i", 1, 1, 3))) + bytes(480), "MAPS.* are 1, 1, 3"),
    "extension": (bytes(header(a=(92, "i", -8))) + bytes(480), "extension has -8 bytes"),
    "text": (b"Dear colleague, here are the picks.\n" * 60, "text that begins 'Dear colleague, here are the picks."),
    "short text": (b"hello", "text that begins 'hello' of 5 bytes"),
    "empty": (b"", "an empty file"),
    "zeros": (bytes(4096), "binary data, not an MRC file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(4096), "damaged HDF5"),
    "noise": (np.random.default_rng(0).bytes(5000), "binary data, not an MRC file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_in_one_line_that_names_them(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    path = write(tmp_path, b"", content)
    with pytest.raises(InvalidArgument, match=message) as error:
        open_volume_file(path, "my tomo.mrc", tmp_path)
    assert str(error.value).startswith("my tomo.mrc: ")
    assert "\n" not in str(error.value)


def test_padding_of_less_than_a_section_is_ignored(tmp_path: Path) -> None:
    stored = voxels("<f4")
    with mrc.MrcVolume(write(tmp_path, header(), stored.tobytes() + bytes(95))) as volume:
        np.testing.assert_array_equal(volume.slab(0, 5), stored)


@pytest.mark.parametrize(
    ("name", "head", "message"),
    [
        ("a.mrc", header((1, 20, 24)), "one image of 24 x 20 pixels"),
        ("tilts.st", header(), "a stack of 5 images of 6 x 4 pixels"),
        ("particles.mrcs.gz", header(), "a stack of 5 images"),
        ("a.mrc", header(a=(88, "i", 0), b=(36, "i", 1)), "a stack of 5 images"),
        ("a.mrc", header((6, 4, 6), a=(88, "i", 401), b=(36, "i", 2)), "a stack of 3 volumes"),
        ("a.mrc", header(a=(52, "3f", 90.0, 94.3, 90.0)), "angles are 90, 94.3, 90 degrees"),
    ],
)
def test_what_is_not_one_volume_is_told_from_one(tmp_path: Path, name: str, head: bytes, message: str) -> None:
    shape = struct.unpack("<3i", head[:12])
    path = write(tmp_path, head, bytes(4 * int(np.prod(shape))), name)
    with pytest.raises(FailedPrecondition, match=message):
        mrc.MrcVolume(path)


def test_gzip_is_unpacked_and_its_damage_found(tmp_path: Path) -> None:
    stored = voxels("<f4")
    packed = gzip.compress(bytes(header()) + stored.tobytes())
    path = write(tmp_path, b"", packed, "tomo.mrc.gz")
    with open_volume_file(path, path.name, tmp_path) as volume:
        np.testing.assert_array_equal(volume.slab(0, 5), stored)
    path.write_bytes(packed[:-200])
    with pytest.raises(InvalidArgument, match=r"tomo.mrc.gz: truncated: the gzip stream ends after \d+ unpacked"):
        open_volume_file(path, path.name, tmp_path)
    path.write_bytes(packed[:-8] + bytes(8))
    with pytest.raises(InvalidArgument, match=r"tomo.mrc.gz: damaged"):
        open_volume_file(path, path.name, tmp_path)


def test_a_gzip_bomb_is_stopped_at_the_size_of_its_header(tmp_path: Path) -> None:
    path = write(tmp_path, b"", gzip.compress(bytes(header()) + bytes(50_000_000)), "bomb.mrc.gz")
    with pytest.raises(InvalidArgument, match="header's size is wrong"):
        open_volume_file(path, path.name, tmp_path)
    assert (tmp_path / "unpacked.mrc").stat().st_size <= 1504 + 96


def test_a_gzip_header_of_billions_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path, b"", gzip.compress(bytes(header((10**9,) * 3)) + bytes(5000)), "big.mrc.gz")
    with pytest.raises(InvalidArgument, match=r"big.mrc.gz: the header says \d+ bytes; \d+ bytes of gzip cannot hold"):
        open_volume_file(path, path.name, tmp_path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the other reader
def test_files_of_other_programs(shared_data: Path, tmp_path: Path) -> None:
    read = 0
    for path in sorted((shared_data / "maps").iterdir()):
        if path.name == "EMD-3001.map":  # a crystal's cell, with an angle of 94 degrees
            with pytest.raises(FailedPrecondition, match=r"EMD-3001.map: the cell's angles are 90, 94.326, 90"):
                open_volume_file(path, path.name, tmp_path)
            continue
        with open_volume_file(path, path.name, tmp_path) as volume:
            with mrcfile.open(path, permissive=True) as other:
                np.testing.assert_array_equal(volume.slab(0, volume.shape[0]), other.data)
            read += 1
    assert read == 12
    for path, message in (
        (shared_data / "formats/misc/float16.mrc", "one image of 64 x 64 pixels"),
        (shared_data / "real/ribosome_70s/Unt_050/Unt_050_12.00A_000001.mrcs", "a stack of 37 images"),
    ):
        with pytest.raises(FailedPrecondition, match=message):
            open_volume_file(path, path.name, tmp_path)


def test_damaged_headers_never_do_worse_than_a_failure(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = np.frombuffer(bytes(header()) + voxels("<f4").tobytes(), dtype=np.uint8)
    path = tmp_path / "a.mrc"
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        damaged = whole.copy()
        places = rng.integers(0, 224, size=rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, size=len(places))
        path.write_bytes(damaged.tobytes())
        try:
            with open_volume_file(path, path.name, tmp_path) as volume:
                assert np.prod(volume.shape) * volume.slab(0, 1).itemsize <= 4 * 480
            outcomes["read"] += 1
        except Failure as failure:
            assert str(failure).startswith("a.mrc: ")  # noqa: PT017  (the message is what is tested)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_statistics_in_pieces_equal_those_of_the_whole() -> None:
    values = RNG.normal(1e6, 1.0, 30_001).astype(np.float32)
    running = RunningStatistics()
    for piece in np.split(values, [1, 10, 20_000]):
        running.update(piece)
    found = running.result()
    exact = values.astype(np.float64)
    assert found.mean == pytest.approx(exact.mean(), rel=1e-12)
    # A sum of squares in float32 would lose the deviation altogether at this mean.
    assert found.standard_deviation == pytest.approx(exact.std(), rel=1e-9)
    assert (found.minimum, found.maximum) == (exact.min(), exact.max())


@pytest.mark.parametrize(("mode", "levels"), [(0, 255), (1, 65535), (2, None), (12, None)])
def test_mrc_of_every_mode_is_valid_and_reads_back(mode: int, levels: int | None, tmp_path: Path) -> None:
    array = noise(9, 20, 30)
    path = tmp_path / "a.mrc"
    mrc.write(path, volume_of(array, VolumeFrame((7.84,) * 3), labels=("cryofleet contrast=dark",)), mode)
    assert mrcfile.validate(path)
    with mrcfile.open(path) as file:
        stored = file.data.astype(np.float64)
        labels = [label.rstrip() for label in file.get_labels()]
        assert file.voxel_size.x == pytest.approx(7.84, rel=1e-6)
    assert labels[0] == "cryofleet contrast=dark"
    if levels is None:
        # float16 has 11 significant bits
        np.testing.assert_allclose(stored, array, rtol=0 if mode == 2 else 2**-11, atol=0)
        return
    match = re.fullmatch(r"cryofleet scaled: value = stored \* (\S+) \+ (\S+)", labels[1])
    assert match is not None
    restored = stored * float(match[1]) + float(match[2])
    step = (array.max() - array.min()) / levels
    assert np.abs(restored - array).max() <= 0.51 * step
    assert stored.max() - stored.min() == levels
    with mrc.MrcVolume(path) as volume:
        # a product and a sum in float32
        np.testing.assert_allclose(volume.slab(0, 9), restored, rtol=0, atol=4 * np.abs(array).max() * 2**-23)


def test_what_float16_cannot_hold_is_said(tmp_path: Path) -> None:
    array = noise(2, 3, 4)
    array[1, 2, 3] = -1e6
    with pytest.raises(FailedPrecondition, match=r"holds 1e\+06; float16 .* ends at 65504: take mrc_mode 1 or 2"):
        mrc.write(tmp_path / "a.mrc", volume_of(array), 12)
