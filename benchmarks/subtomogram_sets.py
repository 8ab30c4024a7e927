"""Sets of simulated subtomograms whose truth is known, made by the simulation service's methods, and how an average
and its poses are judged.

A correlation is that of an average with the noise-free structure, brought into one frame, within one band, over the
whole box, after the mean over each sphere about the centre is taken away from both: a ball scores 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks.crowded import DATA
from cryofleet.formats.tilt_series import TiltSeries
from cryofleet.numerics.fourier import low_pass
from cryofleet.numerics.interpolation import transform_volume
from cryofleet.numerics.rotations import angular_distance_degrees, frame_between, point_group
from cryofleet.numerics.transfer import tilt_series_transfer, wedge_transfer
from services.alignment.align import Poses, Search, align
from services.alignment.symmetry_axes import find_axes
from services.alignment.symmetry_detection import remove_radial_mean
from services.simulation.density import Density, build
from services.simulation.detector import sinc_mtf
from services.simulation.imaging import ImagingParameters, draw_tilt_series
from services.simulation.poses import Poses as Drawn
from services.simulation.poses import draw_poses
from services.simulation.subtomograms import Setup, calibrate, specimen, subtomograms
from services.simulation.tilt_scheme import tilt_scheme

DEFOCUS_UM = 6.0
AXES_VOXEL_ANGSTROM = 5.0
STRUCTURES = {
    "groel": ("structures/1oel.pdb.gz", "D7"),
    "groel-groes": ("structures/1gru_assembly_derived.pdb.gz", "C7"),
    "ribosome-70s": ("structures/7p6z.cif.gz", "C1"),
    "rubisco": ("structures/1bxn.pdb.gz", "D4"),
}


@dataclass(frozen=True, eq=False)
class Set:
    """Boxes (n, side, side, side), protein positive, and their truth.

    `classes` (n,) index `truths` [class][z, y, x], the noise-free structures, and `symmetries`, whose axes lie along
    the frames' axes; `transfer` is what imaging left, on the half grid.
    """

    boxes: NDArray[np.float32]
    classes: NDArray[np.int32]
    poses: Poses
    truths: tuple[NDArray[np.float32], ...]
    symmetries: tuple[str, ...]
    transfer: NDArray[np.float32]
    voxel_size_angstrom: float

    def read(self, first: int, count: int) -> NDArray[np.float32]:
        return self.boxes[first : first + count]

    def __len__(self) -> int:
        return len(self.boxes)


@cache
def structure(name: str, voxel_size_angstrom: float) -> tuple[Density, Rotation]:
    """A structure's density, and the rotation that lays its symmetry axes along the frame's: x' = Q x."""
    file, group = STRUCTURES[name]
    data, called = (DATA / file).read_bytes(), file.rsplit("/", 1)[-1]
    density = build(name, data, called, voxel_size_angstrom, 2 * voxel_size_angstrom)
    # Axes are found where the structure shows its subunits, whatever voxels it is imaged with.
    return density, _upright(build(name, data, called, AXES_VOXEL_ANGSTROM, 2 * AXES_VOXEL_ANGSTROM), group)


