"""TIFF stacks: ImageJ's, OME's, plain ones, and hostile ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from cryofleet.errors import FailedPrecondition, Failure, InvalidArgument
from cryofleet.formats.tiff import TiffVolume
from cryofleet.formats.volume import open_volume_file

RNG = np.random.default_rng(2)


def test_a_real_tomogram_of_imagej(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "real/microtubule_13pf.tif"
    with open_volume_file(path, path.name, tmp_path) as volume:
        assert volume.shape == (36, 206, 94)
        assert volume.voxel_size_angstrom == pytest.approx((10.52, 10.52, 10.52), rel=1e-6)
        truth = tifffile.imread(path).astype(np.float32)
        np.testing.assert_array_equal(volume.slab(0, 36), truth)
        np.testing.assert_array_equal(volume.slab(7, 9), truth[7:9])


@pytest.mark.parametrize("kind", ["u1", "i2", "<u2", ">f4", "f8"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_plain_stacks_of_any_type(tmp_path: Path, kind: str, compression: str | None) -> None:
    stored = (RNG.random((5, 7, 9)) * 100).astype(kind)
    path = tmp_path / "a.tif"
    order: Any = ">" if kind.startswith(">") else "<"
    tifffile.imwrite(path, stored, compression=compression, photometric="minisblack", byteorder=order)
    with TiffVolume(path) as volume:
        assert volume.shape == (5, 7, 9)
        assert volume.voxel_size_angstrom is None
        np.testing.assert_array_equal(volume.slab(0, 5), stored.astype(np.float32))
        np.testing.assert_array_equal(volume.slab(3, 4), stored[3:4].astype(np.float32))


def test_ome_voxel_size_in_its_units(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    stored = RNG.random((4, 5, 6), dtype=np.float32)
    sizes = {"PhysicalSizeX": 1.2, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.0012, "PhysicalSizeZ": 12.0}
    tifffile.imwrite(path, stored, metadata={"axes": "ZYX", **sizes, "PhysicalSizeZUnit": "Å"})
    with TiffVolume(path) as volume:
        assert volume.voxel_size_angstrom == pytest.approx((12.0, 12.0, 12.0))
        np.testing.assert_array_equal(volume.slab(0, 4), stored)


def test_other_files_named_in_ome_metadata_are_not_opened(tmp_path: Path) -> None:
    grey: Any = {"photometric": "minisblack"}
    secret, trick = tmp_path / "secret.ome.tif", tmp_path / "trick.ome.tif"
    tifffile.imwrite(secret, np.full((5, 5, 6), 7, np.uint8), metadata={"axes": "ZYX"}, **grey)
    pointing = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:1"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="6" '
        'SizeY="5" SizeZ="5" SizeC="1" SizeT="1"><TiffData IFD="0" FirstZ="0" PlaneCount="5">'
        '<UUID FileName="secret.ome.tif">urn:uuid:2</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(trick, np.ones((5, 5, 6), np.uint8), description=pointing, metadata=None, **grey)
    with TiffVolume(trick) as volume:
        assert volume.slab(0, 5).max() == 1


def test_entities_in_ome_metadata_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    bomb = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><OME><Image><Pixels SizeC="1"/></Image></OME>'
    tifffile.imwrite(path, np.ones((5, 5, 6), np.uint8), description=bomb, metadata=None, photometric="minisblack")
    with pytest.raises(InvalidArgument, match="document type declaration"):
        TiffVolume(path)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((8, 9), {}, "one image of 9 x 8 pixels"),
        ((4, 8, 9, 3), {"photometric": "rgb"}, "axes are"),
        ((2, 3, 8, 9), {"imagej": True, "metadata": {"axes": "TZYX"}}, "axes are T 2, Z 3, Y 8, X 9"),
    ],
)
def test_what_is_no_volume(tmp_path: Path, shape: tuple[int, ...], options: Any, message: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones(shape, np.uint8), **options)
    with pytest.raises(FailedPrecondition, match=message):
        TiffVolume(path)


def test_channels_of_ome_are_not_taken_for_sections(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.ones((3, 8, 9), np.uint8), metadata={"axes": "CYX"})
    with pytest.raises(FailedPrecondition, match=r"a.ome.tif: an OME-TIFF of 3 channels"):
        TiffVolume(path)


def test_truncated_and_hostile_files_are_refused_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((10, 50, 60), np.uint16), photometric="minisblack")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9000])
    with pytest.raises(InvalidArgument, match=r"a.tif: (truncated|damaged)"):
        TiffVolume(path)
    # The width's tag (256) made 2^31 - 1: terabytes by the tags, kilobytes by the file.
    place = whole.index(b"\x00\x01\x04\x00\x01\x00\x00\x00")
    hostile = bytearray(whole)
    hostile[place + 2 : place + 12] = b"\x04\x00\x01\x00\x00\x00\xff\xff\xff\x7f"
    path.write_bytes(hostile)
    with pytest.raises(Failure, match=r"a.tif: (truncated|damaged|one image of 2147483647 x 50)"):
        TiffVolume(path)


def test_damaged_files_never_do_worse_than_a_failure(tmp_path: Path, shared_data: Path) -> None:
    rng = np.random.default_rng(8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((3, 20, 20), np.uint8), imagej=True, metadata={"axes": "ZYX", "unit": "nm"})
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        places = rng.integers(4, 400, size=rng.integers(1, 5))
        damaged[places] = rng.integers(0, 256, size=len(places))
        path.write_bytes(damaged.tobytes())
        try:
            with TiffVolume(path) as volume:
                volume.slab(0, 1)
        except Failure as failure:
            assert str(failure).startswith("a.tif: ")  # noqa: PT017  (the message is what is tested)
            refused += 1
    assert refused > 20
