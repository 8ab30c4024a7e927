"""Each volume format as other programs write it, and as nobody should."""

import gzip
import json
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pytest

from cryofleet.errors import FailedPrecondition, Failure, InvalidArgument
from cryofleet.formats.volumes import catalogue, zarr_array
from cryofleet.formats.volumes.eman_hdf5 import EmanVolume
from cryofleet.formats.volumes.ome_zarr import OmeZarrVolume, halved
from tests.unit.formats.volumes.volumes import noise, read, volume_of, written

SHAPE = (5, 4, 6)


# --- EM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "order"), [(6, "<"), (5, ">"), (3, ">"), (0, ">")])
@pytest.mark.parametrize(("kind", "dtype"), [(1, "i1"), (2, "i2"), (4, "i4"), (5, "f4"), (9, "f8")])
def test_em_of_every_type_and_machine(machine: int, order: str, kind: int, dtype: str, tmp_path: Path) -> None:
    stored = (noise(*SHAPE) * 10).astype(order + dtype)
    head = bytearray(512)
    head[0], head[3] = machine, kind
    struct.pack_into(f"{order}3i", head, 4, 6, 4, 5)
    struct.pack_into(f"{order}i", head, 120, 13480)
    path = tmp_path / "a.em"
    path.write_bytes(bytes(head) + stored.tobytes())
    values, data = read(path, tmp_path)
    np.testing.assert_array_equal(values, stored.astype(np.float32))
    assert data.frame.voxel_size_angstrom == (13.48, 13.48, 13.48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 1}, "its machine is 1 and its type 5"),
        ({3: 8}, r"type 8 \(complex float32\)"),
        ({4: 7}, "992 bytes; 7 x 4 x 5 voxels of float32 take 1072"),
        ({7: 128}, "size is -2147483642 x 4 x 5"),
    ],
)
def test_em_that_is_refused(change: dict[int, int], message: str, tmp_path: Path) -> None:
    path = written(tmp_path, "em-volume", volume_of(noise(*SHAPE)))
    data = bytearray(path.read_bytes())
    for at, value in change.items():
        data[at] = value
    path.write_bytes(data)
    with pytest.raises(Failure, match=f"^a.em: .*{message}"):
        catalogue.open_volume(path, "a.em", tmp_path, format_name="em-volume")


# --- HDF5 ----------------------------------------------------------------------------------------------------------


def hdf5(path: Path, array: np.ndarray[Any, Any], attributes: dict[str, float] | None = None, **storage: Any) -> Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("MDF/images/0")
        group.create_dataset("image", data=array, **storage)
        for name, value in (attributes or {}).items():
            group.attrs[f"EMAN.{name}"] = np.float32(value)
    return path


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (">f4", {}),
        ("<u2", {"chunks": (1, 3, 6), "compression": "gzip"}),
        (">i2", {"chunks": (2, 4, 4), "compression": "gzip", "shuffle": True, "fletcher32": True}),
        ("<f8", {"chunks": (5, 4, 6), "shuffle": True}),
    ],
)
def test_hdf5_in_every_layout(dtype: str, storage: dict[str, Any], tmp_path: Path) -> None:
    stored = (np.abs(noise(*SHAPE)) * 100).astype(dtype)
    sizes = {f"apix_{axis}": size for axis, size in zip("xyz", (2.5, 3.5, 4.5), strict=True)}
    values, data = read(hdf5(tmp_path / "a.hdf", stored, sizes, **storage), tmp_path)
    np.testing.assert_array_equal(values, stored.astype(np.float32))
    assert data.frame.voxel_size_angstrom == (2.5, 3.5, 4.5)
    assert data.stored_as == np.dtype(dtype).name


def test_hdf5_of_fewer_bits_stands_for_the_range_it_was_made_from(tmp_path: Path) -> None:
    # EMAN2 with 5 bits: 0 is the least value, 31 the greatest
    stored = np.random.default_rng(0).integers(0, 32, SHAPE).astype("u1")
    limits = {"stored_renderbits": 5, "stored_rendermin": -2.0, "stored_rendermax": 7.3}
    path = hdf5(tmp_path / "a.hdf", stored, limits, chunks=(1, 4, 6), compression="gzip")
    values, data = read(path, tmp_path)
    np.testing.assert_allclose(values, -2 + stored / 31 * 9.3, atol=1e-5)
    assert data.stored_as == "uint8, scaled"


