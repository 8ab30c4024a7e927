"""cryofleet convert and inspect, without any server."""

import json
from pathlib import Path
from typing import get_args

import mrcfile
import numpy as np
import pytest
from click.testing import CliRunner, Result

from cryofleet.cli import cli
from cryofleet.cli import formats as commands
from cryofleet.errors import InvalidArgument
from cryofleet.formats import frames
from cryofleet.formats.particles import catalogue
from cryofleet.formats.particles.catalogue import FORMATS
from tests.unit.formats.particles.tables import same, table_of


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)


def test_the_choices_are_those_that_there_are() -> None:
    assert tuple(FORMATS) == commands.FORMATS
    assert get_args(frames.Origin) == commands.ORIGINS
    assert get_args(frames.CentreRule) == commands.CENTRES
    assert get_args(frames.Handedness) == commands.HANDEDNESSES
    assert get_args(frames.BinningRule) == commands.BINNING_RULES


@pytest.fixture
def tomogram(tmp_path: Path) -> Path:
    path = tmp_path / "tomogram.mrc"
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.arange(6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8))
        mrc.voxel_size = 13.79
    return path


def test_there_and_back_by_the_commands(tmp_path: Path, tomogram: Path) -> None:
    particles = table_of(4, shape=(6, 7, 8), voxel_size=13.79)
    catalogue.write(tmp_path / "a.star", particles, FORMATS["relion-5"])
    assert "--to" in str(run("convert", tmp_path / "a.star", tmp_path / "b.star", "--tomogram", tomogram).exception)
    done = run("convert", tmp_path / "a.star", tmp_path / "b.tbl", "--tomogram", tomogram, "--json")
    said = json.loads(done.stdout)
    assert said["from"]["format"] == "relion-5"
    assert (said["format"], said["count"], said["frame"]["origin"]) == ("dynamo", 4, "one")
    assert any("half sets" in warning for warning in said["warnings"])
    assert isinstance(
        run("convert", tmp_path / "a.star", tmp_path / "b.tbl", "--tomogram", tomogram).exception, InvalidArgument
    )
    back = run("convert", tmp_path / "b.tbl", tmp_path / "c.star", "--to", "relion-5", "--tomogram-shape", "6,7,8")
    assert back.exception is None
    read = catalogue.read(tmp_path / "c.star", "c", voxel_size_angstrom=13.79, tomogram_shape=(6, 7, 8))[1].particles()
    same(particles, read, FORMATS["relion-5"], FORMATS["dynamo"])


def test_another_binning_and_frame(tmp_path: Path) -> None:
    particles = table_of(4, shape=(60, 80, 100), voxel_size=8.0)
    catalogue.write(tmp_path / "a.tbl", particles, FORMATS["dynamo"])
    done = run(
        "convert",
        tmp_path / "a.tbl",
        tmp_path / "b.star",
        "--to",
        "relion-4",
        "--out-voxel-size",
        2,
        "--tomogram-name",
        "t",
    )
    assert done.exception is None
    read = catalogue.read(tmp_path / "b.star", "b")[1].particles()
    assert read.voxel_size_angstrom == 2.0
    np.testing.assert_allclose(read.positions() / 4, particles.positions(), atol=1e-5)
    done = run("convert", tmp_path / "a.tbl", tmp_path / "c.tbl", "--origin", "first-voxel", "--out-origin", "corner")
    assert done.exception is None
    there = catalogue.read(tmp_path / "c.tbl", "c")[1].positions
    np.testing.assert_allclose(there, particles.positions() + 1.5, atol=1e-5)


def test_inspect_says_what_a_file_is(tmp_path: Path, tomogram: Path) -> None:
    catalogue.write(tmp_path / "a.mod", table_of(5), FORMATS["imod"])
    seen = json.loads(run("inspect", tmp_path / "a.mod", "--json").stdout)
    assert (seen["kind"], seen["format"], seen["count"], seen["frame"]["origin"]) == ("particles", "imod", 5, "imod")
    assert "IMOD model" in run("inspect", tmp_path / "a.mod").stdout
    seen = json.loads(run("inspect", tomogram, "--json").stdout)
    assert (seen["kind"], seen["shape_zyx"]) == ("volume", [6, 7, 8])
    assert seen["statistics"]["maximum"] == 335
    np.testing.assert_allclose(seen["voxel_size_angstrom_xyz"], 13.79, rtol=1e-6)
    seen = json.loads(run("inspect", tmp_path / "a.mod", "--from", "imod", "--json").stdout)
    assert seen["carried"] == ["positions", "class_id", "filament"]
