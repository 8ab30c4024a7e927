"""The main job, through real processes: a tomogram goes in, sorted and averaged particles come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile

from cryofleet.client import Artifact
from tests.platform import SMALL_DISCOVERY, Platform


@pytest.fixture(scope="module")
def discovery(platform: Platform, scene: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of outputs of a whole run from the command line."""
    folder = tmp_path_factory.mktemp("discovery")
    settings = [f"--set={name}={value}" for name, value in SMALL_DISCOVERY.items()]
    done = platform.command(
        "run", "discover", "--tomogram", scene["tomogram"].uri, f"--set=truth={scene['truth'].uri}",
        "--out", str(folder), *settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_outputs_are_what_other_programs_read(discovery: Path) -> None:
    particles = starfile.read(discovery / "particles.star", always_dict=True)["particles"]
    metrics = json.loads((discovery / "metrics.json").read_text())
    assert len(particles) == metrics["picks"] > 0
    averages = sorted(discovery.glob("average_*.mrc"))
    assert len(averages) == SMALL_DISCOVERY["averages"]
    for path in averages:
        assert mrcfile.validate(path)
        with mrcfile.open(path) as volume:
            assert volume.data.shape == (16, 16, 16)
            assert float(volume.voxel_size.x) == pytest.approx(15.0, rel=1e-5)
            assert np.isfinite(volume.data).all()
            assert float(volume.data.std()) > 0


def test_picks_find_the_complexes(discovery: Path) -> None:
    metrics = json.loads((discovery / "metrics.json").read_text())
    assert metrics["f1"] > 0.6


def test_metrics_say_what_each_step_took(discovery: Path) -> None:
    steps = json.loads((discovery / "metrics.json").read_text())["steps"]
    services = {step["operation"].split(".")[0] for step in steps}
    assert services == {"io", "picking", "learning", "alignment"}
    assert all(step["state"] == "succeeded" for step in steps)
    assert all(step["seconds"] >= 0 for step in steps)


def test_the_report_stands_alone(discovery: Path) -> None:
    page = (discovery / "report.html").read_text()
    assert "data:image/" in page
    assert "alignment.Average" in page, "what each step took belongs into the report"
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_the_trained_model_is_listed_and_its_card_shown(platform: Platform, discovery: Path) -> None:
    models = [model for model in platform.json("models") if model["operation"] == "learning.TrainAutoencoder"]
    assert models
    assert {model["architecture"] for model in models} == {"autoencoder3d"}
    model = models[0]
    assert model["training_set_size"] > 0
    assert model["uri"] in platform.command("models").stdout
    shown = platform.command("models", "show", model["uri"]).stdout
    assert shown.startswith("# autoencoder3d")
    assert f"- Subtomograms trained on: {model['training_set_size']}" in shown.splitlines()
    missing = platform.command("models", "show", model["uri"] + "s")
    assert missing.returncode == 2
    assert "is no model" in missing.stderr


def test_a_second_run_is_answered_from_the_store(platform: Platform, scene: dict[str, Any], discovery: Path) -> None:
    with platform.client() as client:
        run = client.run("discover", tomogram=scene["tomogram"], truth=scene["truth"], **SMALL_DISCOVERY).wait()
        for step in run.record.steps:
            assert step.tasks_cached == step.tasks_done == step.tasks_total > 0, step.id
        star = run.outputs["particles"]
        assert isinstance(star, Artifact)
        assert star.read() == (discovery / "particles.star").read_bytes()


def test_the_client_gives_a_dataframe(platform: Platform, scene: dict[str, Any], discovery: Path) -> None:
    with platform.client() as client:
        run = client.run("discover", tomogram=scene["tomogram"], truth=scene["truth"], **SMALL_DISCOVERY).wait()
        frame = run.outputs["particles"].to_dataframe()
    assert "rlnTomoName" in frame.columns
    assert len(frame) == len(starfile.read(discovery / "particles.star", always_dict=True)["particles"])


def test_provenance_reaches_the_raw_data(platform: Platform, discovery: Path) -> None:
    run = platform.json("runs")[0]
    report = platform.json("show", run["id"])["outputs"]["report"]
    text = json.dumps(platform.json("provenance", report))
    for operation in ("io.Report", "alignment.Average", "picking.DifferenceOfGaussians", "io.Ingest"):
        assert operation in text
    for operation in ("simulation.Reconstruct", "simulation.SimulateTiltSeries", "simulation.SimulateScene"):
        assert operation in text, "the tomogram itself was simulated, and provenance says so"


def test_a_real_tomogram(platform: Platform, shared_data: Path, tmp_path: Path) -> None:
    """The microtubule of 13 protofilaments: picks lie on its wall."""
    with platform.client() as client:
        run = client.run(
            "discover",
            tomogram=shared_data / "real" / "microtubule_13pf.tif",
            voxel_size_angstrom=10.52,
            contrast="light",
            particle_diameter_angstrom=80,
            box_size_voxels=16,
            autoencoder_binning=1,
            max_epochs=2,
            clusters=2,
            averages=1,
            iterations=2,
        ).wait()
        assert run.state == "succeeded"
        picks = run.outputs["picks_table"].to_dataframe()
        volume = run.outputs["tomogram"].to_array()
    assert volume.shape == (36, 206, 94)
    assert len(picks) > 20
    # Tubulin is dense: the tomogram is brighter at picks than elsewhere.
    at_picks = volume[picks.z.astype(int), picks.y.astype(int), picks.x.astype(int)]
    assert at_picks.mean() > volume.mean() + 0.5 * volume.std()