def test_hdf5_opens_no_other_file(tmp_path: Path) -> None:
    outside = tmp_path / "secret.bin"
    noise(*SHAPE).tofile(outside)
    hdf5(tmp_path / "other.hdf", noise(*SHAPE))
    with h5py.File(tmp_path / "external.hdf", "w") as file:
        file.create_dataset("MDF/images/0/image", SHAPE, "<f4", external=[(str(outside), 0, 480)])
    with h5py.File(tmp_path / "link.hdf", "w") as file:
        file["MDF/images/0/image"] = h5py.ExternalLink("other.hdf", "MDF/images/0/image")
    layout: Any = h5py.VirtualLayout(SHAPE, "<f4")
    layout[:] = h5py.VirtualSource(tmp_path / "other.hdf", "MDF/images/0/image", SHAPE)
    with h5py.File(tmp_path / "virtual.hdf", "w") as file:
        file.create_virtual_dataset("MDF/images/0/image", layout)
    for name, message in (("external", "in other files"), ("virtual", "in other files"), ("link", "is a link")):
        with pytest.raises(FailedPrecondition, match=f"^{name}.hdf: .*{message}"):
            EmanVolume(tmp_path / f"{name}.hdf")


def test_hdf5_that_is_no_volume(tmp_path: Path) -> None:
    cases: dict[str, tuple[Path, str]] = {
        "image": (hdf5(tmp_path / "image.hdf", noise(4, 6)), "an image of 6 x 4 pixels"),
        "complex": (hdf5(tmp_path / "complex.hdf", noise(*SHAPE).astype("c8")), "are complex64, not real"),
        "lzf": (hdf5(tmp_path / "lzf.hdf", noise(*SHAPE), compression="lzf"), "compressed by HDF5 filters"),
    }
    with h5py.File(tmp_path / "empty.hdf", "w") as file:
        file["data"] = noise(*SHAPE)
    with h5py.File(tmp_path / "big.hdf", "w") as file:
        file.create_dataset("MDF/images/0/image", (60000, 60000, 60000), "<f4", chunks=(64, 64, 64))
    cases |= {
        "empty": (tmp_path / "empty.hdf", "no /MDF/images/0/image in it"),
        "big": (tmp_path / "big.hdf", "a section would take 14400000000 bytes"),
    }
    for path, message in cases.values():
        with pytest.raises(Failure, match=f"^{path.name}: .*{message}"):
            EmanVolume(path)


# --- OME-Zarr ------------------------------------------------------------------------------------------------------


