"""Volumes through every pair of formats: voxels, shape and frame come back."""

import itertools
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import mrcfile
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryofleet.cli import formats as commands
from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.formats import tilt_files
from cryofleet.formats.volumes import catalogue
from cryofleet.formats.volumes.catalogue import FORMATS
from cryofleet.formats.volumes.frame import VolumeFrame
from tests.unit.formats.volumes.volumes import ENDINGS, FRAME, noise, read, volume_of, written

_SIDES = st.integers(2, 9)
_EXTREMES = np.array([0, -0.0, 1e-45, -1e-38, 3.4028235e38, -3.4028235e38, 1 / 3, np.pi], np.float32)
_VOLUMES = st.builds(
    # eight at least: all extremes are in it
    lambda shape, seed: np.random.default_rng(seed).permutation(
        np.concatenate([_EXTREMES, noise(math.prod(shape) - 8, seed=seed)])).reshape(shape),
    st.tuples(_SIDES, _SIDES, _SIDES),
    st.integers(0, 1 << 30),
)  # fmt: skip
_FRAMES = st.builds(
    VolumeFrame,
    voxel_size_angstrom=st.integers(1, 100_000).map(lambda n: (n / 1000,) * 3),
    origin_angstrom=st.tuples(*[st.floats(-1e5, 1e5, width=32)] * 3),
    binning=st.one_of(st.none(), st.integers(1, 16).map(float)),
    handedness=st.sampled_from(["right", "left"]),
)


def test_the_commands_name_what_there_is() -> None:
    assert tuple(FORMATS) == commands.VOLUME_FORMATS
    assert tuple(tilt_files.FORMATS) == commands.TILT_SERIES_FORMATS


# HDF5 is read by way of a process, which takes its time: the pairs with it are fewer
_PAIRS = [pair for pair in itertools.permutations(FORMATS, 2) if "eman-hdf5" not in pair]


@pytest.mark.parametrize(("first", "second"), [*_PAIRS, ("mrc", "eman-hdf5"), ("eman-hdf5", "ome-zarr")])
def test_every_pair_of_formats(first: str, second: str) -> None:
    examples = 1 if "eman-hdf5" in (first, second) else 4

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(array=_VOLUMES, frame=_FRAMES)
    def check(array: np.ndarray, frame: VolumeFrame) -> None:
        with TemporaryDirectory() as name:
            folder = Path(name)
            path = written(folder, first, volume_of(array, frame), "first")
            with catalogue.open_volume(path, path.name, folder)[1] as reader:
                path = written(folder, second, reader.data(), "second")
            values, back = read(path, folder)
            np.testing.assert_array_equal(values, array)
            # sizes and origins are kept as float32 or, by EM, in thousandths of an Å
            assert back.frame.voxel_size_angstrom == pytest.approx(frame.voxel_size_angstrom, rel=3e-7)
            if all("origin" in FORMATS[each].holds for each in (first, second)):
                assert back.frame.origin_angstrom == pytest.approx(frame.origin_angstrom, rel=3e-7)
            assert (back.frame.binning, back.frame.handedness) == (frame.binning, frame.handedness)

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_sections_of_several_layers_and_an_unknown_voxel_size(name: str, tmp_path: Path) -> None:
    array = noise(67, 5, 131)
    path = written(tmp_path, name, volume_of(array, VolumeFrame()))
    for thickness in (1, 50, 67):
        values, data = read(path, tmp_path, thickness)
        np.testing.assert_array_equal(values, array)
        assert data.frame.voxel_size_angstrom is None
    assert not list(tmp_path.glob(".cryofleet-*"))


@pytest.mark.parametrize("name", FORMATS)
def test_one_angstrom_is_a_size_and_not_the_lack_of_one(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, volume_of(noise(3, 4, 5), VolumeFrame((1.0, 1.0, 1.0))))
    assert read(path, tmp_path)[1].frame.voxel_size_angstrom == pytest.approx((1, 1, 1))


def test_the_mirror_image_is_read_from_the_other_end(tmp_path: Path) -> None:
    array = noise(7, 3, 4)
    mirrored = volume_of(array).mirrored()
    values, data = read(written(tmp_path, "mrc", mirrored), tmp_path)
    np.testing.assert_array_equal(values, array[::-1])
    assert data.frame.handedness == "left"
    assert data.mirrored().frame.handedness == "right"


def test_what_a_format_does_not_hold_is_said(tmp_path: Path) -> None:
    volume = volume_of(noise(3, 4, 5), VolumeFrame((2.0, 2.0, 3.0), (1.0, 2.0, 3.0)), labels=("a", "b"))
    said = " ".join(catalogue.write(tmp_path / "a.em", volume, FORMATS["em-volume"]))
    assert "no place for the origin, 1, 2, 3 Å" in said
    assert "one voxel size: the mean of 2, 2, 3 Å" in said
    assert "2 labels" in said
    assert "2.333333 Å is kept as 2.333 Å" in said
    doubles = volume_of(noise(3, 4, 5), stored_as="float64")
    assert "float64 is written as float32" in catalogue.write(tmp_path / "a.mrc", doubles, FORMATS["mrc"])[0]
    assert catalogue.write(tmp_path / "b.mrc", volume, FORMATS["mrc"]) == ()


def test_images_are_written_as_such_or_not_at_all(tmp_path: Path) -> None:
    stack = volume_of(noise(5, 6, 7), FRAME, kind="stack")
    for name in ("em-volume", "eman-hdf5", "ome-zarr"):
        with pytest.raises(FailedPrecondition, match="a stack of images"):
            written(tmp_path, name, stack)
    path = written(tmp_path, "mrc", stack)
    with mrcfile.open(path) as file:
        assert file.is_image_stack()
        assert file.voxel_size.x == pytest.approx(2.5)
    assert mrcfile.validate(path)


@pytest.mark.parametrize("ending", [".mrc", ".mrc.gz"])
@pytest.mark.parametrize("frame", [FRAME, VolumeFrame()])
def test_mrcfile_finds_nothing_wrong(ending: str, frame: VolumeFrame, tmp_path: Path) -> None:
    array = noise(5, 6, 7)
    array[1, 2, 3] = np.nan
    path = tmp_path / f"a{ending}"
    catalogue.write(path, volume_of(noise(5, 6, 7), frame, labels=("x",) * 12), catalogue.for_writing(path))
    assert mrcfile.validate(path)
    catalogue.write(path, volume_of(array, frame), catalogue.for_writing(path))
    with mrcfile.open(path) as file:
        np.testing.assert_array_equal(file.data, array)


def test_names_that_stand_for_nothing_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"say what to write with --to .*by the ending: .mrc"):
        catalogue.for_writing(tmp_path / "a.xyz")
    assert {catalogue.for_writing(Path(f"a{ending}")).name for ending in ENDINGS.values()} == set(FORMATS)
    with pytest.raises(FailedPrecondition, match="can't be written"):
        catalogue.write(tmp_path / "none" / "a.mrc", volume_of(noise(2, 2, 2)), FORMATS["mrc"])
