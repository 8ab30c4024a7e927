"""Simulation pipelines and the reconstruction of a user's tilt series, through real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mrcfile
import numpy as np

from cryofleet.formats.tilt_series import read_mdoc
from cryofleet.storage import Store
from cryofleet.volumes import open_subtomograms
from tests.platform import Platform

SMALL: dict[str, Any] = {
    "size_x": 64,
    "size_y": 64,
    "size_z": 32,
    "voxel_size_angstrom": 15.0,
    "structures": [{"name": "double-ring", "count": 4}],
    "tilt_step_degrees": 6,
}


def test_a_dataset_has_one_tomogram_for_each_seed(platform: Platform) -> None:
    with platform.client() as client:
        outputs = client.run("simulate-dataset", seeds=[3, 5], halves=True, **SMALL).wait().outputs
        alone = client.run("simulate-tomogram", seed=5, halves=True, **SMALL).wait()
    assert len(outputs["tomograms"]) == len(outputs["truths"]) == len(outputs["even"]) == 2
    assert outputs["counts"] == [4, 4]
    first, second = (tomogram.read() for tomogram in outputs["tomograms"])
    assert first != second
    # the same seed is the same work, which is not done twice
    assert second == alone.outputs["tomogram"].read()
    assert all(step.tasks_cached == step.tasks_total for step in alone.record.steps)


def test_subtomograms_are_made_in_shards(platform: Platform) -> None:
    arguments = {
        "structures": [{"name": "double-ring", "count": 5}, {"name": "hexameric-ring", "count": 4}],
        "box_size_voxels": 20,
        "voxel_size_angstrom": 12.0,
        "snr": 0.5,
        "tilt_step_degrees": 10,
    }
    with platform.client() as client:
        one, several = (
            client.run("simulate-subtomograms", shard_size=size, **arguments).wait().outputs for size in (100, 4)
        )
    assert one["count"] == several["count"] == 9
    store = Store.open(platform.settings)
    sets = [open_subtomograms(store, outputs["subtomograms"].uri) for outputs in (one, several)]
    np.testing.assert_array_equal(sets[0].read(0, 9), sets[1].read(0, 9))
    assert len(sets[1].shards) == 3
    assert sorted(sets[1].particles().table["class_name"]) == ["double-ring"] * 5 + ["hexameric-ring"] * 4


def test_a_users_tilt_series(platform: Platform, tmp_path: Path) -> None:
    """What the simulation wrote goes in as the files that another program would have left."""
    with platform.client() as client:
        made = client.run("simulate-tomogram", **SMALL).wait().outputs
        stack, tlt, mdoc = tmp_path / "mine.st", tmp_path / "mine.tlt", tmp_path / "mine.mdoc"
        stack.write_bytes(made["tilt_series"].read())
        tlt.write_bytes(made["tlt"].read())
        mdoc.write_bytes(made["mdoc"].read())
        assert len(read_mdoc(mdoc.read_bytes(), "mine.mdoc")) == 21
    for tilts in (tlt, mdoc):
        folder = tmp_path / tilts.suffix[1:]
        done = platform.command(
            "run", "reconstruct", f"--set=tilt_series={stack}", f"--set=tilts={tilts}", "--set=size_z=32",
            "--out", str(folder),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with mrcfile.open(folder / "tomogram.mrc") as file:
            assert file.data.shape == (32, 64, 64)
            np.testing.assert_allclose(file.data, made["tomogram"].to_array(), rtol=1e-4, atol=1e-6)
