"""Structures told apart among unlabelled subtomograms by the pipeline `mine`, on a platform of its own.

Particles of three structures, evenly many, at random poses and shifts up to two voxels, imaged from -60 to 60 degrees.
F1 is the mean over the structures, each paired with one of the averages found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from benchmarks.harness import Row, main
from cryofleet.artifacts import ResultWriter
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.volumes import VolumeInfo, write_subtomograms
from tests.platform import Platform, running_platform
from tests.unit.alignment.samples import asymmetric, sample

STRUCTURES = 3
WEDGE = (-60.0, 60.0)
SIDE_ANGSTROM = 288.0


def f1(truth: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """Mean F1 of the true classes, each paired with another one of those found (-1: none); 0 for one without."""
    both = np.zeros((truth.max() + 1, found.max() + 1))
    kept = found >= 0
    np.add.at(both, (truth[kept], found[kept]), 1)
    scores = 2 * both / (np.bincount(truth)[:, None] + np.bincount(found[kept])[None, :])
    return float(scores[linear_sum_assignment(scores, maximize=True)].sum() / len(scores))


def particles_of(box: int, each: int, snr: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Light boxes of all structures, mixed, and which each is of."""
    parts = [
        sample(asymmetric(k + 1), box, each, snr, seed=100 * seed + k, wedge=WEDGE, largest_shift=2.0)
        for k in range(STRUCTURES)
    ]
    order = np.random.default_rng(seed).permutation(STRUCTURES * each)
    return np.concatenate([p.particles for p in parts])[order], np.repeat(np.arange(STRUCTURES), each)[order]


def put(store: Store, boxes: NDArray[np.float32], name: str) -> str:
    """Stores them as dark subtomograms."""
    count, box = boxes.shape[:2]
    info = VolumeInfo((box, box, box), SIDE_ANGSTROM / box, "dark", *WEDGE)
    table = Particles.from_positions(np.full((count, 3), 40.0), SIDE_ANGSTROM / box, "t")
    writer = ResultWriter(store, "default", name)
    uri = write_subtomograms(writer, store, "boxes", -boxes, info, table)
    writer.commit(operation="test.Make", version=1, parameters={}, inputs={}, result={"uri": uri}, seconds=0.0)
    return uri


def mined(platform: Platform, case: str, box: int, each: int, snr: float, seed: int, **options: Any) -> Iterator[Row]:
    boxes, truth = particles_of(box, each, snr, seed)
    uri = put(Store.open(platform.settings), boxes, f"{box:04x}{each:08x}{round(1000 * snr):04x}{seed:08x}".zfill(64))
    begun = time.perf_counter()
    with platform.client() as client:
        run = client.run(
            "mine",
            subtomograms=uri,
            particle_diameter_angstrom=220,
            low_pass_angstrom=4 * SIDE_ANGSTROM / box,
            max_shift_voxels=3,
            max_candidates=12,
            iterations=12,
            min_cluster_particles=each // 2,
            shard_size=64,
            seed=seed,
            **options,
        ).wait()
        outputs = run.outputs
        labels = outputs["particles"].to_dataframe()["class_id"].to_numpy(dtype=np.int64)
        steps = {step.id: step.compute_seconds for step in run.record.steps}
    yield Row(case, "seconds", time.perf_counter() - begun, "s", "lower")
    yield Row(
        case, "compute_seconds_faml", sum(t for name, t in steps.items() if name.startswith("faml")), "s", "lower"
    )
    reassigning = sum(t for name, t in steps.items() if name.startswith("pursue"))
    yield Row(case, "compute_seconds_reassigning", reassigning, "s", "lower")
    yield Row(case, "averages", len(outputs["averages"]), "", "lower", STRUCTURES)
    yield Row(case, "f1", f1(truth, labels), "", "higher", 0.9)
    yield Row(case, "rounds", outputs["rounds"], "", "lower")
    yield Row(case, "particles_in_no_class", outputs["unassigned"], "", "lower")


def measure(quick: bool) -> Iterator[Row]:
    with running_platform() as platform:
        for sieve in (False,) if quick else (False, True):
            box, each, snr = (16, 24, 0.7) if quick else (24, 210, 0.15)
            case = (
                f"{STRUCTURES} x {each} of {box}^3, SNR {snr:g}, {'autoencoder clusters' if sieve else 'one cluster'}"
            )
            yield from mined(platform, case, box, each, snr, 1, sieve=sieve)


if __name__ == "__main__":
    main("mining", measure)