def test_the_pyramid_is_of_means_and_says_where_it_lies(tmp_path: Path) -> None:
    array = noise(66, 9, 131)
    path = written(tmp_path, "ome-zarr", volume_of(array))
    said = json.loads((path / ".zattrs").read_text())["multiscales"][0]
    assert said["version"] == "0.4"
    assert said["axes"] == [{"name": axis, "type": "space", "unit": "angstrom"} for axis in "zyx"]
    assert [level["path"] for level in said["datasets"]] == ["0", "1", "2"]
    # block means: two voxels are twice as large, and their middle lies half a voxel further; in the order z, y, x
    assert said["datasets"][1]["coordinateTransformations"] == [
        {"type": "scale", "scale": [5.0, 5.0, 5.0]},
        {"type": "translation", "translation": [31.75, -18.75, 11.25]},
    ]
    with OmeZarrVolume(path) as volume:
        assert [level.shape for level in volume.levels] == [(66, 9, 131), (33, 5, 66), (17, 3, 33)]
        assert volume.levels[2].voxel_size_angstrom == (10.0, 10.0, 10.0)
        level = zarr_array.ZarrArray(volume._store, "1")
        found = level.slab(0, 33)
    even = array[:, :8, :130].astype(np.float64).reshape(33, 2, 4, 2, 65, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(found[:, :4, :65], even, atol=2e-6)
    np.testing.assert_allclose(found[:, 4, 65], array[:, 8, 130].reshape(33, 2).mean(axis=1), atol=1e-6)
    assert halved(np.full((2, 2, 2), 3e38, np.float32))[0, 0, 0] == np.float32(3e38)


def zarr(folder: Path, change: dict[str, Any] | None = None, image: dict[str, Any] | None = None) -> Path:
    """A small OME-Zarr with keys of .zarray and of the image changed."""
    path = written(folder, "ome-zarr", volume_of(noise(*SHAPE)))
    for key, changes, of in ((".zattrs", image, "multiscales"), ("0/.zarray", change, "")):
        document = json.loads((path / key).read_text())
        (document[of][0] if of else document).update(changes or {})
        (path / key).write_text(json.dumps(document))
    return path


_AXES = [{"name": axis, "type": "space"} for axis in ("c", "z", "y", "x")]


@pytest.mark.parametrize(
    ("change", "image", "message"),
    [
        ({"shape": [5, 4, 10**9]}, {}, "sides are 1 to 65535"),
        ({"shape": [5, 60000, 60000]}, {}, "a section would take 14400000000 bytes"),
        ({"chunks": [2000, 2000, 2000]}, {}, "they take at most 268435456 bytes"),
        ({"chunks": [0, 4, 6]}, {}, "in chunks of"),
        ({"dtype": "|O"}, {}, r"its numbers are \|O"),
        ({"dtype": "<c8"}, {}, "its numbers are <c8"),
        ({"zarr_format": 3}, {}, "Zarr format 3"),
        ({"compressor": {"id": "pickle"}}, {}, "compressed with pickle"),
        ({"filters": [{"id": "vlen-utf8"}]}, {}, "it has filters"),
        ({"shape": "5"}, {}, "TypeError"),
        ({}, {"datasets": [{"path": "../secret"}]}, "no paths of arrays inside of it"),
        ({}, {"datasets": [{"path": "/etc"}]}, "no paths of arrays inside of it"),
        ({}, {"datasets": []}, "no paths of arrays inside of it"),
        ({}, {"version": "0.5"}, "OME-Zarr '0.5'; 0.4 is read"),
        ({}, {"axes": _AXES[1:][::-1]}, "axes x, y, z; one volume"),
        ({}, {"datasets": [{"path": "0", "coordinateTransformations": [{"type": "affine"}]}]}, "unknown transform"),
    ],
)
def test_zarr_that_is_refused(change: dict[str, Any], image: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=f"^a.zarr: .*{message}"):
        OmeZarrVolume(zarr(tmp_path, change, image), "a.zarr")


def test_zarr_follows_no_link_and_no_key(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(zlib.compress(bytes(480)))
    path = zarr(tmp_path)
    chunk = path / "0" / "0" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.unlink()
    chunk.symlink_to(secret)
    with pytest.raises(InvalidArgument, match=r"^a.zarr: 0/0/0/0 is a link"):
        OmeZarrVolume(path, "a.zarr")
    chunk.unlink()
    os.mkfifo(chunk)
    with OmeZarrVolume(path, "a.zarr") as volume, pytest.raises(InvalidArgument, match="no regular file"):
        volume.slab(0, 5)
    chunk.unlink()
    chunk.write_bytes(whole)
    (path / "0").rename(tmp_path / "elsewhere")
    (path / "0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgument, match=r"^a.zarr: .*behind a link"):
        OmeZarrVolume(path, "a.zarr")


@pytest.mark.parametrize("codec", ["zlib", "gzip", "blosc", "zstd", "lz4"])
def test_a_chunk_is_unpacked_no_further_than_its_shape_allows(codec: str) -> None:
    bomb = bytes(64 << 20)
    packers: dict[str, Callable[[bytes], bytes]] = {
        "zlib": zlib.compress,
        "gzip": gzip.compress,
        "blosc": numcodecs.Blosc().encode,
        "zstd": numcodecs.Zstd().encode,
        "lz4": numcodecs.LZ4().encode,
    }
    packed = packers[codec](bomb)
    tracemalloc.start()
    try:
        unpacked = zarr_array.unpack(bytes(packed), codec, 480)
    except (ValueError, RuntimeError):
        unpacked = b""
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(unpacked) <= 481
    assert peak < 1 << 20


def test_a_zip_of_zarr_is_bounded_by_its_members(tmp_path: Path) -> None:
    good = zarr(tmp_path)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for each in sorted(good.rglob("*")):
            if each.is_file():
                file.write(each, f"folder/{each.relative_to(good)}")
    values, _ = read(path, tmp_path)
    np.testing.assert_array_equal(values, noise(*SHAPE))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(".zattrs", (good / ".zattrs").read_bytes())
        file.writestr("0/.zarray", (good / "0/.zarray").read_bytes())
        file.writestr("0/0/0/0", bytes(64 << 20))
    with OmeZarrVolume(tmp_path / "b.zip") as volume, pytest.raises(InvalidArgument, match="has more than the"):
        volume.slab(0, 5)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as file:
        file.writestr("readme.txt", "no volume")
    with pytest.raises(InvalidArgument, match=r"^c.zip: no OME-Zarr image"):
        OmeZarrVolume(tmp_path / "c.zip")
