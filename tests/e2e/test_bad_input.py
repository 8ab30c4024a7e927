"""Bad input gives one clear line, a non-zero exit, and leaves nothing half-written."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

from cryofleet.errors import Failure
from cryofleet.particles import Particles
from tests.platform import Platform


def _volume(path: Path, voxel_size_angstrom: float = 10.0) -> Path:
    data = np.random.default_rng(0).normal(size=(24, 32, 32)).astype(np.float32)
    with mrcfile.new(path) as file:
        file.set_data(data)
        file.voxel_size = voxel_size_angstrom
    return path


def _text(folder: Path) -> Path:
    path = folder / "notes.mrc"
    path.write_text("dear diary, today the microscope was down again\n" * 50)
    return path


def _truncated(folder: Path) -> Path:
    path = _volume(folder / "cut.mrc")
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def _spoilt(folder: Path) -> Path:
    path = _volume(folder / "spoilt.mrc")
    data = bytearray(path.read_bytes())
    struct.pack_into("<f", data, 1024 + 4 * 5000, float("nan"))
    path.write_bytes(data)
    return path


def _huge(folder: Path) -> Path:
    path = _volume(folder / "huge.mrc")
    data = bytearray(path.read_bytes())
    struct.pack_into("<3i", data, 0, 10**9, 10**9, 10**9)
    path.write_bytes(data)
    return path


CASES = {
    "text": (_text, "notes.mrc"),
    "truncated": (_truncated, "cut.mrc"),
    "huge": (_huge, "huge.mrc"),
    "no-voxel-size": (lambda folder: _volume(folder / "novoxel.mrc", 0.0), "voxel_size_angstrom"),
    "nan": (_spoilt, "spoilt.mrc"),
}


def _stored(platform: Platform) -> set[str]:
    """Everything in the store but uploads."""
    store = Path(platform.settings.store.removeprefix("file://"))
    manifests = [path for path in store.rglob("manifest.json") if '"io.Upload"' not in path.read_text()]
    return {str(path.parent) for path in manifests}


def _loose_files(platform: Platform) -> set[Path]:
    """Files in the store that no manifest names: what a broken operation would leave."""
    store = Path(platform.settings.store.removeprefix("file://"))
    return {
        path
        for path in store.rglob("*")
        if path.is_file() and "_work" not in path.parts and not (path.parent / "manifest.json").exists()
    }


@pytest.mark.parametrize("name", CASES)
def test_a_bad_volume(platform: Platform, tmp_path: Path, name: str) -> None:
    make, expected = CASES[name]
    path = make(tmp_path)
    before, loose = _stored(platform), _loose_files(platform)
    done = platform.command("call", "io.Ingest", f"source_uri={path}")
    assert done.returncode in (2, 7), (done.returncode, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert expected in lines[0]
    assert "Traceback" not in done.stderr
    assert _stored(platform) == before
    assert _loose_files(platform) == loose


def test_a_bad_volume_fails_the_run_and_names_step_and_file(platform: Platform, tmp_path: Path) -> None:
    done = platform.command("run", "discover", "--tomogram", str(_truncated(tmp_path)))
    assert done.returncode == 1
    error = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "ingest" in error
    assert "cut.mrc" in error


def test_an_empty_particle_list(platform: Platform, scene: dict[str, Any], tmp_path: Path) -> None:
    with platform.client() as client:
        table = Particles.from_parquet(scene["truth"].read())
        empty = tmp_path / "empty.parquet"
        empty.write_bytes(table.select(np.zeros(len(table.table), dtype=bool)).to_parquet())
        with pytest.raises(Failure, match=r"empty\.parquet") as caught:
            client.call("picking.Extract", tomogram_uri=scene["tomogram"].uri, particles_uri=empty, box_size_voxels=16)
    assert caught.value.status == "FAILED_PRECONDITION"


def test_a_box_larger_than_the_tomogram(platform: Platform, scene: dict[str, Any]) -> None:
    with platform.client() as client, pytest.raises(Failure, match="64") as caught:
        client.call(
            "picking.Extract",
            tomogram_uri=scene["tomogram"].uri,
            particles_uri=scene["truth"].uri,
            box_size_voxels=64,
        )
    assert caught.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "s3://somewhere/else.mrc", "STORE/../../etc/passwd"])
def test_a_uri_outside_the_roots(platform: Platform, uri: str) -> None:
    done = platform.command("call", "io.Ingest", f"source_uri={uri.replace('STORE', platform.settings.store)}")
    assert done.returncode == 6, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "passwd" in done.stderr or "somewhere" in done.stderr


def test_a_pipeline_with_an_unknown_operation(platform: Platform, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nhelp: A pipeline.\ninputs:\n  tomogram: {kind: file, help: a tomogram}\nsteps:\n"
        '  - id: pick\n    op: picking.DiferenceOfGaussians\n    with: {tomogram_uri: "${tomogram}"}\n'
    )
    done = platform.command("run", str(path), "--tomogram", "file:///nothing.mrc")
    assert done.returncode == 2
    assert "mine.yaml:7" in done.stderr
    assert "picking.DifferenceOfGaussians" in done.stderr, "the nearest name is offered"