def _upright(density: Density, group: str) -> Rotation:
    """The turn that makes a structure symmetric under the frame's point group, by trial against its own density."""
    if group == "C1":
        return Rotation.identity()
    side = 2 * (max(density.rotated(Rotation.identity(), np.zeros(3)).shape) // 2) + 8
    volume = specimen(density, Rotation.identity(), np.zeros(3), side)
    members = point_group(group)
    found = find_axes(volume, 0.3 * side, members)

    def unlike(turn: NDArray[np.float64]) -> float:
        frame = found * Rotation.from_rotvec(np.radians(turn))
        turned = [transform_volume(volume, frame * members[k] * frame.inv()) for k in (1, len(members) - 1)]
        return -float(sum(np.corrcoef(v.ravel(), volume.ravel())[0, 1] for v in turned))

    start = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    best = scipy.optimize.minimize(
        unlike, np.zeros(3), method="Nelder-Mead", options={"initial_simplex": start, "xatol": 0.02, "maxfev": 80}
    )
    return (found * Rotation.from_rotvec(np.radians(best.x))).inv()


def make(
    names: tuple[str, ...],
    counts: tuple[int, ...],
    box: int,
    voxel_size_angstrom: float,
    snr: float | None,
    seed: int,
    *,
    tilt_degrees: float = 60.0,
    max_shift_voxels: float = 3.0,
    ctf: bool = False,
    axis: tuple[float, float, float] | None = None,
) -> Set:
    """Particles of some structures at random poses, imaged every 3 degrees with the detector's MTF.

    With `axis`, the structure's z axis lies along it and only turns about it are drawn. With `ctf`, a defocus of 6 µm
    at 300 kV is left uncorrected.
    """
    drawing, measuring, noise = np.random.SeedSequence(seed).spawn(3)
    rng = np.random.default_rng(drawing)
    built = [structure(name, voxel_size_angstrom) for name in names]
    parameters = ImagingParameters(
        pixel_size_angstrom=voxel_size_angstrom,
        defocus_um=DEFOCUS_UM,
        contrast_transfer=ctf,
        radiation_damage=False,
    )
    series = draw_tilt_series(tilt_scheme(-tilt_degrees, tilt_degrees, 3.0), parameters, rng)
    setup = Setup([density for density, _ in built], box, series, parameters, sinc_mtf)
    drawn = draw_poses(counts, rng, max_shift_voxels, axis)
    # Drawn are turns of the upright structures; what is imaged are the files' own frames.
    upright = Rotation.concatenate([built[k][1] for k in drawn.classes])
    imaged = Drawn(drawn.classes, drawn.rotations * upright, drawn.shifts_voxels)
    level = None if snr is None else calibrate(setup, imaged, snr, measuring)
    boxes = np.concatenate(list(subtomograms(setup, imaged, level, noise.spawn(len(drawn.classes)))))
    truths = tuple(specimen(density, turn, np.zeros(3), box) for density, turn in built)
    return Set(
        -boxes,
        drawn.classes,
        Poses(drawn.rotations, drawn.shifts_voxels, np.ones(len(boxes))),
        truths,
        tuple(STRUCTURES[name][1] for name in names),
        _transfer(series, box, voxel_size_angstrom, tilt_degrees, ctf),
        voxel_size_angstrom,
    )


def _transfer(
    series: TiltSeries, box: int, voxel_size_angstrom: float, tilt_degrees: float, ctf: bool
) -> NDArray[np.float32]:
    if not ctf:
        return wedge_transfer(box, -tilt_degrees, tilt_degrees)
    return tilt_series_transfer(series, box, voxel_size_angstrom, use_dose=False)


def correlation(
    average: NDArray[np.float32], truth: NDArray[np.float32], voxel_size_angstrom: float, band_angstrom: float = 35.0
) -> float:
    """Correlation at a resolution, without the radial means, both volumes in one frame."""
    a, b = (remove_radial_mean(low_pass(v, band_angstrom, voxel_size_angstrom)) for v in (average, truth))
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def brought_to(
    average: NDArray[np.float32], truth: NDArray[np.float32], voxel_size_angstrom: float, band_angstrom: float = 35.0
) -> tuple[NDArray[np.float32], Rotation]:
    """An average brought into the truth's frame by the best alignment of the two, and the rotation Q that does it: a
    pose R of the average is one R Q^-1 of the truth."""
    n = average.shape[0]
    search = Search(n, voxel_size_angstrom, None, band_angstrom, max_candidates=200, max_shift_voxels=n / 8)
    pose = align(lambda i, count: truth[None], 1, average, search)
    return transform_volume(average, pose.rotations[0], pose.shifts[0]), pose.rotations[0]


def share_of_poses(truth: Rotation, found: Rotation, symmetry: str, degrees: float = 15.0) -> float:
    """Share of the rotations within so many degrees of the truth, modulo symmetry and one turn of the frame."""
    frame = frame_between(truth, found, symmetry)
    return float((angular_distance_degrees(truth, found * frame, symmetry) <= degrees).mean())
