"""cryofleet convert and inspect of volumes, stacks and tilt series, without any server."""

import json
from pathlib import Path

import click
import mrcfile
import numpy as np
import pytest
from click.testing import CliRunner, Result

from cryofleet.cli import cli
from cryofleet.errors import FailedPrecondition, Failure, InvalidArgument
from cryofleet.formats.tilt_series import TiltSeries, read_tilt_series
from cryofleet.formats.xf import read_xf
from tests.unit.formats.volumes.volumes import noise, read, volume_of, written


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)


def test_through_the_formats_by_their_endings(tmp_path: Path) -> None:
    array = noise(5, 6, 7)
    last = written(tmp_path, "mrc", volume_of(array))
    for ending in ("tif", "em", "hdf", "zarr", "ozx", "mrc.gz", "map"):
        target = tmp_path / f"next.{ending}"
        done = run("convert", last, target)
        assert done.exception is None, done.exception
        last = target
    np.testing.assert_array_equal(read(last, tmp_path)[0], array)
    seen = json.loads(run("inspect", last, "--full", "--json").stdout)
    assert (seen["kind"], seen["shape_zyx"], seen["stored_as"]) == ("volume", [5, 6, 7], "float32")
    assert seen["statistics"]["mean"] == pytest.approx(array.mean(dtype=np.float64), rel=1e-6)
    assert seen["frame"]["voxel_size_angstrom"] == pytest.approx([2.5] * 3)


def test_the_frame_is_said_and_given(tmp_path: Path) -> None:
    array = noise(5, 6, 7)
    path = written(tmp_path, "mrc", volume_of(array))
    done = run("convert", path, tmp_path / "b.zarr", "--voxel-size", 4, "--binning", 2, "--out-handedness", "left")
    assert done.exception is None
    seen = json.loads(run("inspect", tmp_path / "b.zarr", "--json").stdout)
    assert seen["frame"]["voxel_size_angstrom"] == [4, 4, 4]
    assert (seen["frame"]["binning"], seen["frame"]["handedness"]) == (2, "left")
    np.testing.assert_array_equal(read(tmp_path / "b.zarr", tmp_path)[0], array[::-1])
    said = json.loads(run("convert", tmp_path / "b.zarr", tmp_path / "c.mrc", "--mrc-mode", 1, "--json").stdout)
    assert said["from"]["frame"]["handedness"] == said["frame"]["handedness"] == "left"
    assert any("rounded to int16" in warning for warning in said["warnings"])
    assert mrcfile.validate(tmp_path / "c.mrc")


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "mrc", volume_of(noise(3, 4, 5)))
    assert isinstance(run("convert", path, tmp_path / "b.em", "--tomogram-name", "x").exception, click.UsageError)
    for options, message in (
        ((tmp_path / "b.em", "--mrc-mode", 1), "modes are of MRC"),
        ((tmp_path / "b.em", "--to", "dynamo"), "unknown format of volumes 'dynamo'"),
        ((tmp_path / "b.tbl",), "say what to write"),
        ((path,), "is there already"),
        ((tmp_path / "none" / "b.em",), "there is no folder"),
    ):
        failure = run("convert", path, *options).exception
        assert isinstance(failure, InvalidArgument), failure
        assert message in str(failure)
    kept = tmp_path / "kept.mrc"
    kept.write_bytes(b"mine")
    assert isinstance(run("convert", path, kept).exception, InvalidArgument)
    assert kept.read_bytes() == b"mine"
    missing = run("convert", tmp_path / "none.mrc", tmp_path / "b.em").exception
    assert isinstance(missing, Failure)
    assert "there is no such file" in str(missing)


def test_what_is_there_is_replaced_only_where_it_is_the_like(tmp_path: Path) -> None:
    array = noise(3, 4, 5)
    path = written(tmp_path, "mrc", volume_of(array))
    assert run("convert", path, path, "--overwrite", "--out-handedness", "left").exception is None
    np.testing.assert_array_equal(read(path, tmp_path)[0], array[::-1])
    assert run("convert", path, tmp_path / "a.zarr").exception is None
    assert run("convert", path, tmp_path / "a.zarr", "--overwrite", "--voxel-size", 9).exception is None
    assert read(tmp_path / "a.zarr", tmp_path)[1].frame.voxel_size_angstrom == (9, 9, 9)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("all of it")
    for name in ("mrc", "ome-zarr"):
        failure = run("convert", path, home, "--to", name, "--overwrite").exception
        assert isinstance(failure, InvalidArgument)
        assert "is a folder of other things" in str(failure)
    assert (home / "thesis.txt").exists()


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "mrc", volume_of(noise(3, 4, 5) * 1e5))
    failure = run("convert", path, tmp_path / "half.mrc", "--mrc-mode", 12).exception
    assert isinstance(failure, FailedPrecondition)
    assert "float16" in str(failure)
    assert [each.name for each in tmp_path.iterdir()] == ["volume.mrc"]


