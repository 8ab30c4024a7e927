"""The pipelines that prepare a tomogram and that say what it is, through real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cryofleet.storage import Store
from cryofleet.volumes import open_volume
from tests.platform import Platform

SCENE: dict[str, Any] = {
    "size_x": 96,
    "size_y": 96,
    "size_z": 48,
    "voxel_size_angstrom": 15.0,
    "structures": [{"name": "double-ring", "count": 8}],
    "tilt_step_degrees": 4,
    "snr": 0.5,
    "halves": True,
}


@pytest.fixture(scope="module")
def files(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tomogram and its halves, as another program would have left them."""
    folder = tmp_path_factory.mktemp("tomograms")
    with platform.client() as client:
        made = client.run("simulate-tomogram", **SCENE).wait().outputs
        paths = {name: folder / f"{name}.mrc" for name in ("tomogram", "even", "odd")}
        for name, path in paths.items():
            path.write_bytes(made[name].read())
    return paths


def test_preprocess(platform: Platform, files: dict[str, Path]) -> None:
    with platform.client() as client:
        outputs = client.run(
            "preprocess", tomograms=[files["tomogram"]], factor=2, filter="anisotropic_diffusion", invert=True
        ).wait().outputs  # fmt: skip
    volume = open_volume(Store.open(platform.settings), outputs["tomogram"][0].uri)
    assert volume.info.shape == (24, 48, 48)
    assert volume.info.voxel_size_angstrom == outputs["voxel_size_angstrom"][0] == 30
    assert volume.info.contrast == "light"
    values = volume.read()
    assert np.std(values) == pytest.approx(1, rel=1e-4)
    # what is dense is light now
    assert np.mean(values**3) > 0


def test_estimate(platform: Platform, files: dict[str, Path]) -> None:
    with platform.client() as client:
        outputs = client.run(
            "estimate", **files, tilt_step_degrees=4
        ).wait().outputs  # fmt: skip
    assert outputs["tilt_min_degrees"] == pytest.approx(-60, abs=2)
    assert outputs["tilt_max_degrees"] == pytest.approx(60, abs=2)
    assert outputs["tilt_axis_degrees"] == pytest.approx(0, abs=2)
    assert outputs["snr_of_halves"] == pytest.approx(0.5, rel=0.15)
    assert b"stated tilt min" in outputs["report"].read().lower()
