"""Fields like those of the SHREC 2021 track: thirteen kinds of complex, vesicles and gold beads, 10 Å voxels.

The kinds are the track's but for p97, whose deposited structure is not at hand: apoferritin stands in its place. Where
the folder of real data does not lie beside the repository, phantoms stand for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.crowded import DATA, real_data
from benchmarks.simulation import CORES
from benchmarks.simulation import KINDS as PHANTOMS
from cryofleet.numerics import image_quality
from cryofleet.storage import Store
from cryofleet.testing import run_operation
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import open_volume
from services.simulation.service import service as simulation

VOXEL_SIZE_ANGSTROM = 10.0
SNR = 0.1
KINDS = {
    "1s3x": "structures/1s3x",
    "3qm1": "structures/3qm1",
    "3gl1": "structures/3gl1",
    "3h84": "structures/3h84",
    "2cg9": "structures/2cg9",
    "3d2f": "structures/3d2f",
    "1u6g": "structures/1u6g",
    "1bxn": "structures/1bxn",
    "1qvr": "structures/1qvr",
    "4cr2": "maps/4cr2_10A",
    "5mrc": "maps/5mrc_10A",
    "1oel": "structures/1oel",
    "4v1w": "structures/4v1w",
}
#: Copies of each kind in a field of 512 x 512 x 180.
COPIES = 110
#: Vesicles in such a field, and gold beads.
VESICLES, GOLD_BEADS = 18, 9

Array = NDArray[np.float32]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A specimen: its density, its labels, and its particles."""

    density_uri: str
    labels_uri: str
    truth_uri: str
    gold_labels: tuple[int, ...]


@dataclass(frozen=True)
class Tomogram:
    """A tomogram, protein dark, and those of its even and odd tilts."""

    uri: str
    even_uri: str
    odd_uri: str


def scene(store: Store, shape: Shape, seed: int) -> Scene:
    """A specimen of `shape` (z, y, x) voxels."""
    z, y, x = shape
    share = z * y * x / (180 * 512 * 512)
    copies, vesicles, beads = (max(1, round(count * share)) for count in (COPIES, VESICLES, GOLD_BEADS))
    if real_data():
        structures = [
            pb.Structure(name=name, count=copies, source_uri=f"file://{min(DATA.glob(file + '*'))}")
            for name, file in KINDS.items()
        ]
    else:
        structures = [pb.Structure(name=name, count=copies) for name in PHANTOMS]
    made = run_operation(
        simulation,
        pb.SimulateSceneRequest(
            size_x=x, size_y=y, size_z=z, voxel_size_angstrom=VOXEL_SIZE_ANGSTROM, seed=seed, allow_partial=True,
            structures=structures,
            vesicles=[pb.Vesicles(count=vesicles, radius_min_angstrom=200, radius_max_angstrom=350)],
            gold_beads=[pb.GoldBeads(count=beads, diameter_angstrom=100)],
        ),
        store,
        threads=CORES,
    )  # fmt: skip
    return Scene(made.density_uri, made.labels_uri, made.truth_uri, tuple(made.gold_labels))


def tomogram(store: Store, specimen: Scene, shape: Shape, seed: int, snr: float = SNR) -> Tomogram:
    """The specimen imaged at ±60° by 3° and reconstructed, contrast transfer and all."""
    series = run_operation(
        simulation,
        pb.SimulateTiltSeriesRequest(
            density_uri=specimen.density_uri,
            labels_uri=specimen.labels_uri,
            labels_left_out=specimen.gold_labels,
            snr=snr,
            seed=seed,
            halves=True,
        ),
        store,
        threads=CORES,
    )
    made = run_operation(
        simulation,
        pb.ReconstructRequest(
            tilt_series_uri=series.tilt_series_uri,
            tilts_uri=series.tilts_uri,
            size_z=shape[0],
            even_uri=series.even_uri,
            odd_uri=series.odd_uri,
        ),
        store,
        threads=CORES,
    )
    return Tomogram(made.tomogram_uri, made.even_uri, made.odd_uri)


def protein_positive(store: Store, uri: str) -> Array:
    """A volume `[z, y, x]` with mean 0 and deviation 1, protein positive."""
    volume = open_volume(store, uri)
    return standardised(volume.read(), -1 if volume.info.contrast == "dark" else 1)


def standardised(volume: Array, sign: int = 1) -> Array:
    """With mean 0 and deviation 1, times the sign."""
    deviation = volume.std(dtype=np.float64)
    return np.asarray(sign * (volume - volume.mean(dtype=np.float64)) / deviation, np.float32)


def quality(truth: Array, found: Array) -> tuple[float, float]:
    """PSNR in dB, with the truth's range as its peak, and SSIM with a data range of 1; both standardised before."""
    truth, found = standardised(truth), standardised(found)
    pair = (lambda i, j: truth[i:j]), (lambda i, j: found[i:j])
    return (
        image_quality.psnr(*pair, truth.shape, float(np.ptp(truth))),
        image_quality.ssim(*pair, truth.shape),
    )