def test_a_stack_takes_what_lies_beside_it_along(tmp_path: Path, shared_data: Path) -> None:
    real = shared_data / "formats/tiltseries"
    count = len(read_xf((real / "uermel_tilt_1.xf").read_bytes(), "xf"))
    stack = tmp_path / "TS_01.st"
    assert run("convert", written(tmp_path, "mrc", volume_of(noise(count, 6, 8))), stack).exception is None
    (tmp_path / "TS_01.xf").write_bytes((real / "uermel_tilt_1.xf").read_bytes())
    (tmp_path / "TS_01.tlt").write_bytes((real / "uermel_tilt_1.tlt").read_bytes())
    (tmp_path / "TS_01.st.mdoc").write_text("ImageFile = TS_01.st\n\n[ZValue = 0]\nTiltAngle = 1.5\n")
    seen = json.loads(run("inspect", stack, "--json").stdout)
    assert (seen["kind"], seen["count"]) == ("tilt series", count)
    assert seen["tilt_max_degrees"] - seen["tilt_min_degrees"] > 90
    assert seen["beside"] == {
        "TS_01.st.mdoc": "SerialEM metadata, 1 images",
        "TS_01.tlt": f"tilt angles, {count} images",
        "TS_01.xf": f"IMOD transforms, {count} images",
    }
    assert f"TS_01.st.mdoc is of 1 images, the stack has {count}" in seen["warnings"]
    assert run("convert", stack, tmp_path / "b.mrc").exception is None
    assert (tmp_path / "b.xf").read_bytes() == (tmp_path / "TS_01.xf").read_bytes()
    assert (tmp_path / "b.tlt").exists()
    assert (tmp_path / "b.mrc.mdoc").read_text().startswith("ImageFile = b.mrc\n")
    assert isinstance(run("convert", stack, tmp_path / "b.zarr").exception, FailedPrecondition)
    # a reconstruction beside the same files is none, nor is a stack of which nothing says it
    whole = written(tmp_path, "mrc", volume_of(noise(count + 3, 6, 8))).rename(tmp_path / "TS_01.rec")
    seen = json.loads(run("inspect", whole, "--json").stdout)
    assert (seen["kind"], seen["beside"], seen["warnings"]) == ("volume", {}, [])
    alone = stack.rename(tmp_path / "alone.st")
    assert json.loads(run("inspect", alone, "--json").stdout)["kind"] == "stack"
    with mrcfile.open(alone, "r+") as file:
        file.add_label("Tilt axis angle = 84.7, binning = 1")
    assert json.loads(run("inspect", alone, "--json").stdout)["kind"] == "tilt series"
    alignment = json.loads(run("inspect", tmp_path / "b.xf", "--json").stdout)
    assert alignment["mean_rotation_degrees"] == pytest.approx(100, abs=1)


def test_a_turned_image_is_said_to_be(tmp_path: Path) -> None:
    turn = np.deg2rad(30)
    row = f"{np.cos(turn)} {-np.sin(turn)} {np.sin(turn)} {np.cos(turn)} 3 -4\n"
    transforms = read_xf(row.encode() * 2, "a.xf")
    np.testing.assert_allclose(transforms.rotations_degrees(), 30)
    np.testing.assert_array_equal(transforms.shifts_pixels, [[3, -4]] * 2)
    for text in ("", "1 0 0 1 0\n", "1 0 0 1 0 nan\n", "a b c d e f\n"):
        with pytest.raises(InvalidArgument, match=r"^a\.xf"):
            read_xf(text.encode(), "a.xf")


def test_tilt_series_from_one_format_to_another(tmp_path: Path) -> None:
    series = TiltSeries(
        np.array([-3.0, 0.0, 3.0]), exposure=np.array([3.0, 3.1, 3.2]), defocus_um=np.array([2.0, 2.1, 2.2]),
        acquisition_order=np.array([2, 0, 1]), pixel_size_angstrom=1.35,
    )  # fmt: skip
    (tmp_path / "a.json").write_bytes(series.to_json())
    done = run("convert", tmp_path / "a.json", tmp_path / "a.mdoc", "--json")
    assert json.loads(done.stdout)["warnings"] == ["mdoc has no place for: defocus_um"]
    read = read_tilt_series((tmp_path / "a.mdoc").read_bytes(), "a.mdoc")
    assert (read.pixel_size_angstrom, read.defocus_um) == (1.35, None)
    np.testing.assert_array_equal(read.exposure, series.exposure)
    np.testing.assert_array_equal(read.acquisition_order, series.acquisition_order)
    assert run("convert", tmp_path / "a.mdoc", tmp_path / "a.rawtlt").exception is None
    angles = read_tilt_series((tmp_path / "a.rawtlt").read_bytes(), "a.rawtlt").angles_degrees
    np.testing.assert_array_equal(angles, series.angles_degrees)
    failure = run("convert", tmp_path / "a.json", tmp_path / "a.tlt", "--voxel-size", 2).exception
    assert isinstance(failure, click.UsageError)
