"""Other programs read what we write and see the same places and rotations, each in an environment of its own.

Part of no usual run, for the environments take minutes to make: `make check-formats`. They are kept in
CRYOFLEET_FORMATS_FOLDER, .venv/formats where that is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryofleet.formats.particles import catalogue
from cryofleet.formats.particles.catalogue import FORMATS
from cryofleet.formats.volumes import catalogue as volumes
from cryofleet.particles import Particles
from tests.unit.formats.particles.tables import ENDINGS, table_of
from tests.unit.formats.volumes.volumes import noise, volume_of

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("CRYOFLEET_FORMATS_FOLDER", HERE.parents[1] / ".venv" / "formats"))
VOXEL_SIZE = 4.0

# What reads each format, in which environment, and where its users count the first voxel's centre from.
READERS = [
    ("field", "starfile", "relion-4", (), 0.0, 1e-5),
    ("field", "cryocat_relion", "relion-4", (), 0.0, 1e-5),
    ("field", "cryocat", "em", ("emmotl",), 1.0, 5e-4),
    ("field", "cryocat", "stopgap", ("stopgap",), 1.0, 1e-5),
    ("field", "cryocat", "dynamo", ("dynamo",), 1.0, 1e-5),
    ("field", "emfile", "em", (), 1.0, 5e-4),
    ("field", "dynamotable", "dynamo", (), 1.0, 1e-5),
    ("field", "imodmodel", "imod", (), (0.5, 0.5, 0.0), 5e-4),
    ("copick", "copick", "copick", (), 0.0, 1e-8),
]


@pytest.fixture(scope="module")
def particles() -> Particles:
    return table_of(12, voxel_size=VOXEL_SIZE).without_columns("filament").with_columns(class_id=np.zeros(12, np.int64))


def environment(name: str) -> Path:
    """The Python of an environment, made where it is not there."""
    python = ENVIRONMENTS / name / "bin" / "python"
    ready = ENVIRONMENTS / name / ".ready"
    wanted = (HERE / f"requirements-{name}.txt").read_text()
    if not ready.is_file() or ready.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENTS / name], check=True)
        requirements = HERE / f"requirements-{name}.txt"
        options = os.environ.get("PIP_OPTIONS", "").split()
        subprocess.run([python, "-m", "pip", "install", "--quiet", *options, "-r", requirements], check=True)
        ready.write_text(wanted)
    return python


@pytest.mark.parametrize(("where", "reader", "name", "options", "origin", "tolerance"), READERS)
def test_the_same_places_and_rotations(
    where: str,
    reader: str,
    name: str,
    options: tuple[str, ...],
    origin: float | tuple[float, float, float],
    tolerance: float,
    particles: Particles,
    tmp_path: Path,
) -> None:
    path = tmp_path / f"particles{ENDINGS[name]}"
    catalogue.write(path, particles, FORMATS[name])
    file = path / "copick_config.json" if name == "copick" else path
    command = [str(part) for part in (environment(where), HERE / "readers.py", reader, file, *options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    places, expected = np.array(seen["places"]), particles.positions() + particles.shifts()
    if name == "copick":
        places = places / VOXEL_SIZE
    first, second = np.argsort(expected[:, 0]), np.argsort(places[:, 0])
    np.testing.assert_allclose(places[second] - np.array(origin), expected[first], atol=tolerance)
    if seen["matrices"] is not None:
        rotations = particles.rotations()
        assert rotations is not None
        turned = Rotation.from_matrix(np.array(seen["matrices"]))[second]
        assert np.rad2deg((turned.inv() * rotations[first]).magnitude()).max() < 1e-4


@pytest.mark.parametrize(
    ("where", "reader", "name"),
    [
        ("ome-zarr", "ome_zarr", "volume.zarr"),
        ("ome-zarr", "zipped_zarr", "volume.ozx"),
        ("field", "em_volume", "volume.em"),
    ],
)
def test_the_same_voxels(where: str, reader: str, name: str, tmp_path: Path) -> None:
    array = noise(70, 130, 129)
    path = tmp_path / name
    volumes.write(path, volume_of(array), volumes.for_writing(path))
    command = [str(part) for part in (environment(where), HERE / "readers.py", reader, path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = np.load(tmp_path / "volume.npz")
    np.testing.assert_array_equal(seen["level0"], array)
    if reader == "ome_zarr":
        # z, y, x: the voxel of level k is 2^k times as large, its centre (2^k - 1) / 2 voxels further
        factors = 2.0 ** np.arange(3)[:, None]
        np.testing.assert_allclose(seen["scale"], 2.5 * factors * np.ones(3))
        np.testing.assert_allclose(seen["translation"], [30.5, -20, 10] + 2.5 * (factors - 1) / 2)
        blocks = array[:, :, :128].reshape(35, 2, 65, 2, 64, 2).mean(axis=(1, 3, 5))
        np.testing.assert_allclose(seen["level1"][:, :, :64], blocks, atol=2e-6)
