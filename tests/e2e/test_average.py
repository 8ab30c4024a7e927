"""Averaging across tasks, through real processes: the pipeline gives what one process does."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from cryofleet.artifacts import ResultWriter
from cryofleet.numerics.rotations import angular_distance_degrees
from cryofleet.numerics.transfer import wedge_transfer
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, write_subtomograms
from services.alignment.align import Search
from services.alignment.average import average
from services.alignment.average_model import Options
from services.alignment.rejection import Rejection
from tests.platform import Platform
from tests.unit.alignment.samples import asymmetric, sample

BOX, VOXEL, COUNT = 24, 12.0, 11
WEDGE = (-60.0, 60.0)


def test_shards_on_a_platform_give_what_one_process_gives(platform: Platform) -> None:
    data = sample(asymmetric(3), BOX, COUNT, 0.5, wedge=WEDGE)
    store = Store.open(platform.settings)
    writer = ResultWriter(store, "default", "5" * 64)
    table = Particles.from_positions(np.full((COUNT, 3), 40.0), VOXEL, "t", id=np.arange(100, 100 + COUNT))
    info = VolumeInfo((BOX, BOX, BOX), VOXEL, "dark", *WEDGE)
    subtomograms = write_subtomograms(writer, store, "boxes", -data.particles, info, table)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": subtomograms}, seconds=0)

    with platform.client() as client:
        run = client.run(
            "average",
            subtomograms=subtomograms,
            iterations=2,
            max_candidates=10,
            reject_share=0.2,
            shard_size=4,
            seed=3,
        ).wait()
        outputs = run.outputs
        tasks = {step.id: step.tasks_total for step in run.record.steps}
        found = outputs["average"].to_array()
        curves = json.loads(outputs["fsc"].read())
        page = outputs["report"].read().decode()
    assert tasks["first"] == 4, "three shards, and the update that adds them up"
    assert outputs["iterations"] == 2

    whole = average(
        lambda first, count: -data.particles[first : first + count],
        COUNT,
        Search(BOX, VOXEL, wedge_transfer(BOX, *WEDGE), max_candidates=10),
        iterations=2,
        contrast="dark",
        seed=3,
        options=Options(rejection=Rejection(lowest_share=0.2)),
        names=np.arange(100, 100 + COUNT),
    )
    # Single precision, and sums added up in another order.
    np.testing.assert_allclose(found, whole.average, atol=1e-3 * np.abs(whole.average).max())
    kept = np.flatnonzero(whole.kept)
    particles = Particles.from_parquet(store.get(outputs["particles"].uri))
    assert particles.table["id"].tolist() == (100 + kept).tolist()
    rotations = particles.rotations()
    assert rotations is not None
    assert angular_distance_degrees(whole.poses.rotations[kept], rotations).max() < 0.1
    expected: dict[str, Any] = whole.table(np.arange(100, 100 + COUNT))
    np.testing.assert_allclose(curves["fsc"], expected["fsc"], atol=1e-3)
    assert [r["id"] for r in curves["rejected"]] == (100 + np.flatnonzero(~whole.kept)).tolist()
    rejected = Particles.from_parquet(store.get(outputs["rejected"].uri))
    assert len(rejected) == outputs["count"] - 9 + 2 == 2
    assert "Average of 9 subtomograms" in page
