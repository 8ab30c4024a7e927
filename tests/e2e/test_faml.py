"""FAML across tasks, through real processes: the pipeline gives what one process does, and tells structures apart."""

from __future__ import annotations

import json

import numpy as np

from cryofleet.artifacts import ResultWriter
from cryofleet.numerics.transfer import wedge_transfer
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, write_subtomograms
from services.alignment import faml
from services.alignment.align import Search
from services.alignment.likelihood_model import Task
from tests.platform import Platform
from tests.unit.alignment.samples import asymmetric, sample

BOX, VOXEL, COUNT = 24, 12.0, 13
WEDGE = (-60.0, 60.0)


def test_shards_on_a_platform_give_what_one_process_gives(platform: Platform) -> None:
    data = sample(asymmetric(3), BOX, COUNT, 0.5, wedge=WEDGE)
    store = Store.open(platform.settings)
    writer = ResultWriter(store, "default", "7" * 64)
    table = Particles.from_positions(np.full((COUNT, 3), 40.0), VOXEL, "t", id=np.arange(100, 100 + COUNT))
    info = VolumeInfo((BOX, BOX, BOX), VOXEL, "dark", *WEDGE)
    subtomograms = write_subtomograms(writer, store, "boxes", -data.particles, info, table)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": subtomograms}, seconds=0)

    with platform.client() as client:
        run = client.run(
            "faml",
            subtomograms=subtomograms,
            particle_diameter_angstrom=220,
            low_pass_angstrom=40,
            max_shift_voxels=2,
            iterations=3,
            shard_size=4,
            seed=3,
        ).wait()
        outputs = run.outputs
        tasks = {step.id: step.tasks_total for step in run.record.steps}
        found = outputs["averages"][0].to_array()
        history = json.loads(outputs["history"].read())
        particles = outputs["particles"].to_dataframe()
        page = outputs["report"].read().decode()
    assert tasks["first"] == 5, "four shards, and the maximisation that adds them up"
    assert outputs["iterations"] == 3
    assert outputs["class_sizes"] == [COUNT]
    assert "FAML of 13 subtomograms" in page

    search = Search(BOX, VOXEL, wedge_transfer(BOX, *WEDGE), max_shift_voxels=2.0, low_pass_angstrom=40.0)
    task = Task(search, 220.0, seed=3)
    whole = faml.faml(
        task,
        faml.Particles(
            lambda first, count: -data.particles[first : first + count],
            np.arange(COUNT),
            faml.random_halves(COUNT, 3),
            -1.0,
        ),
        iterations=3,
    )
    np.testing.assert_allclose(found, whole.volumes[0], atol=1e-5 * np.abs(whole.volumes[0]).max())
    np.testing.assert_allclose([h["sizes"] for h in history["iterations"]], COUNT)
    assert particles["half"].tolist() == (whole.halves + 1).tolist()
