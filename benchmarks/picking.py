"""How fast particles are picked, cut out and compared: python -m benchmarks.picking.

The bound of the difference of Gaussians is what the field's scripts do: two calls of scipy.ndimage.gaussian_filter on
the whole tomogram in memory, without the search for peaks, the statistics or the tiling that our time includes. Both
run on the cores that BLAS is given (OMP_NUM_THREADS), scipy on one.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.harness import Row, main
from benchmarks.template_matching import against_ffts
from services.picking.difference_of_gaussians import difference_of_gaussians, sigmas_voxels
from services.picking.evaluate import evaluate
from services.picking.extract import cut_boxes, place_boxes

VOXEL_SIZE_ANGSTROM = 10.0
Shape = tuple[int, int, int]


def best_seconds(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def noise(shape: Shape) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def against_scipy(quick: bool) -> Iterator[Row]:
    shape: Shape = (96, 256, 256)
    volume = noise(shape)
    for diameter_angstrom in (120.0, 250.0):
        narrow, wide = sigmas_voxels(diameter_angstrom, VOXEL_SIZE_ANGSTROM)

        def pick(diameter: float = diameter_angstrom) -> None:
            difference_of_gaussians(lambda z0, z1: volume[z0:z1], shape, VOXEL_SIZE_ANGSTROM, diameter, contrast="dark")

        def smooth(sigmas: tuple[float, float] = (narrow, wide)) -> None:
            for sigma in sigmas:
                ndimage.gaussian_filter(volume, sigma)

        ours, scipys = best_seconds(pick, 2 if quick else 7), best_seconds(smooth, 1 if quick else 3)
        case = f"DoG 256x256x96, particles of {diameter_angstrom / VOXEL_SIZE_ANGSTROM:g} voxels"
        yield Row(case, "seconds", ours, "s", "lower", 5.0)
        yield Row(case, "voxels_per_second", volume.size / ours / 1e6, "Mvoxel/s", "higher")
        yield Row(case, "scipy_gaussian_pair_ratio", ours / scipys, "", "lower", 1.0)


def large_tomogram(quick: bool) -> Iterator[Row]:
    """Slabs made as they are read, so that all memory is that of the picking."""
    planes = 60 if quick else 300
    shape: Shape = (planes, 1000, 1000)
    slab = noise((32, 1000, 1000))

    def pick() -> None:
        difference_of_gaussians(
            lambda z0, z1: slab[: z1 - z0], shape, VOXEL_SIZE_ANGSTROM, 250.0, contrast="dark", threshold=2.0
        )

    tracemalloc.start()
    seconds = best_seconds(pick, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    case = f"DoG 1000x1000x{planes}, particles of 25 voxels"
    yield Row(case, "voxels_per_second", planes * 1e6 / seconds / 1e6, "Mvoxel/s", "higher")
    yield Row(case, "peak_memory", peak / 2**20, "MiB", "lower", 4096.0)


def extraction(quick: bool) -> Iterator[Row]:
    shape: Shape = (96, 256, 256)
    volume = noise(shape)
    count = 100 if quick else 1000
    positions = np.random.default_rng(1).uniform(32, np.array(shape[::-1]) - 33, (count, 3))
    for binning in (1, 2):
        placement = place_boxes(positions, shape, 32, binning, "skip")
        out = np.empty((len(placement.rows), 32, 32, 32), np.float32)

        def cut(placement: object = placement, out: NDArray[np.float32] = out) -> None:
            cut_boxes(lambda z0, z1: volume[z0:z1], shape, placement, out)  # type: ignore[arg-type]

        seconds = best_seconds(cut, 3)
        yield Row(f"boxes of 32, binned by {binning}", "boxes_per_second", len(out) / seconds, "1/s", "higher")


def comparison(quick: bool) -> Iterator[Row]:
    count = 10_000 if quick else 100_000
    rng = np.random.default_rng(2)
    side = 100 * count ** (1 / 3)
    truth, picks = rng.uniform(0, side, (count, 3)), rng.uniform(0, side, (count, 3))
    truth[: count // 2] = picks[: count // 2] + rng.normal(0, 5, (count // 2, 3))
    # so wide that groups of competing picks and particles are common
    seconds = best_seconds(lambda: evaluate(picks, truth, 50.0), 1)
    yield Row(f"{count} picks against {count} particles", "seconds", seconds, "s", "lower", 60.0)


def measure(quick: bool) -> Iterator[Row]:
    for subject in (against_ffts, against_scipy, large_tomogram, extraction, comparison):
        yield from subject(quick)


if __name__ == "__main__":
    main("picking", measure)
