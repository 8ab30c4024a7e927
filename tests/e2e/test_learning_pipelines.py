"""Mining, weak segmentation, classification and annotation through real processes, as users run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from numpy.typing import NDArray

from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, write_subtomograms
from tests.platform import Platform
from tests.unit.learning.shapes import two_kinds

FINDING: dict[str, Any] = {
    "particle_diameter_angstrom": 200,
    "smoothing_angstrom": 15,
    "min_distance_angstrom": 100,
    "threshold": 0,
    "box_size_voxels": 16,
    "shard_size": 32,
}
SIDE, VOXEL = 16, 15.0


@pytest.fixture(scope="module")
def features(platform: Platform, scene: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a run of mine-features."""
    arguments = {"tomogram": scene["tomogram"], "max_epochs": 4, "clusters": 5, **FINDING}
    with platform.client() as client:
        estimate = client.estimate("mine-features", **arguments)
        assert {step.id for step in estimate.steps} >= {"ingest", "pick", "extract", "train", "cluster", "report"}
        return client.run("mine-features", **arguments).wait().outputs


def test_features_are_mined_into_a_gallery(features: dict[str, Any]) -> None:
    sizes = [int(size) for size in features["cluster_sizes"]]
    particles = features["particles"].to_dataframe()
    assert sizes == np.bincount(particles["class_id"], minlength=5).tolist() == sorted(sizes, reverse=True)
    assert sum(sizes) == features["count"] == len(particles) > 20
    assert features["centres"].to_array().shape == (5, SIDE, SIDE, SIDE)
    page = features["report"].read().decode()
    captions = re.findall(r"<b>Cluster (\d+)</b>([\d,]+) particle", page)
    assert captions == [(str(number), str(size)) for number, size in enumerate(sizes, start=1)]
    assert f"All {len(particles)} particles by their codes" in page
    assert "validation loss" in page


def test_chosen_clusters_segment_tomograms(platform: Platform, scene: dict[str, Any], features: dict[str, Any]) -> None:
    with platform.client() as client:
        run = client.run(
            "segment-weakly",
            subtomograms=features["subtomograms"],
            model=features["model"],
            particles=features["particles"],
            tomograms=[scene["tomogram"]],
            groups=["first:1", "others:2-3"],
            max_epochs=3,
            batch_size=8,
            tile_size_voxels=48,
            near_label=1,
            **FINDING,
        ).wait()
        outputs = run.outputs
        shape = scene["tomogram"].to_array().shape
        labels, whole = (outputs[name][0].to_array() for name in ("labels", "whole_labels"))
        particles = outputs["particles"][0].to_dataframe()
        page = outputs["report"][0].read().decode()
        near = outputs["enrichment"][0].to_json()
        stack = outputs["segmentations"][0].to_array()
    assert outputs["names"] == ["first", "others"]
    # The same tomogram is picked and assigned as before.
    sizes = [int(size) for size in features["cluster_sizes"]]
    assert particles["class_id"].value_counts().to_dict() == {1: sizes[0], 2: sizes[1] + sizes[2]}
    assert len(particles) == len(stack) == outputs["placed"][0]
    assert labels.shape == whole.shape == shape
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert (labels > 0).any()
    # Each box's labels are in the map, but for those that others lie over.
    row = int(particles["score"].to_numpy().argmax())
    x, y, z = particles[["x", "y", "z"]].to_numpy(int)[row] - SIDE // 2
    box = stack[row]
    assert np.array_equal(labels[z : z + SIDE, y : y + SIDE, x : x + SIDE][box > 0], box[box > 0])
    assert "Labels" in page
    assert {row["class"] for row in near["classes"]} <= set(range(1, 6))
    assert near["particles_near"] > 0


