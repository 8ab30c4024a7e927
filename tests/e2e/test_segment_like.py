"""From a DUAL model to classes and averages in somebody's tomogram, through real processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cryofleet.storage import Store
from services.learning import dual
from tests.contract.learning_models import put_weights
from tests.platform import Platform

VOXEL = 15.0
GLOBULE = "two-subunit-globule"
STRUCTURES = [{"name": "double-ring", "count": 10}, {"name": GLOBULE, "count": 8}]


def put_simulator_without_noise(store: Store) -> str:
    """A DUAL model whose tomograms are the densities themselves, so that a few epochs are enough to learn from them."""
    model = dual.Dual(16, 2, torch.Generator().manual_seed(0))
    for output in (model.structural.output, model.noise.output):
        torch.nn.init.zeros_(output.weight)
        assert output.bias is not None
        torch.nn.init.zeros_(output.bias)
    with torch.no_grad():
        model.structural.output.weight[0, -1, 1, 1, 1] = 1
    config = dual.config(16, 2) | {
        "voxel_size_angstrom": VOXEL,
        "tomogram_contrast": "light",
        "tomogram_tilt_degrees": [-60.0, 60.0],
        "transposed_pair": False,
    }
    return put_weights(store, "simulator-without-noise", model, config)


def test_structures_of_scenes_are_found_in_a_tomogram(platform: Platform, scene: dict[str, Any]) -> None:
    with platform.client() as client:
        run = client.run(
            "segment-like",
            tomograms=[scene["clean"]],
            model=put_simulator_without_noise(Store.open(platform.settings)),
            contrast="light",
            target_voxel_size_angstrom=VOXEL,
            seeds=[11, 12],
            size_x=64,
            size_y=64,
            size_z=32,
            structures=STRUCTURES,
            vesicles=[],
            patch_size_voxels=16,
            patches=90,
            channels=6,
            max_epochs=8,
            batch_size=3,
            learning_rate=0.004,
            tile_size_voxels=64,
            box_size_voxels=16,
            iterations=2,
        ).wait()
        outputs = run.outputs
        labels = outputs["labels"][0].to_array()
        truth = scene["labels"].to_array()
        picks = outputs["particles"][0].to_dataframe()
        complexes = scene["truth"].to_dataframe()
        averages = [average.to_array() for average in outputs["averages"] if average is not None]
        page = outputs["report"][0].read().decode()
        averages_page = outputs["averages_report"].read().decode()
    names = [structure["name"] for structure in STRUCTURES]
    assert outputs["names"] == names
    assert len(outputs["simulated"]) == 2
    assert labels.shape == truth.shape
    dice = [2 * ((labels == n) & (truth == n)).sum() / ((labels == n).sum() + (truth == n).sum()) for n in (1, 2)]
    # So few steps teach the larger of the two alone, but for certain: all is without noise.
    assert dice[1] > 0.5
    globules = complexes[complexes["class_name"] == GLOBULE][["x", "y", "z"]].to_numpy()
    found = picks[picks["class_name"] == GLOBULE][["x", "y", "z"]].to_numpy()
    distances = np.linalg.norm(globules[:, None] - found[None], axis=2).min(axis=1)
    assert (distances * VOXEL < 60).sum() >= 6, "of eight"
    assert set(picks["class_name"]) <= set(names)
    assert outputs["counts"][0] == [(picks["class_name"] == name).sum() for name in names]
    assert sum(outputs["members"]) == len(picks)
    assert len(averages) == sum(count > 0 for count in outputs["members"])
    assert all(average.shape == (16, 16, 16) and average.std() > 0 for average in averages)
    assert "Labels" in page
    assert "Averages of the classes" in averages_page
