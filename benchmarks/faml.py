"""The FAML paper's experiments, rebuilt with the simulation service's methods, and what an iteration takes.

From random poses and classes, shifts up to 3 voxels, FA (`average`) beside FAML. Correlations are with the truth at
35 Å, without the radial means, over the whole box; `bound` is the average at the true poses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks import crowded
from benchmarks.harness import Row, main
from benchmarks.subtomogram_sets import Set, brought_to, correlation, make, share_of_poses
from cryofleet.numerics.rotations import angular_distance_degrees, frame_between
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment import faml
from services.alignment.align import Poses, Search
from services.alignment.average import average
from services.alignment.band import Band
from services.alignment.faml import Particles, random_halves
from services.alignment.likelihood_model import Task
from services.alignment.reconstruction import Contributions, divide, volume_of
from tests.unit.alignment.samples import asymmetric, sample

THREADS = 2
SECONDS = {32: 0.5, 64: 3.0, 128: 30.0}


def _seconds(box: int, count: int, classes: int = 1) -> float:
    """Of the iteration after the first, which compiles and fills the tables."""
    data = sample(asymmetric(1), box, count, 0.1, wedge=(-60.0, 60.0))
    search = Search(box, 384.0 / box, wedge_transfer(box, -60.0, 60.0), low_pass_angstrom=35.0, max_shift_voxels=4.0)
    particles = Particles(data.read, np.arange(count), random_halves(count, 0))
    state = faml.begin(Task(search, 250.0, classes), count)
    seconds = 0.0
    for _ in range(3):
        begun = time.perf_counter()
        state = faml.advance(state, *faml.sums_of(state, particles, threads=THREADS))
        seconds = time.perf_counter() - begun
    return seconds


def speed(quick: bool) -> Iterator[Row]:
    for box in (32, 64) if quick else (32, 64, 128):
        case = f"{box}^3, 20 particles, {THREADS} cores"
        yield Row(case, "faml_seconds_per_iteration", _seconds(box, 20), "s", "lower", SECONDS[box])
    for count in () if quick else (200, 2000):
        case = f"32^3, {count} particles, {THREADS} cores"
        yield Row(case, "faml_seconds_per_iteration", _seconds(32, count), "s", "lower")
    if not quick:
        case = f"32^3, 200 particles, 2 classes, {THREADS} cores"
        yield Row(case, "faml_seconds_per_iteration", _seconds(32, 200, 2), "s", "lower")


def at_true_poses(data: Set, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The average of some particles at their true poses: what no method can beat."""
    n = data.boxes.shape[1]
    band = Band(n, 1.0, n / 2 - 0.5, None, "cpu")
    contributions = Contributions(band, data.transfer, Rotation.identity(1), "cpu")
    sums = torch.zeros(len(band), dtype=torch.complex64)
    weights = torch.zeros(len(band))
    for part in np.array_split(rows, max(1, len(rows) // 8)):
        quaternions, shifts = data.poses.tensors(part, "cpu")
        terms, coverage = contributions.of(torch.from_numpy(data.boxes[part]), quaternions, shifts)
        sums += terms.sum(0)
        weights += coverage.sum(0)
    return volume_of(band, divide(sums, weights, len(rows))[None])[0].numpy()


def _against_truth(data: Set, volume: NDArray[np.float32], k: int) -> float:
    size = data.voxel_size_angstrom
    return correlation(brought_to(volume, data.truths[k], size)[0], data.truths[k], size)


def _judge(
    case: str, data: Set, volumes: NDArray[np.float32], classes: NDArray[np.int64], poses: Poses, bounds: list[float]
) -> Iterator[Row]:
    kinds = len(data.truths)
    named = max(permutations(range(kinds)), key=lambda p: float(np.mean(np.array(p)[data.classes] == classes)))
    if kinds > 1:
        scores = []
        for k in range(kinds):
            both = np.sum((classes == named[k]) & (data.classes == k))
            scores.append(2 * both / max(np.sum(classes == named[k]) + np.sum(data.classes == k), 1))
        yield Row(case, "f1", float(np.mean(scores)), "", "higher")
    for k in range(kinds):
        rows = np.flatnonzero((data.classes == k) & (classes == named[k]))
        found = _against_truth(data, volumes[named[k]], k)
        yield Row(f"{case}, class {k + 1}", "correlation", found, "", "higher")
        yield Row(f"{case}, class {k + 1}", "share_of_true_poses_value", found / bounds[k], "", "higher")
        if len(rows) > 2:
            share = share_of_poses(data.poses.rotations[rows], poses.rotations[rows], data.symmetries[k])
            yield Row(f"{case}, class {k + 1}", "poses_within_15_degrees", share, "", "higher")


def _experiment(case: str, data: Set, diameter: float, seed: int, symmetry: str = "C1") -> Iterator[Row]:
    n, count, kinds = data.boxes.shape[1], len(data), len(data.truths)
    bounds = [_against_truth(data, at_true_poses(data, np.flatnonzero(data.classes == k)), k) for k in range(kinds)]
    for k, bound in enumerate(bounds):
        yield Row(f"{case}, class {k + 1}", "bound", bound, "", "higher")
    finest = 24.0 if n == 64 else 36.0
    search = Search(
        n, data.voxel_size_angstrom, data.transfer, finest, max_shift_voxels=4.0 if n == 64 else 2.0, symmetry=symmetry
    )
    particles = Particles(data.read, np.arange(count), random_halves(count, seed))
    begun = time.perf_counter()
    result = faml.faml(Task(search, diameter, kinds, seed=seed), particles, iterations=20, threads=THREADS)
    yield Row(f"{case}, FAML", "seconds", time.perf_counter() - begun, "s", "lower")
    yield from _judge(f"{case}, FAML", data, result.volumes, result.classes, result.poses, bounds)
    if kinds == 1:
        begun = time.perf_counter()
        aligned = average(
            data.read, count, replace(search, symmetry="C1", max_candidates=20), iterations=10, symmetry=symmetry,
            seed=seed, threads=THREADS,
        )  # fmt: skip
        yield Row(f"{case}, FA", "seconds", time.perf_counter() - begun, "s", "lower")
        nobody = np.zeros(count, np.int64)
        yield from _judge(f"{case}, FA", data, aligned.average[None], nobody, aligned.poses, bounds)


def experiments(quick: bool) -> Iterator[Row]:
    """(a) to (d); a quick run has one seed of (d) at fewer particles."""
    if not crowded.real_data():
        print(f"the structures of the experiments are looked for in {crowded.DATA}, which is not there")
        return
    for seed in range(1 if quick else 5):
        if not quick:
            few = make(("groel",), (100,), 64, 6.0, 0.003, seed)
            yield from _experiment(f"(a) GroEL, SNR 0.003, seed {seed}", few, 200.0, seed)
            blurred = make(("groel",), (100,), 64, 6.0, 0.003, seed, ctf=True)
            yield from _experiment(f"(a) GroEL, SNR 0.003, CTF, seed {seed}", blurred, 200.0, seed)
            wedged = make(("groel",), (50,), 64, 6.0, 0.01, seed, tilt_degrees=40.0, axis=(0.0, 1.0, 0.0))
            for group in ("C1", "C7"):
                yield from _experiment(f"(b) GroEL, +-40, {group}, seed {seed}", wedged, 200.0, seed, group)
            both = make(("groel", "ribosome-70s"), (100, 100), 64, 6.0, 0.01, seed)
            yield from _experiment(f"(c) GroEL and 70S, seed {seed}", both, 280.0, seed)
        counts = (30, 30) if quick else (200, 200)
        lids = make(("groel", "groel-groes"), counts, 32, 12.0, 0.05, seed, tilt_degrees=65.0, max_shift_voxels=1.5)
        yield from _experiment(f"(d) GroEL and GroEL-GroES, seed {seed}", lids, 240.0, seed)


def lock_in(quick: bool) -> Iterator[Row]:
    """20 particles that begin unturned, all in the average's own frame."""
    data = sample(asymmetric(1), 32, 20, 0.1, wedge=(-60.0, 60.0))
    search = Search(32, 9.0, wedge_transfer(32, -60.0, 60.0), max_shift_voxels=3.0)
    particles = Particles(data.read, np.arange(20), random_halves(20, 0))
    start = Poses(Rotation.identity(20), np.zeros((20, 3)), np.zeros(20))
    for iterations in (1, 8):
        found = faml.faml(Task(search, 220.0), particles, iterations=iterations, start=start, threads=THREADS).poses
        errors = angular_distance_degrees(
            data.rotations, found.rotations * frame_between(data.rotations, found.rotations)
        )
        left = float((np.degrees(found.rotations.magnitude()) > 10).sum())
        case = f"lock-in, 20 x 32^3 SNR 0.1, {iterations} iterations"
        yield Row(case, "particles_that_left", left, "", "higher", 18.0)
        yield Row(case, "median_error_degrees", float(np.median(errors)), "degrees", "lower")


def measure(quick: bool) -> Iterator[Row]:
    torch.set_num_threads(1)
    yield from speed(quick)
    yield from lock_in(quick)
    yield from experiments(quick)


if __name__ == "__main__":
    main("faml", measure)
