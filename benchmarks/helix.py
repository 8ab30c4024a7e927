"""How much of its helix an average of tobacco mosaic virus has, and what its symmetry then gives.

Zeng and others (FAML, Bioinformatics 2021, section 3.2.3) average 2742 subtomograms of the virus, 64^3 at 5.4 Å, tilted
by +-60 degrees, of a measured SNR of 0.0023, without symmetry, and count the mean pairwise correlation with turns by
360/17 degrees: 0.47 with FAML, 0.25 with plain averaging (FA). Mask and mean are unstated.

The setting here: a right-handed helix of 49 subunits in three turns of 22.99 Å, each a row of Gaussians from 25 to 85 Å
from the axis, in boxes of 64^3 at 5.4 Å, cut from filaments longer than the box that lie in the ice to within 15
degrees, in random directions, turns and offsets. Subunits are 31 Å apart around the rim and 23 Å along, the helices of
16 and 17 starts that they make are seen from about 21 Å on and the turns at 23 Å: at these voxels, whose Nyquist limit
is 10.8 Å, rise and twist are within reach of an average that gets to 20 Å, and a rotation alone is no symmetry of it.
So two figures stand beside the paper's: the same without the mean of each radius, and the correlation under the
helical operator, which only the helix itself can have. All are within 100 Å of the axis, in the central 0.6 of the
box, the rotations at 20 Å, the helix at 16 Å, and are given for the truth too. A smooth tube, or a stack of rings,
scores higher in the paper's figure than the virus itself. SNR is the ratio of variances of the box under its wedge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks.harness import Row, main
from cryofleet.numerics.fourier import low_pass
from cryofleet.numerics.fsc import fsc, resolution
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.masks import soft_sphere
from cryofleet.numerics.transfer import wedge_transfer
from services.alignment import faml
from services.alignment.align import Search
from services.alignment.average import average
from services.alignment.faml import Particles, random_halves
from services.alignment.helical import (
    Candidate,
    Cylinder,
    HelicalSymmetry,
    find,
    find_axis,
    helical_correlation,
    refine,
    refine_axis,
    rotational_correlation,
    symmetrise,
    upright,
)
from services.alignment.likelihood_model import Task

BOX, VOXEL = 64, 5.4
WEDGE = (-60.0, 60.0)
PITCH, TURNS, SUBUNITS = 22.99, 3, 49
TRUTH = HelicalSymmetry(PITCH * TURNS / SUBUNITS, 360.0 * TURNS / SUBUNITS)
SUBUNIT = np.array([(25, 0, -3, 0.7), (40, -5, 0, 0.8), (55, 2, 1, 0.9), (70, 4, 0, 1.0), (82, 0, 2, 1.0)])
"""Gaussians of a deviation of 6.5 Å: radius (Å), azimuth (degrees), height (Å), weight."""
DEVIATION = 6.5
COMPARED_ANGSTROM = 20.0
"""Rotations are compared up to here: noise of more detail would be most of what differs."""
FILAMENT = Cylinder(outer_radius_angstrom=100.0)
DIAMETER = 0.8 * BOX * VOXEL
"""Of the sphere that FAML averages: a filament has no end in the box."""
FIRST_RISES, FIRST_TWISTS = (1.2, 3.0), (15.0, 50.0)
"""Where the helix is looked for in an average: around the turns that are seen."""

Volume = NDArray[np.float32]


@dataclass(frozen=True)
class Segments:
    """Boxes (n, 64, 64, 64), protein positive, and their true poses."""

    boxes: Volume
    rotations: Rotation
    shifts: NDArray[np.float64]

    def read(self, first: int, count: int) -> Volume:
        return self.boxes[first : first + count]

    def __len__(self) -> int:
        return len(self.boxes)


Average = Callable[[Segments, int], Volume]
"""Averages segments without their poses; the number is of iterations."""


def segment(rotation: Rotation, shift_voxels: NDArray[np.float64]) -> Volume:
    """The box of a filament at a pose."""
    reach = 0.9 * BOX * VOXEL
    steps = np.arange(-int(reach / TRUTH.rise_angstrom), int(reach / TRUTH.rise_angstrom) + 1)
    radius, azimuth, height, weight = SUBUNIT.T[:, :, None]
    angle = np.radians(azimuth + steps * TRUTH.twist_degrees)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle), height + steps * TRUTH.rise_angstrom], axis=-1)
    placed = rotation.apply(points.reshape(-1, 3)) / VOXEL + shift_voxels
    weights = np.broadcast_to(weight, angle.shape).ravel()
    near = np.abs(placed).max(axis=1) < BOX / 2 + 4
    r = np.arange(BOX) - BOX // 2
    x, y, z = (
        np.exp(-0.5 * ((r - placed[near, axis, None]) * (VOXEL / DEVIATION)) ** 2).astype(np.float32)
        for axis in range(3)
    )
    z *= weights[near, None].astype(np.float32)
    plane = (y[:, :, None] * x[:, None, :]).reshape(len(y), -1)
    return np.asarray((z.T @ plane).reshape(BOX, BOX, BOX), dtype=np.float32)


def segments(count: int, snr: float, seed: int) -> Segments:
    """Segments of filaments in the ice, of an SNR in the whole box."""
    rng = np.random.default_rng(seed)
    lean = np.arcsin(rng.uniform(-np.sin(np.radians(15)), np.sin(np.radians(15)), count))
    # z is taken into the ice, its lean against it last but one, its direction in it last.
    angles = np.stack([rng.uniform(0, 360, count), 90 - np.degrees(lean), rng.uniform(0, 360, count)], axis=1)
    rotations = Rotation.from_euler("zyz", angles, degrees=True)
    shifts = rng.uniform(-2, 2, (count, 3))
    transfer = wedge_transfer(BOX, *WEDGE)

    def seen(volume: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.asarray(scipy.fft.irfftn(scipy.fft.rfftn(volume) * transfer, volume.shape), dtype=np.float64)

    boxes = np.empty((count, BOX, BOX, BOX), np.float32)
    for i in range(count):
        signal = seen(segment(rotations[i], shifts[i]))
        noise = seen(rng.normal(size=signal.shape))
        boxes[i] = signal + noise * (signal.std() / noise.std() / np.sqrt(snr))
    return Segments(boxes, rotations, shifts)


def fast_alignment(data: Segments, iterations: int) -> Volume:
    """FA: each segment at its best pose, no reference, no symmetry."""
    search = Search(BOX, VOXEL, wedge_transfer(BOX, *WEDGE), low_pass_angstrom=3 * VOXEL, max_candidates=10)
    return average(data.read, len(data), search, iterations=iterations).average


def likelihood(data: Segments, iterations: int) -> Volume:
    """FAML of one class."""
    search = Search(BOX, VOXEL, wedge_transfer(BOX, *WEDGE), low_pass_angstrom=3 * VOXEL)
    particles = Particles(data.read, np.arange(len(data)), random_halves(len(data), 0))
    volume: Volume = faml.faml(Task(search, DIAMETER), particles, iterations=iterations).volumes[0]
    return volume


METHODS: dict[str, Average] = {"FA": fast_alignment, "FAML": likelihood}


def at_true_poses(data: Segments) -> Volume:
    """What no alignment can improve on: the mean of the segments turned back to where they came from."""
    total = np.zeros((BOX,) * 3)
    for box, rotation, shift in zip(data.boxes, data.rotations, data.shifts, strict=True):
        back = rotation.inv()
        total += transform_volume(box, back, -back.apply(shift))
    return np.asarray(total / len(data) * soft_sphere(BOX, BOX / 2 - 4, 4), dtype=np.float32)


def _symmetry_rows(case: str, volume: Volume) -> Iterator[Row]:
    """How much of a rotation's and of the helix's symmetry an upright volume has."""
    compared = low_pass(volume, COMPARED_ANGSTROM, VOXEL)
    plain = rotational_correlation(compared, 17, VOXEL, FILAMENT, "volume")
    yield Row(case, "17-fold, mean removed", plain, "", "higher")
    radial = rotational_correlation(compared, 17, VOXEL, FILAMENT, "radius")
    yield Row(case, "17-fold, radial mean removed", radial, "", "higher")
    yield Row(case, "under the true helix", helical_correlation(volume, TRUTH, VOXEL, FILAMENT), "", "higher")


def _helix_rows(case: str, found: Candidate, target: float | None) -> Iterator[Row]:
    rise = 100 * abs(found.symmetry.rise_angstrom / TRUTH.rise_angstrom - 1)
    twist = 100 * abs(found.symmetry.twist_degrees / TRUTH.twist_degrees - 1)
    pitch = 100 * abs(found.symmetry.pitch_angstrom / PITCH - 1)
    yield Row(case, "rise error", rise, "%", "lower", target)
    yield Row(case, "twist error", twist, "%", "lower", target)
    yield Row(case, "pitch error", pitch, "%", "lower")
    yield Row(case, "helical score", found.score, "", "higher")


def _at_true_poses(case: str, data: Segments, target: float | None) -> Iterator[Row]:
    """The helix found in, and imposed on, an average that is as good as its particles."""
    volume = at_true_poses(data)
    yield from _symmetry_rows(case, volume)
    begun = time.perf_counter()
    candidates = find(volume, FIRST_RISES, FIRST_TWISTS, VOXEL, FILAMENT)
    found = refine(volume, candidates[0].symmetry, VOXEL, FILAMENT)
    yield Row(case, "seconds to find the helix", time.perf_counter() - begun, "s", "lower")
    yield from _helix_rows(case, found, target)
    begun = time.perf_counter()
    result = symmetrise(volume, found.symmetry, VOXEL, FILAMENT)
    yield Row(case, "seconds to impose it", time.perf_counter() - begun, "s", "lower")
    truth = segment(Rotation.identity(), np.zeros(3))
    mask = soft_sphere(BOX, 24, 4)
    for name, compared in (("as averaged", volume), ("symmetrised", result.volume)):
        frequency, curve = fsc(compared, truth, mask)
        reached = resolution(frequency, curve, VOXEL, 0.5)
        yield Row(case, f"resolution {name}", reached, "Å", "lower")


def averaged(case: str, data: Segments, method: Average, iterations: int) -> Iterator[Row]:
    """An average without reference or symmetry, and the helix in it once it is put upright."""
    begun = time.perf_counter()
    volume = method(data, iterations)
    yield Row(case, "seconds", time.perf_counter() - begun, "s", "lower")
    axis = find_axis(volume)
    first = find(upright(volume, axis), FIRST_RISES, FIRST_TWISTS, VOXEL, FILAMENT, count=1)[0]
    axis, found = refine_axis(volume, axis, first.symmetry, VOXEL, FILAMENT)
    yield from _symmetry_rows(case, upright(volume, axis))
    yield from _helix_rows(case, found, None)


def measure(quick: bool) -> Iterator[Row]:
    """All cases; a quick run has fewer segments and iterations."""
    torch.set_num_threads(1)
    yield from _symmetry_rows("truth", segment(Rotation.identity(), np.zeros(3)))
    for snr, count in ((0.01, 16 if quick else 300), (0.0023, 32 if quick else 800)):
        data = segments(count, snr, seed=1)
        yield from _at_true_poses(f"{count} at SNR {snr:g}, true poses", data, 1.0)
    count, iterations = (8, 1) if quick else (160, 6)
    data = segments(count, 0.01, seed=2)
    for name, method in METHODS.items():
        yield from averaged(f"{count} at SNR 0.01, {name}, {iterations} iterations", data, method, iterations)


if __name__ == "__main__":
    main("helix", measure)
