"""DUAL through real processes: a training set in the style of a user's tomogram, denoising, and the missing wedge."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cryofleet.storage import Store
from cryofleet.volumes import open_volume
from tests.platform import Platform

SMALL: dict[str, Any] = {
    "target_voxel_size_angstrom": 15,
    "box_size_voxels": 16,
    "channels": 2,
    "max_epochs": 1,
    "batch_size": 32,
}
SCENES: dict[str, Any] = {
    "size_x": 64,
    "size_y": 64,
    "size_z": 32,
    "structures": [{"name": "double-ring", "count": 4}],
    "vesicles": [],
}


@pytest.fixture(scope="module")
def simulated(platform: Platform, scene: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a run of simulate-like."""
    arguments = {"tomograms": [scene["tomogram"]], "scenes": [1], "seeds": [2, 3], **SMALL, **SCENES}
    with platform.client() as client:
        estimate = client.estimate("simulate-like", **arguments)
        assert {step.id for step in estimate.steps} >= {"grand_model", "train", "made.simulate"}
        return client.run("simulate-like", **arguments).wait().outputs


def test_a_labelled_training_set_in_the_style_of_a_tomogram(platform: Platform, simulated: dict[str, Any]) -> None:
    store = Store.open(platform.settings)
    assert simulated["counts"] == [4, 4]
    made = [each for row in simulated["simulated"] for each in row]
    assert len(made) == len(simulated["labels"]) == len(simulated["truths"]) == 2
    for tomogram, labels, truth in zip(made, simulated["labels"], simulated["truths"], strict=True):
        info = open_volume(store, tomogram.uri).info
        assert (info.shape, info.voxel_size_angstrom, info.contrast) == ((32, 64, 64), 15, "dark")
        assert (info.tilt_min_degrees, info.tilt_max_degrees) == (-60, 60)
        assert labels.to_array().shape == info.shape
        assert set(truth.to_dataframe()["class_name"]) == {"double-ring"}
    first, second = (tomogram.to_array() for tomogram in made)
    assert np.abs(first - second).max() > 0
    page = simulated["report"].read().decode()
    assert "reconstruction" in page
    assert base64.b64encode(simulated["picture"].read()).decode() in page


def test_denoised_by_the_same_model(platform: Platform, scene: dict[str, Any], simulated: dict[str, Any]) -> None:
    with platform.client() as client:
        run = client.run(
            "denoise",
            model=simulated["model"],
            tomograms=[scene["tomogram"]],
            target_voxel_size_angstrom=15,
            strength=0.5,
            uncertainty=True,
        ).wait()
    (found,) = (tomogram.to_array() for tomogram in run.outputs["tomogram"])
    assert found.shape == scene["tomogram"].to_array().shape
    (comparison,) = run.outputs["comparison"]
    assert comparison.to_json()["strength"] == 0.5
    (uncertainty,) = run.outputs["uncertainty"]
    assert uncertainty.to_array().min() > 0
    assert "Denoised" in run.outputs["report"][0].read().decode()


def test_trained_on_density_maps_of_ones_own_and_on_itself_turned(
    platform: Platform, scene: dict[str, Any], tmp_path: Path
) -> None:
    files = {name: tmp_path / f"{name}.mrc" for name in ("tomogram", "clean")}
    for name, path in files.items():
        scene[name].save(path)
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    done = platform.command(
        "run", "train-dual", "--tomogram", str(files["tomogram"]), f'--set=densities=["{files["clean"]}"]',
        "--set=scenes=[]", *settings, "--out", str(tmp_path / "dual"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "dual" / "training.json").read_text())
    with platform.client() as client:
        turned = client.run("compensate-wedge", tomograms=[scene["tomogram"]], **SMALL).wait()
    assert metrics["tomogram_subvolumes"] == metrics["density_subvolumes"] == 3 * 7 * 7
    (compensated,) = turned.outputs["tomogram"]
    info = open_volume(Store.open(platform.settings), compensated.uri).info
    assert (info.tilt_min_degrees, info.tilt_max_degrees) == (-90, 90)
    measured = scene["tomogram"].to_array()
    # Most of it is as measured; what is new lies in the wedge.
    assert 0.7 < np.corrcoef(compensated.to_array().ravel(), measured.ravel())[0, 1] < 1
