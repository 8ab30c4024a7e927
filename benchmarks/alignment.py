"""How fast and how well subtomograms are aligned to a clean reference, and averaged without one.

Phantoms are sums of Gaussians, one without symmetry and one with D7; poses are random and uniform, shifts up to two
voxels, the wedge is -60 to 60 degrees, SNR is the ratio of variances in the whole box. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import crowded
from benchmarks.harness import Row, main
from benchmarks.subtomogram_sets import Set, make
from cryofleet.numerics.rotations import angular_distance_degrees, frame_between, point_group, rotation_grid
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment.align import Poses, Search, align, search_exhaustively
from services.alignment.average import average
from tests.unit.alignment.samples import asymmetric, sample, symmetric

WEDGE = (-60.0, 60.0)
BOX_ANGSTROM = 384.0
SECONDS = {32: 0.04, 64: 0.15}
MEDIANS = {None: 0.5, 0.1: 1.5}


def _named(box: int, snr: float | None, shape: str) -> str:
    return f"{box}^3 {'noise-free' if snr is None else f'SNR {snr:g}'} {shape}"


def _pairs(box: int, snr: float | None, group: str, count: int) -> Iterator[Row]:
    blobs = asymmetric(1) if group == "C1" else symmetric(group)
    data = sample(blobs, box, count, snr, seed=box, wedge=WEDGE)
    search = Search(box, BOX_ANGSTROM / box, wedge_transfer(box, *WEDGE))
    reference = blobs.volume(box)
    align(data.read, min(count, 4), reference, search)  # compiles, and makes the tables of this band
    begun = time.perf_counter()
    poses = align(data.read, count, reference, search)
    seconds = (time.perf_counter() - begun) / count
    errors = angular_distance_degrees(data.rotations, poses.rotations, group)
    case = _named(box, snr, group)
    yield from _errors(case, errors, seconds, box, snr)
    offsets = np.linalg.norm(poses.shifts - data.shifts, axis=1)
    yield Row(case, "median_shift_error_voxels", float(np.median(offsets)), "voxels", "lower")


def _errors(case: str, errors: NDArray[np.float64], seconds: float, box: int, snr: float | None) -> Iterator[Row]:
    yield Row(case, "seconds_per_pair", seconds, "s", "lower", SECONDS[box])
    yield Row(case, "median_error_degrees", float(np.median(errors)), "degrees", "lower", MEDIANS[snr])
    if snr is None:
        yield Row(case, "largest_error_degrees", float(errors.max()), "degrees", "lower", 3.0)
    else:
        yield Row(case, "share_within_10_degrees", float((errors <= 10).mean()), "", "higher", 0.97)


def _exhaustive(count: int) -> Iterator[Row]:
    """What a search of every rotation of a grid takes and finds, for comparison."""
    blobs = asymmetric(1)
    data = sample(blobs, 32, count, 0.1, seed=32, wedge=WEDGE)
    search = Search(32, BOX_ANGSTROM / 32, wedge_transfer(32, *WEDGE), max_shift_voxels=3.0)
    grid = rotation_grid(12.0)
    begun = time.perf_counter()
    found = [search_exhaustively(box, blobs.volume(32), search, grid).rotations for box in data.particles]
    seconds = (time.perf_counter() - begun) / count
    errors = [float(angular_distance_degrees(data.rotations[i], f)[0]) for i, f in enumerate(found)]
    case = "32^3 SNR 0.1 exhaustive, 12 degrees"
    yield Row(case, "seconds_per_pair", seconds, "s", "lower")
    yield Row(case, "median_error_degrees", float(np.median(errors)), "degrees", "lower")


def _structures(quick: bool) -> Iterator[Row]:
    """Simulated subtomograms of real structures against their noise-free densities, and against one another."""
    if not crowded.real_data():
        print(f"the structures are looked for in {crowded.DATA}, which is not there")
        return
    count = 6 if quick else 40
    for box, voxel in ((32, 12.0), (64, 6.0)):
        for name in ("groel",) if quick else ("groel", "ribosome-70s", "rubisco"):
            for snr in (None, 0.1):
                data = make((name,), (count,), box, voxel, snr, box, max_shift_voxels=2.0)
                search = Search(box, voxel, data.transfer, max_shift_voxels=4.0)
                align(data.read, min(count, 4), data.truths[0], search)
                begun = time.perf_counter()
                poses = align(data.read, count, data.truths[0], search)
                seconds = (time.perf_counter() - begun) / count
                errors = angular_distance_degrees(data.poses.rotations, poses.rotations, data.symmetries[0])
                yield from _errors(_named(box, snr, name), errors, seconds, box, snr)
            yield _at_best(_named(box, 0.1, name), data, search)
            yield from _mutual(name, data)


def _at_best(case: str, data: Set, search: Search) -> Row:
    """How far the score's own maximum lies from the true pose: climbed from there, what no search can better."""
    near = replace(search, max_angle_degrees=6.0)
    poses = align(data.read, len(data), data.truths[0], near, start=data.poses)
    errors = angular_distance_degrees(data.poses.rotations, poses.rotations, data.symmetries[0])
    return Row(f"{case}, from the true poses", "median_error_degrees", float(np.median(errors)), "degrees", "lower")


