"""GroEL as a measure of density maps: its own symmetry, and its fit to an experimental map."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from typing import Literal

import gemmi
import numpy as np
import scipy.ndimage
import scipy.optimize
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryofleet.numerics import fourier
from cryofleet.numerics.interpolation import transform_volume
from services.simulation import density
from services.simulation.potential import Scatterers
from services.simulation.structures import Map, load

FIT_VOXEL_SIZE, FIT_RESOLUTION = 5.4, 11.5


def correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Pearson's correlation over all voxels."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def scatterers_of(data: bytes) -> Scatterers:
    """The 14-mer of the bytes of 1oel.pdb.gz."""
    loaded = load(data, "1oel.pdb.gz")
    assert isinstance(loaded, Scatterers)
    return loaded


def symmetry_operations(data: bytes) -> Rotation:
    """The 14 operations of its point group about its own axes: the sevenfold from its chains, the twofold from the
    file's second operator."""
    structure = gemmi.read_pdb_string(gzip.decompress(data))
    chains = [
        [atom.pos.tolist() for residue in chain for atom in residue if atom.name == "CA"] for chain in structure[0]
    ]
    ring = np.array([chain for chain in chains if chain])
    ring -= ring.mean(axis=(0, 1))
    # the rotation that takes every chain onto the next
    next_chain, _ = Rotation.align_vectors(np.roll(ring, -1, axis=0).reshape(-1, 3), ring.reshape(-1, 3))
    axis = next_chain.as_rotvec() / next_chain.magnitude()
    sevenfold = Rotation.from_rotvec(np.outer(np.arange(7) * 2 * np.pi / 7, axis))
    twofold = Rotation.from_matrix(structure.assemblies[0].generators[0].operators[1].transform.mat.tolist())
    return Rotation.concatenate([sevenfold, twofold * sevenfold])


def symmetry_correlations(data: bytes) -> list[float]:
    """Of its density at 15 Å with itself under each operation."""
    volume = density.density_map(scatterers_of(data), 5.0, 15.0).values
    return [correlation(transform_volume(volume, turn), volume) for turn in symmetry_operations(data)]


@dataclass(frozen=True)
class Fit:
    """The best fit of a density to a map: azimuth (degrees), shift z, y, x (voxels), and magnification."""

    pose: NDArray[np.float64]
    target: NDArray[np.float32]
    upright: Scatterers

    def fitted(
        self, model: NDArray[np.float32], order: Literal[1, 3] = 3, pose: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """A density, its axis along z, at the pose."""
        pose = self.pose if pose is None else pose
        azimuth, shift, scale = pose[0], pose[3:0:-1], pose[4]
        turn = Rotation.from_euler("z", azimuth, degrees=True).as_matrix()[::-1, ::-1].T * scale
        offset = np.full(3, len(model) // 2) - turn @ (25 + shift)
        moved = scipy.ndimage.affine_transform(
            model, turn, offset, self.target.shape, order=order, mode="grid-constant"
        )
        return np.asarray(moved, np.float32)

    def model(self, added_b_factor: float = 0.0) -> NDArray[np.float32]:
        """The density at the map's resolution, its axis along z."""
        widened = replace(self.upright, sigmas=np.sqrt(self.upright.sigmas**2 + added_b_factor / (8 * np.pi**2)))
        return density.density_map(widened, FIT_VOXEL_SIZE, FIT_RESOLUTION).values

    def at_resolution(self, model: NDArray[np.float32]) -> NDArray[np.float32]:
        """A fitted density, low-passed as the map is."""
        return fourier.low_pass(self.fitted(model), FIT_RESOLUTION, FIT_VOXEL_SIZE)


def fit(structure: bytes, experimental_map: bytes) -> Fit:
    """Over the azimuth, the shift and the magnification: the map's voxel size is its microscope's, and crystals and ice
    differ by a percent or two. Correlation over the whole box of 270 Å, at 5.4 Å voxels, up to 11.5 Å."""
    loaded = load(experimental_map, "groel_11.5A_emdb.mrc.gz")
    assert isinstance(loaded, Map)
    target = fourier.low_pass(fourier.fourier_crop(loaded.values, 2), FIT_RESOLUTION, FIT_VOXEL_SIZE)
    scatterers = scatterers_of(structure)
    # the sevenfold axis is the longest of inertia
    axis = np.linalg.eigh(scatterers.positions.T @ scatterers.positions)[1][:, -1]
    upright = Rotation.align_vectors([[0, 0, 1]], [axis])[0].apply(scatterers.positions)
    found = Fit(np.zeros(5), target, replace(scatterers, positions=upright))
    model = found.model()

    def misfit(pose: NDArray[np.float64]) -> float:
        return -correlation(found.fitted(model, 1, pose), target)

    starts = [np.array([azimuth, 0, 0, 0, scale]) for azimuth in range(0, 52, 5) for scale in (0.98, 1.02)]
    start = min(starts, key=misfit)
    simplex = start + np.concatenate([np.zeros((1, 5)), np.diag([2, 0.5, 0.5, 0.5, 0.02])])
    best = scipy.optimize.minimize(
        misfit, start, method="Nelder-Mead", options={"initial_simplex": simplex, "maxfev": 110}
    )
    return replace(found, pose=np.asarray(best.x))
