"""A crowded tomogram of ten kinds of complex, made by the simulation service at several SNRs, and templates of them.

Structures are the deposited ones where the folder of real data lies beside the repository, phantoms elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryofleet.formats.tilt_series import TiltSeries, read_tilt_series
from cryofleet.particles import Particles
from cryofleet.storage import Store
from cryofleet.testing import run_operation
from cryofleet.v1 import simulation_pb2 as pb
from cryofleet.volumes import open_volume
from services.simulation.service import service

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VOXEL_SIZE_ANGSTROM = 10.0
COPIES = 40


@dataclass(frozen=True)
class Kind:
    """A kind of complex: its file of real data or the phantom in its place, its symmetry and its diameter."""

    name: str
    file: str
    phantom: str
    symmetry: str
    phantom_symmetry: str
    diameter_angstrom: float


KINDS = (
    Kind("ribosome-70s", "structures/7p6z.cif.gz", "two-subunit-globule", "C1", "C1", 260),
    Kind("groel", "structures/1oel.pdb.gz", "double-ring", "D7", "D7", 170),
    # D7, D4 and C2, but about axes of their own, and not the frame's.
    Kind("proteasome-20s", "structures/3j9i.pdb.gz", "barrel", "C1", "D7", 160),
    Kind("apoferritin", "structures/4v1w.cif.gz", "octahedral-shell", "O", "O", 125),
    Kind("rubisco", "structures/1bxn.pdb.gz", "single-ring", "C1", "C7", 125),
    Kind("proteasome-26s", "maps/4cr2_10A.mrc.gz", "barrel-with-lids", "C1", "C2", 420),
    Kind("clpb", "structures/1qvr.pdb.gz", "hexameric-ring", "C1", "C6", 170),
    Kind("cand1-cul1-roc1", "structures/1u6g.pdb.gz", "tetrahedral-shell", "C1", "T", 170),
    Kind("hsp90-sba1", "structures/2cg9.pdb.gz", "", "C1", "C1", 120),
    Kind("sse1-hsp70", "structures/3d2f.pdb.gz", "", "C1", "C1", 120),
)


@dataclass(frozen=True, eq=False)
class Crowd:
    """A simulated tomogram `[z, y, x]`, protein dark, and what is in it."""

    tomogram: NDArray[np.float32]
    truth: Particles
    series: TiltSeries


def real_data() -> bool:
    """Whether the folder of real structures is there."""
    return DATA.is_dir()


def kinds() -> list[Kind]:
    """The kinds that can be made here."""
    return [kind for kind in KINDS if real_data() or kind.phantom]


def symmetry(kind: Kind) -> str:
    """Of what stands for the kind here."""
    return kind.symmetry if real_data() else kind.phantom_symmetry


def store_in(folder: Path) -> Store:
    """A store that may read the folder of real data."""
    return Store(f"file://{folder}", (f"file://{DATA}",))


def _structure(kind: Kind, count: int) -> pb.Structure:
    if real_data():
        return pb.Structure(name=kind.name, count=count, source_uri=f"file://{DATA / kind.file}")
    return pb.Structure(name=kind.phantom, count=count)


def template(store: Store, kind: Kind) -> NDArray[np.float32]:
    """The kind's density at the tomogram's voxel size and the simulation's resolution, protein positive."""
    real = real_data()
    result = run_operation(
        service,
        pb.SimulateDensityRequest(
            name=kind.name if real else kind.phantom,
            source_uri=f"file://{DATA / kind.file}" if real else "",
            voxel_size_angstrom=VOXEL_SIZE_ANGSTROM,
        ),
        store,
    )
    return open_volume(store, result.density_uri).read()


def crowd(store: Store, snr: float, size: tuple[int, int, int] = (100, 320, 320), seed: int = 0) -> Crowd:
    """A tomogram of (z, y, x) voxels of 10 Å, +-60 degrees by 3, at an SNR.

    The CTF is that of 3 µm underfocus, uncorrected, with dose and detector as usual.
    """
    share = np.prod(size) / (100 * 320 * 320)
    scene = run_operation(
        service,
        pb.SimulateSceneRequest(
            size_x=size[2],
            size_y=size[1],
            size_z=size[0],
            voxel_size_angstrom=VOXEL_SIZE_ANGSTROM,
            structures=[_structure(kind, max(1, round(COPIES * share))) for kind in kinds()],
            seed=seed,
        ),
        store,
        threads=2,
    )
    images = run_operation(
        service, pb.SimulateTiltSeriesRequest(density_uri=scene.density_uri, snr=snr, seed=seed), store, threads=2
    )
    made = run_operation(
        service,
        pb.ReconstructRequest(tilt_series_uri=images.tilt_series_uri, tilts_uri=images.tilts_uri, size_z=size[0]),
        store,
        threads=2,
    )
    return Crowd(
        open_volume(store, made.tomogram_uri).read(),
        Particles.from_parquet(store.get(scene.truth_uri), scene.truth_uri),
        read_tilt_series(store.get(images.tilts_uri), images.tilts_uri),
    )
