"""Sets of simulated subtomograms of ten classes: eight complexes, a piece of membrane, and empty ice.

Complexes are the deposited structures where the folder of real data lies beside the repository, phantoms elsewhere.
Every class is imaged at the same SNR, so that classes differ by their structure and not by how much of the noise they
leave; ice is noise alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from benchmarks.crowded import DATA, KINDS
from cryofleet.numerics.fourier import soft_step
from services.learning.preparation import Preparation
from services.simulation.density import Density, build
from services.simulation.detector import sinc_mtf
from services.simulation.imaging import ImagingParameters, draw_tilt_series
from services.simulation.membranes import bilayer_profile
from services.simulation.poses import Poses, draw_poses
from services.simulation.subtomograms import Calibration, Setup, subtomograms
from services.simulation.tilt_scheme import tilt_scheme

BOX = 32
VOXEL_SIZE_ANGSTROM = 10.0
RESOLUTION_ANGSTROM = 2 * VOXEL_SIZE_ANGSTROM
COMPLEXES = (
    "ribosome-70s",
    "groel",
    "proteasome-20s",
    "apoferritin",
    "rubisco",
    "clpb",
    "cand1-cul1-roc1",
    "hsp90-sba1",
)
#: Phantoms for structures of the data folder that have none of their own there.
PHANTOMS = {"hsp90-sba1": "icosahedral-shell"}
MEMBRANE, ICE = "membrane", "ice"
NAMES = (*COMPLEXES, MEMBRANE, ICE)
#: Of the membrane: the vesicle it is part of, and the ball that is cut out of it.
VESICLE_RADIUS_ANGSTROM, PIECE_RADIUS_ANGSTROM = 500.0, 130.0
DEFOCUS_UM = 6.0
SHIFT_VOXELS = 2.0


@dataclass(frozen=True)
class Imaging:
    """How a set is imaged: tilts of plus and minus so many degrees every 3, with the CTF of 6 µm or without."""

    tilt_degrees: float = 60.0
    ctf: bool = False


@dataclass(frozen=True, eq=False)
class Imaged:
    """Boxes (n, side, side, side) of particles without noise, protein positive, boxes of noise alone, and classes
    (n,)."""

    signal: NDArray[np.float32]
    noise: NDArray[np.float32]
    classes: NDArray[np.int64]

    def at(self, snr: float, binning: int = 1) -> NDArray[np.float32]:
        """Prepared boxes of an SNR, that of each class: the variance of its noise-free boxes over the noise's."""
        scale = np.ones(len(self.classes), np.float32)
        variance = float(self.noise.var(dtype=np.float64))
        for number in range(len(NAMES) - 1):
            rows = self.classes == number
            if rows.any():
                own = float(self.signal[rows].var(axis=(1, 2, 3), dtype=np.float64).mean())
                scale[rows] = np.sqrt(own / (snr * variance))
        boxes = self.signal + scale[:, None, None, None] * self.noise
        return Preparation(self.signal.shape[1], binning, False, "light")(boxes, np.arange(len(boxes)))


@cache
def density(name: str) -> Density:
    if name == MEMBRANE:
        return membrane()
    kind = next(kind for kind in KINDS if kind.name == name)
    file = DATA / kind.file
    if file.exists():
        return build(name, file.read_bytes(), file.name, VOXEL_SIZE_ANGSTROM, RESOLUTION_ANGSTROM)
    return build(kind.phantom or PHANTOMS[name], None, "", VOXEL_SIZE_ANGSTROM, RESOLUTION_ANGSTROM).named(name)


def membrane() -> Density:
    """A ball of a vesicle's bilayer, its normal along z."""
    oversampling = 2
    spacing = VOXEL_SIZE_ANGSTROM / oversampling
    half = int(np.ceil((PIECE_RADIUS_ANGSTROM + 2 * RESOLUTION_ANGSTROM) / spacing))
    z, y, x = (spacing * grid for grid in np.ogrid[-half : half + 1, -half : half + 1, -half : half + 1])
    distance = np.sqrt(x**2 + y**2 + (z + VESICLE_RADIUS_ANGSTROM) ** 2) - VESICLE_RADIUS_ANGSTROM
    values = bilayer_profile(distance, RESOLUTION_ANGSTROM).astype(np.float32)
    radius = np.sqrt(x**2 + y**2 + z**2).astype(np.float32)
    values *= soft_step(radius, PIECE_RADIUS_ANGSTROM, RESOLUTION_ANGSTROM)
    shape = (np.abs(distance) < 25) & (radius < PIECE_RADIUS_ANGSTROM)
    return Density(
        MEMBRANE,
        scipy.ndimage.spline_filter(values, order=3, output=np.float32, mode="constant"),
        shape.astype(np.uint8),
        np.full(3, float(half)),
        oversampling,
        float(shape.sum()) / oversampling**3,
        None,
    )


def image(count: int, imaging: Imaging, seed: int, names: tuple[str, ...] = NAMES) -> Imaged:
    """`count` boxes of each class, of any orientation and shifted by up to 2 voxels, in a random order."""
    drawing, noise = np.random.SeedSequence(seed).spawn(2)
    rng = np.random.default_rng(drawing)
    parameters = ImagingParameters(
        pixel_size_angstrom=VOXEL_SIZE_ANGSTROM,
        defocus_um=DEFOCUS_UM,
        contrast_transfer=imaging.ctf,
        radiation_damage=False,
    )
    series = draw_tilt_series(tilt_scheme(-imaging.tilt_degrees, imaging.tilt_degrees, 3.0), parameters, rng)
    there = [name for name in names if name != ICE]
    setup = Setup([density(name) for name in there], BOX, series, parameters, sinc_mtf)
    drawn = draw_poses([count] * len(names), rng, SHIFT_VOXELS)
    numbers = np.array([NAMES.index(name) for name in names])
    present = np.array([there.index(name) if name in there else -1 for name in names], np.int32)
    poses = Poses(present[drawn.classes], drawn.rotations, drawn.shifts_voxels)
    total = len(drawn.classes)
    empty = Poses(np.full(total, -1, np.int32), Rotation.identity(total), np.zeros((total, 3)))
    signal = np.concatenate(list(subtomograms(setup, poses, None, [])))
    grains = np.concatenate(list(subtomograms(setup, empty, Calibration(1.0, (), 0.0), noise.spawn(total))))
    return Imaged(-signal, -grains, numbers[drawn.classes])