def _one(box: NDArray[np.float32], first: int, count: int) -> NDArray[np.float32]:
    return box[None]


MUTUAL = {(32, "groel"): (None, 0.9), (32, "ribosome-70s"): (None, 0.55), (64, "groel"): (2.0, 0.97)} | {
    (64, name): (2.0, 0.97) for name in ("ribosome-70s", "rubisco")
}
"""What two particles are to reach: median error in degrees, share within 10 degrees."""
BY_EXHAUSTION = 10
"""So many pairs are also searched exhaustively."""


def _mutual(name: str, data: Set) -> Iterator[Row]:
    """Each particle against the next, both noisy and wedged, in the band that the search chooses; beside it every
    rotation of a grid."""
    count, box = len(data), data.boxes.shape[1]
    search = Search(
        box, data.voxel_size_angstrom, data.transfer, max_shift_voxels=6.0, reference_transfer=data.transfer
    )
    case = f"{box}^3 SNR 0.1 {name}, two particles"
    median, share = MUTUAL.get((box, name), (None, None))
    begun = time.perf_counter()
    found = [align(partial(_one, data.boxes[k]), 1, data.boxes[(k + 1) % count], search) for k in range(count)]
    yield Row(case, "seconds_per_pair", (time.perf_counter() - begun) / count, "s", "lower")
    errors = _mutual_errors(data, found)
    yield Row(case, "median_error_degrees", float(np.median(errors)), "degrees", "lower", median)
    yield Row(case, "share_within_10_degrees", float((errors <= 10).mean()), "", "higher", share)
    if box > 32:
        return
    slow = replace(search, exhaustive_step_degrees=10.0)
    few = [
        align(partial(_one, data.boxes[k]), 1, data.boxes[(k + 1) % count], slow)
        for k in range(min(count, BY_EXHAUSTION))
    ]
    errors = _mutual_errors(data, few)
    yield Row(f"{case}, exhaustively", "median_error_degrees", float(np.median(errors)), "degrees", "lower")
    yield Row(f"{case}, exhaustively", "share_within_10_degrees", float((errors <= 10).mean()), "", "higher")


def _mutual_errors(data: Set, found: list[Poses]) -> NDArray[np.float64]:
    true, group, count = data.poses.rotations, point_group(data.symmetries[0]), len(data)
    return np.array(
        [
            min(
                float(angular_distance_degrees(true[k] * g * true[(k + 1) % count].inv(), pose.rotations)[0])
                for g in group
            )
            for k, pose in enumerate(found)
        ]
    )


def _averages(count: int, iterations: int) -> Iterator[Row]:
    data = sample(asymmetric(1), 32, count, 0.1, seed=7, wedge=WEDGE)
    search = Search(32, 10.0, wedge_transfer(32, *WEDGE), max_candidates=20)
    begun = time.perf_counter()
    result = average(data.read, count, search, iterations=iterations)
    seconds = time.perf_counter() - begun
    frame = frame_between(data.rotations, result.poses.rotations)
    errors = angular_distance_degrees(data.rotations, result.poses.rotations * frame)
    case = f"average of {count} x 32^3 SNR 0.1, {iterations} iterations, no reference"
    yield Row(case, "seconds", seconds, "s", "lower")
    yield Row(case, "median_error_degrees", float(np.median(errors)), "degrees", "lower", 5.0)
    yield Row(case, "share_within_15_degrees", float((errors <= 15).mean()), "", "higher", 0.95)
    yield Row(case, "resolution_angstrom", result.resolution_angstrom, "Å", "lower")


def measure(quick: bool) -> Iterator[Row]:
    """All cases; a quick run takes fewer particles of each."""
    torch.set_num_threads(1)
    for box in (32, 64):
        for snr in (None, 0.1):
            for group in ("C1", "D7"):
                yield from _pairs(box, snr, group, 8 if quick else 40)
    yield from _structures(quick)
    yield from _exhaustive(1 if quick else 8)
    yield from _averages(20 if quick else 60, 3 if quick else 6)


if __name__ == "__main__":
    main("alignment", measure)
