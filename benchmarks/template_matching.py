"""Template matching, its speed, its memory and what it finds: python -m benchmarks.template_matching.

The bound of a search is one forward and one inverse real transform of the padded tile for each orientation, here by
FFTW as measured by itself, on the same cores. pyTME (KosinskiLab) is run on the same volume, template, mask and
rotations where it is installed.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyfftw
import scipy.ndimage
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks import crowded
from benchmarks.harness import Row, main
from cryofleet.numerics import transfer
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.rotations import angular_distance_degrees, rotation_grid
from services.picking import detection, template_matching
from services.picking.difference_of_gaussians import difference_of_gaussians, suppress
from services.picking.evaluate import evaluate
from services.picking.pose_refinement import refine
from services.picking.saliency import saliency
from services.picking.score_peaks import Peaks, peaks
from services.picking.score_threshold import background
from services.picking.slabs import ReadSlab
from services.picking.template import Template, Turner, binned, extent, sphere
from services.picking.template_matching import Tomogram

CORES = len(os.sched_getaffinity(0))
Array = NDArray[np.float32]
Shape = tuple[int, int, int]
#: False positives that are asked for in the crowded tomograms: as by default, and enough for their number to be a
#: figure.
ASKED, ASKED_MANY = 1.0, 10.0


def fft_pair_seconds(shape: Shape) -> float:
    """One forward and one inverse transform of a real volume, the best of some."""
    real = pyfftw.zeros_aligned(shape, "float32")
    half = pyfftw.zeros_aligned((*shape[:2], shape[2] // 2 + 1), "complex64")
    flags = ("FFTW_MEASURE", "FFTW_DESTROY_INPUT")
    down = pyfftw.FFTW(real, half, axes=(0, 1, 2), threads=CORES, flags=flags)
    up = pyfftw.FFTW(half, real, axes=(0, 1, 2), threads=CORES, flags=flags, direction="FFTW_BACKWARD")
    times = []
    for _ in range(12):
        started = time.perf_counter()
        down.execute()
        up.execute()
        times.append(time.perf_counter() - started)
    return min(times)


def volume_reader(volume: Array) -> ReadSlab:
    return lambda first, last: volume[first:last]


def tomogram_of(volume: Array, sign: int = 1) -> Tomogram:
    shape = (volume.shape[0], volume.shape[1], volume.shape[2])
    measured = template_matching.survey(lambda a, b: volume[a:b], shape)
    return Tomogram(lambda a, b: volume[a:b], shape, *measured, sign=sign)


def searched(tomogram: Tomogram, template: Template, rotations: Rotation) -> tuple[Array, NDArray[np.int32], float]:
    """Score and rotation maps, and seconds."""
    started = time.perf_counter()
    plan = template_matching.layout(
        tomogram.binned_shape,
        template.box,
        disturbed=tomogram.profile is not None or tomogram.binning > 1,
        mask_turns=template.mask_turns,
        variants=1,
    )
    scores = np.zeros(tomogram.binned_shape, np.float32)
    numbers = np.zeros(tomogram.binned_shape, np.int32)
    work = template_matching.pieces(plan, len(rotations))
    for match in template_matching.search(tomogram, [template], rotations, plan, work, threads=CORES):
        own = tuple(slice(a, b) for a, b in zip(match.tile.start, match.tile.stop, strict=True))
        scores[own], numbers[own] = match.scores[0], match.rotations
    return scores, numbers, time.perf_counter() - started


def planted() -> tuple[Array, Array, Array]:
    """Noise with a few copies of a template, the template, and its mask."""
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((160, 200, 200)).astype(np.float32)
    density = scipy.ndimage.gaussian_filter(rng.standard_normal((31, 31, 31)), 2).astype(np.float32)
    density *= sphere(31, 12)
    density /= density.std()
    grid = rotation_grid(38.53)
    for number, (z, y, x) in enumerate([(40, 50, 60), (100, 120, 60), (80, 60, 150), (120, 150, 140)]):
        volume[z - 15 : z + 16, y - 15 : y + 16, x - 15 : x + 16] += 0.8 * transform_volume(density, grid[7 * number])
    return volume, density, sphere(31, 13)


def against_ffts(quick: bool) -> Iterator[Row]:
    volume, density, mask = planted()
    tomogram, template = tomogram_of(volume), Template(density, mask)
    rotations = rotation_grid(38.53)
    few, many = rotations[:8], rotations[: 48 if quick else 200]
    searched(tomogram, template, few)
    pair, times = [], []
    plan = template_matching.layout(tomogram.shape, 31, disturbed=False, mask_turns=False, variants=1)
    for _ in range(2 if quick else 4):
        pair.append(fft_pair_seconds(plan.padded))
        seconds = [searched(tomogram, template, some)[2] for some in (few, many)]
        times.append((seconds[1] - seconds[0]) / (len(many) - len(few)))
    case = f"200x200x160, 31^3 template, tile {'x'.join(map(str, plan.padded[::-1]))}, {CORES} cores"
    yield Row(case, "orientation", 1e3 * min(times), "ms", "lower")
    yield Row(case, "fft_pair", 1e3 * min(pair), "ms", "lower")
    yield Row(case, "fft_pair_ratio", min(times) / min(pair), "", "lower", 1.2)
    turner = Turner(template)
    started = time.perf_counter()
    for first in range(0, 32, 4):
        turner.kernels(rotations[first : first + 4])
    yield Row(case, "turning", 1e3 * (time.perf_counter() - started) / 32, "ms", "lower")


def against_pytme(quick: bool) -> Iterator[Row]:
    try:
        from tme.analyzer import MaxScoreOverRotations
        from tme.matching_data import MatchingData
        from tme.matching_exhaustive import MATCHING_EXHAUSTIVE_REGISTER, match_exhaustive
    except ImportError:
        print("pyTME is not installed: no figures against it", file=sys.stderr)
        return
    volume, density, mask = planted()
    rotations = rotation_grid(38.53)
    setup, score = MATCHING_EXHAUSTIVE_REGISTER["FLC"]

    def theirs(some: Rotation) -> tuple[Array, float]:
        # it turns by the inverse of matrices in the order of the array's axes
        matrices = np.ascontiguousarray(np.transpose(some.as_matrix()[:, ::-1, ::-1], (0, 2, 1)), np.float32)
        data = MatchingData(
            target=volume.copy(), template=density.copy(), template_mask=mask.copy(), rotations=matrices
        )
        started = time.perf_counter()
        found = match_exhaustive(
            data,
            matching_score=score,
            matching_setup=setup,
            callback_class=MaxScoreOverRotations,
            job_schedule=(1, CORES),
        )
        return found[0], time.perf_counter() - started

    tomogram, template = tomogram_of(volume), Template(density, mask)
    few, many = rotations[:24], rotations[: 56 if quick else 152]
    per_rotation = len(many) - len(few)
    their_few, our_few = theirs(few)[1], searched(tomogram, template, few)[2]
    their_map, their_many = theirs(many)
    our_map, _, our_many = searched(tomogram, template, many)
    found = [_peaks_of(scores).positions[:4] for scores in (our_map, their_map)]
    apart = [np.linalg.norm(found[1] - place, axis=1).min() for place in found[0]]
    case = f"200x200x160, 31^3 template, {CORES} cores, pyTME's FLC"
    yield Row(case, "their_orientation", 1e3 * (their_many - their_few) / per_rotation, "ms", "lower")
    yield Row(case, "our_orientation", 1e3 * (our_many - our_few) / per_rotation, "ms", "lower")
    yield Row(case, "times_as_fast", (their_many - their_few) / (our_many - our_few), "", "higher", 2.0)
    yield Row(case, "whole_search_times_as_fast", their_many / our_many, "", "higher", 2.0)
    yield Row(case, "farthest_of_four_peaks", float(max(apart)), "voxels", "lower", 0.0)


def _peaks_of(scores: Array) -> Peaks:
    return peaks(volume_reader(scores), (scores.shape[0], scores.shape[1], scores.shape[2]), 10.0)


_LARGE = """
import resource, sys
import numpy as np
from benchmarks.template_matching import tomogram_of, searched
from cryofleet.numerics.rotations import rotation_grid
from services.picking import template_matching as tm
from services.picking.slabs import ReadSlab
from services.picking.template import Template, sphere
planes, count = int(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
slab = rng.standard_normal((32, 1000, 1000), np.float32)
read = lambda a, b: slab[: b - a] if b - a <= 32 else np.concatenate([slab] * -(-(b - a) // 32))[: b - a]
shape = (planes, 1000, 1000)
tomogram = tm.Tomogram(read, shape, 0.0, 1.0)
template = Template(rng.standard_normal((32, 32, 32)).astype(np.float32), sphere(32, 14))
rotations = rotation_grid(30)[:count]
plan = tm.layout(shape, 32, disturbed=False, mask_turns=False, variants=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for match in tm.search(tomogram, [template], rotations, plan, tm.pieces(plan, count), threads=2):
    pass
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
need = tm.memory_bytes(shape, 32, binning=1, disturbed=False, mask_turns=False, variants=1, threads=2)
print(kilobytes / 1024, (kilobytes - before) / 1024, need / 2**20, len(plan.tiles))
"""


def large_tomogram(quick: bool) -> Iterator[Row]:
    """Planes made as they are read, in a process of its own, whose largest memory is that of the search."""
    planes = 300
    result = subprocess.run(
        [sys.executable, "-c", _LARGE, str(planes), "1" if quick else "4"], capture_output=True, text=True, check=True
    )
    resident, own, asked, tiles = (float(value) for value in result.stdout.split())
    case = f"1000x1000x{planes}, 32^3 template, {tiles:g} tiles"
    yield Row(case, "peak_resident", resident, "MiB", "lower", 4096.0)
    yield Row(case, "memory_of_the_search", own, "MiB", "lower", asked)
    yield Row(case, "memory_asked_for", asked, "MiB", "lower", 4096.0)


def gpu(quick: bool) -> Iterator[Row]:
    """pytom-match-pick's timing page: 462 x 478 x 250, 34^3."""
    if not torch.cuda.is_available():
        print("no CUDA device: no figures of it", file=sys.stderr)
        return
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((250, 478, 462), np.float32)
    template = Template(rng.standard_normal((34, 34, 34)).astype(np.float32), sphere(34, 15))
    tomogram = tomogram_of(volume)
    plan = template_matching.layout(tomogram.shape, 34, disturbed=False, mask_turns=False, variants=1)
    for step, target in ((12.85, 10.0), (7.0, 60.0)):
        rotations = rotation_grid(step)[: 500 if quick else None]
        started = time.perf_counter()
        work = template_matching.pieces(plan, len(rotations))
        for _ in template_matching.search(tomogram, [template], rotations, plan, work, device="cuda"):
            pass
        seconds = time.perf_counter() - started
        yield Row(
            f"462x478x250, 34^3, {step} degrees, GPU",
            "seconds",
            seconds * len(rotation_grid(step)) / len(rotations),
            "s",
            "lower",
            target,
        )


# --- Crowded tomograms -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Candidates, highest score first, with the seconds that finding them took."""

    positions: NDArray[np.float64]
    rotations: Rotation
    scores: NDArray[np.float64]
    seconds: float


def template_for(crowd: crowded.Crowd, density: Array, voxel_size: float) -> Template:
    weights = transfer.tilt_series_transfer(crowd.series, density.shape[0], voxel_size)
    return Template(density, sphere(density.shape[0], extent(density) + 1), False, weights)


def full_search(crowd: crowded.Crowd, density: Array, step: float, symmetry: str) -> Found:
    template = template_for(crowd, density, crowded.VOXEL_SIZE_ANGSTROM)
    rotations = rotation_grid(step, symmetry)
    scores, numbers, seconds = searched(tomogram_of(crowd.tomogram, -1), template, rotations)
    found = peaks(lambda a, b: scores[a:b], tomogram_of(crowd.tomogram).shape, extent(density))
    x, y, z = found.positions.T
    return Found(found.positions.astype(np.float64), rotations[numbers[z, y, x]], found.scores, seconds)


def coarse_to_fine(crowd: crowded.Crowd, density: Array, step: float, symmetry: str, candidates: int) -> Found:
    started = time.perf_counter()
    whole = tomogram_of(crowd.tomogram, -1)
    coarse = dataclasses.replace(whole, binning=2)
    reduced = binned(density, 2)
    template = template_for(crowd, reduced, 2 * crowded.VOXEL_SIZE_ANGSTROM)
    rotations = rotation_grid(step, symmetry)
    scores, numbers, _ = searched(coarse, template, rotations)
    found = peaks(lambda a, b: scores[a:b], coarse.binned_shape, extent(reduced))
    threshold = background(found.heights).threshold(candidates)
    passing = found.positions[found.heights >= threshold]
    x, y, z = passing.T
    refined = refine(
        whole,
        template_for(crowd, density, crowded.VOXEL_SIZE_ANGSTROM),
        2.0 * passing.astype(np.float64),
        rotations[numbers[z, y, x]],
        angle_degrees=step / 2,
        threads=CORES,
    )
    kept = suppress(refined.positions, refined.scores, extent(density))
    seconds = time.perf_counter() - started
    return Found(refined.positions[kept], refined.rotations[kept], refined.scores[kept], seconds)


def judge(crowd: crowded.Crowd, found: Found, kind: crowded.Kind, threshold: float | None = None) -> dict[str, Any]:
    """Figures of the picks that pass the threshold for `ASKED` false positives, or one that is given, and how many
    false ones pass the threshold for `ASKED_MANY`.
    """
    names = np.array(crowd.truth.table["class_name"])
    own = names == (kind.name if crowded.real_data() else kind.phantom)
    noise = background(found.scores)
    threshold = noise.threshold(ASKED) if threshold is None else threshold
    passing = found.scores >= threshold
    size = crowded.VOXEL_SIZE_ANGSTROM
    reach = kind.diameter_angstrom / 2 * 0.8
    truth = crowd.truth.positions()[own] * size
    figures = evaluate(found.positions[passing] * size, truth, reach)
    every = detection.match_in_order(found.positions * size, found.scores, truth, reach)
    curve = detection.curve(found.scores, every >= 0, len(truth))
    rotations = crowd.truth.rotations()
    assert rotations is not None
    pairs = figures.matching
    angle = float("nan")
    if len(pairs.picks):
        errors = angular_distance_degrees(
            rotations[np.flatnonzero(own)[pairs.truth]],
            found.rotations[np.flatnonzero(passing)[pairs.picks]],
            crowded.symmetry(kind),
        )
        angle = float(np.median(errors))
    return {
        "f1": figures.f1,
        "false_positives": figures.picks - figures.matched,
        "false_positives_of_many": int(((every < 0) & (found.scores >= noise.threshold(ASKED_MANY))).sum()),
        "average_precision": 0.0 if curve is None else curve.average_precision,
        "best_f1": 0.0 if curve is None else curve.best_f1,
        "angle": angle,
        "threshold": threshold,
        "found": {tuple(place) for place in truth[pairs.truth]},
    }


def full_against_coarse(quick: bool) -> Iterator[Row]:
    with TemporaryDirectory() as folder:
        store = crowded.store_in(Path(folder))
        crowd = crowded.crowd(store, 0.05, (64, 160, 160) if quick else (100, 320, 320))
        for kind, step, target in ((crowded.KINDS[1], 12.0, 0.9), (crowded.KINDS[0], 18.0 if quick else 15.0, 0.95)):
            density = crowded.template(store, kind)
            symmetry = crowded.symmetry(kind)
            full = full_search(crowd, density, step, symmetry)
            # at half the resolution half as fine a step would do
            fast = coarse_to_fine(crowd, density, 1.5 * step, symmetry, 100)
            one, other = judge(crowd, full, kind), judge(crowd, fast, kind)
            passing = judge(crowd, fast, kind, one["threshold"])
            case = f"{kind.name}, SNR 0.05, {step:g} degrees"
            again = len(one["found"] & passing["found"]) / max(1, len(one["found"]))
            yield Row(f"{case}, full", "f1", one["f1"], "", "higher", target)
            ratio = one["false_positives_of_many"] / ASKED_MANY
            yield Row(f"{case}, full", "false_positives_over_asked", ratio, "", "lower", 2.0)
            yield Row(f"{case}, full", "asked_over_false_positives", 1 / max(ratio, 0.01), "", "lower", 2.0)
            yield Row(f"{case}, full", "median_angular_error", one["angle"], "deg", "lower")
            yield Row(f"{case}, full", "seconds", full.seconds, "s", "lower")
            yield Row(f"{case}, coarse to fine", "f1", other["f1"], "", "higher", target)
            yield Row(f"{case}, coarse to fine", "median_angular_error", other["angle"], "deg", "lower", one["angle"])
            yield Row(f"{case}, coarse to fine", "share_of_full_found", again, "", "higher", 0.98)
            yield Row(f"{case}, coarse to fine", "times_as_fast", full.seconds / fast.seconds, "", "higher", 8.0)


def every_class(quick: bool) -> Iterator[Row]:
    """Coarse-to-fine searches of each kind, and the pickers that need no template beside them."""
    size = crowded.VOXEL_SIZE_ANGSTROM
    with TemporaryDirectory() as folder:
        store = crowded.store_in(Path(folder))
        for snr in (0.05,) if quick else (0.1, 0.05, 0.02, 0.01):
            crowd = crowded.crowd(store, snr, (64, 160, 160) if quick else (100, 320, 320))
            everything = crowd.truth.positions() * size
            for kind in crowded.kinds()[:2] if quick else crowded.kinds():
                symmetry = crowded.symmetry(kind)
                found = coarse_to_fine(
                    crowd, crowded.template(store, kind), 12.0 if symmetry != "C1" else 18.0, symmetry, 100
                )
                figures = judge(crowd, found, kind)
                case = f"{kind.name}, SNR {snr:g}"
                yield Row(case, "f1", figures["f1"], "", "higher")
                yield Row(case, "false_positives", figures["false_positives"], "", "lower")
                yield Row(case, "best_f1", figures["best_f1"], "", "higher")
                yield Row(case, "average_precision", figures["average_precision"], "", "higher")
            volume = scipy.ndimage.gaussian_filter(crowd.tomogram, 1.5)
            shape = (volume.shape[0], volume.shape[1], volume.shape[2])
            dog = difference_of_gaussians(volume_reader(volume), shape, size, 180.0, contrast="dark")
            salient = saliency(crowd.tomogram, size, 180.0, contrast="dark", workers=CORES)
            for name, places in (("DoG", dog.positions), ("saliency", salient.positions)):
                figures_ = evaluate(places.astype(np.float64) * size, everything, 90.0)
                yield Row(f"{name}, all kinds, SNR {snr:g}", "f1", figures_.f1, "", "higher")


def measure(quick: bool) -> Iterator[Row]:
    for subject in (against_ffts, against_pytme, large_tomogram, gpu, full_against_coarse, every_class):
        yield from subject(quick)


if __name__ == "__main__":
    main("template_matching", measure)