def put_boxes(platform: Platform, name: str, boxes: NDArray[np.float32], kinds: NDArray[np.int64]) -> tuple[str, str]:
    """A set of subtomograms in dark contrast, and the table of their classes."""
    store = Store.open(platform.settings)
    writer = ResultWriter(store, "default", name * 64)
    names = np.array(["ball", "shell"], object)[kinds]
    table = Particles.from_positions(
        np.full((len(boxes), 3), 40.0), VOXEL, "t", class_id=kinds.astype(np.int32), class_name=names
    )
    info = VolumeInfo((SIDE,) * 3, VOXEL, "dark", -60, 60)
    uri = write_subtomograms(writer, store, "boxes", -boxes, info, table)
    truth = writer.put("truth.parquet", table.to_parquet())
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0)
    return uri, truth


def test_classes_are_learnt_found_and_adapted(platform: Platform, scene: dict[str, Any]) -> None:
    known, _ = put_boxes(platform, "a", *two_kinds(48, SIDE, 0))
    further, truth = put_boxes(platform, "b", *two_kinds(24, SIDE, 1))
    training: dict[str, Any] = {
        "subtomograms": known,
        "network": "cb3d",
        "max_epochs": 30,
        "patience_epochs": 30,
        "batch_size": 8,
        "validation_fraction": 0.25,
        "rotations": "none",
        "learning_rate": 0.003,
    }
    with platform.client() as client:
        run = client.run("classify", target=further, truth=truth, adapt=True, adaptation_epochs=1, **training).wait()
        outputs = run.outputs
        found = outputs["particles"].to_dataframe()
        page = outputs["report"].read().decode()
        # The classifier is there already; now for the picks of a tomogram.
        picks = {"tomogram": scene["tomogram"], "picks": scene["truth"], "box_size_voxels": SIDE}
        picked = client.run("classify", **picks, **training).wait().outputs
        classes = picked["particles"].to_dataframe()
        complexes = scene["truth"].to_dataframe()
    assert outputs["names"] == ["ball", "shell"]
    assert outputs["accuracy"] >= 0.9
    assert (found["class_id"].to_numpy() == two_kinds(24, SIDE, 1)[1]).mean() == pytest.approx(outputs["accuracy"])
    assert 0 <= outputs["adapted_accuracy"] <= 1
    assert outputs["adapted_model"].uri != outputs["model"].uri
    assert "Classes of 24 subtomograms" in page
    assert page.count('<table class="confusion">') >= 2
    assert picked["model"].uri == outputs["model"].uri
    assert classes["id"].tolist() == complexes["id"].tolist()
    assert set(classes["class_name"]) <= {"ball", "shell"}


def test_painted_features_are_found_in_tomograms(platform: Platform, scene: dict[str, Any], tmp_path: Path) -> None:
    tomogram = scene["tomogram"].to_array()
    truth = scene["truth"].to_dataframe()
    painted = np.zeros(tomogram.shape, np.float32)
    y, x = np.indices(tomogram.shape[1:])
    for section in (16, 24, 32):
        painted[section] = 2
        for px, py, pz in truth[["x", "y", "z"]].to_numpy():
            if abs(pz - section) < 5:
                painted[section][(x - px) ** 2 + (y - py) ** 2 < 25] = 1
    path = tmp_path / "painted.mrc"
    with mrcfile.new(path) as file:
        file.set_data(painted)
        file.voxel_size = 15.0
    with platform.client() as client:
        run = client.run(
            "annotate",
            painted=scene["tomogram"],
            tomograms=[scene["tomogram"]],
            features=[{"name": "complex", "painted_uris": [str(path)]}],
            patch_size_voxels=32,
            max_epochs=4,
            threshold=0.3,
        ).wait()
        outputs = run.outputs
        labels = outputs["labels"][0].to_array()
        page = outputs["report"][0].read().decode()
    assert outputs["names"] == [["complex"]]
    assert labels.shape == tomogram.shape
    assert set(np.unique(labels)) <= {0, 1}
    assert outputs["voxels"] == [[int((labels == 1).sum())]]
    assert "Features found as painted" in page
