"""Mining through real processes: structures are told apart without references, and each particle is accounted for."""

from __future__ import annotations

import numpy as np

from benchmarks.mining import f1
from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, write_subtomograms
from tests.platform import Platform
from tests.unit.alignment.samples import asymmetric, sample

BOX, VOXEL, EACH = 16, 15.0, 26
WEDGE = (-60.0, 60.0)


def test_two_structures_among_unlabelled_subtomograms(platform: Platform) -> None:
    parts = [sample(asymmetric(k + 1), BOX, EACH, 0.7, seed=k, wedge=WEDGE, largest_shift=1.0) for k in range(2)]
    order = np.random.default_rng(0).permutation(2 * EACH)
    boxes = np.concatenate([part.particles for part in parts])[order]
    truth = np.repeat([0, 1], EACH)[order]
    store = Store.open(platform.settings)
    writer = ResultWriter(store, "default", "8" * 64)
    ids = np.arange(100, 100 + 2 * EACH)
    table = Particles.from_positions(np.full((2 * EACH, 3), 40.0), VOXEL, "t", id=ids)
    subtomograms = write_subtomograms(
        writer, store, "boxes", -boxes, VolumeInfo((BOX, BOX, BOX), VOXEL, "dark", *WEDGE), table
    )
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": subtomograms}, seconds=0)

    with platform.client() as client:
        run = client.run(
            "mine",
            subtomograms=subtomograms,
            particle_diameter_angstrom=180,
            clusters=2,
            min_cluster_particles=15,
            classes=2,
            max_epochs=2,
            iterations=7,
            max_candidates=10,
            rounds=4,
            low_pass_angstrom=50,
            max_shift_voxels=2,
            shard_size=32,
            seed=1,
        ).wait()
        outputs = run.outputs
        particles = outputs["particles"].to_dataframe()
        members = [uri.to_dataframe() for uri in outputs["class_particles"]]
        page = outputs["report"].read().decode()
        sizes = [int(size) for size in outputs["class_sizes"]]
    assert len(outputs["averages"]) == len(outputs["fsc"]) == len(sizes) == 2, sizes
    assert outputs["stable"]
    assert particles["id"].tolist() == ids.tolist()
    labels = particles["class_id"].to_numpy(dtype=np.int64)
    assert f1(truth, labels) >= 0.9
    assert sizes == np.bincount(labels[labels >= 0]).tolist() == [len(table) for table in members]
    assert sum(sizes) + outputs["unassigned"] == 2 * EACH
    assert sorted(particles["half"].value_counts()) == [EACH, EACH]
    assert f"Structures among {2 * EACH} subtomograms" in page
